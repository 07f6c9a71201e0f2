"""The rank allocator: the time of its importance scores, PEFT's and ours, and their share of a training step."""

from collections.abc import Iterator
from typing import Any

import torch
from cases import training_step
from counters import launches
from internals import StockRankAllocator
from report import Table
from settings import Settings
from timing import comparison, measure, ratio
from torch import nn
from variants import ADALORA, ADAPTER, adapt

from peft.tuners.adalora import RankAllocator


LAYERS, WIDTH, TOKENS = 16, 512, 512
STOCK, OURS, STEP = "PEFT's", "ours", "step"


def mlp() -> nn.Sequential:
    """Linear layers named "0", "2", "4" … with activations in between."""
    torch.manual_seed(0)
    return nn.Sequential(*(module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


def allocator_row(settings: Settings) -> dict[str, Any]:
    model = adapt(mlp().to(settings.device), ADALORA, target_modules=[str(2 * index) for index in range(LAYERS)])
    x = torch.randn(TOKENS, WIDTH, device=settings.device)
    one_pass = training_step(model, x, lambda: model(x).square().mean())
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)

    def step() -> None:
        one_pass()
        optimizer.step()

    step()  # the scores need gradients
    tuner = model.base_model
    allocators = {
        name: kind(tuner.model, tuner.peft_config[ADAPTER], ADAPTER)
        for name, kind in ((STOCK, StockRankAllocator), (OURS, RankAllocator))
    }
    updates = {
        name: lambda allocator=allocator: allocator.update_ipt(tuner.model) for name, allocator in allocators.items()
    }
    seconds = measure({**updates, STEP: step}, settings)
    return {
        "model": f"{LAYERS} layers of {WIDTH}, {TOKENS} tokens",
        **comparison({name: seconds[name] for name in updates}, STOCK),
        **{f"{name} / rest of a step": ratio(seconds[name], seconds[STEP]) for name in updates},
        **{f"{name}, calls": launches(update, settings.device) for name, update in updates.items()},
    }


def tables(settings: Settings) -> Iterator[Table]:
    yield Table(
        "allocator",
        "Importance scores of the rank allocator",
        [allocator_row(settings)],
        "Times are relative to PEFT's `update_ipt`: median (quartiles) of the rounds. The rest of a step is "
        "forward and backward pass and AdamW. Calls: kernel launches on a GPU, operations called from Python on a "
        "CPU.",
    )
