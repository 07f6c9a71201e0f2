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

"""AdaLoRA's rank allocator with exact adapter names, batched scores, and a state that can be saved."""

import warnings
from collections import defaultdict
from contextlib import suppress
from itertools import chain
from typing import Optional

import torch
from torch import nn

from . import sharding
from . import stock_layer as stock
from .importance import all_finite, gradients_of, keep_most_important, kept_triplets, triplet_scores, update_scores_
from .parameter_names import FACTORS, adapted_layers, layer_of_E
from .validation import warn_of_uncalled_layers


# Warn after this many training forwards without an allocation.
FORWARDS_UNTIL_WARNING = 200

# The names of further weights of a parameter in the state of schedule-free and averaging optimizers.
OTHER_WEIGHTS = ("x", "y", "z", "ax")

# The averages of the importance, which allocation goes on from.
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankAllocator(stock.RankAllocator):
    """
    PEFT's rank allocator, with the same scores and ranks bit for bit. Magnitudes take no part in the importance.

    Each process keeps the averages of its own shards of sharded parameters. The scores are sums over all processes, so
    they are the same on each, and round in another order than the scores of full parameters.

    `kept` is the rank pattern that the final phase masks with: the one of the last allocation, or of the weights that
    were loaded since. `None` if there were neither.
    """

    kept: Optional[dict[str, list[bool]]] = None
    expects_regularization = True  # until a gradient of the term has arrived, or a warning says that none did
    finite: bool | torch.Tensor = True  # whether the gradients of the last `update_ipt` were
    _captured: Optional[sharding.GradientCapture] = None
    _has_seen_finite: bool | torch.Tensor = True  # whether the averages have; a tensor until the host reads it
    _forwards = 0

    def count_forward(self, model: nn.Module) -> None:
        """Count a forward pass in training, and warn once if there are many without an allocation."""
        if torch.compiler.is_compiling() or self.exp_avg_ipt or self._is_pruned():
            return
        if self.kept is None and self._forwards < FORWARDS_UNTIL_WARNING and not torch.jit.is_tracing():
            with suppress(RuntimeError):  # tensors of torch.func and fake ones have no values
                self.read_kept(model)  # pruned weights may have been loaded into the model inside
            self.kept = self.kept if self._is_pruned() else None
        self._forwards += 1
        if self._forwards == FORWARDS_UNTIL_WARNING:
            warnings.warn(
                "AdaLoRA has trained for a while without an allocation, so no rank will be pruned; pass "
                "`AdaLoraCallback()` to the Trainer, or call `model.base_model.update_and_allocate(step)` after each "
                "optimizer step."
            )

    def _is_pruned(self) -> bool:
        return self.kept is not None and not all(map(all, self.kept.values()))

    def _factors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """A, E and B of each layer, by their names in the model."""
        factors = {
            f"{name}.{part}.{self.adapter_name}": getattr(layer, part)[self.adapter_name]
            for name, layer in adapted_layers(model, self.adapter_name).items()
            for part in FACTORS
        }
        for factor in factors.values():
            sharding.check_not_flattened(factor)
        return factors

    def _set_budget_scheduler(self, model: nn.Module) -> None:
        layers = adapted_layers(model, self.adapter_name)
        self.name_set = sorted(f"{name}.%s.{self.adapter_name}" for name in layers)
        self.init_bgt = sum(sharding.full_shape(layer.lora_A[self.adapter_name])[0] for layer in layers.values())
        self.target_bgt = self.peft_config.target_r * len(layers)

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """
        Update the averages of the sensitivity and the uncertainty of every entry of A, E and B. A parameter without a
        gradient has a gradient of zero. A step changes nothing if a gradient of any parameter of the model is not
        finite, because a gradient scaler skips such a step.

        Raises:
            `ValueError`: If no parameter has a gradient; nothing has changed then.
        """
        params = self._factors(model)
        gradients = self._gradients(params)
        if all(gradient is None for gradient in gradients.values()):
            raise ValueError(
                f"No factor of the adapter {self.adapter_name!r} has a gradient; call `update_and_allocate(step)` "
                "after `optimizer.step()` and before `optimizer.zero_grad()`, and adapt layers that the model calls."
            )
        values = {name: sharding.gather_partitioned(param) for name, param in params.items()}
        groups, importance = defaultdict(list), {}
        for name, value in values.items():
            groups[value.device, value.dtype].append(name)
        for names in groups.values():
            slopes = [torch.zeros_like(values[name]) if gradients[name] is None else gradients[name] for name in names]
            local = ([sharding.local_part(tensor) for tensor in each] for each in (map(values.get, names), slopes))
            importance[tuple(names)] = torch._foreach_abs(torch._foreach_mul(*local))
        self.finite = finite = all_finite([*gradients_of(model), *chain(*importance.values())])
        seen = self._has_seen_finite if self.exp_avg_ipt else False
        self._has_seen_finite = True if seen is True else finite | seen
        for names, new in importance.items():
            scores = [[self._score(kind, name, values[name]) for name in names] for kind in ("ipt", *AVERAGES)]
            update_scores_(scores, new, finite, self.beta1, self.beta2)

    def _score(self, kind: str, name: str, value: torch.Tensor) -> torch.Tensor:
        """This process's part of `ipt` or of an average, with the dtype, device and shards of the factor `value`."""
        scores = getattr(self, kind)
        score = scores[name].to(value.device, value.dtype) if name in scores else torch.zeros_like(value)
        scores[name] = sharding.shard_like(score, value)
        return sharding.local_part(scores[name])

    def _gradients(self, params: dict[str, nn.Parameter]) -> dict[str, Optional[torch.Tensor]]:
        captured = self._captured.take_means() if self._captured is not None else {}
        if not captured and any(map(sharding.has_master_copy, params.values())):
            raise ValueError(
                "DeepSpeed clears gradients before the rank allocator can see them; pass `AdaLoraCallback()` to the "
                "Trainer, or call `rankallocator.capture_gradients(model)` before training."
            )
        return {name: captured.get(name, param.grad) for name, param in params.items()}

    def capture_gradients(self, model: nn.Module) -> None:
        """Sum up gradients for `update_ipt` from now on. Call it before training with DeepSpeed, which clears them."""
        if self._captured is not None:
            self._captured.remove()
        self._captured = sharding.GradientCapture(self._factors(model))

    def has_averages(self) -> bool:
        """Whether any gradients have been finite. The host waits for the device until they have been once."""
        self._has_seen_finite = bool(self._has_seen_finite)
        return bool(self.exp_avg_ipt) and self._has_seen_finite

    def mask_to_budget(self, model: nn.Module, budget: int) -> Optional[dict[str, list[bool]]]:
        """
        Set the singular values of the least important triplets to zero.

        Args:
            model (`nn.Module`): The model of the adapter.
            budget (`int`): The number of triplets to keep in all layers together.

        Returns:
            `dict[str, list[bool]]`, *optional*: The kept triplets, by the name of each `lora_E` in the model. `None`
            if no gradient has been finite yet; nothing is masked then.
        """
        if not self.has_averages():
            return None
        if self.kept is None or (budget < self.init_bgt and not self._is_pruned()):  # the first since a resume, too
            warn_of_uncalled_layers(adapted_layers(model, self.adapter_name), self.adapter_name, self.exp_avg_ipt)
        scores = triplet_scores(self.exp_avg_ipt, self.exp_avg_unc, self.name_set)
        # as PEFT, which takes it from the ranks that a plain adapter had before it was saved pruned, too
        kept = keep_most_important(scores, self.init_bgt - budget)
        self.kept = {name % "lora_E": mask for name, mask in zip(self.name_set, kept)}
        self.mask_using_rank_pattern(model, self.kept)
        return self.kept

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool] | torch.Tensor]) -> None:
        """Set the singular values that a rank pattern prunes to zero. Its keys may lack the adapter's name."""
        layers = adapted_layers(model, self.adapter_name)
        groups = defaultdict(list)
        for key, kept in rank_pattern.items():
            lora_E = layers[layer_of_E(key, self.adapter_name)].lora_E[self.adapter_name]
            mask = torch.as_tensor(kept).bool().view(-1, 1)
            if sharding.has_master_copy(lora_E):
                sharding.copy_full_(lora_E, sharding.gather_full(lora_E).masked_fill(~mask.to(lora_E.device), 0.0))
            else:
                groups[lora_E.device, lora_E.dtype, len(lora_E), sharding.layout(lora_E)].append((lora_E, mask))
        for (device, *_), params in groups.items():
            singular_values, masks = zip(*params)
            masks = torch.cat(masks, dim=1).to(device, non_blocking=True)
            local = list(map(sharding.local_part, singular_values))
            values = torch.cat(local, dim=1).masked_fill_(~masks[sharding.local_indices(singular_values[0], 0)], 0.0)
            torch._foreach_copy_(local, values.split(1, dim=1))

    @torch.no_grad()
    def mask_other_weights(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Set pruned entries of E to zero in an optimizer's `OTHER_WEIGHTS` too. Returns whether it has any."""
        found = False
        for layer in adapted_layers(model, self.adapter_name).values():
            lora_E = layer.lora_E[self.adapter_name]
            state = optimizer.state.get(lora_E, {})
            for name in OTHER_WEIGHTS:
                if isinstance(state.get(name), torch.Tensor) and state[name].shape == lora_E.shape:
                    state[name].masked_fill_(lora_E == 0, 0.0)
                    found = True
        return found

    def read_kept(self, model: nn.Module) -> None:
        """Take the kept triplets from E, after weights have been loaded."""
        self.kept = None
        values = {
            f"{name}.lora_E.{self.adapter_name}": layer.lora_E[self.adapter_name]
            for name, layer in adapted_layers(model, self.adapter_name).items()
        }
        if not any(lora_E.is_meta for lora_E in values.values()):
            kept = kept_triplets(values)
            # a new adapter has zeros, too; with `target_r=0` it ends with them
            self.kept = kept if any(map(any, kept.values())) or not self.target_bgt else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        Copies of the averages, by `exp_avg_ipt.<name>` and `exp_avg_unc.<name>` for each A, E and B in the model. The
        weights tell which triplets are kept. For `accelerator.register_for_checkpointing(allocator)`. With sharded
        parameters, every process has to call this, and gets the full averages.
        """
        if not self.has_averages():
            return {}
        scores = ((f"{kind}.{name}", score) for kind in AVERAGES for name, score in getattr(self, kind).items())
        return {key: sharding.gather_full(score).clone() for key, score in scores}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """
        Continue from the averages in another allocator's `state_dict`.

        Raises:
            `ValueError`: If it is the state of another adapter or model; nothing has changed then.
        """
        expected = {f"{kind}.{name % part}" for kind in AVERAGES for name in self.name_set for part in FACTORS}
        for key in sorted(state_dict.keys() - expected):
            raise ValueError(f"{key!r} does not belong to the adapter {self.adapter_name!r} of this model.")
        for key in sorted(expected - state_dict.keys()) if state_dict else ():
            raise ValueError(f"{key} is missing from the allocator's state.")
        self.reset_ipt()
        self._has_seen_finite = True
        for key, score in state_dict.items():
            kind, _, name = key.partition(".")
            getattr(self, kind)[name] = score.clone()
