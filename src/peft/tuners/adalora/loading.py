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

"""Ranks and weights of adapters that are saved and loaded, and what is refused of them."""

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import nn

from .config import AdaLoraConfig
from .names import (
    DIM_OF_RANK,
    PREFIX,
    WEIGHTS,
    adapted_layers,
    key_of_E,
    layer_of_E,
    name_in_file,
    part_of,
    unwrapped_name,
)
from .sharding import is_sharded, whole


RankPattern = dict[str, list[bool] | torch.Tensor]


@torch.no_grad()
def keep_ranks(layer: nn.Module, adapter_name: str, kept: torch.Tensor) -> None:
    """
    Drop all singular triplets of an adapter but some (int64 indices). Scaling, magnitude, dtypes, devices and
    `requires_grad` stay as they are.
    """
    if len(kept) == len(layer.lora_E[adapter_name]):
        return
    for params, dim in ((layer.lora_A, 0), (layer.lora_E, 0), (layer.lora_B, 1)):
        param = params[adapter_name]
        values = param.index_select(dim, kept.to(param.device))
        params[adapter_name] = nn.Parameter(values, requires_grad=param.requires_grad)
    layer.r[adapter_name] = len(kept)


def keep_ranks_of_pattern(layers: dict[str, nn.Module], adapter_name: str, rank_pattern: RankPattern) -> None:
    """[`keep_ranks`] of each of the layers that a rank pattern names."""
    for key, kept in rank_pattern.items():
        if layer_of_E(key, adapter_name) in layers:
            indices = torch.as_tensor(kept).view(-1).nonzero().view(-1)
            keep_ranks(layers[layer_of_E(key, adapter_name)], adapter_name, indices)


def exact_weights(
    weights: dict[str, torch.Tensor], state_dict: dict[str, torch.Tensor], model: nn.Module, adapter_name: str
) -> dict[str, torch.Tensor]:
    """
    The weights to save, by their names without wrappers, and those that PEFT leaves out: of `state_dict`, where a
    module is wrapped, or those of AdaDoRA of the model, where another adapter is called like a module.
    """
    given = {unwrapped_name(key): value for key, value in (*state_dict.items(), *weights.items())}
    others = tuple(f".{name}" for name in model.peft_config if name != adapter_name)
    exact = {unwrapped_name(key): value for key, value in weights.items() if not key.endswith(others)}
    for name, layer in adapted_layers(model, adapter_name).items():
        for part in WEIGHTS:
            key = f"{name}.{part}.{adapter_name}"
            if key in given:
                exact[key] = given[key]
            elif adapter_name in layer.lora_magnitude:
                exact[key] = whole(getattr(layer, part)[adapter_name])
    return exact


def keep_saved_ranks(
    weights: dict[str, torch.Tensor], config: AdaLoraConfig, adapter_name: str
) -> dict[str, torch.Tensor]:
    """
    The weights to save, by their names in the model, without pruned triplets. `config` loses the adapter name, and
    saves what is kept: of AdaDoRA also what the optimizer has moved off zero since the last allocation.
    """
    saved = dict(weights)
    pattern = {f"{layer_of_E(key, adapter_name)}.lora_E": kept for key, kept in (config.rank_pattern or {}).items()}
    config.saved_rank_pattern = {} if pattern and config.use_dora_adaptive else None
    for key, kept in pattern.items():
        keeps = torch.as_tensor(kept).view(-1).bool()
        name_of_E = f"{key}.{adapter_name}"
        prefix = "" if name_of_E in saved else PREFIX
        values = saved[prefix + name_of_E]
        if is_sharded(values):
            keeps = torch.ones_like(keeps)  # each process saves a part, for an adapter that has all ranks
        elif config.use_dora_adaptive and len(values) == len(keeps):
            keeps = keeps | (values.view(-1) != 0).to(keeps.device)
        if config.saved_rank_pattern is not None:
            config.saved_rank_pattern[key] = keeps.tolist()
        indices = keeps.nonzero().view(-1)
        for part, dim in DIM_OF_RANK.items():
            name = f"{prefix}{layer_of_E(key, adapter_name)}.{part}.{adapter_name}"
            if saved[name].shape[dim] == len(keeps) != len(indices):
                saved[name] = saved[name].index_select(dim, indices.to(saved[name].device))
    config.rank_pattern = pattern or config.rank_pattern
    return saved


def weights_of_layers(
    weights: dict[str, torch.Tensor], model: nn.Module, adapter_name: str
) -> dict[str, torch.Tensor]:
    """The weights to load, by their names in the model without wrappers, which PEFT does not find behind wrappers."""
    names = {
        name_in_file(key, adapter_name): key
        for name in adapted_layers(model, adapter_name)
        for part in WEIGHTS
        for key in [f"{name}.{part}.{adapter_name}"]
    }
    exact = {unwrapped_name(key): value for key, value in weights.items()}
    return {names.get(key, key): value for key, value in exact.items()}


