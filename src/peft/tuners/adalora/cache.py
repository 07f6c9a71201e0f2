# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""m / n of each layer, cached while `generate()` of the model or PEFT's `DoraCaching()` lasts, and no longer.

The cache belongs to the call of `generate()` or to the use of `DoraCaching()`, not to the layers. EMA libraries, SWA
and much of PEFT write weights through `.data`, which no version counter records, so no value may outlive the two.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from typing import Optional
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .parameter_names import WEIGHTS
from .sharding import is_partitioned


class Cache(WeakKeyDictionary):
    """The scales of layers, each with the state of the tensors that it comes from."""

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.in_training = in_training  # also for layers in training mode


_cache: ContextVar[Optional[Cache]] = ContextVar("adadora_cache", default=None)


def swap_cache(cache: Optional[Cache]) -> Optional[Cache]:
    """Use another cache, or none, in this thread. Returns the one that was in use."""
    before = _cache.get()
    _cache.set(cache)
    return before


@contextmanager
def generation() -> Iterator[None]:
    """A context that caches m / n for one `generate()` of the model."""
    before = swap_cache(Cache(in_training=True))
    try:
        yield
    finally:
        swap_cache(before)


def invalidate(layer: nn.Module) -> None:
    """Drop the cached scale of a layer."""
    cache = _cache.get()
    if cache is not None:
        cache.pop(layer, None)


def cached(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """
    Decorate `compute(layer, adapter_name, factors)`, which returns m / n of a layer: return the cached value if there
    is one and nothing has changed. Nothing is cached for an adapter that needs gradients.
    """

    @wraps(compute)
    def cached_compute(layer: nn.Module, adapter_name: str, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or (cache := _cache.get()) is None:
            return compute(layer, adapter_name, factors)
        params = [getattr(layer, part)[adapter_name] for part in (*WEIGHTS, "ranknum")]
        weight = layer.get_base_layer().weight
        needs_grad = torch.is_grad_enabled() and any(param.requires_grad for param in params)
        if needs_grad or (layer.training and not cache.in_training) or is_partitioned(weight):
            cache.pop(layer, None)  # a training step may follow, and a fused optimizer does not count its writes
            return compute(layer, adapter_name, factors)
        # those that the weight wraps, which change without it, or the weight itself
        flatten = getattr(weight, "__tensor_flatten__", None)
        stored = [getattr(weight, name) for name in flatten()[0]] if flatten else [weight]
        tensors = [*stored, *params]
        key = adapter_name, layer.scaling[adapter_name], torch.is_inference_mode_enabled()
        try:
            state = [(tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()) for tensor in tensors]
        except RuntimeError:  # tensors from inference mode count no writes; those of torch.func have no storage
            return compute(layer, adapter_name, factors)
        cached_key, storages, scale = cache.get(layer, (None, (), None))
        if cached_key == (key, state) and not any(storage.expired() for storage in storages):
            return scale
        scale = compute(layer, adapter_name, factors)
        with suppress(RuntimeError):  # torch.func may have made it
            # weak references keep no memory, and an address belongs to no other storage while they are valid
            storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*tensors, scale)]
            if type(scale) is torch.Tensor:  # and not a fake one of a tracer
                cache[layer] = (key, state), storages, scale
        return scale

    return cached_compute
