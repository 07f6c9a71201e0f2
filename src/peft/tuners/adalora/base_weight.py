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

"""The frozen weight of an adapted layer, whether it is plain, transposed, quantized, offloaded or sharded."""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from .rows import row_norm
from .sharding import gather_full


def onloaded(base_layer: nn.Module) -> AbstractContextManager:
    """A context in which a weight that accelerate offloads, to CPU memory or disk, is on its device."""
    is_elsewhere = has_offloaded_params(base_layer) and base_layer.weight.is_meta
    return align_module_device(base_layer) if is_elsewhere else nullcontext()


def has_computed_weight(module: nn.Module) -> bool:
    """Whether the weight is made anew for each forward pass, as by weight_norm, spectral_norm, or pruning."""
    # `hasattr` would compute it, which may change the module
    is_parametrized = nn.utils.parametrize.is_parametrized(module, "weight")
    return is_parametrized or isinstance(module.__dict__.get("weight"), torch.Tensor)


@torch.no_grad()
def unmerged_rows(layer: nn.Module) -> torch.Tensor:
    """`layer.get_base_rows()` without the plain AdaLoRA adapters that are merged into W."""
    rows = layer.get_base_rows()
    for adapter_name in layer.merged_adapters:
        if adapter_name not in layer.lora_magnitude:
            lora_A, scaled_E, lora_B = layer.update_factors(adapter_name)
            rows = rows - lora_B @ (lora_A * scaled_E)
    return rows


@torch.no_grad()
def base_row_norm(layer: nn.Module) -> torch.Tensor:
    """‖W‖ of shape (out, 1), of [`unmerged_rows`]."""
    with onloaded(layer.get_base_layer()):
        return row_norm(unmerged_rows(layer))


def base_weight(layer: nn.Module) -> torch.Tensor:
    """The weight itself if it is a plain tensor, or else its values: dequantized, and from all processes."""
    if layer.quantization_backend is not None:
        return layer.get_base_weight()
    return gather_full(layer.get_base_layer().weight)
