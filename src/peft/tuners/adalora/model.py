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

import copy
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer

from . import stock_layer
from . import stock_model as stock
from .adadora_model import AdaDoraModelMixin
from .config import AdaLoraConfig


class AdaLoraModel(AdaDoraModelMixin, stock.AdaLoraModel):
    """
    PEFT's AdaLoRA model, whose adapters can also be AdaDoRA adapters (`AdaLoraConfig(use_dora_adaptive=True)`).

    Args:
        keep_shapes_on_load (`bool`):
            Whether loading pruned weights into an adapter that exists keeps its parameters, which an optimizer may
            hold, with the pruned triplets masked, instead of resizing the adapter to the ranks kept.
            [`AdaLoraCallback`] sets it. Defaults to `False`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.forward_otherwise(*args, **kwargs)
        return super().forward(*args, **kwargs) if outputs is None else outputs

    def _check_targets(
        self, model: nn.Module, config: AdaLoraConfig, state_dict: Optional[dict[str, torch.Tensor]]
    ) -> dict[str, tuple[int, int]]:
        layers = super()._check_targets(model, config, state_dict)
        if not hasattr(stock_layer, "SVDConv2d"):
            for name in layers:
                module = model.get_submodule(name)
                if isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Conv2d):
                    raise NotImplementedError(
                        f"Module {name!r} is a Conv2d, which AdaLoRA adapts from PEFT 0.20 on; leave it out of "
                        "`target_modules`, or upgrade PEFT."
                    )
        return layers

    def resize_modules_by_rank_pattern(
        self, rank_pattern: dict[str, list[bool] | torch.Tensor], adapter_name: str
    ) -> None:
        """
        Drop the pruned singular triplets of an adapter.

        An AdaDoRA adapter keeps its magnitudes, and all that remains keeps its dtype. Adapters on the meta device
        (`low_cpu_mem_usage=True`) can be resized too.

        Args:
            rank_pattern (`dict[str, list[bool] | torch.Tensor]`):
                For each `lora_E`, by its name in the model with or without the name of the adapter, which triplets to
                keep.
            adapter_name (`str`):
                The adapter.
        """
        if not self.keep_ranks(rank_pattern, adapter_name):
            super().resize_modules_by_rank_pattern(rank_pattern, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdaLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        if hasattr(model, "resize_state_dict_by_rank_pattern") or not config.rank_pattern:
            saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        else:
            # the adapter was injected into a model that knows nothing of ranks
            whole_config = copy.copy(config)
            whole_config.rank_pattern = None
            saved = super()._get_adapter_state_dict(
                model, whole_config, adapter_name, state_dict, unwanted_adapter_names
            )
            config.rank_pattern = {
                name.removesuffix(f".{adapter_name}"): kept for name, kept in config.rank_pattern.items()
            }
            cls._keep_ranks_of_state_dict(config.rank_pattern, saved, adapter_name)
        cls._note_checksum(config, adapter_name, saved)
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # the mapping alone, to check the weights before AdaLoRA's implementation resizes the model
        mapped = super(LoraModel, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        checked = cls._check_loaded(model, config, adapter_name, mapped)
        if getattr(model, "keep_shapes_on_load", False) or not hasattr(model, "resize_modules_by_rank_pattern"):
            # without AdaLoraModel, the adapter got its ranks when it was injected
            return checked
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
