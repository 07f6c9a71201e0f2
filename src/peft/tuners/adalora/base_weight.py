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

"""The frozen weight of an adapted layer, however it is stored: as it is, transposed, quantized, or sharded."""

from collections import defaultdict
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from torch.distributed.tensor import distribute_tensor
from transformers.pytorch_utils import Conv1D

from peft.tuners.tuners_utils import BaseTunerLayer

from .adadora import Rows, squared_row_norm
from .sharding import whole
from .targets import has_computed_weight


def here(base_layer: nn.Module) -> AbstractContextManager:
    """A context in which a weight is on its device that accelerate keeps in CPU memory or on disk between uses."""
    is_elsewhere = has_offloaded_params(base_layer) and base_layer.weight.is_meta
    return align_module_device(base_layer) if is_elsewhere else nullcontext()


def base_rows(layer: nn.Module) -> torch.Tensor | Rows:
    """W as a matrix (out, in), detached; what gives its rows block by block if the weight is quantized."""
    base_layer, backend = layer.get_base_layer(), layer.quantization_backend
    if backend is not None:
        return getattr(backend, "get_base_rows", backend.get_base_weight)(base_layer)
    weight: Any = whole(base_layer.weight)
    return weight.T if isinstance(base_layer, Conv1D) else weight.flatten(1)


@torch.no_grad()
def base_row_norm(layer: nn.Module) -> torch.Tensor:
    """‖W‖ of shape (out, 1), without what plain AdaLoRA adapters have merged into W."""
    with here(layer.get_base_layer()):
        rows = base_rows(layer)
        for adapter_name in layer.merged_adapters:
            if adapter_name not in layer.lora_magnitude:
                lora_A, scaled_E, lora_B = layer.update_factors(adapter_name)
                rows = rows - lora_B @ (lora_A * scaled_E)
        return squared_row_norm(rows).sqrt()


def base_weight(layer: nn.Module) -> torch.Tensor:
    """The weight itself if it is a plain tensor, or else its values: dequantized, and from all processes."""
    if layer.quantization_backend is not None:
        return layer.get_base_weight()
    return whole(layer.get_base_layer().weight)


def check_overwrite(layer: nn.Module) -> None:
    """Raise a `NotImplementedError` if the layer would not compute with what [`overwrite_base_weight`] writes."""
    if has_computed_weight(layer.get_base_layer()):
        raise NotImplementedError(
            "The base weight is computed for each forward pass, as by weight_norm, spectral_norm, pruning or FSDP1, "
            "so a merged weight would not last; remove what computes it."
        )
    if getattr(layer.quantization_backend, "get_apply_tensor_subclass", layer) is None:
        raise NotImplementedError(
            "The model does not say how torchao quantized its weights, so the merged weight cannot be quantized; load "
            "the model with the `TorchAoConfig` of transformers."
        )


@torch.no_grad()
def overwrite_base_weight(layer: nn.Module, values: torch.Tensor) -> None:
    """Give a layer another weight, in place where it can be, which is quantized or sharded again if it was."""
    weight = layer.get_base_layer().weight
    if layer.quantization_backend is not None:
        layer.set_base_weight(values)
    elif hasattr(weight, "full_tensor"):
        weight.copy_(distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None))
    elif shares_rows(weight):
        weight.data = values
    elif values.data_ptr() != weight.data_ptr():
        weight.copy_(values)


def shares_rows(weight: torch.Tensor) -> bool:
    """Whether elements of a weight may lie in the same memory, as in an expanded one, which cannot be written to."""
    last = 0  # of the elements that differ in the dimensions so far; an expanded one has a stride of 0
    for stride, size in sorted(zip(weight.stride(), weight.shape)):
        if size > 1 and stride <= last:
            return True
        last += (size - 1) * stride
    return False


def check_not_shared(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise a `NotImplementedError` if another part of the model holds a base weight, or base layer, of the layers."""
    names = {id(module): name for name, module in model.named_modules()}
    holders = defaultdict(list)
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                holders[_storage(tensor)].append((module, tensor))
        for child in module.children():
            holders[id(child)].append((module, None))
    for layer in layers:
        base_layer = layer.get_base_layer()
        weight = base_layer.weight
        others = [module for module, tensor in holders[_storage(weight)] if _overlap(tensor, weight)]
        others += [module for module, _ in holders[id(base_layer)] if not isinstance(module, BaseTunerLayer)]
        for module in others:
            if module is not base_layer:
                raise NotImplementedError(
                    f"The base weight of {names[id(layer)]!r} also belongs to {names[id(module)] or 'the model'!r}, "
                    "which merging would change as well; give the layer a weight of its own before the adapter is "
                    "added."
                )


def _storage(tensor: torch.Tensor) -> Hashable:
    """What two tensors have in common if they share memory."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # of a tensor that wraps others
        return id(tensor)


def _overlap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one storage have elements between the first and the last of each other."""
    (start, end), (other_start, other_end) = map(_range, (tensor, other))
    return max(start, other_start) < min(end, other_end)


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Where in its storage a tensor begins, and where it ends, in bytes."""
    start = tensor.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()
