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

"""The weights of an adapter as they are saved and loaded: ranks come from E and from shapes, and from nothing else."""

import torch
from torch import nn

from .allocator import kept_triplets
from .config import AdaLoraConfig
from .parameter_names import (
    DIM_OF_RANK,
    WEIGHTS,
    adapted_layers,
    key_of_E,
    layer_of_E,
    name_in_file,
    part_of,
    unwrapped_name,
)
from .sharding import gather_full, has_master_copy, is_sharded


Weights = dict[str, torch.Tensor]


def set_rank(layer: nn.Module, adapter_name: str, rank: int) -> None:
    """
    Give the factors of an adapter the shapes of another rank, and zeros as values, before weights are loaded. The
    parameters stay the same objects, because an optimizer may hold them.
    """
    for part, dim in DIM_OF_RANK.items():
        param = getattr(layer, part)[adapter_name]
        shape = [rank if index == dim else size for index, size in enumerate(param.shape)]
        param.data, param.grad = param.data.new_zeros(shape), None
    layer.r[adapter_name] = rank


def keep_triplets(layer: nn.Module, adapter_name: str, kept: list[bool] | torch.Tensor) -> None:
    """Drop the triplets of an adapter that a mask (r,) does not keep. Scaling, magnitude and dtypes stay."""
    indices = torch.as_tensor(kept).view(-1).nonzero().view(-1)
    for part, dim in DIM_OF_RANK.items():
        param = getattr(layer, part)[adapter_name]
        param.data, param.grad = param.data.index_select(dim, indices.to(param.device)), None
    layer.r[adapter_name] = len(indices)


