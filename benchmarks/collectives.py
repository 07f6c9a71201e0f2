"""The collectives of a training step under FSDP2, counted and not timed: their number, their bytes, and their price.

torch's fake process group gives any number of processes within one. Forward and backward passes run on fake tensors,
and the allocation, which looks at values, on the shards of one process. Both have the true shapes of the transformer
blocks; embedding, head and loss are small. Models of one, two and three blocks have to agree that each count grows
linearly with the number of blocks, and the count of the whole model follows.
"""

import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import apart
import torch
import torch.distributed as dist
from apart import STOCK
from report import Table
from settings import Settings
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from variants import ADADORA, ADALORA, LORA, RANK, WITH_LORA

from peft import PeftModel, get_peft_model


# hidden and intermediate size, heads, heads of keys and values, blocks
SHAPES = {
    "Llama-3-8B": (4096, 14336, 32, 8, 32),
    "Llama-3-70B": (8192, 28672, 64, 8, 80),
    "a small Llama": (64, 96, 4, 2, 4),
}
TOKENS, VOCABULARY = 4, 64

# By the number of processes: NVLink within a machine of eight GPUs, and 400 Gb/s for each GPU between machines.
LATENCY_US = {8: 10.0, 64: 25.0}
BANDWIDTH_GBS = {8: 450.0, 64: 50.0}

# How often the largest tensor of a collective passes through a link, in ring algorithms.
PASSES = {
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "all_gather_into_tensor": 1,
    "all_to_all_single": 1,
    "allreduce_": 2,
    "all_reduce": 2,
}
NO_COLLECTIVE = {"wait_tensor", "_wrap_tensor_autograd"}
ERRORS = (AssertionError, NotImplementedError, RuntimeError, TypeError)


@dataclass(eq=False)
class Collectives(TorchDispatchMode):
    """Counts collectives by their kind, the bytes of their largest tensors, and how often the host reads a value."""

    numbers: Counter = field(default_factory=Counter, init=False)
    bytes: Counter = field(default_factory=Counter, init=False)
    reads: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        namespace, name = operation._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional", "_dtensor") and name not in NO_COLLECTIVE:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.numbers[name] += 1
            self.bytes[name] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.reads += name == "_local_scalar_dense"
        return result


def sharded_llama(variant: str, shape: tuple[int, ...], blocks: int, mode: AbstractContextManager) -> PeftModel:
    """So many blocks of a Llama, all linear layers adapted, each block a unit of FSDP2. `mode` makes the tensors."""
    hidden, intermediate, heads, key_value_heads, _ = shape
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, WITH_LORA[variant].config(RANK, **options)).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with mode:
        return model.to_empty(device="cpu")


