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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, onload_layer

from .adadora_layer import AdaDoraMixin, frozen_stays_frozen
from .base_weight import check_magnitude_support, weight_rows
from .checkpoint import PREFIX, adapter_checksum, check_adapter_file, check_adapter_weights
from .config import AdaLoraConfig
from .layer import AdaLoraLayer, RankAllocator
from .sharding import is_partitioned, is_sharded


class AdaDoraModelMixin:
    """
    What makes an AdaLoRA model one that can have AdaDoRA adapters. It goes in front of the model's other base classes.

    What is refused for AdaDoRA is refused here for the whole model, before any of its layers has changed.
    """

    keep_shapes_on_load = False
    # so many forward passes in training without an allocation are no accident
    _forwards_until_warning = 200

    def forward_otherwise(self, *args: Any, **kwargs: Any) -> Optional[Any]:
        """
        The outputs of the model where AdaLoRA's own forward pass, which adds a regularization to the loss, does not
        work: if no adapter is in training, and if parameters are sharded. `None` if it does.
        """
        if not hasattr(self, "trainable_adapter_name"):
            return self.model.forward(*args, **kwargs)
        self._warn_if_never_allocated()
        if not any(is_sharded(param) for param in self.model.parameters()):
            return None
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), torch.Tensor):
            outputs.loss = outputs.loss + self.rankallocator.peft_config.orth_reg_weight * self._orthogonality_loss()
        return outputs

    def _warn_if_never_allocated(self) -> None:
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._forwards_until_warning -= 1
        has_allocated = self.rankallocator.exp_avg_ipt or self.rankallocator.peft_config.rank_pattern
        if self._forwards_until_warning == 0 and not has_allocated:
            warnings.warn(
                "AdaLoRA has trained for a while without an allocation, so no rank will be pruned; pass "
                "`AdaLoraCallback()` to the Trainer, or call `model.base_model.update_and_allocate(step)` after each "
                "optimizer step."
            )

    def _orthogonality_loss(self) -> torch.Tensor:
        """AdaLoRA's regularization, the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖, of parameters that may be sharded."""
        losses = []
        for name, param in self.model.named_parameters():
            if ("lora_A" in name or "lora_B" in name) and self.trainable_adapter_name in name:
                rows = param.full_tensor() if is_sharded(param) else param
                rows = rows if "lora_A" in name else rows.T
                losses.append(
                    torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
                )
        return torch.stack(losses).mean()

    def _adadora_layers(self) -> Iterator[AdaDoraMixin]:
        return (module for module in self.model.modules() if isinstance(module, AdaDoraMixin))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._check_unmerge()  # because injecting sets the active adapter, which unmerges
        layers = self._check_targets(model, config, kwargs.get("state_dict")) if config.use_dora_adaptive else {}
        check_adapter_file(config, layers)
        with warnings.catch_warnings():
            # the keys of AdaLoRA's pattern name E, not the module, so PEFT says that it ignores them
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.inference_mode and config.rank_pattern:
            # at once, because transformers loads weights without asking for `resize_modules_by_rank_pattern`
            pattern = {
                name: kept for name, kept in config.rank_pattern.items() if name.partition(".lora_E")[0] in layers
            }
            self.keep_ranks(pattern, adapter_name)
        quantization_config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        if hasattr(quantization_config, "get_apply_tensor_subclass"):
            torchao_config = quantization_config.get_apply_tensor_subclass()
            for layer in self._adadora_layers():
                layer.torchao_config = torchao_config
        if config.use_dora_adaptive and hasattr(model, "add_model_tags"):
            model.add_model_tags("adadora")  # of the model card that PEFT writes
        if not config.inference_mode:
            # PEFT's __init__ does so for the first adapter alone
            self.trainable_adapter_name = adapter_name
            self.rankallocator = RankAllocator(model, config, adapter_name)

    def _check_targets(
        self, model: nn.Module, config: AdaLoraConfig, state_dict: Optional[dict[str, torch.Tensor]]
    ) -> dict[str, tuple[int, int]]:
        """The shapes (out, in) of the weights that will be adapted, by the names of their modules."""
        # on a copy, because `inject_adapter` warns about what it resolves in the config itself
        config = self._prepare_adapter_config(copy.copy(config), self.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        names_in_state_dict = {key.rpartition(f".{self.prefix}")[0] for key in state_dict or ()}
        inside_adapter_layer, layers = (), {}
        for name, module in model.named_modules():
            if not name or name.startswith(inside_adapter_layer):
                continue
            base_layer = module
            if isinstance(module, BaseTunerLayer):
                base_layer = module.get_base_layer()
                inside_adapter_layer = (*inside_adapter_layer, f"{name}.")
            if name in names_in_state_dict if state_dict else self._check_target_module_exists(config, name):
                check_magnitude_support(base_layer, name)
                layers[name] = tuple(weight_rows(base_layer).shape)
        return layers

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        layers = [layer for layer in self._adadora_layers() if adapter_name in layer.lora_magnitude]
        with frozen_stays_frozen(layers, adapter_name):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer in layers:
            layer.restore_magnitude_precision(adapter_name)

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
        if kwargs.get("adapter_names") is not None and any(
            layer.use_dora_adaptive for layer in self._adadora_layers()
        ):
            raise NotImplementedError(
                "`adapter_names`, different adapters within a batch, is not supported with AdaDoRA adapters; call "
                "`set_adapter` and use one adapter at a time."
            )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _check_unmerge(self) -> None:
        for layer in self._adadora_layers():
            layer.check_unmerge()

    def _check_merge(self, adapter_names: Optional[list[str]], safe_merge: bool) -> None:
        for layer in self._adadora_layers():
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

    def keep_ranks(self, rank_pattern: dict[str, list[bool] | torch.Tensor], adapter_name: str) -> bool:
        """
        Drop the pruned singular triplets of an adapter if AdaLoRA's own way would lose something: magnitudes, or what
        will be loaded into an adapter on the meta device. Tells whether it did. The arguments are those of
        `resize_modules_by_rank_pattern`.
        """
        masks = {}
        for name, mask in rank_pattern.items():
            layer_name = name.removesuffix(f".{adapter_name}").rpartition(".")[0]
            masks[self.model.get_submodule(layer_name)] = torch.as_tensor(mask).view(-1)
        if all(adapter_name not in layer.lora_magnitude and not layer.lora_E[adapter_name].is_meta for layer in masks):
            return False
        for layer, mask in masks.items():
            if layer.r[adapter_name] != int(mask.sum()):
                layer.keep_ranks(adapter_name, mask.nonzero().view(-1))
        return True

    @classmethod
    def _keep_ranks_of_state_dict(
        cls, rank_pattern: dict[str, list[bool]], state_dict: dict[str, torch.Tensor], adapter_name: str
    ) -> None:
        """Drop the pruned triplets from what is saved of an adapter that was injected into a model."""
        for name, kept in rank_pattern.items():
            layer_name = name.rpartition(".")[0]
            kept = torch.as_tensor(kept).view(-1)
            for part, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                key = f"{layer_name}.{part}.{adapter_name}"
                if state_dict[key].shape[dim] == len(kept):
                    indices = kept.nonzero().view(-1).to(state_dict[key].device)
                    state_dict[key] = state_dict[key].index_select(dim, indices)

    @classmethod
    def _note_checksum(cls, config: AdaLoraConfig, adapter_name: str, saved: dict[str, torch.Tensor]) -> None:
        if config.use_dora_adaptive and not any(
            tensor.is_meta or is_sharded(tensor) or is_partitioned(tensor) for tensor in saved.values()
        ):
            config.weights_sha256 = adapter_checksum(
                {cls._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in saved.items()}
            )

    @classmethod
    def _check_loaded(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Check weights to load by their names in the model, and fill them up if the model keeps its shapes."""
        keeps_shapes = getattr(model, "keep_shapes_on_load", False)
        saved = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in state_dict.items()}
        layers = {
            name.removeprefix(PREFIX): (len(layer.lora_B[adapter_name]), layer.lora_A[adapter_name].shape[1])
            for name, layer in model.named_modules()
            if isinstance(layer, AdaLoraLayer) and adapter_name in layer.lora_A
        }
        max_rank = config.init_r if keeps_shapes else None
        check_adapter_weights(saved, layers, config, "the weights of the adapter", max_rank)
        return cls._fill_up_ranks(model, config, adapter_name, state_dict) if keeps_shapes else state_dict

    @classmethod
    def _fill_up_ranks(
        cls, model: nn.Module, config: AdaLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        Give the weights of a pruned adapter the shapes that it has in the model: its triplets first, and behind them
        those of the model with a singular value of 0. The rank pattern in `config` is set to match.
        """
        filled, rank_pattern = dict(state_dict), {}
        for name, layer in model.named_modules():
            if not isinstance(layer, AdaLoraLayer) or adapter_name not in layer.lora_A:
                continue
            rank = layer.lora_E[adapter_name].shape[0]
            kept = len(state_dict.get(f"{name}.lora_E.{adapter_name}", layer.lora_E[adapter_name]))
            rank_pattern[f"{name.removeprefix(PREFIX)}.lora_E"] = [True] * kept + [False] * (rank - kept)
            for part, params, dim in (
                ("lora_A", layer.lora_A, 0),
                ("lora_E", layer.lora_E, 0),
                ("lora_B", layer.lora_B, 1),
            ):
                value = state_dict.get(f"{name}.{part}.{adapter_name}")
                if value is None or value.shape[dim] >= rank:
                    continue
                rest = params[adapter_name].detach().narrow(dim, kept, rank - kept).to(value)
                if part == "lora_E":
                    rest = torch.zeros_like(rest)
                filled[f"{name}.{part}.{adapter_name}"] = torch.cat([value, rest], dim)
        is_pruned = not all(all(kept) for kept in rank_pattern.values())
        config.rank_pattern = rank_pattern if is_pruned else None
        return filled
