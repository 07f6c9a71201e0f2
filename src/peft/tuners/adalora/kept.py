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

"""What a layer keeps from one forward pass to the next: ‖W‖², and for a while m / n.

EMA libraries, SWA and much of PEFT write weights through `.data`, which shows in no counter. So m / n is kept only
while `generate` of the model runs, and inside of PEFT's `DoraCaching`.
"""

import operator
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from accelerate.utils import has_offloaded_params
from torch import nn

from peft.tuners.lora import dora

from .rows import Rows, squared_row_norm
from .sharding import is_partitioned


Tensors = tuple[torch.Tensor, ...]


class _Values(NamedTuple):
    """Values computed from some tensors. It never changes, so threads that share it by mistake read what is right."""

    owner: Hashable
    tensors: list[torch.Tensor]
    aliases: list[torch.Tensor]  # hold the storages, whose addresses can then belong to no other tensor
    states: list[tuple[int, int]]
    values: Tensors


class Kept(nn.Module):
    """
    What a layer keeps: a module without parameters, so that it forgets when the layer moves, trains, or is copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generation: Optional[object] = None
        self.forget()

    def forget(self) -> None:
        self.norm = self.scales = None

    def _apply(self, *args: Any, **kwargs: Any) -> "Kept":
        self.forget()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> "Kept":
        self.scales = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles
        return {**self.__dict__, "norm": None, "scales": None}


class _Session:
    """Stands for True in PEFT's switch of `DoraCaching`, and tells one use of it from the next."""


def squared_base_norm(layer: nn.Module, rows: torch.Tensor | Rows) -> torch.Tensor:
    """‖W‖² (out, 1) from W (out, in), kept while W takes no gradient and is the same tensor with the same values."""
    weight = layer.get_base_layer().weight
    if weight.requires_grad or is_partitioned(weight):
        return squared_row_norm(rows)
    return _keep(layer, layer.kept, "norm", lambda: (squared_row_norm(rows),), _stored_tensors(weight), None)[0]


def scales(layer: nn.Module, adapter_name: str) -> Tensors:
    """
    m / n (out, 1), c · E (r, 1) and (m / n) ⊙ B (out, r), kept for as long as one `generate` of the model or one
    `DoraCaching()` lasts.
    """

    def compute() -> Tensors:
        return layer.lora_variant[adapter_name].scales(layer, adapter_name)

    if torch.compiler.is_compiling():
        return compute()
    parts = layer.lora_A, layer.lora_E, layer.lora_B, layer.lora_magnitude, layer.ranknum
    params = [part[adapter_name] for part in parts]
    needs_grad = torch.is_grad_enabled() and any(param.requires_grad for param in params)
    kept = layer.kept
    session = None if needs_grad else _session(layer, kept)
    if session is None:
        kept.scales = None  # a training step may follow, and a fused optimizer does not count its writes
        return compute()
    tensors = [*_stored_tensors(layer.get_base_layer().weight), *params]
    owner = session, adapter_name, layer.scaling[adapter_name], torch.is_inference_mode_enabled()
    return _keep(layer, kept, "scales", compute, tensors, owner)


@contextmanager
def generation(layers: list[nn.Module]) -> Iterator[None]:
    """In which the layers keep m / n: one `generate` of their model."""
    token = object()
    for layer in layers:
        layer.kept.generation = token
    try:
        yield
    finally:
        for layer in layers:
            layer.kept.generation = layer.kept.scales = None


def _session(layer: nn.Module, kept: Kept) -> Optional[object]:
    """What m / n may be kept for: one `generate` of the model, or one `DoraCaching()`. `None` outside of both."""
    if kept.generation is not None:
        return kept.generation
    if layer.training or not dora.ENABLE_DORA_CACHING:
        return None
    if dora.ENABLE_DORA_CACHING is True:
        # or what was kept would be taken for good in the next `DoraCaching()`, whatever was written in between
        dora.ENABLE_DORA_CACHING = _Session()
    return dora.ENABLE_DORA_CACHING


def _stored_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that change when a weight does: those that it wraps, or the weight itself."""
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight]


def _keep(
    layer: nn.Module,
    kept: Kept,
    place: str,
    compute: Callable[[], Tensors],
    tensors: list[torch.Tensor],
    owner: Hashable,
) -> Tensors:
    """The values of `compute()`, which depend on nothing but `tensors` and `owner`, kept by one layer and thread.

    Args:
        layer (`nn.Module`): The layer that the values are of.
        kept ([`Kept`]): What it keeps.
        place (`str`): The attribute that the values are kept in, `None` at first.
        compute (`Callable`): Gives the values.
        tensors (`list[torch.Tensor]`): The values are used for as long as these have the same storages and versions.
        owner (`Hashable`): The values are used for as long as this is the same, too.
    """
    is_passing = has_offloaded_params(layer.get_base_layer())  # here for this forward pass alone
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_passing:
        return compute()
    owner = owner, id(layer), threading.get_ident()
    try:
        states = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    except RuntimeError:  # made in inference mode, where nobody counts writes, or without storage
        return compute()
    last = getattr(kept, place)  # once, because another thread may replace it
    if last and last.owner == owner and last.states == states and all(map(operator.is_, last.tensors, tensors)):
        return last.values
    values = compute()
    if all(map(_has_values, (*tensors, *values))):
        setattr(kept, place, _Values(owner, tensors, [tensor.detach() for tensor in tensors], states, values))
    return values


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether this is a tensor as it is, and none that stands for one while it is traced or transformed."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
