"""`torch.compile` of a small Llama: does it work, with how many graph breaks, with the same numbers, and how fast."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from cases import LlamaCase
from report import Table
from settings import Settings
from timing import measure, milliseconds, ratio
from torch._dynamo.utils import counters
from variants import ADADORA, ADALORA

from peft import PeftModel


FULL = LlamaCase("Llama, 2 layers of 512", 512, 1408, 8, 8, layers=2, tokens=256)
QUICK = LlamaCase("Llama, 1 layer of 256", 256, 704, 4, 4, layers=1, tokens=64)


def outcome(model: PeftModel, step: Callable[[], Any]) -> torch.Tensor:
    """What a step computes, as one vector: the gradients of a training step, the logits of a forward pass."""
    output = step()
    if output is not None:
        return output.flatten()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of what is expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def first_call(model: PeftModel, eager: Callable[[], Any], compiled: Callable[[], Any]) -> dict[str, Any]:
    """Compile a step by running it. What went wrong is told in the column `failure`, not raised."""
    counters.clear()
    expected = outcome(model, eager)
    start = time.perf_counter()
    try:
        found, failure = difference(outcome(model, compiled), expected), None
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises belongs into the table
        found, failure = None, " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return {
        "graph breaks": sum(counters["graph_break"].values()),
        "relative difference": found,
        "first call (s)": time.perf_counter() - start,
        "failure": failure,
    }


def rows(case: LlamaCase, step: str, make_step: Callable, settings: Settings) -> Iterator[dict[str, Any]]:
    models, inputs = case.build(settings.device, (ADALORA, ADADORA)), case.inputs(settings.device)
    steps, calls = {}, {}
    for variant, model in models.items():
        torch.compiler.reset()  # else the breaks of one variant are not counted again for the next
        steps[variant, "eager"] = make_step(model, inputs)
        compiled = make_step(torch.compile(model), inputs)
        calls[variant] = first_call(model, steps[variant, "eager"], compiled)
        if calls[variant]["failure"] is None:
            steps[variant, "compiled"] = compiled
    seconds = measure(steps, settings)
    for variant in models:
        eager, compiled = seconds[variant, "eager"], seconds.get((variant, "compiled"))
        reference = seconds.get((ADALORA, "compiled"))
        yield {
            **case.labels,
            "step": step,
            "variant": variant,
            "eager (ms)": milliseconds(eager),
            "eager / AdaLoRA": ratio(eager, seconds[ADALORA, "eager"]),
            "compiled / eager": compiled and ratio(compiled, eager),
            "compiled / AdaLoRA": compiled and reference and ratio(compiled, reference),
            **calls[variant],
        }


def tables(settings: Settings) -> Iterator[Table]:
    case = settings.pick(FULL, QUICK)
    if settings.on_cuda:
        case = replace(case, dtype=torch.bfloat16)
    yield Table(
        "compile",
        "torch.compile",
        [
            *rows(case, "training step", case.training_step, settings),
            *rows(case, "prefill", case.forward_pass, settings),
        ],
        "Ratios: median (quartiles) of the rounds. The difference is between compiled and eager, of the gradients of "
        "a training step and the logits of a prefill. The first call compiles, or finds on disk what was compiled "
        "before. PEFT's orthogonal regularization breaks the graph of each training step once.",
    )
