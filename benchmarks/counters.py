"""Counting what a step costs besides time: bytes that autograd keeps, bytes allocated, and operations launched."""

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


# the profiler announces its start and end on stderr otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Storages = dict[int, torch.UntypedStorage]


def storages_of(tensors: Iterable[torch.Tensor]) -> Storages:
    """The storages of tensors by their addresses. Two tensors that share one give it once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages}


def byte_count(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


class Saved:
    """A tensor that autograd has saved; it lives as long as the graph that saved it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # detached, because an output that holds itself would never be freed
        self.tensor = tensor.detach()


def kept_storages(forward: Callable[[], Any], exclude: Iterable[torch.Tensor] = ()) -> Storages:
    """
    The storages that autograd keeps from a forward pass for its backward pass, each once.

    What was saved for a branch of the graph that is dropped again during the forward pass does not count.

    Args:
        forward: The forward pass, with gradients.
        exclude: Tensors that are there anyway, such as parameters and buffers.
    """
    alive: WeakSet[Saved] = WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = forward()  # noqa: F841 - holds the graph
        gc.collect()
        kept = storages_of(saved.tensor for saved in alive)
    excluded = storages_of(exclude)
    return {address: storage for address, storage in kept.items() if address not in excluded}


def memory_events(function: Callable[[], Any]) -> list[int]:
    """Bytes of the CPU's allocations (positive) and frees (negative) during a call, in their order.

    What the call returns is still held when the recording ends. Scratch space that a library takes directly from the
    system is not seen.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        result = function()  # noqa: F841
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def held_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call allocated and that are still allocated afterwards, its result included."""
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        result = function()  # noqa: F841
        return torch.cuda.memory_allocated(device) - before
    return sum(memory_events(function))


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes allocated at one time during a call, beyond those allocated before it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    peak = allocated = 0
    for size in memory_events(function):
        allocated += size
        peak = max(peak, allocated)
    return peak


def launches(function: Callable[[], Any], device: torch.device) -> int:
    """How many operations a call hands over: kernel launches on a GPU, operations called from Python on a CPU."""
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU]) as recording:
            function()
        return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in recording.events())
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recording:
        function()
    return sum(event.count for event in recording.key_averages() if "LaunchKernel" in event.key)
