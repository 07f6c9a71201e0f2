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

"""AdaDoRA as a variant of AdaLoRA's convolutions."""

from typing import Any

import torch
from torch import nn

from .adadora import scale_output
from .variants import AdaDoraLinearVariant, row_scale


class AdaDoraConv2dVariant(AdaDoraLinearVariant):
    """
    AdaDoRA for a convolution, whose weight counts as a matrix of shape (out, in / groups · kernel height · width).

    The update is the product of two convolutions: one like the layer's with A as its kernel, and behind it one of size
    1×1 with B. With several groups, A applies to the inputs of each group.
    """

    @staticmethod
    def forward(
        module: nn.Module, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """h = (m / n) ⊙ (W x + ΔW dropout(x)) + b of shape (..., out, height, width), given x and W x + b."""
        base_layer = module.get_base_layer()
        lora_A, scaled_E, lora_B = factors = module.update_factors(active_adapter)
        scale = row_scale(module, active_adapter, factors)
        bias = None if base_layer.bias is None else base_layer.bias.view(-1, 1, 1)
        scaled = scale_output(result, scale.view(-1, 1, 1), bias)
        if len(lora_A) > 0:
            x = module.lora_dropout[active_adapter](module._cast_input_dtype(x, lora_A.dtype))
            groups = base_layer.groups
            kernel = lora_A.view(-1, *base_layer.weight.shape[1:]).repeat(groups, 1, 1, 1)
            projected = base_layer._conv_forward(x, kernel, None)
            projected = (projected * scaled_E.repeat(groups, 1).unsqueeze(1)).to(projected.dtype)
            kernel = (scale * lora_B).to(projected.dtype)[:, :, None, None]
            scaled = scaled + nn.functional.conv2d(projected, kernel, groups=groups)
        return scaled.to(result.dtype)
