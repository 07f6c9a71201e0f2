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

"""PEFT's AdaLoRA model with AdaDoRA: which layers are adapted, refusals, saving, loading and merging."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners.tuners_utils import BaseTunerLayer

from . import loading
from . import stock_model as stock
from .base_weight import onloaded
from .cache import generation
from .config import AdaLoraConfig
from .importance import all_finite, gradients_of
from .layer import AdaLoraLayer, RankAllocator, preserve_requires_grad
from .merging import check_merge
from .parameter_names import adapted_layers, layer_of_E, unwrapped_name
from .quantized import learn_how_to_quantize
from .regularization import add_orthogonality_loss, factors_to_orthogonalize, orthogonalize_
from .sharding import is_sharded
from .supported_layers import avoid_fast_path, check_targets
from .validation import check_allocation, check_name, check_options
from .variants import check_sole_adapter


class AdaLoraModel(stock.AdaLoraModel):
    """
    PEFT's AdaLoRA model, whose adapters can also be AdaDoRA adapters (`AdaLoraConfig(use_dora_adaptive=True)`).

    It refuses what AdaDoRA cannot do for the whole model, before any layer changes.
    """

    trainable_adapter_name: Optional[str] = None  # until an adapter is added to be trained

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_read_kept)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Add the orthogonality term to the loss as PEFT does, unless the regularization is decoupled. The term of an
        AdaDoRA adapter is added only in training mode, and only while this adapter is active.
        """
        adapter_name = self.trainable_adapter_name
        if adapter_name is None or self.peft_config[adapter_name].orth_reg_decoupled:
            return self.model.forward(*args, **kwargs)
        config, layers = self.peft_config[adapter_name], adapted_layers(self.model, adapter_name).values()
        if not config.use_dora_adaptive and not any(is_sharded(layer.lora_A[adapter_name]) for layer in layers):
            return super().forward(*args, **kwargs)
        outputs = self.model.forward(*args, **kwargs)
        in_use = (not layer.disable_adapters and adapter_name in layer.active_adapters for layer in layers)
        if not config.use_dora_adaptive or (self.training and any(in_use)):
            # not an attribute of the model, because DataParallel copies the model for its replicas
            note = partial(setattr, self.rankallocator, "expects_regularization", False)
            add_orthogonality_loss(outputs, layers, adapter_name, config.orth_reg_weight, on_gradient=note)
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call `generate` of the base model, and compute m / n of each layer only once for it."""
        with generation():
            return self.model.generate(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name == self.trainable_adapter_name:
            self.trainable_adapter_name = None  # an adapter to predict may get the name

    def _adadora_adapters(self) -> list[str]:
        # an injected adapter shares the dictionary with those of other methods
        return [name for name, config in self.peft_config.items() if getattr(config, "use_dora_adaptive", False)]

    def _layers(self) -> list[AdaLoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, AdaLoraLayer)]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._check_unmerge()  # because injecting sets the active adapter, which unmerges
        source = self.trainable_adapter_name
        # there can be no second trainable adapter; TRL's trainers ask in this way for a frozen reference
        is_reference = config.use_dora_adaptive and adapter_name != source and config is self.peft_config.get(source)
        if config.use_dora_adaptive:
            check_name(adapter_name)
            if config.modules_to_save is None and config.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
                config.modules_to_save = []  # PEFT extends it after the injection; the copy shares the list
            # a copy, because the config may serve other models
            config = self.peft_config[adapter_name] = copy.copy(config)
            config.inference_mode = config.inference_mode or is_reference
            check_targets(self, model, config, kwargs.get("state_dict"))
        if config.use_dora_adaptive and not config.inference_mode:
            check_options(config, adapter_name)
            config.rank_pattern = None  # of another adapter
        trainable = [param for param in self.model.parameters() if param.requires_grad]
        with warnings.catch_warnings():
            # the keys of AdaLoRA's pattern name E, not the module, so PEFT says that it ignores them
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.inference_mode and len(self.peft_config) > 1 and self._adadora_adapters():
            for param in trainable:
                param.requires_grad_(True)  # PEFT freezes all parameters that have the name anywhere in theirs
        if is_reference:
            for layer in adapted_layers(model, source).values():
                loading.copy_adapter(layer, source, adapter_name)
        elif config.use_dora_adaptive and config.inference_mode:
            # transformers loads weights without asking for their ranks, so the layers need them from the start
            loading.set_ranks(adapted_layers(self.model, adapter_name), config.rank_pattern or {}, adapter_name)
        learn_how_to_quantize(model, self._layers())
        if config.use_dora_adaptive:
            avoid_fast_path(model)
            if hasattr(model, "add_model_tags"):
                model.add_model_tags("adadora")  # for the model card that PEFT writes
        if not config.inference_mode:
            # PEFT's __init__ does so for the first adapter alone
            self.trainable_adapter_name = adapter_name
            self.rankallocator = RankAllocator(model, config, adapter_name)

    def _create_and_replace(
        self, lora_config: AdaLoraConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        with onloaded(base_layer) if lora_config.use_dora_adaptive else nullcontext():
            # not `super()`, because MixedModel calls this as a function
            stock.AdaLoraModel._create_and_replace(self, lora_config, adapter_name, target, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        layers = [layer for layer in self._layers() if adapter_name in layer.lora_magnitude]
        with preserve_requires_grad(layers, adapter_name):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer in layers if not autocast_adapter_dtype else ():
            magnitude = layer.lora_magnitude[adapter_name]
            magnitude.data = magnitude.data.to(layer.lora_E[adapter_name].dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_unmerge()
        check_sole_adapter(adapter_name, self._adadora_adapters())
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None and self._adadora_adapters():
            raise NotImplementedError(
                "`adapter_names`, different adapters within a batch, is not supported with AdaDoRA adapters; call "
                "`set_adapter` and use one adapter at a time."
            )
        if self.training and torch.is_grad_enabled() and self.trainable_adapter_name is not None:
            self.rankallocator.count_forward(self.model)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _check_unmerge(self) -> None:
        for layer in self._layers():
            layer.check_unmerge()

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        check_merge(self.model, self._layers(), adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        self._check_unmerge()
        super().unmerge_adapter()

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            check_merge(self.model, self._layers(), kwargs.get("adapter_names"), kwargs.get("safe_merge", False))
        return super()._unload_and_optionally_merge(merge=merge, **kwargs)

    def update_and_allocate(self, global_step: int, optimizer: Optional[torch.optim.Optimizer] = None) -> None:
        """
        Update the importance scores and prune. Call it after `optimizer.step()` and before `optimizer.zero_grad()`.

        Args:
            global_step (`int`): The optimizer step, counted from 0.
            optimizer (`torch.optim.Optimizer`, *optional*): Needed for the decoupled regularization, and for an
                optimizer that keeps further weights, as schedule-free ones do.

        Raises:
            `ValueError`: If no factor has a gradient, and as [`check_allocation`] and [`factors_to_orthogonalize`].
                Nothing has changed then.
        """
        check_allocation(self, global_step)
        config = self.peft_config[self.trainable_adapter_name]
        factors = factors_to_orthogonalize(self.model, self.trainable_adapter_name, config, optimizer)
        allocator, last = self.rankallocator, config.total_step - config.tfinal
        if global_step == last and allocator.kept and not allocator.exp_avg_ipt:
            if sum(map(sum, allocator.kept.values())) <= allocator.target_bgt:
                global_step = last + 1  # a second call, or pruned weights have just been loaded: only mask
            elif config.use_dora_adaptive:
                allocator.update_ipt(self.model)  # weights of other ranks have just been loaded
        if global_step > last:
            config.rank_pattern = allocator.kept or config.rank_pattern
        stock.AdaLoraModel.update_and_allocate(self, global_step)
        if optimizer is not None:
            allocator.mask_other_weights(self.model, optimizer)
        if factors:  # unless a gradient scaler has skipped this step
            finite = allocator.finite if global_step < last else all_finite(gradients_of(self.model))
            orthogonalize_(factors, config.orth_reg_weight * finite)

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        """
        Drop the triplets that a rank pattern does not keep. Its keys are names of `lora_E`, with or without the
        adapter's name, and its values masks (r,). AdaDoRA adapters keep their magnitudes and dtypes.
        """
        layers = adapted_layers(self.model, adapter_name)
        if not any(
            adapter_name in layer.lora_magnitude or layer.lora_E[adapter_name].is_meta for layer in layers.values()
        ):
            super().resize_modules_by_rank_pattern(rank_pattern, adapter_name)
            return
        for key, kept in rank_pattern.items():
            if (name := layer_of_E(key, adapter_name)) in layers:
                loading.keep_triplets(layers[name], adapter_name, kept)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: loading.Weights, **_: Any
    ) -> loading.Weights:
        # not PEFT's implementation, which knows neither exact names, nor wrappers, nor adapters that were injected
        biases = cls._get_learnable_bias_state_dict(model, state_dict, config)
        weights = loading.weights_to_save(state_dict, model, config, adapter_name)
        return {**{unwrapped_name(key): value for key, value in biases.items()}, **weights}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: loading.Weights
    ) -> loading.Weights:
        # not PEFT's implementation, which resizes the model before the weights are checked, and knows no wrappers
        tuner = next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)
        return loading.weights_to_load(state_dict, model, tuner, config, adapter_name)


def _read_kept(tuner: AdaLoraModel, incompatible_keys: Any) -> None:
    """Tell the allocator which triplets the loaded weights keep, if weights of its adapter have been loaded."""
    name = tuner.trainable_adapter_name
    if name is not None and not any(key.endswith(f".lora_E.{name}") for key in incompatible_keys.missing_keys):
        tuner.rankallocator.read_kept(tuner.model)