def passes(model: PeftModel, with_labels: bool) -> list[Collectives]:
    """A forward and a backward pass. Without labels the model has no loss that AdaLoRA could add to."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    forward, backward = Collectives(), Collectives()
    with forward:
        outputs = model(input_ids=ids, labels=ids if with_labels else None)
    with backward:
        (outputs.loss if with_labels else outputs.logits.sum()).backward()
    model.zero_grad()
    return [forward, backward]


def allocation(model: PeftModel) -> Collectives:
    """An allocation in the budget phase that is not the first one."""
    tuner = model.base_model
    tuner.rankallocator.peft_config.tinit = 0  # allocate from the second step on
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
            parameter.grad = torch.zeros_like(parameter)
    for step in range(3):
        counter = Collectives()
        with counter:
            tuner.update_and_allocate(step)
    return counter


def state_bytes(model: PeftModel) -> int:
    """The memory of the allocator's averages on this process."""
    state = vars(model.base_model.rankallocator)
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def count(variant: str, shape: tuple[int, ...], blocks: int) -> tuple[Counter, dict[str, str]]:
    """
    What a step takes: numbers and bytes of its collectives by phase and kind, the allocator's state in bytes, and how
    often the host reads a value in an allocation. Beside it the errors of the phases that fail.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model, counters, found, errors = sharded_llama(variant, shape, blocks, fake), {}, Counter(), {}
    if variant != LORA:
        model.base_model.rankallocator.exp_avg_ipt = {"": torch.empty(0)}  # as after the first step
    with fake:
        counters["forward"], counters["backward"] = passes(model, with_labels=False)
        try:
            together = passes(model, with_labels=True)
        except ERRORS as error:
            errors["regularization"] = message(error)
        else:
            counters["regularization"] = Collectives()
            for counter, without in zip(together, list(counters.values())):
                counters["regularization"].numbers += counter.numbers - without.numbers
                counters["regularization"].bytes += counter.bytes - without.bytes
    if variant != LORA:
        model = sharded_llama(variant, shape, blocks, nullcontext())
        try:
            counters["allocation"] = allocation(model)
            found["reads"] = counters["allocation"].reads
        except ERRORS as error:
            errors["allocation"] = message(error)
        found["state"] = state_bytes(model)
    for phase, counter in counters.items():
        found += Counter({(phase, kind, "number"): number for kind, number in counter.numbers.items()})
        found += Counter({(phase, kind, "bytes"): number for kind, number in counter.bytes.items()})
    return found, errors


def message(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def count_all(variant: str, name: str) -> dict[str, Any]:
    """
    The [`count`] of all blocks of a model, summed by phase, with the seconds that its collectives take with latency 1
    and with a bandwidth of 1 byte/s.

    Raises:
        `AssertionError`: If a figure does not grow linearly with the number of blocks.
    """
    blocks, processes = SHAPES[name][-1], dist.get_world_size()
    (one, errors), (two, _), (three, _) = (count(variant, SHAPES[name], number) for number in (1, 2, 3))
    found = {}
    for key in one.keys() | two.keys() | three.keys():
        assert three[key] - two[key] == two[key] - one[key], key
        found[key] = one[key] + (two[key] - one[key]) * (blocks - 1)
    result = {"errors": errors, "state": found.pop("state", 0), "reads": found.pop("reads", 0)}
    for phase in ("forward", "backward", "regularization", "allocation"):
        of_phase = {key[1:]: number for key, number in found.items() if key[0] == phase}
        traffic = {kind: number for (kind, unit), number in of_phase.items() if unit == "bytes"}
        result[phase] = {
            "number": sum(number for (_, unit), number in of_phase.items() if unit == "number"),
            "bytes": sum(traffic.values()),
            "passed": sum(PASSES[kind] * number for kind, number in traffic.items()) * (processes - 1) / processes,
        }
    return result


def cells(counts: dict[str, Any], phases: tuple[str, ...], latency: float, bandwidth: float) -> list[Any]:
    """The number of collectives of some phases, their megabytes, and their milliseconds; or the error of one."""
    for phase in phases:
        if phase in counts["errors"]:
            return [counts["errors"][phase], None, None]
    number, size, passed = (sum(counts[phase][unit] for phase in phases) for unit in ("number", "bytes", "passed"))
    return [number, size / 1e6, number * latency / 1e3 + passed / (bandwidth * 1e6)]


def tables(settings: Settings) -> Iterator[Table]:
    names = settings.pick(list(SHAPES)[:2], list(SHAPES)[2:])
    rows, prices = [], []
    for processes in settings.pick((8, 64), (8,)):
        latency = settings.latency_us or LATENCY_US[processes]
        bandwidth = settings.bandwidth_gbs or BANDWIDTH_GBS[processes]
        prices.append(f"{latency:g} µs and {bandwidth:g} GB/s with {processes} processes")
        counted = {}
        for with_us, variants in ((True, {LORA: LORA, ADADORA: ADADORA}), (False, {ADALORA: STOCK})):
            arguments = json.dumps([processes, names, list(variants)])
            output, _ = apart.start("collectives", arguments, with_us=with_us).communicate()
            for name, variant, counts in json.loads(output.splitlines()[-1]):
                counted[name, variants[variant]] = counts
        for name in names:
            for method in (LORA, STOCK, ADADORA):
                counts, row = counted[name, method], {"model": name, "processes": processes, "method": method}
                for title, phases in (
                    ("forward and backward", ("forward", "backward")),
                    ("regularization", ("regularization",)),
                    ("allocation", ("allocation",)),
                ):
                    figures = cells(counts, phases, latency, bandwidth)
                    row |= dict(zip((title, f"{title} (MB)", f"{title} (ms)"), figures))
                rows.append({**row, "reads": counts["reads"], "state (MB)": counts["state"] / 1e6})
    yield Table(
        "collectives",
        "Collectives of a training step under FSDP2, counted and not timed",
        rows,
        f"All linear layers of all blocks at rank {RANK}, each block a unit, without embedding and head. Bytes "
        "count the largest tensor of each collective. `reads` is how often the host reads a value in an allocation, "
        "beside the transfer of all scores. `state` is the averages on the first process, which has the most. Price "
        f"of a collective: {'; '.join(prices)}.",
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # fake tensors log the errors that they raise
    processes, names, variants = json.loads(sys.argv[1])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    print(json.dumps([(name, variant, count_all(variant, name)) for name in names for variant in variants]))
