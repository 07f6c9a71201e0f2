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

"""Prepare the weights of an adapter for saving and loading. E and the shapes alone decide the ranks."""

import warnings
from typing import Optional

import torch
from torch import nn

from .config import AdaLoraConfig
from .importance import kept_triplets
from .parameter_names import DIM_OF_RANK, PREFIX, WEIGHTS, adapted_layers, layer_of_E, name_in_file, unwrapped_name
from .sharding import gather_full, has_master_copy, is_sharded


Weights = dict[str, torch.Tensor]


def set_rank(layer: nn.Module, adapter_name: str, rank: int) -> None:
    """
    Give the factors of an adapter another rank, and zeros as values, before weights are loaded. The parameters stay
    the same objects, because an optimizer may hold them.
    """
    for part, dim in DIM_OF_RANK.items():
        param = getattr(layer, part)[adapter_name]
        shape = [rank if index == dim else size for index, size in enumerate(param.shape)]
        param.data, param.grad = param.data.new_zeros(shape), None
    layer.r[adapter_name] = rank


def set_ranks(layers: dict[str, nn.Module], rank_pattern: dict[str, list[bool]], adapter_name: str) -> None:
    """Give the layers the ranks that a rank pattern keeps, with [`set_rank`]."""
    for key, kept in rank_pattern.items():
        if (name := layer_of_E(key, adapter_name)) in layers:
            set_rank(layers[name], adapter_name, int(torch.as_tensor(kept).sum()))


def keep_triplets(layer: nn.Module, adapter_name: str, kept: list[bool] | torch.Tensor) -> None:
    """Drop the triplets of an adapter that are `False` in the mask (r,). Scaling, magnitude and dtypes stay."""
    indices = torch.as_tensor(kept).view(-1).nonzero().view(-1)
    for part, dim in DIM_OF_RANK.items():
        param = getattr(layer, part)[adapter_name]
        param.data, param.grad = param.data.index_select(dim, indices.to(param.device)), None
    layer.r[adapter_name] = len(indices)


def copy_adapter(layer: nn.Module, source: str, adapter_name: str) -> None:
    """Make `adapter_name` a frozen copy of the adapter `source` of the same layer."""
    for part in (*WEIGHTS, "ranknum"):
        values = getattr(layer, part)[source].detach().clone()
        getattr(layer, part)[adapter_name] = nn.Parameter(values, requires_grad=False)
    layer.r[adapter_name] = layer.r[source]


def weights_to_save(state_dict: Weights, model: nn.Module, config: AdaLoraConfig, adapter_name: str) -> Weights:
    """
    The weights to save, without pruned triplets, by their names without wrappers. `state_dict` lacks weights if
    another adapter is called like a module; the model then provides them.
    """
    given = {unwrapped_name(key): value for key, value in state_dict.items()}
    saved = {}
    layers = adapted_layers(model, adapter_name)
    for name, layer in layers.items():
        for part in WEIGHTS:
            key = f"{name}.{part}.{adapter_name}"
            if key in given:
                saved[key] = given[key]
            elif adapter_name in getattr(layer, part):
                saved[key] = gather_full(getattr(layer, part)[adapter_name])
    warn_of_rounded_magnitudes(saved, adapter_name)
    kept = triplets_to_save({name: saved[f"{name}.lora_E.{adapter_name}"] for name in layers}, config, adapter_name)
    for name, mask in kept.items():
        indices = torch.as_tensor(mask).nonzero().view(-1)
        for part, dim in DIM_OF_RANK.items():
            key = f"{name}.{part}.{adapter_name}"
            if saved[key].shape[dim] == len(mask) != len(indices):
                saved[key] = saved[key].index_select(dim, indices.to(saved[key].device))
    return saved


def warn_of_rounded_magnitudes(weights: Weights, adapter_name: str) -> None:
    """Warn if magnitudes to save are in a low precision, as after a write through `.data` or with DeepSpeed."""
    for dtype in {value.dtype for key, value in weights.items() if key.endswith(f".lora_magnitude.{adapter_name}")}:
        if dtype.itemsize < 4:
            warnings.warn(
                f"The magnitudes of the adapter {adapter_name!r} have been cast to {dtype}, which rounds away small "
                "changes that they learn; keep these parameters in float32, in training and until they are saved."
            )


def triplets_to_save(values_of_E: Weights, config: AdaLoraConfig, adapter_name: str) -> dict[str, list[bool]]:
    """
    The kept triplets of each layer, or an empty dictionary if all are saved. For AdaDoRA they come from E (r, 1), for
    plain AdaLoRA from the rank pattern of the last allocation. `config` gets them as its rank pattern, without the
    name of the adapter, as in PEFT.
    """
    if config.saves_all_ranks:
        return {}
    pattern = {layer_of_E(key, adapter_name): mask for key, mask in (config.rank_pattern or {}).items()}
    if any(map(is_sharded, values_of_E.values())):
        kept = {name: [True] * len(value) for name, value in values_of_E.items()}  # each process saves a part
    elif config.use_dora_adaptive:
        kept = kept_triplets(values_of_E)
        is_unpruned = all(len(mask) == config.init_r and (all(mask) or not any(mask)) for mask in kept.values())
        if not pattern and is_unpruned:
            kept = {}  # pruning has not begun: a layer of zeros got no gradient yet, such as an expert without tokens
    else:
        inner_names = {name: name if name in pattern else name.removeprefix(PREFIX) for name in values_of_E}
        kept = {name: pattern[inner] for name, inner in inner_names.items() if inner in pattern}
    ranks = {name.removeprefix(PREFIX): sum(mask) for name, mask in kept.items()}
    tells_ranks = ranks == {name: sum(mask) for name, mask in pattern.items()}
    if config.use_dora_adaptive and not (config.inference_mode and tells_ranks):
        pattern = {name.removeprefix(PREFIX): mask for name, mask in kept.items()}
    config.rank_pattern = {f"{name}.lora_E": mask for name, mask in sorted(pattern.items())} or None
    return kept


