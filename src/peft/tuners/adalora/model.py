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
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, onload_layer

from . import stock_model as stock
from .config import AdaLoraConfig
from .layer import AdaLoraLayer, SVDLinear, check_magnitude_support


class AdaLoraModel(stock.AdaLoraModel):
    """
    PEFT's AdaLoRA model, whose adapters can also be AdaDoRA adapters (`AdaLoraConfig(use_dora_adaptive=True)`).

    What is refused for AdaDoRA is refused here for the whole model, before any of its layers has changed.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "trainable_adapter_name"):
            # AdaLoRA's forward adds the regularization of the adapter in training to the loss; here none is in training
            return self.model.forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def _svd_linear_layers(self) -> Iterator[SVDLinear]:
        return (module for module in self.model.modules() if isinstance(module, SVDLinear))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._check_unmerge()  # because injecting sets the active adapter, which unmerges
        if config.use_dora_adaptive:
            self._check_targets(model, config, kwargs.get("state_dict"))
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_targets(
        self, model: nn.Module, config: AdaLoraConfig, state_dict: Optional[dict[str, torch.Tensor]]
    ) -> None:
        # on a copy, because `inject_adapter` warns about what it resolves in the config itself
        config = self._prepare_adapter_config(copy.copy(config), self.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        names_in_state_dict = {key.rpartition(f".{self.prefix}")[0] for key in state_dict or ()}
        inside_adapter_layer = ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside_adapter_layer):
                continue
            base_layer = module
            if isinstance(module, BaseTunerLayer):
                base_layer = module.get_base_layer()
                inside_adapter_layer = (*inside_adapter_layer, f"{name}.")
            if name in names_in_state_dict if state_dict else self._check_target_module_exists(config, name):
                check_magnitude_support(base_layer, name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer in self._svd_linear_layers():
            if adapter_name in layer.lora_magnitude:
                layer.restore_magnitude_precision(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_unmerge()
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if len(names) > 1 and name in self.peft_config and self.peft_config[name].use_dora_adaptive:
                raise NotImplementedError(
                    f"The AdaDoRA adapter {name!r} has to be the only active adapter but got {names}; choose one of them."
                )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _check_unmerge(self) -> None:
        for layer in self._svd_linear_layers():
            layer.check_unmerge()

    def _check_merge(self, adapter_names: Optional[list[str]], safe_merge: bool) -> None:
        for layer in self._svd_linear_layers():
            adapter_name = layer.adapter_to_merge(adapter_names)
            if adapter_name is not None and safe_merge:
                with onload_layer(layer):
                    layer.check_merge_is_finite(adapter_name)

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        self._check_unmerge()
        super().unmerge_adapter()

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge(kwargs.get("adapter_names"), kwargs.get("safe_merge", False))
        return super()._unload_and_optionally_merge(merge=merge, **kwargs)

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
        masks = {}
        for name, mask in rank_pattern.items():
            layer_name = name.removesuffix(f".{adapter_name}").rpartition(".")[0]
            masks[self.model.get_submodule(layer_name)] = torch.as_tensor(mask).view(-1)

        if all(adapter_name not in layer.lora_magnitude and not layer.lora_E[adapter_name].is_meta for layer in masks):
            super().resize_modules_by_rank_pattern(rank_pattern, adapter_name)
            return
        for layer, mask in masks.items():
            layer.keep_ranks(adapter_name, mask.nonzero().view(-1))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # the mapping alone, to check the magnitudes before AdaLoRA's implementation resizes the model
        mapped = super(LoraModel, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        cls._check_magnitudes(model, adapter_name, mapped)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _check_magnitudes(cls, model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
        expected = {
            f"{name}.lora_magnitude.{adapter_name}": module.lora_magnitude[adapter_name].shape
            for name, module in model.named_modules()
            if isinstance(module, AdaLoraLayer) and adapter_name in module.lora_magnitude
        }
        for key, shape in expected.items():
            saved_key = cls._remove_adapter_name_from_key(key, adapter_name)
            if key not in state_dict:
                raise ValueError(
                    f"The adapter uses `use_dora_adaptive=True` but {saved_key!r} is missing from its weights."
                )
            if state_dict[key].shape != shape:
                raise ValueError(
                    f"The weights have {saved_key!r} of shape {tuple(state_dict[key].shape)}, but the layer needs "
                    f"{tuple(shape)}."
                )
        for key in state_dict:
            if key not in expected and ".lora_magnitude" in key:
                raise ValueError(
                    f"The weights have {key!r}, but the adapter has no such magnitude; set `use_dora_adaptive=True` in "
                    "its config, or adapt the layers that it was trained on."
                )
