"""Bytes: what autograd keeps in a layer and in a Llama block, the peak of a step, and the temporaries of the norm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import norm
import torch
from cases import Case, LayerCase, LlamaCase
from counters import Storages, byte_count, held_bytes, kept_storages, peak_bytes, storages_of
from model import cases as model_cases
from report import Table
from settings import Settings
from variants import ADALORA, LORA, VARIANTS, adapted_layers

from peft import PeftModel


MIB = 2**20
LAYER_SHAPES = [(768, 768, 512), (2048, 2048, 512), (4096, 4096, 256), (4096, 11008, 256)]


@dataclass(frozen=True)
class Kept:
    """
    Args:
        total: Bytes that autograd keeps in a forward pass.
        outputs: Bytes of the outputs of all adapted layers.
        other_outputs: Those of them that autograd does not keep.
    """

    total: int
    outputs: int
    other_outputs: int


def kept_by_autograd(model: PeftModel, forward: Callable[[], Any]) -> Kept:
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
        for layer in adapted_layers(model)
    ]
    kept = kept_storages(forward, chain(model.parameters(), model.buffers()))
    for hook in hooks:
        hook.remove()
    output_storages = storages_of(outputs)
    others: Storages = {address: storage for address, storage in output_storages.items() if address not in kept}
    return Kept(byte_count(kept), byte_count(output_storages), byte_count(others))


def memory_rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    models, inputs = case.build(device, (LORA, *VARIANTS)), case.inputs(device)
    steps = {variant: case.training_step(model, inputs) for variant, model in models.items()}
    for step in steps.values():
        step()  # what a layer keeps from step to step is there from here on
    forwards = {variant: lambda model=model: case.forward(model, inputs) for variant, model in models.items()}
    kept = {variant: kept_by_autograd(model, forwards[variant]) for variant, model in models.items()}
    reference = kept[ADALORA]
    for variant in models:
        yield {
            **case.labels,
            "variant": variant,
            "kept (MiB)": kept[variant].total / MIB,
            "/ AdaLoRA": kept[variant].total / reference.total,
            "/ LoRA": kept[variant].total / kept[LORA].total,
            "more, in outputs": (kept[variant].total - reference.total) / reference.outputs,
            "held after forward (MiB)": held_bytes(forwards[variant], device) / MIB,
            "peak of a step (MiB)": peak_bytes(steps[variant], device) / MIB,
        }


def layer_cases(settings: Settings) -> list[LayerCase]:
    shapes = settings.pick(LAYER_SHAPES, [(768, 768, 512)])
    bfloat16_shapes = shapes if settings.on_cuda else shapes[:1]  # a CPU may take 50 times as long as in float32
    return [LayerCase(*shape) for shape in shapes] + [
        LayerCase(*shape, dtype=torch.bfloat16) for shape in bfloat16_shapes
    ]


def block_cases(settings: Settings) -> list[LlamaCase]:
    """The blocks of the section `model`, and one block of its Llama."""
    llama, *blocks = model_cases(settings)
    one_layer = replace(llama, name=f"{llama.name}, one block", layers=1, is_block=True)
    return [one_layer, *blocks]


def norm_rows(settings: Settings) -> Iterator[dict[str, Any]]:
    for case in norm.cases(settings):
        functions = norm.norm_functions(case, settings.device)
        peaks = {name: peak_bytes(function, settings.device) for name, function in functions.items()}
        unit = 4 * (case.out_features * case.rank + case.rank**2)
        yield {
            **norm.labels(case),
            **{f"{name} (MiB)": peak / MIB for name, peak in peaks.items()},
            "from the factors / 4(out·r + r²) bytes": peaks[norm.FACTORED] / unit,
        }


def tables(settings: Settings) -> Iterator[Table]:
    note = (
        "Kept: by autograd for the backward pass, each storage once, without parameters and buffers. More, in "
        "outputs: how much more than AdaLoRA, as a multiple of the bytes of all adapted layers' outputs (tokens, "
        "out). Held after forward: allocated in it and not freed, the result included. "
    )
    rows = [row for case in layer_cases(settings) for row in memory_rows(case, settings.device)]
    yield Table("memory-layer", "Memory of one layer", rows, note)
    rows = [row for case in block_cases(settings) for row in memory_rows(case, settings.device)]
    yield Table("memory-block", "Memory of a Llama block", rows, note)
    yield Table("memory-norm", "Peak temporary memory of the norm", list(norm_rows(settings)))
