"""Llama models and blocks: a training step, a forward pass over the prompt (prefill), and generation."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Optional

import torch
from cases import LlamaCase
from counters import byte_count, kept_storages
from report import Table
from settings import Settings
from timing import Seconds, comparison, measure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from variants import ADALORA

from peft import PeftModel
from peft.helpers import DoraCaching


SMALL_LLAMA = LlamaCase("Llama, 8 layers of 1024", 1024, 2816, 16, 16, layers=8, tokens=512)
LLAMA_3_8B_BLOCK = LlamaCase("Llama-3-8B block", 4096, 14336, 32, 8, layers=1, tokens=256, is_block=True)
QUICK_LLAMA = LlamaCase("Llama, 2 layers of 256", 256, 704, 4, 4, layers=2, tokens=128)
QUICK_BLOCK = LlamaCase("Llama-3-8B block, a quarter as wide", 1024, 3584, 8, 2, layers=1, tokens=64, is_block=True)


def cases(settings: Settings) -> list[LlamaCase]:
    model, block = settings.pick((SMALL_LLAMA, LLAMA_3_8B_BLOCK), (QUICK_LLAMA, QUICK_BLOCK))
    if not settings.on_cuda:
        return [model, block]
    blocks = [replace(block, tokens=tokens) for tokens in settings.pick((2048, 8192), (512,))]
    return [replace(case, dtype=torch.bfloat16) for case in (model, *blocks)]


def generation(model: PeftModel, prompt: torch.Tensor, tokens: int) -> Callable[[], torch.Tensor]:
    """Greedy generation of so many tokens after a prompt (1, length)."""
    model.eval()
    return lambda: model.generate(
        input_ids=prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )


def lower_bound(
    step: Callable[[], Any], model: nn.Module, weight_reads: int, kept_bytes: int, settings: Settings
) -> Optional[float]:
    """
    The milliseconds that a step needs at least on a device of given bandwidth and peak (its roofline).

    It reads the weights once for each pass over them, writes and reads what autograd keeps, and does its operations.

    Args:
        step: The step.
        model: Whose weights it reads.
        weight_reads: How many passes over the weights it makes.
        kept_bytes: What autograd keeps in it.
        settings: Of the run; without the two rates there is no bound.
    """
    if settings.gbps is None or settings.tflops is None:
        return None
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        step()
    moving = (weight_reads * weight_bytes + 2 * kept_bytes) / (settings.gbps * 1e9)
    return 1e3 * max(moving, counter.get_total_flops() / (settings.tflops * 1e12))


def row(case: LlamaCase, step: str, seconds: Seconds, bound: Optional[float]) -> dict[str, Any]:
    return {**case.labels, "step": step, **comparison(seconds, ADALORA), "roofline (ms)": bound}


def case_rows(case: LlamaCase, settings: Settings) -> Iterator[dict[str, Any]]:
    models, inputs = case.build(settings.device), case.inputs(settings.device)
    reference = models[ADALORA]
    share = settings.pick(12.0, 0.15)  # seconds

    steps = {variant: case.training_step(model, inputs) for variant, model in models.items()}
    seconds = measure(steps, settings, min_rounds=3, share=share)
    kept = byte_count(kept_storages(lambda: case.forward(reference, inputs), reference.parameters()))
    yield row(case, "training step", seconds, lower_bound(steps[ADALORA], reference, 2, kept, settings))

    steps = {variant: case.forward_pass(model, inputs) for variant, model in models.items()}
    bound = lower_bound(steps[ADALORA], reference, 1, 0, settings)
    for step, context in {"prefill": nullcontext(), "prefill, DoraCaching()": DoraCaching()}.items():
        with context:
            seconds = measure(steps, settings, min_rounds=3, share=share)
        yield row(case, step, seconds, bound)

    if not case.is_block:
        case = replace(case, tokens=settings.pick(64, 8))
        steps = {variant: generation(model, inputs[:, :16], case.tokens) for variant, model in models.items()}
        seconds = measure(steps, settings, min_rounds=3, share=share)
        yield row(case, "generate", seconds, lower_bound(steps[ADALORA], reference, case.tokens, 0, settings))


def tables(settings: Settings) -> Iterator[Table]:
    yield Table(
        "model",
        "Llama, all linear layers adapted",
        [case_row for case in cases(settings) for case_row in case_rows(case, settings)],
        "Times are relative to AdaLoRA's: median (quartiles) of the rounds. The loss of the AdaLoRA variants holds "
        "AdaLoRA's regularization, and DoRA's does not; a block has no loss. The roofline is the time of AdaLoRA's "
        "operations and bytes at the rates given by `--tflops` and `--gbps`.",
        plot="bars",
    )