def weights_to_load(
    weights: Weights, model: nn.Module, tuner: Optional[nn.Module], config: AdaLoraConfig, adapter_name: str
) -> Weights:
    """
    The weights to load, by their names in the model. Makes the ranks of the model and of the weights the same. `tuner`
    is the [`AdaLoraModel`], if any. Raises as [`check_loaded_weights`] and [`fit_ranks`] before any change.
    """
    # compare by the names of a saved adapter, without wrappers
    weights = {name_in_file(key, adapter_name): value for key, value in weights.items()}
    layers = {PREFIX + name.removeprefix(PREFIX): layer for name, layer in adapted_layers(model, adapter_name).items()}
    check_loaded_weights(weights, layers, config, adapter_name)
    live_E = {f"{name}.lora_E": layer.lora_E[adapter_name] for name, layer in layers.items()}
    if any(len(weights.get(key, lora_E)) != len(lora_E) for key, lora_E in live_E.items()):
        if config.use_dora_adaptive:
            weights = fit_ranks(weights, layers, config, adapter_name)
        elif config.rank_pattern is not None and tuner is not None:
            tuner.resize_modules_by_rank_pattern(config.rank_pattern, adapter_name)
        if getattr(tuner, "trainable_adapter_name", None) == adapter_name:
            tuner.rankallocator.reset_ipt()  # the order of the triplets has changed
    names = {name_in_file(key, adapter_name): key for key in model.state_dict()}
    return {names.get(key, key): value for key, value in weights.items()}


def check_loaded_weights(
    weights: Weights, layers: dict[str, nn.Module], config: AdaLoraConfig, adapter_name: str
) -> None:
    """
    Check that weights, by the names of a saved adapter, belong to the adapter of `layers`.

    Raises:
        `ValueError`:
            If a weight is missing, unknown, of the wrong shape, or not finite. For plain AdaLoRA, which PEFT checks,
            if there is a magnitude.
    """
    if not config.use_dora_adaptive:
        for key in (key for key in weights if key.endswith(".lora_magnitude")):
            raise ValueError(
                f"The weights of the adapter have {key!r} but its config does not say `use_dora_adaptive=True`, so it "
                "would be used without its magnitudes."
            )
        return
    shapes = {}
    for name, layer in layers.items():
        lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        rank = len(weights.get(f"{name}.lora_E", lora_A))
        shapes[f"{name}.lora_magnitude"] = (len(lora_B), 1)
        shapes[f"{name}.lora_E"] = (rank, 1)
        shapes[f"{name}.lora_A"] = (rank, lora_A.shape[1])
        shapes[f"{name}.lora_B"] = (len(lora_B), rank)
    for key in weights.keys() - shapes.keys():
        if key.rpartition(".")[2].startswith("lora_"):
            raise ValueError(f"The weights of the adapter have {key!r}, for which the model has no place.")
    for key, shape in shapes.items():
        if key not in weights:
            raise ValueError(f"{key!r} is missing from the weights of the adapter.")
        if tuple(weights[key].shape) != shape:
            found = tuple(weights[key].shape)
            raise ValueError(
                f"{key!r} in the weights of the adapter has the shape {found}, but the model needs {shape}."
            )
        if not torch.isfinite(weights[key]).all():
            raise ValueError(f"{key!r} in the weights of the adapter is not finite.")


def fit_ranks(weights: Weights, layers: dict[str, nn.Module], config: AdaLoraConfig, adapter_name: str) -> Weights:
    """
    Make the ranks of an AdaDoRA adapter and of its checked weights the same. Returns the weights to load.

    An adapter in training keeps its ranks: the loaded triplets come first, and the singular values of the rest become
    0. Any other adapter gets the ranks of the weights, also a new one whose singular values are all 0.

    Raises:
        `ValueError`: If an adapter in training has too few ranks; nothing has changed then.
    """
    if not _is_in_training(layers, config, adapter_name):
        for name, layer in layers.items():
            set_rank(layer, adapter_name, len(weights[f"{name}.lora_E"]))
        return weights
    fitted = dict(weights)
    for name, layer in layers.items():
        rank, live_rank = len(weights[f"{name}.lora_E"]), len(layer.lora_E[adapter_name])
        if rank > live_rank:
            raise ValueError(
                f"The weights of {name!r} have rank {rank}, but the adapter in training has rank {live_rank}; load "
                "them into a new adapter."
            )
        for part, dim in DIM_OF_RANK.items():
            key, live = f"{name}.{part}", gather_full(getattr(layer, part)[adapter_name])
            rest = live.narrow(dim, rank, live_rank - rank).to(weights[key])
            fitted[key] = torch.cat([weights[key], torch.zeros_like(rest) if part == "lora_E" else rest], dim)
    return fitted


def _is_in_training(layers: dict[str, nn.Module], config: AdaLoraConfig, adapter_name: str) -> bool:
    """Whether an optimizer has trained the parameters of an adapter, so that they have to keep their shapes."""
    for layer in layers.values():
        lora_E = layer.lora_E[adapter_name]
        # PEFT freezes an adapter while it is disabled or another one is active
        is_active = adapter_name in layer.active_adapters and not layer.disable_adapters
        is_trained = lora_E.requires_grad or not (config.inference_mode or is_active)
        if is_sharded(lora_E) or has_master_copy(lora_E) or (is_trained and not lora_E.is_meta and bool(lora_E.any())):
            return True
    return False
