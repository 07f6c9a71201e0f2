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

"""PEFT's AdaLoRA model with AdaDoRA: which layers can be adapted, what is refused, saving, loading, merging."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer

from . import stock_model as stock
from .base_weight import check_not_shared, here
from .config import AdaLoraConfig
from .kept import generation
from .layer import AdaLoraLayer, RankAllocator
from .loading import (
    BeforeLoading,
    exact_weights,
    fit_to_loaded_weights,
    keep_ranks_of_pattern,
    keep_saved_ranks,
    weights_of_layers,
    wrapped_weights,
)
from .names import adapted_layers
from .options import check_first_allocation, check_name, check_options
from .regularization import orthogonality_loss
from .targets import check_targets


class AdaLoraModel(stock.AdaLoraModel):
    """
    PEFT's AdaLoRA model, whose adapters can also be AdaDoRA adapters (`AdaLoraConfig(use_dora_adaptive=True)`).

    What is refused for AdaDoRA is refused here for the whole model, before any of its layers has changed.
    """

    # what fits loaded weights to adapters that an optimizer holds and that must keep their shapes, if there are any
    fit_loaded_weights: Optional[Callable] = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, but the orthogonality term of an AdaDoRA adapter is part of the loss in training alone."""
        if not hasattr(self, "trainable_adapter_name"):
            return self.model.forward(*args, **kwargs)
        config = self.peft_config[self.trainable_adapter_name]
        layers = list(adapted_layers(self.model, self.trainable_adapter_name).values())
        is_sharded = any(hasattr(layer.lora_A[self.trainable_adapter_name], "full_tensor") for layer in layers)
        if not config.use_dora_adaptive and not is_sharded:
            return super().forward(*args, **kwargs)
        outputs = self.model.forward(*args, **kwargs)
        is_training = self.training or not config.use_dora_adaptive
        if is_training and layers and isinstance(getattr(outputs, "loss", None), torch.Tensor):
            regularization = orthogonality_loss(layers, self.trainable_adapter_name)
            outputs.loss = outputs.loss + config.orth_reg_weight * regularization
            self.adds_regularization = True
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model, for the time of which m / n of each layer is kept."""
        with generation(list(self._layers())):
            return self.model.generate(*args, **kwargs)

    def _has_adadora(self) -> bool:
        return any(config.use_dora_adaptive for config in self.peft_config.values())

    def _layers(self) -> Iterator[AdaLoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, AdaLoraLayer))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._check_unmerge()  # because injecting sets the active adapter, which unmerges
        if config.use_dora_adaptive:
            check_name(adapter_name)
            check_targets(self, model, config, kwargs.get("state_dict"), AdaLoraLayer.resolve_backend)
            if not config.inference_mode:
                check_options(config, adapter_name)
                # that of another adapter: this one starts with all its ranks
                config.rank_pattern = config.saved_rank_pattern = None
        before = BeforeLoading(self)
        with warnings.catch_warnings():
            # the keys of AdaLoRA's pattern name E, not the module, so PEFT says that it ignores them
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.inference_mode and len(self.peft_config) > 1 and self._has_adadora():
            for param in before.trainable:
                param.requires_grad_(True)  # PEFT freezes all parameters with the name in theirs, at any place
        if config.use_dora_adaptive and config.inference_mode and config.rank_pattern:
            # at once, because transformers loads weights without asking for `resize_modules_by_rank_pattern`
            keep_ranks_of_pattern(adapted_layers(model, adapter_name), adapter_name, config.rank_pattern)
        quantization_config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        for layer in self._layers():
            if hasattr(layer.quantization_backend, "get_apply_tensor_subclass"):  # torchao's
                how = getattr(quantization_config, "get_apply_tensor_subclass", None)
                layer.quantization_backend.get_apply_tensor_subclass = how
        if config.use_dora_adaptive and hasattr(model, "add_model_tags"):
            model.add_model_tags("adadora")  # of the model card that PEFT writes
        if not config.inference_mode:
            # PEFT's __init__ does so for the first adapter alone
            self.trainable_adapter_name = adapter_name
            self.rankallocator = RankAllocator(model, config, adapter_name)
        if config.was_loaded or config.inference_mode:
            self.__dict__.setdefault("_before_loading", {})[adapter_name] = before

    def _create_and_replace(
        self, lora_config: AdaLoraConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        with here(base_layer) if lora_config.use_dora_adaptive else nullcontext():
            # not `super()`, because MixedModel calls this as a function
            stock.AdaLoraModel._create_and_replace(self, lora_config, adapter_name, target, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        layers = [layer for layer in self._layers() if adapter_name in layer.lora_magnitude]
        with ExitStack() as stack:
            magnitudes = [stack.enter_context(layer.magnitude_aside(adapter_name)) for layer in layers]
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer, magnitude in zip(layers, magnitudes):
            dtype = torch.promote_types(magnitude.dtype, torch.float32)
            magnitude.data = magnitude.data.to(dtype if autocast_adapter_dtype else layer.lora_E[adapter_name].dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_unmerge()
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if len(names) > 1 and name in self.peft_config and self.peft_config[name].use_dora_adaptive:
                raise NotImplementedError(
                    f"The AdaDoRA adapter {name!r} has to be the only active adapter but got {names}; choose one of "
                    "them."
                )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None and any(layer.use_dora_adaptive for layer in self._layers()):
            raise NotImplementedError(
                "`adapter_names`, different adapters within a batch, is not supported with AdaDoRA adapters; call "
                "`set_adapter` and use one adapter at a time."
            )
        if self.training and torch.is_grad_enabled() and hasattr(self, "rankallocator"):
            self.rankallocator.count_forward()
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _check_unmerge(self) -> None:
        for layer in self._layers():
            layer.check_unmerge()

    def _check_merge(self, adapter_names: Optional[list[str]], safe_merge: bool) -> None:
        to_merge = {layer: layer.adapter_to_merge(adapter_names) for layer in self._layers()}
        to_merge = {layer: adapter_name for layer, adapter_name in to_merge.items() if adapter_name is not None}
        check_not_shared(self.model, list(to_merge))
        for layer, adapter_name in to_merge.items() if safe_merge else ():
            with here(layer.get_base_layer()):
                layer.checked_merged_weight(adapter_name)

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

    def update_and_allocate(self, global_step: int, optimizer: Optional[torch.optim.Optimizer] = None) -> None:
        """
        As PEFT's. Raises a `ValueError` at the first call if the schedule of an AdaDoRA adapter cannot work.

        `optimizer`, that of the adapter, has to be given if it keeps other weights beside those of the model, as
        schedule-free optimizers do, so that a pruned singular value does not come back with them.
        """
        allocator = self.rankallocator
        if allocator.peft_config.use_dora_adaptive and not allocator.has_started:
            check_first_allocation(self, global_step)
        allocator.has_started = True
        stock.AdaLoraModel.update_and_allocate(self, global_step)
        if optimizer is not None:
            allocator.mask_other_weights(self.model, optimizer)

    def resize_modules_by_rank_pattern(
        self, rank_pattern: dict[str, list[bool] | torch.Tensor], adapter_name: str
    ) -> None:
        """
        Drop the pruned triplets of an adapter: those that a pattern, by names of `lora_E` with or without the name of
        the adapter, does not keep. Magnitudes and dtypes of AdaDoRA stay; adapters on the meta device can be resized.
        """
        layers = adapted_layers(self.model, adapter_name)
        if any(
            adapter_name in layer.lora_magnitude or layer.lora_E[adapter_name].is_meta for layer in layers.values()
        ):
            keep_ranks_of_pattern(layers, adapter_name, rank_pattern)
        else:
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
        whole = copy.copy(config)
        whole.rank_pattern = None  # what PEFT does with it knows neither exact names nor adapters that were injected
        saved = super()._get_adapter_state_dict(model, whole, adapter_name, state_dict, unwanted_adapter_names)
        return keep_saved_ranks(exact_weights(saved, state_dict, model, adapter_name), config, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # the mapping alone, to check the weights before AdaLoRA's implementation resizes the model
        weights = super(LoraModel, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        weights = weights_of_layers(weights, model, adapter_name)
        tuner = next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)
        weights = fit_to_loaded_weights(tuner, model, config, adapter_name, weights)
        return wrapped_weights(weights, model)
