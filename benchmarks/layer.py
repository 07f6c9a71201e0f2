"""One linear layer: a training step, and a forward pass without gradients, outside and inside of `DoraCaching()`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from cases import LayerCase
from report import Table
from settings import Settings
from timing import Seconds, comparison, measure
from variants import ADALORA

from peft.helpers import DoraCaching


SHAPES = [
    (768, 768, 512),
    (2048, 2048, 512),
    (4096, 4096, 256),
    (2048, 2048, 32),
    (2048, 2048, 1),
    (11008, 4096, 256),
    (4096, 11008, 256),
]
OTHER_RANKS = [8, 64, 384]
# Without instructions for bfloat16 a CPU takes 50 times as long as in float32, so there only the small shapes are run.
BFLOAT16_SHAPES_ON_CPU = [(768, 768, 512), (2048, 2048, 32), (2048, 2048, 1)]


def cases(settings: Settings) -> list[LayerCase]:
    shapes = settings.pick(SHAPES, [(768, 768, 512), (2048, 2048, 1)])
    ranks = settings.pick(OTHER_RANKS, [64])
    rank_shape = settings.pick((2048, 2048, 512), (768, 768, 512))
    cases = [LayerCase(*shape) for shape in shapes] + [LayerCase(*rank_shape, rank=rank) for rank in ranks]
    bfloat16_cases = [replace(case, dtype=torch.bfloat16) for case in cases]
    if not settings.on_cuda:
        bfloat16_cases = [
            LayerCase(*shape, dtype=torch.bfloat16) for shape in BFLOAT16_SHAPES_ON_CPU if shape in shapes
        ]
    return cases + bfloat16_cases


def row(case: LayerCase, seconds: Seconds) -> dict[str, Any]:
    return {**case.labels, **comparison(seconds, ADALORA)}


def tables(settings: Settings) -> Iterator[Table]:
    training_rows, forward_rows, caching_rows = [], [], []
    for case in cases(settings):
        models, x = case.build(settings.device), case.inputs(settings.device)
        steps = {variant: case.training_step(model, x) for variant, model in models.items()}
        training_rows.append(row(case, measure(steps, settings)))
        steps = {variant: case.forward_pass(model, x) for variant, model in models.items()}
        forward_rows.append(row(case, measure(steps, settings)))
        with DoraCaching():  # around all rounds, because AdaDoRA starts anew in the next one
            seconds = measure(steps, settings)
        caching_rows.append(row(case, seconds))
    note = "Times are relative to AdaLoRA's: median (quartiles) of the rounds."
    yield Table("layer-training", "One layer, training step", training_rows, note, plot="bars")
    title = "One layer, forward pass without gradients"
    yield Table("layer-forward", title, forward_rows, note, plot="bars")
    note += " AdaDoRA keeps m / n there, DoRA its norm and ΔW, AdaLoRA and the dense norm nothing."
    yield Table("layer-caching", f"{title}, inside of DoraCaching()", caching_rows, note, plot="bars")
