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

"""Which layers have an adapter, and what a rank pattern calls them: the one place that takes names apart."""

import torch
from torch import nn


# the factors of an update by the dimension that their triplets have, and all weights that an adapter may have
DIM_OF_RANK = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
FACTORS = tuple(DIM_OF_RANK)
WEIGHTS = (*FACTORS, "lora_magnitude")

# of the names of modules inside of a PeftModel
PREFIX = "base_model.model."

# what activation checkpointing, FSDP1 and torch.compile call the module that they wrap
WRAPPED = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"}


def unwrapped_name(name: str) -> str:
    """The name that a module or parameter has in a model of which nothing is wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The AdaLoRA layers that have an adapter of exactly this name, by their names in the model without wrappers."""
    return {
        unwrapped_name(name): module  # which comes after its wrapper, which may pass on its attributes
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_E", None), nn.ParameterDict) and adapter_name in module.lora_E
    }


def layer_of_E(key: str, adapter_name: str) -> str:
    """The name of the layer whose `lora_E` a rank pattern means, with or without the name of the adapter."""
    return key.removesuffix(f".{adapter_name}").removesuffix(".lora_E")


def key_of_E(layer_name: str) -> str:
    """What a rank pattern without the name of the adapter calls the `lora_E` of a layer."""
    return f"{layer_name.removeprefix(PREFIX)}.lora_E"


def part_of(key: str, adapter_name: str) -> str:
    """Which part of its layer a weight is, such as `lora_A`."""
    return key.removesuffix(f".{adapter_name}").rpartition(".")[2]


def name_in_file(key: str, adapter_name: str) -> str:
    """What a file calls a weight that the model calls `key`."""
    return PREFIX + key.removeprefix(PREFIX).removesuffix(f".{adapter_name}")


def layers_of_state_dict(state_dict: dict[str, torch.Tensor], prefix: str) -> set[str]:
    """The names of the layers that the weights of an adapter are for."""
    return {key.rpartition(f".{prefix}")[0] for key in state_dict}
