"""What a training step asks of a GPU, counted and not timed: its launches, and what they cost at a device's rates.

The model is on the meta device, at its true sizes, so that this needs no GPU. Every operation that does work counts as
one launch; views and allocations do not. The price of a launch is the time to move its inputs and outputs, the time of
its floating point operations, or the time that any launch takes, whichever is longest.

Figures are for one more transformer layer: those of a model of two layers, without those of a model of one.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import apart
import torch
from apart import STOCK
from report import Table
from settings import Settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM
from variants import ADADORA, ADALORA, DORA, LORA, RANK, WITH_LORA

from peft import PeftModel, get_peft_model


KINDS = ("bfloat16", "float32", "4-bit")
TOKENS = (512, 2048, 8192)
# What an H100 does, about: bytes and operations in a second, and the seconds of a launch.
GBPS, TFLOPS, FLOAT32_TFLOPS, LAUNCH_SECONDS = 3000.0, 700.0, 50.0, 4.5e-6
# They return something new, without work.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}
NO_LAUNCH |= {"lift_fresh", "_local_scalar_dense"}


def is_launch(operation: Any) -> bool:
    """Whether an operation of torch does work on a device, and is no view or allocation."""
    schema = operation._schema
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
    return not is_view and schema.name.split("::")[1] not in NO_LAUNCH


@dataclass(eq=False)
class Launches(TorchDispatchMode):
    """
    Counts launches and their price, in seconds, while it is entered.

    Args:
        gbps: Memory bandwidth of the device in GB/s.
        tflops: Peak of the device in TFLOP/s for products of 16 bits.
        float32_tflops: Peak of the device in TFLOP/s for products of float32.
    """

    gbps: float = GBPS
    tflops: float = TFLOPS
    float32_tflops: float = FLOAT32_TFLOPS
    count: int = field(default=0, init=False)
    price: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if is_launch(operation):
            inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
            outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
            moving = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs)) / (1e9 * self.gbps)
            computing = 0.0
            if operation._overloadpacket in flop_registry:
                is_float32 = inputs[-1].dtype == torch.float32
                rate = 1e12 * (self.float32_tflops if is_float32 else self.tflops)
                computing = flop_registry[operation._overloadpacket](*args, **(kwargs or {}), out_val=result) / rate
            self.count += 1
            self.price += max(moving, computing, LAUNCH_SECONDS)
        return result


def quantize_on_meta(model: nn.Module) -> None:
    """Replace the linear layers of a model on the meta device, but the head, by those of bitsandbytes in 4 bits."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        values, state = bnb.functional.quantize_4bit(module.weight.data, quant_type="nf4", blocksize=64)
        shape, options = (module.in_features, module.out_features), {"bias": False, "device": "meta"}
        layer = bnb.nn.Linear4bit(*shape, **options, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            values, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4", module=layer
        )
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True


def llama_config(layers: int, width: int) -> LlamaConfig:
    """So many layers of Llama-3-8B, whose width is 4096, or of one that is less wide."""
    heads = max(4, width // 128)
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        use_cache=False,
    )


def adapted_llama(variant: str, kind: str, layers: int, width: int, device: str) -> PeftModel:
    """So many layers of Llama-3-8B, all linear layers adapted."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    config = llama_config(layers, width)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if kind == "4-bit":
        quantize_on_meta(model)
    if device != "meta":
        model.to_empty(device=device)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    config = WITH_LORA[variant].config(RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def passes(variant: str, kind: str, layers: int, width: int, tokens: int, device_rates: dict) -> list[Launches]:
    """The forward and the backward pass of a training step that is not the first one."""
    model = adapted_llama(variant, kind, layers, width, "meta")
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # as the layers get it; to make it, transformers would look at values
    mask = torch.zeros(1, 1, tokens, tokens, dtype=model.dtype, device="meta")
    for _ in range(2):
        model.zero_grad()
        forward, backward = Launches(**device_rates), Launches(**device_rates)
        with forward:
            loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
        with backward:
            loss.backward()
    return [forward, backward]


@cache
def allocation(variant: str, layers: int, width: int, device_rates: tuple[tuple[str, float], ...]) -> Launches:
    """An allocation in the budget phase that is not the first one, counted on the CPU, because it looks at values."""
    counter = Launches(**dict(device_rates))
    if variant not in (ADALORA, ADADORA):
        return counter
    model = adapted_llama(variant, "bfloat16", layers, width, "cpu")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    tuner = model.base_model
    tuner.rankallocator.peft_config.tinit = 0  # prune from the second step on
    for step in range(3):
        tuner.update_and_allocate(step)
    with counter:
        tuner.update_and_allocate(3)
    return counter


def one_layer(variant: str, kind: str, tokens: int, width: int = 4096, **device_rates: float) -> dict[str, Any]:
    """
    What one more transformer layer adds to a training step: launches by their phase, and the microseconds of all.
    """
    rates = tuple(device_rates.items())
    less, more = (
        [*passes(variant, kind, layers, width, tokens, device_rates), allocation(variant, layers, width, rates)]
        for layers in (1, 2)
    )
    counts = [two.count - one.count for one, two in zip(less, more)]
    price = sum(two.price - one.price for one, two in zip(less, more))
    return {**dict(zip(("forward", "backward", "allocate"), counts)), "total": sum(counts), "price (µs)": 1e6 * price}


def without_us(**arguments: Any) -> dict[str, Any]:
    """[`one_layer`] of PEFT without peft-adadora, in a process of its own."""
    output, _ = apart.start("launches", json.dumps(arguments), with_us=False).communicate()
    return json.loads(output.splitlines()[-1])


def tables(settings: Settings) -> Iterator[Table]:
    rates = {"gbps": settings.gbps or GBPS, "tflops": settings.tflops or TFLOPS}
    width = settings.pick(4096, 512)
    rows = []
    for kind in settings.pick(KINDS, KINDS[:1]):
        for tokens in settings.pick(TOKENS, TOKENS[:1]):
            arguments = {"kind": kind, "tokens": tokens, "width": width, **rates}
            counted = {LORA: one_layer(LORA, **arguments)}
            if kind != "4-bit":  # of which PEFT's DoRA makes copies, which the meta device does not take
                counted[DORA] = one_layer(DORA, **arguments)
            counted[STOCK] = without_us(variant=ADALORA, **arguments)
            counted[ADADORA] = one_layer(ADADORA, **arguments)
            prices = {name: count["price (µs)"] for name, count in counted.items()}
            for name, count in counted.items():
                ratios = {
                    f"/ {other}": prices[name] / prices[other] if other in prices else None for other in (STOCK, DORA)
                }
                rows.append({"weights": kind, "tokens": tokens, "variant": name, **count, **ratios})
    yield Table(
        "launches",
        "Launches of a training step on a GPU, counted and not timed",
        rows,
        f"One layer of Llama-3-8B, 7 linear layers at rank {RANK} in float32, without the optimizer. Price: "
        f"max(bytes / {rates['gbps']:g} GB/s, operations / {rates['tflops']:g} TFLOP/s ({FLOAT32_TFLOPS:g} in "
        f"float32), {1e6 * LAUNCH_SECONDS:g} µs) for each launch.",
    )


if __name__ == "__main__":
    print(json.dumps(one_layer(**json.loads(sys.argv[1]))))
