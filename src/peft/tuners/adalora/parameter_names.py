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

"""Find the layers of an adapter, and parse and build the names of its weights. No other module parses names."""

from torch import nn


# The factors of an update with the dimension of their triplets, and all weights that an adapter may have.
DIM_OF_RANK = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
FACTORS = tuple(DIM_OF_RANK)
WEIGHTS = (*FACTORS, "lora_magnitude")

# The start of module names inside a PeftModel.
PREFIX = "base_model.model."

# The names of wrapped modules under activation checkpointing, FSDP1 and torch.compile.
WRAPPED = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"}


def unwrapped_name(name: str) -> str:
    """The name of a module or parameter without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The AdaLoRA layers that have an adapter of exactly this name, by their names without wrappers."""
    return {
        unwrapped_name(name): module  # a wrapper may pass on attributes; it comes first, so its module replaces it
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_E", None), nn.ParameterDict) and adapter_name in module.lora_E
    }


def layer_of_E(key: str, adapter_name: str) -> str:
    """The layer of a key of a rank pattern, which is a `lora_E` with or without the name of the adapter."""
    return key.removesuffix(f".{adapter_name}").removesuffix(".lora_E")


def name_in_file(key: str, adapter_name: str) -> str:
    """The name of a weight in a saved adapter, given its name in the model."""
    # an adapter may be called like a part of a layer
    has_adapter_name = key.endswith(tuple(f".{part}.{adapter_name}" for part in WEIGHTS))
    name = PREFIX + unwrapped_name(key).removeprefix(PREFIX)
    return name.removesuffix(f".{adapter_name}") if has_adapter_name else name


def layers_of_state_dict(state_dict: dict, prefix: str) -> set[str]:
    """The names of the layers that the weights of an adapter belong to."""
    return {key.rpartition(f".{prefix}")[0] for key in state_dict}
