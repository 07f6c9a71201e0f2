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

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor
from transformers.pytorch_utils import Conv1D

from .adadora import Rows, squared_row_norm
from .sharding import whole


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
    """Raise a `NotImplementedError` if [`overwrite_base_weight`] cannot quantize the weight of a layer again."""
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
    elif values.data_ptr() != weight.data_ptr():
        weight.copy_(values)
