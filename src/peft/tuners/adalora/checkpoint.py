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

"""What has to be true of saved AdaDoRA weights before they may change a model."""

import hashlib
import os
from typing import Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .config import AdaLoraConfig


PREFIX = "base_model.model."


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    result = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        result.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        result.update(value.reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def adapter_checksum(weights: dict[str, torch.Tensor]) -> str:
    """The [`checksum`] of those of saved weights that belong to AdaDoRA."""
    return checksum({key.removeprefix(PREFIX): value for key, value in weights.items() if ".lora_" in key})


def check_adapter_file(config: AdaLoraConfig, layers: dict[str, tuple[int, int]]) -> None:
    """
    Check the weights that were saved with a config, if it was loaded from a folder that has them.

    Args:
        config ([`AdaLoraConfig`]):
            The config of the adapter.
        layers (`dict[str, tuple[int, int]]`):
            Shapes (out, in) of the weights that the adapter will adapt, by the names of their modules.

    Raises:
        `ValueError`: If the file cannot be read or its weights are not those that were saved with the config, or as
            [`check_adapter_weights`].
    """
    path = os.path.join(config.loaded_from or "", SAFETENSORS_WEIGHTS_NAME)
    if config.loaded_from is None or not os.path.isfile(path):
        return
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path!r} is broken: {error}.") from error
    check_adapter_weights(weights, layers, config, path)
    if config.weights_sha256 not in (None, adapter_checksum(weights)):
        raise ValueError(
            f"The weights in {path!r} are not those that were saved with its config; the file is broken, or was "
            "edited, in which case `weights_sha256` has to be removed from the config."
        )


def check_adapter_weights(
    weights: dict[str, torch.Tensor],
    layers: dict[str, tuple[int, int]],
    config: AdaLoraConfig,
    source: str,
    max_rank: Optional[int] = None,
) -> None:
    """
    Check that saved weights are those of an adapter, all of it and finite.

    Args:
        weights (`dict[str, torch.Tensor]`):
            The weights by their names in the file.
        layers (`dict[str, tuple[int, int]]`):
            Shapes (out, in) of the adapted weights, by the names of their modules.
        config ([`AdaLoraConfig`]):
            The config of the adapter. For plain AdaLoRA only magnitudes are looked for, which it must not have.
        source (`str`):
            Where the weights are from, for the error messages.
        max_rank (`int`, *optional*):
            Accept any rank up to this one, whatever rank the config says.

    Raises:
        `ValueError`:
            If a weight is missing or not known, of the wrong shape, or not finite, or if the rank pattern does not
            fit.
    """
    if not config.use_dora_adaptive:
        for key in weights:
            if key.endswith(".lora_magnitude"):
                raise ValueError(
                    f"{source!r} has {key!r} but its config does not say `use_dora_adaptive=True`, so it would be "
                    "used without its magnitudes."
                )
        return

    def shapes(layer: str, rank: int) -> dict[str, tuple[int, int]]:
        out_features, in_features = layers[layer]
        return {
            "lora_magnitude": (out_features, 1),
            "lora_E": (rank, 1),
            "lora_A": (rank, in_features),
            "lora_B": (out_features, rank),
        }

    parts = ("lora_magnitude", "lora_E", "lora_A", "lora_B")
    known = {f"{PREFIX}{layer}.{part}": (part, layer) for part in parts for layer in layers}
    weights = {PREFIX + key.removeprefix(PREFIX): value for key, value in weights.items()}
    for key in weights:
        if key not in known and key.rpartition(".")[2].startswith("lora_"):
            raise ValueError(f"{source!r} has {key!r}, for which the model has no place.")
    for key in known:
        if key not in weights:
            raise ValueError(f"{key!r} is missing from {source!r}.")
        if not torch.isfinite(weights[key]).all():
            raise ValueError(f"{key!r} in {source!r} is not finite.")

    ranks = dict.fromkeys(layers, config.init_r)
    for name, kept in (config.rank_pattern or {}).items():
        layer = name.partition(".lora_E")[0]
        if layer not in layers or len(kept) != config.init_r:
            raise ValueError(f"The rank pattern of {layer!r} in the config of {source!r} does not fit the model.")
        ranks[layer] = sum(kept)
    for key, (part, layer) in known.items():
        rank = ranks[layer] if max_rank is None else min(max_rank, len(weights[f"{PREFIX}{layer}.lora_E"]))
        if tuple(weights[key].shape) != shapes(layer, rank)[part]:
            raise ValueError(
                f"{key!r} in {source!r} has the shape {tuple(weights[key].shape)}, but the model and the config need "
                f"{shapes(layer, rank)[part]}."
            )
