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

from collections.abc import Container
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners.lora.layer import LoraVariant

from .adadora import adapted_output, magnitude_scale, merged_rows, squared_adapted_row_norm
from .base_weight import onloaded, unmerged_rows
from .cache import cached
from .rows import norm_dtype, row_norm
from .sharding import copy_full_, gather_full


def check_sole_adapter(adapter_names: str | list[str], adadora_adapters: Container[str]) -> None:
    """Raise a `NotImplementedError` if there are several adapters and one of them is AdaDoRA."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    for name in names if len(names) > 1 else ():
        if name in adadora_adapters:
            raise NotImplementedError(
                f"The AdaDoRA adapter {name!r} has to be the only active adapter but got {names}; choose one of them."
            )


@cached
def row_scale(module: nn.Module, active_adapter: str, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """m / n (out, 1), given `module.update_factors`, in float32 or float64. Only m gets a gradient."""
    squared_norm = squared_adapted_row_norm(module.get_base_rows(), *factors)
    return magnitude_scale(module.lora_magnitude[active_adapter], squared_norm)


class AdaDoraLinearVariant(LoraVariant):
    """AdaDoRA for layers that compute W x + b: `nn.Linear`, `Conv1D`, and quantized ones."""

    @staticmethod
    def init(module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Set m (out, 1) to the row norm of W, or of W + ΔW if the adapter starts with an update, as in DoRA."""
        lora_E = module.lora_E[adapter_name]
        if adapter_name not in module.lora_magnitude:
            dtype = norm_dtype(module.get_base_layer().weight.dtype)
            magnitude = torch.empty(module.out_features, 1, dtype=dtype, device=lora_E.device)
            module.lora_magnitude[adapter_name] = nn.Parameter(magnitude, requires_grad=lora_E.requires_grad)
        if lora_E.is_meta:
            return
        with onloaded(module.get_base_layer()):
            rows, factors = unmerged_rows(module), [gather_full(part) for part in module.update_factors(adapter_name)]
            norm = squared_adapted_row_norm(rows, *factors).sqrt() if factors[1].any() else row_norm(rows)
        copy_full_(module.lora_magnitude[adapter_name], norm)

    @staticmethod
    def forward(
        module: nn.Module, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """h = (m / n) ⊙ (W x + ΔW dropout(x)) + b, given x (..., in) and W x + b (..., out)."""
        lora_A, scaled_E, lora_B = factors = module.update_factors(active_adapter)
        scale = row_scale(module, active_adapter, factors)
        x = module.lora_dropout[active_adapter](module._cast_input_dtype(x, lora_A.dtype))
        projected = x @ lora_A.T
        projected = (projected * scaled_E.view(-1)).to(projected.dtype)  # (..., r)
        bias = module.get_base_layer().bias
        return adapted_output(result, scale.view(-1), bias, projected, scale * lora_B).to(result.dtype)

    @staticmethod
    def merge_safe(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The merged weight (m / n) ⊙ (W + ΔW), which has to be finite; the given weight stays as it is."""
        merged = orig_weight.detach().clone()
        AdaDoraLinearVariant.merge_unsafe(module, active_adapter, merged)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"The merged weight of adapter {active_adapter!r} is not finite, so the adapter seems to be broken; "
                "nothing was merged."
            )
        return merged

    @staticmethod
    @torch.no_grad()
    def merge_unsafe(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Overwrite the weight with (m / n) ⊙ (W + ΔW), a block of rows at a time."""
        weight = orig_weight.T if isinstance(module.get_base_layer(), Conv1D) else orig_weight
        factors = *module.update_factors(active_adapter), module.lora_magnitude[active_adapter]
        for rows, values in merged_rows(weight.flatten(1), *map(gather_full, factors)):
            # into the weight itself, because `flatten` copies one that is not contiguous
            weight[rows] = values.view(-1, *weight.shape[1:])

    @staticmethod
    def unmerge(module: nn.Module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(
            f"The AdaDoRA adapter {active_adapter!r} cannot be unmerged, because rescaled and rounded rows do not "
            "give the base weight back; reload the base model."
        )