def wrapped_weights(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights to load, by the names that the state dict of the model has, with those of wrappers."""
    if all(name == unwrapped_name(name) for name, _ in model.named_modules()):
        return weights
    wrapped = {unwrapped_name(key): key for key in model.state_dict()}
    return {wrapped.get(key, key): value for key, value in weights.items()}


def check_loaded_weights(
    weights: dict[str, torch.Tensor], layers: dict[str, nn.Module], config: AdaLoraConfig, adapter_name: str
) -> None:
    """
    Check that loaded weights, by their names in the model, are those of the adapter that `layers` have.

    Raises:
        `ValueError`:
            If a weight is missing or not known, of the wrong shape, or not finite, or if the rank pattern is that of
            another model. Weights of plain AdaLoRA are checked by PEFT; here, only for magnitudes.
    """

    parts = {key: part_of(key, adapter_name) for key in weights}
    if not config.use_dora_adaptive:
        for key in (key for key, part in parts.items() if part == "lora_magnitude"):
            raise ValueError(
                f"The weights of the adapter have {name_in_file(key, adapter_name)!r} but its config does not say "
                "`use_dora_adaptive=True`, so it would be used without its magnitudes."
            )
        return
    pattern = {f"{layer_of_E(key, adapter_name)}.lora_E": kept for key, kept in (config.rank_pattern or {}).items()}
    unknown = sorted(pattern.keys() - set(map(key_of_E, layers)))
    if unknown and len(unknown) != len(set(map(key_of_E, layers)) - pattern.keys()):
        # or else all modules have been renamed, by `key_mapping`
        layer_name = layer_of_E(unknown[0], adapter_name)
        raise ValueError(f"The rank pattern of {layer_name!r} in the config of the adapter does not fit the model.")
    shapes = {}
    for name, layer in layers.items():
        lora_E = layer.lora_E[adapter_name]
        rank = min(len(lora_E), len(weights.get(f"{name}.lora_E.{adapter_name}", lora_E)))
        rank = sum(pattern.get(key_of_E(name), [True] * rank))
        in_features, out_features = layer.lora_A[adapter_name].shape[1], len(layer.lora_B[adapter_name])
        shapes[f"{name}.lora_magnitude.{adapter_name}"] = (out_features, 1)
        shapes[f"{name}.lora_E.{adapter_name}"] = (rank, 1)
        shapes[f"{name}.lora_A.{adapter_name}"] = (rank, in_features)
        shapes[f"{name}.lora_B.{adapter_name}"] = (out_features, rank)
    for key, part in parts.items():
        if key not in shapes and part.startswith("lora_"):
            raise ValueError(
                f"The weights of the adapter have {name_in_file(key, adapter_name)!r}, for which the model has no "
                "place."
            )
    for key, shape in shapes.items():
        what = f"{name_in_file(key, adapter_name)!r} in the weights of the adapter"
        if key not in weights:
            raise ValueError(f"{name_in_file(key, adapter_name)!r} is missing from the weights of the adapter.")
        if tuple(weights[key].shape) != shape:
            found = tuple(weights[key].shape)
            raise ValueError(f"{what} has the shape {found}, but the model and the config need {shape}.")
        if not torch.isfinite(weights[key]).all():
            raise ValueError(f"{what} is not finite.")


def fit_to_loaded_weights(
    tuner: Optional[nn.Module],
    model: nn.Module,
    config: AdaLoraConfig,
    adapter_name: str,
    weights: dict[str, torch.Tensor],
) -> None:
    """
    Make an adapter of the ranks that the weights to load have, after [`check_loaded_weights`]. If they are refused,
    nothing has changed: an adapter that was added for them is gone again.

    Args:
        tuner (`AdaLoraModel`, *optional*): The model's; `None` if the adapter was injected without.
        model (`nn.Module`): The model to load into, such as a `PeftModel`.
        weights (`dict[str, torch.Tensor]`): By their names in the model.
    """
    layers = adapted_layers(model, adapter_name)
    before = tuner.__dict__.get("_before_loading", {}).pop(adapter_name, None) if tuner else None
    try:
        check_loaded_weights(weights, layers, config, adapter_name)
    except ValueError:
        if before is not None:
            before.put_back(tuner, model, layers.values(), adapter_name)
        raise
    keep_shapes = any(layer.keeps_shapes for layer in layers.values())
    if config.use_dora_adaptive or keep_shapes:
        ranks = {
            name: len(weights.get(f"{name}.lora_E.{adapter_name}", layer.lora_E[adapter_name]))
            for name, layer in layers.items()
        }
        for name, layer in layers.items():
            if not layer.keeps_shapes:
                keep_ranks(layer, adapter_name, torch.arange(ranks[name]))
        if keep_shapes or set(map(key_of_E, layers)) != (config.rank_pattern or {}).keys():
            pattern = {
                key_of_E(name): [index < rank for index in range(config.init_r)] for name, rank in ranks.items()
            }
            config.rank_pattern = None if all(map(all, pattern.values())) else pattern
    elif config.rank_pattern is not None and tuner:
        tuner.resize_modules_by_rank_pattern(config.rank_pattern, adapter_name)


class BeforeLoading:
    """What adding an adapter has changed, to be put back if the weights that it was added for are refused."""

    def __init__(self, tuner: nn.Module) -> None:
        self.trainable = [param for param in tuner.model.parameters() if param.requires_grad]
        self.training = {name: tuner.__dict__.get(name) for name in ("trainable_adapter_name", "rankallocator")}

    def put_back(self, tuner: nn.Module, peft_model: Any, layers: Iterable[nn.Module], adapter_name: str) -> None:
        """Remove the adapter, unless it has been trained meanwhile."""
        if any(not layer.lora_E[adapter_name].is_meta and layer.lora_E[adapter_name].any() for layer in layers):
            return
        if len(tuner.peft_config) == 1:
            tuner.unload()
        else:
            peft_model.delete_adapter(adapter_name)
        for param in self.trainable:
            param.requires_grad_(True)
        tuner.__dict__.update({name: value for name, value in self.training.items() if value is not None})
