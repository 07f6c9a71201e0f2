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

"""AdaLoRA's rank allocator by exact names, with all scores of a step at once, and a state that can be saved."""

import warnings
from collections.abc import Hashable
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import stock_layer as stock
from .names import FACTORS, adapted_layers, layer_of_E
from .sharding import check_not_flattened, copy_whole_, has_master_copy, is_sharded, whole, whole_shape


# so many forward passes in training without an allocation are no accident
FORWARDS_UNTIL_WARNING = 200


# what schedule-free optimizers, and averaging ones, call the other weights that they keep of a parameter
OTHER_WEIGHTS = ("x", "y", "z", "ax")


class RankAllocator(stock.RankAllocator):
    """
    PEFT's rank allocator, which decides the ranks from the importance of A, E and B but not of the magnitudes.

    Scores and ranks are PEFT's, bit for bit. The adapter is told by its exact name. Where the parameters are sharded
    (DTensor), the importance is that of the whole ones, the same on every process.
    """

    # whether a step has been asked for
    has_started = False

    def reset_ipt(self) -> None:
        super().reset_ipt()
        self._flat_scores = {}

    def count_forward(self) -> None:
        """Count a forward pass in training, and warn once if there are many without an allocation."""
        if torch.compiler.is_compiling() or self.exp_avg_ipt or self.peft_config.rank_pattern:
            return
        self._forwards = getattr(self, "_forwards", 0) + 1
        if self._forwards == FORWARDS_UNTIL_WARNING:
            warnings.warn(
                "AdaLoRA has trained for a while without an allocation, so no rank will be pruned; pass "
                "`AdaLoraCallback()` to the Trainer, or call `model.base_model.update_and_allocate(step)` after each "
                "optimizer step."
            )

    def _factors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """A, E and B of each layer, by their names in the model."""
        factors = {
            f"{name}.{part}.{self.adapter_name}": getattr(layer, part)[self.adapter_name]
            for name, layer in adapted_layers(model, self.adapter_name).items()
            for part in FACTORS
        }
        for factor in factors.values():
            check_not_flattened(factor)
        return factors

    def _set_budget_scheduler(self, model: nn.Module) -> None:
        layers = adapted_layers(model, self.adapter_name)
        self.name_set = sorted(f"{name}.%s.{self.adapter_name}" for name in layers)
        self.init_bgt = sum(whole_shape(layer.lora_A[self.adapter_name])[0] for layer in layers.values())
        self.target_bgt = self.peft_config.target_r * len(layers)

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """
        Update the sensitivity and the uncertainty of every entry of A, E and B. The scores are PEFT's, bit for bit,
        but all parameters of a device and dtype are updated at once. A parameter without a gradient counts as one of
        gradient zero.

        Raises:
            `ValueError`: If no parameter has a gradient; nothing has changed then.
        """
        groups = {}
        params = self._factors(model)
        gradients = {name: self._gradient(name, param) for name, param in params.items()}
        if all(gradient is None for gradient in gradients.values()):
            raise ValueError(
                f"No factor of the adapter {self.adapter_name!r} has a gradient, so its ranks cannot be compared; "
                "call `update_and_allocate(step)` after `optimizer.step()` and before `optimizer.zero_grad()`."
            )
        self.__dict__.get("_captured", {}).clear()
        for name, param in params.items():
            groups.setdefault((param.device, param.dtype, is_sharded(param)), {})[name] = param
        for group, params in groups.items():
            ipt, exp_avg_ipt, exp_avg_unc = self._scores_of(group, params)
            missing = {name: torch.zeros_like(param) for name, param in params.items() if gradients[name] is None}
            gradients.update(missing)
            if group[-1]:
                products = [param * gradients[name] for name, param in params.items()]
                torch.cat([product.full_tensor().reshape(-1) for product in products], out=ipt).abs_()
                change = torch.empty_like(ipt)
            else:
                change = torch.cat([gradients[name].reshape(-1) for name in params])
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

    def _gradient(self, name: str, param: nn.Parameter) -> torch.Tensor | None:
        captured = self.__dict__.get("_captured", {})
        if name in captured:
            # of this process, as backward passes leave it
            gradient = captured[name]
            if dist.is_initialized():
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            return gradient
        if has_master_copy(param):
            raise ValueError(
                "DeepSpeed clears gradients before the rank allocator can see them; pass `AdaLoraCallback()` to the "
                "Trainer, or call `rankallocator.capture_gradients(model)` before training."
            )
        return param.grad

    def capture_gradients(self, model: nn.Module) -> None:
        """
        Keep the sums of the gradients of backward passes for the next `update_ipt`. To be called once before training
        with DeepSpeed, which steps, and clears the gradients, as part of a backward pass.
        """
        for handle in self.__dict__.get("_handles", ()):
            handle.remove()
        self._captured, self._handles = {}, []
        for name, param in self._factors(model).items():
            if param.requires_grad:
                self._handles.append(param.register_hook(partial(self._add_gradient, name)))

    def _add_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if name in self._captured:
            self._captured[name] += gradient
        else:
            self._captured[name] = gradient.detach().clone()

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """
        Set the singular values of the least important triplets to zero.

        Args:
            model (`nn.Module`): The model whose adapter it is.
            budget (`int`): How many triplets are kept in all layers together.

        Returns:
            `dict[str, list[bool]]`: Which triplets are kept, by the name of each `lora_E` in the model.
        """
        scores = self._triplet_scores()
        pruned = self.init_bgt - budget
        threshold = scores.kthvalue(pruned)[0] if pruned else -torch.inf
        ranks = [len(self.exp_avg_ipt[name % "lora_E"]) for name in self.name_set]
        kept = iter((~(scores <= threshold)).tolist())
        rank_pattern = {name % "lora_E": list(islice(kept, rank)) for name, rank in zip(self.name_set, ranks)}
        self.mask_using_rank_pattern(model, rank_pattern)
        return rank_pattern

    def _triplet_scores(self) -> torch.Tensor:
        """
        The importance of all triplets, one layer of `name_set` after the other. As PEFT's, it is that of the singular
        value and the mean of those of the two vectors; the means of parameters of equal shape are taken at once.
        """
        scores = []
        for part, dim in (("lora_E", 1), ("lora_A", 1), ("lora_B", 0)):
            groups, means = {}, {}
            for name in self.name_set:
                score = self.exp_avg_ipt[name % part]
                groups.setdefault((score.shape, score.dtype, score.device), []).append(name)
            for names in groups.values():
                ipt, unc = (
                    torch.stack([score[name % part] for name in names])
                    for score in (self.exp_avg_ipt, self.exp_avg_unc)
                )
                means.update(zip(names, ipt.mul_(unc).mean(dim=1 + dim)))
            scores.append(torch.cat([means[name] for name in self.name_set]))
        score_of_E, score_of_A, score_of_B = scores
        return score_of_E + (score_of_A + score_of_B)

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool] | torch.Tensor]) -> None:
        """Set the singular values that a rank pattern, with or without the adapter's name, prunes to zero."""
        layers = adapted_layers(model, self.adapter_name)
        groups = {}
        for key, kept in rank_pattern.items():
            lora_E = layers[layer_of_E(key, self.adapter_name)].lora_E[self.adapter_name]
            mask = torch.as_tensor(kept).bool().view(-1, 1)
            if is_sharded(lora_E) or has_master_copy(lora_E):
                copy_whole_(lora_E, whole(lora_E).masked_fill(~mask.to(lora_E.device), 0.0))
            else:
                groups.setdefault((lora_E.device, lora_E.dtype), []).append((lora_E, mask))
        for (device, _), params in groups.items():
            values, masks = (torch.cat(tensors) for tensors in zip(*params))
            values.masked_fill_(~masks.to(device), 0.0)
            torch._foreach_copy_([lora_E for lora_E, _ in params], values.split([len(mask) for _, mask in params]))

    @torch.no_grad()
    def mask_other_weights(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """
        Set what is zero of E to zero as well in the other weights that a schedule-free or averaging optimizer keeps,
        or a pruned singular value would come back with them. Returns whether the optimizer keeps any.
        """
        if not any(name in state for state in optimizer.state.values() for name in OTHER_WEIGHTS):
            return False
        found = False
        for layer in adapted_layers(model, self.adapter_name).values():
            lora_E = layer.lora_E[self.adapter_name]
            state = optimizer.state.get(lora_E, {})
            for name in OTHER_WEIGHTS:
                if isinstance(state.get(name), torch.Tensor) and state[name].shape == lora_E.shape:
                    state[name].masked_fill_(lora_E == 0, 0.0)
                    found = True
        return found

    def _full_names(self, rank_pattern: dict[str, Any]) -> dict[str, Any]:
        """The rank pattern by the names of `lora_E` in the model; saving an adapter drops its name from them."""
        adapter_name = self.adapter_name
        return {f"{layer_of_E(key, adapter_name)}.lora_E.{adapter_name}": kept for key, kept in rank_pattern.items()}

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
        known = {name % part for name in self.name_set for part in FACTORS}
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
