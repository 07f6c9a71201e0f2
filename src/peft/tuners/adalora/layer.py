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

"""PEFT's AdaLoRA layers with a magnitude for each AdaDoRA adapter, and with AdaDoRA as their variant."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners.tuners_utils import BaseTunerLayer

from . import stock_layer as stock
from .allocator import RankAllocator
from .base_weight import onloaded
from .cache import invalidate
from .config import AdaLoraConfig
from .conv2d import AdaDoraConv2dVariant
from .merging import adapter_to_merge, merge_adapter
from .quantized import get_quantized_rows, resolve_backend
from .rows import norm_dtype
from .sharding import gather_full
from .supported_layers import check_magnitude_support
from .variants import AdaDoraLinearVariant, check_sole_adapter


# PEFT has the allocator in this module
__all__ = ["AdaLoraLayer", "RankAllocator", "SVDConv2d", "SVDLinear"]


class Magnitudes(nn.ParameterDict):
    """The magnitudes of a layer. A cast to a lower precision than float32 leaves them as they are."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Magnitudes":
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            is_rounded = applied.dtype.itemsize < min(4, tensor.dtype.itemsize)
            return tensor.to(applied.device) if is_rounded else applied

        return super()._apply(apply, recurse)


class AdaLoraLayer(stock.AdaLoraLayer):
    """PEFT's AdaLoRA layer with magnitudes: `lora_magnitude` holds one of shape (out, 1) for each AdaDoRA adapter."""

    adapter_layer_names = (*stock.AdaLoraLayer.adapter_layer_names, "lora_magnitude")

    @property
    def use_dora_adaptive(self) -> bool:
        """Whether an adapter of this layer is AdaDoRA; the keys of `lora_magnitude` say which."""
        return len(self.lora_magnitude) > 0

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Optional[type]]:
        return {(): None, ("use_dora_adaptive",): AdaDoraLinearVariant}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: AdaLoraConfig, **kwargs) -> None:
        if not hasattr(self, "lora_magnitude"):
            # here and not in `__init__`, because the constructors of PEFT's layers call that of PEFT's AdaLoraLayer
            self.lora_magnitude = Magnitudes({})
        if config.use_dora_adaptive:
            check_magnitude_support(self.get_base_layer())
            self.quantization_backend = self.quantization_backend or resolve_backend(self.get_base_layer())
        learned = self.lora_magnitude.pop(adapter_name) if adapter_name in self.lora_magnitude else None
        try:
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        finally:
            if learned is not None:
                self.lora_magnitude[adapter_name] = _on_device(learned, self.lora_E[adapter_name].device)
        if config.use_dora_adaptive:
            # not `resolve_lora_variant`, which refuses options of LoRA's other variants that AdaLoRA does not read
            self.lora_variant[adapter_name] = self.lora_variants["use_dora_adaptive",]()
            self.ranknum[adapter_name].requires_grad_(False)
            if learned is None:
                self.lora_variant[adapter_name].init(self, adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        if adapter_name not in self.lora_magnitude:
            return super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        magnitude = self.lora_magnitude[adapter_name]
        with preserve_requires_grad([self], adapter_name):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        # PEFT has cast it to the dtype of the weight
        self.lora_magnitude[adapter_name] = _on_device(magnitude, self.lora_magnitude[adapter_name].device)

    def reset_lora_parameters(self, adapter_name: str) -> None:
        super().reset_lora_parameters(adapter_name)
        if adapter_name in self.lora_magnitude:
            self.lora_variant[adapter_name].init(self, adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.adadora_adapter([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def adadora_adapter(self, adapter_names: list[str]) -> Optional[str]:
        """The AdaDoRA adapter among those of this layer, if there is one. Raises as [`check_sole_adapter`]."""
        names = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A]
        check_sole_adapter(names, self.lora_magnitude)
        return names[0] if names and names[0] in self.lora_magnitude else None

    def get_base_rows(self) -> torch.Tensor:
        """W as a matrix (out, in), detached. If W is quantized, an object that gives its rows block by block."""
        base_layer = self.get_base_layer()
        if self.quantization_backend is not None:
            return get_quantized_rows(self.quantization_backend, base_layer)
        weight = gather_full(base_layer.weight)
        return weight.T if isinstance(base_layer, Conv1D) else weight.flatten(1)

    def update_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, c · E and B of the update ΔW = B (c · E ⊙ A), c · E in float32 at least."""
        ranknum = self.ranknum[adapter_name]
        ranknum = ranknum.to(norm_dtype(ranknum.dtype))
        scaled_E = self.lora_E[adapter_name] / ((ranknum + 1e-5) / self.scaling[adapter_name])
        return self.lora_A[adapter_name], scaled_E, self.lora_B[adapter_name]

    def train(self, mode: bool = True) -> "AdaLoraLayer":
        invalidate(self)  # as PEFT's DoRA does
        return nn.Module.train(self, mode)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Merge the active adapters, or the named ones, into the base weight. AdaDoRA cannot be unmerged afterwards.
        Raises as [`adapter_to_merge`], and a `ValueError` if `safe_merge=True` and the result is not finite.
        """
        adapter_name = adapter_to_merge(self, adapter_names)
        invalidate(self)
        if adapter_name is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            merge_adapter(self, adapter_name, safe_merge)

    def unmerge(self) -> None:
        """Unmerge all merged adapters. Raises a `NotImplementedError` if one of them is AdaDoRA."""
        self.check_unmerge()
        invalidate(self)
        super().unmerge()

    def check_unmerge(self) -> None:
        """Raise a `NotImplementedError` if an AdaDoRA adapter is merged."""
        for adapter_name in self.merged_adapters:
            if adapter_name in self.lora_magnitude:
                self.lora_variant[adapter_name].unmerge(self, adapter_name, self.get_base_layer().weight)

    def adadora_adapter_in_use(self) -> Optional[str]:
        """The adapter that is merged or active, if it is AdaDoRA."""
        if self.disable_adapters:
            self.check_unmerge()
            return None
        return self.adadora_adapter(self.merged_adapters or self.active_adapters)

    def forward_adadora(self, adapter_name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the layer with an AdaDoRA adapter."""
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if isinstance(inner := self.base_layer, BaseTunerLayer) and not inner.disable_adapters:  # of another method
            in_use = [name for name in inner.active_adapters if name in inner._get_available_adapters()]
            check_sole_adapter([adapter_name, *in_use], self.lora_magnitude)
        with onloaded(self.get_base_layer()):
            return self.lora_variant[adapter_name].forward(self, adapter_name, x, result)


def _on_device(param: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The parameter itself if it is on the device, or else a copy there."""
    return param if param.device == device else nn.Parameter(param.detach().to(device), param.requires_grad)


@contextmanager
def preserve_requires_grad(layers: Iterable[AdaLoraLayer], adapter_name: str) -> Iterator[None]:
    """A context that keeps `requires_grad` while PEFT casts an adapter, which makes all its parameters trainable."""
    parts = [part for layer in layers for part in (layer.lora_A, layer.lora_E, layer.lora_B, layer.ranknum)]
    requires_grad = [part[adapter_name].requires_grad for part in parts]
    yield
    for part, was_trained in zip(parts, requires_grad):
        part[adapter_name].requires_grad_(was_trained)


class AdaDoraForward:
    """
    The forward pass of a layer: with an AdaDoRA adapter if it has one in use, and as PEFT's otherwise.

    It has to be the first base class. It gives the layer the memory layout of `nn.Module`, so that FSDP2's
    `fully_shard` can change the layer's class. `abc.ABC`, the first base of `AdaLoraLayer`, has another layout.
    """

    # PEFT's layers of bitsandbytes derive from our AdaLoraLayer behind nn.Module
    train = AdaLoraLayer.train

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_name = self.adadora_adapter_in_use()
        if adapter_name is None:
            return super().forward(x, *args, **kwargs)
        return self.forward_adadora(adapter_name, x, *args, **kwargs)


class SVDLinear(AdaDoraForward, AdaLoraLayer, stock.SVDLinear):
    """
    PEFT's linear layer with an AdaLoRA adapter, which can also be an AdaDoRA adapter.

    `use_dora_adaptive` (`bool`, *optional*) says whether the adapter is AdaDoRA; if `None`, the configuration decides.
    The other arguments are PEFT's. Raises a `NotImplementedError` as [`check_magnitude_support`].
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: AdaLoraConfig,
        *args: Any,
        use_dora_adaptive: Optional[bool] = None,
        **kwargs: Any,
    ) -> None:
        if use_dora_adaptive is not None:
            config = copy.copy(config)
            config.use_dora_adaptive = use_dora_adaptive
        if config.use_dora_adaptive:
            innermost = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
            check_magnitude_support(innermost, fan_in_fan_out=config.fan_in_fan_out)
        stock.SVDLinear.__init__(self, base_layer, adapter_name, config, *args, **kwargs)


class SVDConv2d(AdaDoraForward, AdaLoraLayer, stock.SVDConv2d):
    """PEFT's convolution with an AdaLoRA adapter, which can also be an AdaDoRA adapter."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Optional[type]]:
        return {(): None, ("use_dora_adaptive",): AdaDoraConv2dVariant}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: AdaLoraConfig, **kwargs) -> None:
        base_layer = self.get_base_layer()
        # AdaLoRA takes the shape of A from it, which would not fit a weight with several groups
        self.in_features = base_layer.in_channels // base_layer.groups
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
