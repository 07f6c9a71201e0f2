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

from typing import Optional

import torch
from torch import nn

from . import stock_layer as stock
from .adadora_layer import AdaDoraConv2dMixin, AdaDoraMixin
from .allocator import RankAllocatorMixin
from .base_weight import check_magnitude_support, checked_config
from .config import AdaLoraConfig
from .sharding import has_sharded_parameters


class AdaLoraLayer(stock.AdaLoraLayer):
    """
    PEFT's AdaLoRA layer with a place for magnitudes: `lora_magnitude`, one of shape (out, 1) per AdaDoRA adapter.
    """

    adapter_layer_names = (*stock.AdaLoraLayer.adapter_layer_names, "lora_magnitude")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: AdaLoraConfig, **kwargs) -> None:
        if not hasattr(self, "lora_magnitude"):
            # the constructors of PEFT's layers call the __init__ of PEFT's AdaLoraLayer, but all of them come here
            self.lora_magnitude = nn.ParameterDict({})
        if config.use_dora_adaptive:
            check_magnitude_support(self.get_base_layer())
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)


class SVDLinear(AdaDoraMixin, AdaLoraLayer, stock.SVDLinear):
    """
    PEFT's linear layer with an AdaLoRA adapter, which can also be an AdaDoRA adapter.

    Args:
        base_layer (`nn.Module`):
            The layer to adapt. Its weight W of shape (out, in) is frozen.
        adapter_name (`str`):
            The name of the adapter.
        config ([`AdaLoraConfig`]):
            The configuration of the adapter.
        r (`int`):
            The initial rank.
        lora_alpha (`int`):
            The numerator of the scaling of the update.
        use_dora_adaptive (`bool`, *optional*):
            Whether this is an AdaDoRA adapter. If `None`, the configuration says so.

    Raises:
        `NotImplementedError`: If it is an AdaDoRA adapter and the layer is not supported, see
            [`check_magnitude_support`].
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: AdaLoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        use_dora_adaptive: Optional[bool] = None,
        **kwargs,
    ) -> None:
        config = checked_config(config, base_layer, use_dora_adaptive)
        stock.SVDLinear.__init__(self, base_layer, adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs)


if hasattr(stock, "SVDConv2d"):  # not in PEFT 0.19

    class SVDConv2d(AdaDoraConv2dMixin, AdaLoraLayer, stock.SVDConv2d):
        """PEFT's convolution with an AdaLoRA adapter, which can also be an AdaDoRA adapter."""


class RankAllocator(RankAllocatorMixin, stock.RankAllocator):
    """PEFT's rank allocator, which decides the ranks from the importance of A, E and B but not of the magnitudes."""

    def reset_ipt(self) -> None:
        super().reset_ipt()
        self._flat_scores = {}

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        if has_sharded_parameters(model):
            return self.mask_sharded_to_budget(model, budget)
        return super().mask_to_budget(model, budget)

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool] | torch.Tensor]) -> None:
        if has_sharded_parameters(model):
            self.mask_sharded_using_rank_pattern(model, rank_pattern)
        else:
            super().mask_using_rank_pattern(model, rank_pattern)
