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

from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .sharding import copy_whole_, has_master_copy, is_sharded, whole, whole_shape


class RankAllocatorMixin:
    """
    What AdaDoRA changes in AdaLoRA's rank allocator: magnitudes take no part, all scores are updated at once,
    parameters may be sharded, and the state can be saved.

    Where the parameters are sharded (DTensor), the importance is that of the whole ones, the same on every process.
    """

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """
        Update the sensitivity and the uncertainty of every entry of A, E and B. The scores are PEFT's, bit for bit,
        but all parameters of a device and dtype are updated at once. A parameter without a gradient counts as one of
        gradient zero.
        """
        groups = {}
        for name, param in model.named_parameters():
            if "lora_" in name and self.adapter_name in name and "lora_magnitude" not in name:
                groups.setdefault((param.device, param.dtype, is_sharded(param)), {})[name] = param
        for group, params in groups.items():
            ipt, exp_avg_ipt, exp_avg_unc = self._scores_of(group, params)
            if group[-1]:
                products = [param * self._gradient(name, param) for name, param in params.items()]
                torch.cat([product.full_tensor().reshape(-1) for product in products], out=ipt).abs_()
                change = torch.empty_like(ipt)
            else:
                change = torch.cat([self._gradient(name, param).reshape(-1) for name, param in params.items()])
                torch.cat([whole(param).reshape(-1) for param in params.values()], out=ipt).mul_(change).abs_()
            # each product and each sum is rounded by itself, as in PEFT: `add` with `alpha` would fuse the two
            torch.mul(ipt, 1 - self.beta1, out=change)
            exp_avg_ipt.mul_(self.beta1).add_(change)
            torch.sub(ipt, exp_avg_ipt, out=change).abs_().mul_(1 - self.beta2)
            exp_avg_unc.mul_(self.beta2).add_(change)

    def _scores_of(self, group: Hashable, params: dict[str, nn.Parameter]) -> list[torch.Tensor]:
        """The three scores of some parameters, each as one flat tensor of which PEFT's dicts hold views."""
        flat_scores, views = self._flat_scores.get(group, ([], {}))
        scores = (self.ipt, self.exp_avg_ipt, self.exp_avg_unc)
        current = [score.get(name) for score in scores for name in params]
        if len(current) != len(views) or any(id(score) not in views for score in current):
            flat_scores, views = [], {}
            shapes = {name: whole_shape(param) for name, param in params.items()}
            for score in scores:
                old = [score.get(name, torch.zeros(shape)) for name, shape in shapes.items()]
                flat_scores.append(torch.cat([tensor.reshape(-1).to(*group[:2]) for tensor in old]))
                pieces = flat_scores[-1].split([shape.numel() for shape in shapes.values()])
                score.update({name: piece.view(shapes[name]) for name, piece in zip(params, pieces)})
                views.update({id(score[name]): score[name] for name in params})
            self._flat_scores[group] = flat_scores, views
        return flat_scores

    def _gradient(self, name: str, param: nn.Parameter) -> torch.Tensor:
        captured = self.__dict__.get("_captured", {})
        if name in captured:
            # of this process, as backward passes leave it
            gradient = captured.pop(name)
            if dist.is_initialized():
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            return gradient
        if has_master_copy(param):
            raise ValueError(
                "DeepSpeed clears gradients before the rank allocator can see them; pass `AdaLoraCallback()` to the "
                "Trainer, or call `rankallocator.capture_gradients(model)` before training."
            )
        return torch.zeros_like(param) if param.grad is None else param.grad

    def capture_gradients(self, model: nn.Module) -> None:
        """
        Keep the sums of the gradients of backward passes for the next `update_ipt`. To be called once before training
        with DeepSpeed, which steps, and clears the gradients, as part of a backward pass.
        """
        for handle in self.__dict__.get("_handles", ()):
            handle.remove()
        self._captured, self._handles = {}, []
        for name, param in model.named_parameters():
            if "lora_" in name and self.adapter_name in name and param.requires_grad:
                self._handles.append(param.register_hook(partial(self._add_gradient, name)))

    def _add_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if name in self._captured:
            self._captured[name] += gradient
        else:
            self._captured[name] = gradient.detach().clone()

    def mask_sharded_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """`mask_to_budget` for a model whose parameters may be sharded."""
        rank_pattern = self.mask_to_budget(_WholeParameters(model), budget)
        self.mask_sharded_using_rank_pattern(model, rank_pattern)
        return rank_pattern

    @torch.no_grad()
    def mask_sharded_using_rank_pattern(
        self, model: nn.Module, rank_pattern: dict[str, list[bool] | torch.Tensor]
    ) -> None:
        """`mask_using_rank_pattern` for a model whose parameters may be sharded."""
        params = dict(model.named_parameters())
        for name, kept in self._full_names(rank_pattern).items():
            values = whole(params[name])
            pruned = ~torch.as_tensor(kept, device=values.device).view(-1, 1)
            copy_whole_(params[name], values.masked_fill(pruned, 0.0))

    def _full_names(self, rank_pattern: dict[str, Any]) -> dict[str, Any]:
        """The rank pattern by the names of `lora_E` in the model; saving an adapter drops its name from them."""
        suffix = f".{self.adapter_name}"
        return {name if name.endswith(suffix) else name + suffix: mask for name, mask in rank_pattern.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        What allocation goes on from: copies of the averages of the importance, by `exp_avg_ipt.<name>` and
        `exp_avg_unc.<name>` for each A, E and B, and which triplets are kept, by `rank_pattern.<name>` for each E,
        bool of shape (r,). The names are those of the parameters in the model.

        With it the allocator can be registered with accelerate, `accelerator.register_for_checkpointing(allocator)`.
        """
        state = {}
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            state.update({f"{kind}.{name}": score.clone() for name, score in getattr(self, kind).items()})
        for name, mask in self._full_names(self.peft_config.rank_pattern or {}).items():
            state[f"rank_pattern.{name}"] = torch.as_tensor(mask).view(-1).clone()
        return state

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """
        Go on from where the allocator that gave `state_dict` was.

        Raises:
            `ValueError`: If it is the state of another adapter or model; nothing has changed then.
        """
        parts = {kind: {} for kind in ("exp_avg_ipt", "exp_avg_unc", "rank_pattern")}
        known = {name % part for name in self.name_set for part in ("lora_A", "lora_E", "lora_B")}
        for key, value in state_dict.items():
            kind, _, name = key.partition(".")
            if kind not in parts or name not in known:
                raise ValueError(f"{key!r} does not belong to the adapter {self.adapter_name!r} of this model.")
            parts[kind][name] = value
        # all or nothing
        for kind, names in (
            ("exp_avg_ipt", known),
            ("exp_avg_unc", known),
            ("rank_pattern", {name % "lora_E" for name in self.name_set}),
        ):
            if parts[kind] and parts[kind].keys() != names:
                raise ValueError(f"{kind}.{min(names - parts[kind].keys())} is missing from the allocator's state.")
        self.reset_ipt()
        self.exp_avg_ipt.update({name: score.clone() for name, score in parts["exp_avg_ipt"].items()})
        self.exp_avg_unc.update({name: score.clone() for name, score in parts["exp_avg_unc"].items()})
        masks = {name: mask.tolist() for name, mask in parts["rank_pattern"].items()}
        self.peft_config.rank_pattern = masks or None


class _WholeParameters:
    """Stands in for a model with sharded parameters: holds copies of the whole ones, all that allocation needs."""

    def __init__(self, model: nn.Module) -> None:
        self._params = {name: whole(param).clone() for name, param in model.named_parameters() if ".lora_" in name}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._params.items())

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter(self._params.values())