def weights_by_model_name(weights: Weights, state_dict: Weights, model: nn.Module, adapter_name: str) -> Weights:
    """
    The weights to save by their names without wrappers. Adds what PEFT leaves out: weights of `state_dict` where a
    module is wrapped, and weights of AdaDoRA where another adapter is called like a module.
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
                exact[key] = gather_full(getattr(layer, part)[adapter_name])
    return exact


def without_pruned(weights: Weights, config: AdaLoraConfig, adapter_name: str) -> Weights:
    """
    The weights to save, by their names in the model, without pruned triplets. E tells them for AdaDoRA, and the rank
    pattern of the last allocation for plain AdaLoRA. The rank pattern of `config` then fits what is saved.
    """
    values_of_E = {key: value for key, value in weights.items() if part_of(key, adapter_name) == "lora_E"}
    if config.saves_all_ranks or any(map(is_sharded, values_of_E.values())):  # each process saves a part of all ranks
        return weights
    if config.use_dora_adaptive:
        kept = kept_triplets(values_of_E) or {}
        config.rank_pattern = {key_of_E(layer_of_E(key, adapter_name)): mask for key, mask in kept.items()} or None
    else:
        pattern = {
            f"{layer_of_E(key, adapter_name)}.lora_E": mask for key, mask in (config.rank_pattern or {}).items()
        }
        config.rank_pattern = pattern or config.rank_pattern
        kept = {key: pattern[name] for key in values_of_E for name in _keys_of_E(key, adapter_name) if name in pattern}
    saved = dict(weights)
    for key, mask in kept.items():
        indices = torch.as_tensor(mask).view(-1).nonzero().view(-1)
        for part, dim in DIM_OF_RANK.items():
            name = f"{layer_of_E(key, adapter_name)}.{part}.{adapter_name}"
            if saved[name].shape[dim] == len(mask) != len(indices):
                saved[name] = saved[name].index_select(dim, indices.to(saved[name].device))
    return saved


def _keys_of_E(key: str, adapter_name: str) -> set[str]:
    """The keys of a weight E in rank patterns of PEFT, which may have the prefix of a PeftModel or not."""
    layer_name = layer_of_E(key, adapter_name)
    return {f"{layer_name}.lora_E", key_of_E(layer_name)}


def weights_of_layers(weights: Weights, model: nn.Module, adapter_name: str) -> Weights:
    """The weights to load, by their names in the model without wrappers, which PEFT does not find behind wrappers."""
    names = {
        name_in_file(key, adapter_name): key
        for name in adapted_layers(model, adapter_name)
        for part in WEIGHTS
        for key in [f"{name}.{part}.{adapter_name}"]
    }
    exact = {unwrapped_name(key): value for key, value in weights.items()}
    return {names.get(key, key): value for key, value in exact.items()}


def wrapped_weights(weights: Weights, model: nn.Module) -> Weights:
    """The weights to load, by the names in the state dict of the model, which has the names of wrappers."""
    if all(name == unwrapped_name(name) for name, _ in model.named_modules()):
        return weights
    wrapped = {unwrapped_name(key): key for key in model.state_dict()}
    return {wrapped.get(key, key): value for key, value in weights.items()}


def check_loaded_weights(
    weights: Weights, layers: dict[str, nn.Module], config: AdaLoraConfig, adapter_name: str
) -> None:
    """
    Check that loaded weights, by their names in the model, belong to the adapter of `layers`.

    Raises:
        `ValueError`:
            If a weight is missing, unknown, of the wrong shape, or not finite. PEFT checks the weights of plain
            AdaLoRA; here, they must have no magnitude.
    """
    parts = {key: part_of(key, adapter_name) for key in weights}
    if not config.use_dora_adaptive:
        for key in (key for key, part in parts.items() if part == "lora_magnitude"):
            raise ValueError(
                f"The weights of the adapter have {name_in_file(key, adapter_name)!r} but its config does not say "
                "`use_dora_adaptive=True`, so it would be used without its magnitudes."
            )
        return
    shapes = {}
    for name, layer in layers.items():
        lora_E = layer.lora_E[adapter_name]
        rank = len(weights.get(f"{name}.lora_E.{adapter_name}", lora_E))
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
            raise ValueError(f"{what} has the shape {found}, but the model needs {shape}.")
        if not torch.isfinite(weights[key]).all():
            raise ValueError(f"{what} is not finite.")


def fit_ranks(weights: Weights, layers: dict[str, nn.Module], adapter_name: str) -> Weights:
    """
    Make the ranks of an AdaDoRA adapter and of checked weights for it the same. Returns the weights to load.

    An adapter in training keeps its ranks: the loaded triplets come first, and the singular values of the rest become
    0. Any other, also a new one whose singular values are all 0, gets the ranks of the weights.

    Raises:
        `ValueError`: If an adapter in training has too few ranks; nothing has changed then.
    """
    ranks = {name: len(weights[f"{name}.lora_E.{adapter_name}"]) for name in layers}
    changed = {name: layer for name, layer in layers.items() if len(layer.lora_E[adapter_name]) != ranks[name]}
    if not _is_in_training(layers, adapter_name):
        for name, layer in changed.items():
            set_rank(layer, adapter_name, ranks[name])
        return weights
    for name, layer in changed.items():
        rank = len(layer.lora_E[adapter_name])
        if ranks[name] > rank:
            raise ValueError(
                f"The weights of {name!r} have rank {ranks[name]}, but the adapter in training has rank {rank}; load "
                "them into a new adapter."
            )
    fitted = dict(weights)
    for name, layer in changed.items():
        for part, dim in DIM_OF_RANK.items():
            key, live = f"{name}.{part}.{adapter_name}", gather_full(getattr(layer, part)[adapter_name])
            rest = live.narrow(dim, ranks[name], live.shape[dim] - ranks[name]).to(weights[key])
            fitted[key] = torch.cat([weights[key], torch.zeros_like(rest) if part == "lora_E" else rest], dim)
    return fitted


def _is_in_training(layers: dict[str, nn.Module], adapter_name: str) -> bool:
    """Whether the parameters of an adapter have to keep their shapes, because an optimizer has trained them."""
    values_of_E = [layer.lora_E[adapter_name] for layer in layers.values()]
    if any(map(is_sharded, values_of_E)) or any(map(has_master_copy, values_of_E)):
        return True
    return any(lora_E.requires_grad and not lora_E.is_meta and bool(lora_E.any()) for lora_E in values_of_E)


def has_ranks_of(weights: Weights, layers: dict[str, nn.Module], adapter_name: str) -> bool:
    """Whether an adapter has the ranks of the weights that are loaded into it."""
    values_of_E = {f"{name}.lora_E.{adapter_name}": layer.lora_E[adapter_name] for name, layer in layers.items()}
    return all(len(weights.get(key, lora_E)) == len(lora_E) for key, lora_E in values_of_E.items())
