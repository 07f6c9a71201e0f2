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

"""Merge an AdaDoRA adapter into its base weight, after checks that it can be merged."""

from collections import defaultdict
from collections.abc import Hashable
from typing import Optional

import torch
from torch import nn

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx

from .base_weight import base_weight, has_computed_weight, onloaded
from .sharding import copy_full_, is_partitioned, is_sharded


def adapter_to_merge(layer: nn.Module, adapter_names: Optional[list[str]]) -> Optional[str]:
    """
    The AdaDoRA adapter that `merge(adapter_names=adapter_names)` of a layer would merge, or `None`.

    Raises:
        `NotImplementedError`:
            If another adapter is merged too, or if the layer would not compute with the merged weight.
    """
    if isinstance(adapter_names, str):
        return None
    names = layer.active_adapters if adapter_names is None else adapter_names
    adapter_name = layer.adadora_adapter([*layer.merged_adapters, *names])
    if adapter_name is None or adapter_name in layer.merged_adapters:
        return None
    if has_computed_weight(layer.get_base_layer()):
        raise NotImplementedError(
            "The base weight is computed for each forward pass, as by weight_norm, spectral_norm, pruning or FSDP1, "
            "so a merged weight would be overwritten; remove what computes it."
        )
    if getattr(layer.quantization_backend, "get_apply_tensor_subclass", layer) is None:
        raise NotImplementedError(
            "The model does not say how torchao quantized its weights, so the merged weight cannot be quantized; load "
            "the model with the `TorchAoConfig` of transformers."
        )
    return adapter_name


def merge_adapter(layer: nn.Module, adapter_name: str, safe_merge: bool) -> None:
    """
    Merge an AdaDoRA adapter into its base weight. This happens in place, unless the weight is quantized, sharded, or a
    part of a larger tensor. Raises as `merge_safe` of [`AdaDoraLinearVariant`].
    """
    parts = (layer.lora_A, layer.lora_E, layer.lora_B, layer.lora_magnitude)
    with gather_params_ctx([layer.get_base_layer().weight, *(part[adapter_name] for part in parts)]):
        weight, variant = base_weight(layer), layer.lora_variant[adapter_name]
        if safe_merge:
            weight = variant.merge_safe(layer, adapter_name, weight)
        else:
            weight = weight if fills_storage(weight) else weight.detach().clone()
            variant.merge_unsafe(layer, adapter_name, weight)
        overwrite_base_weight(layer, weight)
    layer.merged_adapters.append(adapter_name)


def check_merge(
    model: nn.Module, layers: list[nn.Module], adapter_names: Optional[list[str]], safe_merge: bool
) -> None:
    """Raise as `merge` of one of the layers would, or a `NotImplementedError` if it would change other modules."""
    to_merge = {layer: name for layer in layers if (name := adapter_to_merge(layer, adapter_names)) is not None}
    check_not_tied(model, list(to_merge))
    for layer, adapter_name in to_merge.items() if safe_merge else ():
        with onloaded(layer.get_base_layer()):
            layer.lora_variant[adapter_name].merge_safe(layer, adapter_name, base_weight(layer))


@torch.no_grad()
def overwrite_base_weight(layer: nn.Module, values: torch.Tensor) -> None:
    """Give a layer another weight: in place if possible, quantized or sharded like the old one."""
    weight = layer.get_base_layer().weight
    if layer.quantization_backend is not None or not (is_sharded(weight) or fills_storage(weight)):
        layer.set_base_weight(values)
    elif is_sharded(weight):
        copy_full_(weight, values)
    elif values.data_ptr() != weight.data_ptr():
        weight.copy_(values)


def fills_storage(weight: torch.Tensor) -> bool:
    """Whether a weight fills its storage, each element once, so that it can be overwritten. A part of a larger tensor
    and a view that repeats elements do not."""
    dims = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    is_dense = weight.permute(dims).is_contiguous()
    return is_partitioned(weight) or (is_dense and weight.nbytes == weight.untyped_storage().nbytes())


def check_not_tied(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise a `NotImplementedError` if another module holds a base weight or base layer of the layers."""
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
        # a part of a larger tensor gets its own memory
        changed = [module for module, tensor in holders[_storage(weight)] if tensor is weight or fills_storage(weight)]
        changed += [module for module, _ in holders[id(base_layer)] if not isinstance(module, BaseTunerLayer)]
        for module in changed:
            if module is not base_layer:
                raise NotImplementedError(
                    f"The base weight of {names[id(layer)]!r} also belongs to {names[id(module)] or 'the model'!r}, "
                    "which merging would change as well; give the layer its own weight before the adapter is "
                    "added, or, with `layer_replication`, use the adapter unmerged."
                )


def _storage(tensor: torch.Tensor) -> Hashable:
    """A key that is equal for tensors of the same storage."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # of a tensor that wraps others
        return id(tensor)
