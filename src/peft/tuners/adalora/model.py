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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer

from . import loading
from . import stock_model as stock
from .base_weight import here
from .config import AdaLoraConfig
from .kept import generation
from .layer import AdaLoraLayer, RankAllocator
from .merging import check_merge
from .names import adapted_layers
from .options import check_first_allocation, check_name, check_only_adapter, check_options
from .quantized import learn_how_to_quantize
from .regularization import add_orthogonality_loss
from .sharding import is_sharded
from .targets import check_targets


class AdaLoraModel(stock.AdaLoraModel):
    """
    PEFT's AdaLoRA model, whose adapters can also be AdaDoRA adapters (`AdaLoraConfig(use_dora_adaptive=True)`).

    What is refused for AdaDoRA is refused here for the whole model, before any of its layers has changed.
    """

    # whether the regularization has been part of a loss
    adds_regularization = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, but the orthogonality term of an AdaDoRA adapter is part of the loss in training alone."""
        if not hasattr(self, "trainable_adapter_name"):
            return self.model.forward(*args, **kwargs)
        adapter_name = self.trainable_adapter_name
        config, layers = self.peft_config[adapter_name], adapted_layers(self.model, adapter_name).values()
        if not config.use_dora_adaptive and not any(is_sharded(layer.lora_A[adapter_name]) for layer in layers):
            return super().forward(*args, **kwargs)
        outputs = self.model.forward(*args, **kwargs)
        if self.training or not config.use_dora_adaptive:
            self.adds_regularization |= add_orthogonality_loss(outputs, layers, adapter_name, config.orth_reg_weight)
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model, for the time of which m / n of each layer is kept."""
        with generation(list(self._layers())):
            return self.model.generate(*args, **kwargs)

    def _adadora_adapters(self) -> list[str]:
        return [name for name, config in self.peft_config.items() if config.use_dora_adaptive]

    def _layers(self) -> Iterator[AdaLoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, AdaLoraLayer))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._check_unmerge()  # because injecting sets the active adapter, which unmerges
        if config.use_dora_adaptive:
            check_name(adapter_name)
            check_targets(self, model, config, kwargs.get("state_dict"))
            if not config.inference_mode:
                check_options(config, adapter_name)
                # that of another adapter: this one starts with all its ranks
                config.rank_pattern = config.saved_rank_pattern = None
        before = loading.BeforeLoading(self)
        with warnings.catch_warnings():
            # the keys of AdaLoRA's pattern name E, not the module, so PEFT says that it ignores them
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.inference_mode and len(self.peft_config) > 1 and self._adadora_adapters():
            for param in before.trainable:
                param.requires_grad_(True)  # PEFT freezes all parameters with the name in theirs, at any place
        if config.use_dora_adaptive and config.inference_mode and config.rank_pattern:
            # at once, because transformers loads weights without asking for `resize_modules_by_rank_pattern`
            loading.keep_ranks_of_pattern(adapted_layers(model, adapter_name), adapter_name, config.rank_pattern)
        learn_how_to_quantize(model, self._layers())
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
        check_only_adapter(adapter_name, self._adadora_adapters())
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None and self._adadora_adapters():
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

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        check_merge(self.model, list(self._layers()), adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        self._check_unmerge()
        super().unmerge_adapter()

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            safe_merge = kwargs.get("safe_merge", False)
            check_merge(self.model, list(self._layers()), kwargs.get("adapter_names"), safe_merge)
        return super()._unload_and_optionally_merge(merge=merge, **kwargs)

    def update_and_allocate(self, global_step: int, optimizer: Optional[torch.optim.Optimizer] = None) -> None:
        """
        As PEFT's. Raises a `ValueError` at the first call if the schedule of an AdaDoRA adapter cannot work.

        `optimizer`, that of the adapter, has to be given if it keeps other weights beside those of the model, as
        schedule-free optimizers do, so that a pruned singular value does not come back with them.
        """
        check_first_allocation(self, global_step)
        stock.AdaLoraModel.update_and_allocate(self, global_step)
        if optimizer is not None:
            self.rankallocator.mask_other_weights(self.model, optimizer)

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
            loading.keep_ranks_of_pattern(layers, adapter_name, rank_pattern)
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
        saved = loading.exact_weights(saved, state_dict, model, adapter_name)
        return loading.keep_saved_ranks(saved, config, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # the mapping alone, to check the weights before AdaLoRA's implementation resizes the model
        weights = super(LoraModel, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        weights = loading.weights_of_layers(weights, model, adapter_name)
        tuner = next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)
        loading.fit_to_loaded_weights(tuner, model, config, adapter_name, weights)
        return loading.wrapped_weights(weights, model)
