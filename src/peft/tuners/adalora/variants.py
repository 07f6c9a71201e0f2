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

"""AdaDoRA as a variant of LoRA's layers: how a layer starts, predicts and merges with a magnitude. No state."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners.lora.layer import LoraVariant

from .adadora import adapted_output, magnitude_scale, merged_rows, scale_output, squared_adapted_row_norm
from .base_weight import base_row_norm, base_rows, onloaded, unmerged_rows
from .cache import cached_scale
from .rows import norm_dtype
from .sharding import copy_full_, gather_full


def row_scale(module: nn.Module, active_adapter: str, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """m / n (out, 1), float32 at least, with no gradient but that of m, given `module.update_factors`."""
    magnitude = module.lora_magnitude[active_adapter]
    params = [part[active_adapter] for part in (module.lora_A, module.lora_E, module.lora_B, module.ranknum)]

    def compute() -> torch.Tensor:
        return magnitude_scale(magnitude, squared_adapted_row_norm(base_rows(module), *factors))

    return cached_scale(module, active_adapter, [*params, magnitude], compute)


class AdaDoraLinearVariant(LoraVariant):
    """AdaDoRA for layers that compute W x + b: `nn.Linear`, `Conv1D`, and quantized ones."""

    @staticmethod
    def init(module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """
        Give an adapter the magnitude m (out, 1) in float32 (float64 for a float64 weight): the row norm of W, or of W
        + ΔW for an adapter that starts with an update (`init_lora_weights=False`), as in PEFT's DoRA.
        """
        lora_E = module.lora_E[adapter_name]
        dtype = norm_dtype(module.get_base_layer().weight.dtype)
        if adapter_name not in module.lora_magnitude:
            magnitude = torch.empty(module.out_features, 1, dtype=dtype, device=lora_E.device)
            module.lora_magnitude[adapter_name] = nn.Parameter(magnitude, requires_grad=lora_E.requires_grad)
        if lora_E.is_meta:
            return
        norm, factors = base_row_norm(module), tuple(map(gather_full, module.update_factors(adapter_name)))
        if factors[1].any():
            with onloaded(module.get_base_layer()):
                norm = squared_adapted_row_norm(unmerged_rows(module), *factors).sqrt()
        copy_full_(module.lora_magnitude[adapter_name], norm)

    @staticmethod
    def forward(
        module: nn.Module, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """h = (m / n) ⊙ (W x + ΔW dropout(x)) + b of shape (..., out), given x (..., in) and W x + b."""
        lora_A, scaled_E, lora_B = factors = module.update_factors(active_adapter)
        scale = row_scale(module, active_adapter, factors)
        x = module.lora_dropout[active_adapter](module._cast_input_dtype(x, lora_A.dtype))
        projected = x @ lora_A.T
        projected = (projected * scaled_E.view(-1)).to(projected.dtype)  # (..., r)
        bias = module.get_base_layer().bias
        return adapted_output(result, scale.view(-1), bias, projected, scale * lora_B).to(result.dtype)

    @staticmethod
    def merge_safe(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The merged weight (m / n) ⊙ (W + ΔW), stored and shaped like the weight, which stays as it is."""
        merged = orig_weight.detach().clone()
        AdaDoraLinearVariant.merge_unsafe(module, active_adapter, merged)
        return merged

    @staticmethod
    @torch.no_grad()
    def merge_unsafe(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Overwrite the weight with (m / n) ⊙ (W + ΔW), a block of rows at a time."""
        is_transposed = isinstance(module.get_base_layer(), Conv1D)
        rows_of_weight = orig_weight.T if is_transposed else orig_weight.flatten(1)
        factors = *module.update_factors(active_adapter), module.lora_magnitude[active_adapter]
        for rows, values in merged_rows(rows_of_weight, *map(gather_full, factors)):
            if is_transposed:
                orig_weight[:, rows] = values.T
            else:
                # of the weight itself, because `flatten` copies one that is not contiguous
                orig_weight[rows] = values.view(-1, *orig_weight.shape[1:])

    @staticmethod
    def unmerge(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Refused, because rescaled and rounded rows do not give the weight back."""
        raise NotImplementedError(
            f"The AdaDoRA adapter {active_adapter!r} cannot be unmerged, because rescaled and rounded rows do not "
            "give the base weight back; reload the base model."
        )


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
