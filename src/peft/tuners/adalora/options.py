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

"""What is asked of an AdaDoRA adapter that cannot work, or that AdaLoRA does not read."""

import warnings
from collections.abc import Container, Iterable
from typing import Any

from torch import nn

from .config import AdaLoraConfig
from .names import adapted_layers, layer_of_E
from .sharding import check_not_flattened, whole_shape


# of LoRA's options, besides `r`, of which PEFT tells
UNREAD_OPTIONS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "use_rslora",
    "velora_config",
)


def check_name(adapter_name: str) -> None:
    """Raise a `ValueError` if torch does not take the name of an adapter for that of a parameter."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"An adapter cannot be called {adapter_name!r}, which torch does not allow as the name of a parameter; "
            "choose another name."
        )


def check_only_adapter(adapter_names: str | Iterable[str], of_adadora: Container[str]) -> None:
    """Raise a `NotImplementedError` if several adapters are to be used together of which one is AdaDoRA."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for name in names if len(names) > 1 else ():
        if name in of_adadora:
            raise NotImplementedError(
                f"The AdaDoRA adapter {name!r} has to be the only active adapter but got {names}; choose one of them."
            )


def check_options(config: AdaLoraConfig, adapter_name: str) -> None:
    """
    Raise a `ValueError` if the schedule of an adapter that is to be trained, or what it is to adapt, cannot work, and
    warn of options that are not read.
    """
    if config.target_r > config.init_r:
        raise ValueError(
            f"`target_r={config.target_r}` is more than `init_r={config.init_r}`, the rank that pruning starts from; "
            "set `target_r` to at most `init_r`."
        )
    if config.target_parameters:
        raise ValueError(
            "AdaLoRA adapts modules, not single parameters; leave out `target_parameters` and set `target_modules`."
        )
    unread = [name for name in UNREAD_OPTIONS if getattr(config, name, None)]
    if not isinstance(config.init_lora_weights, bool):
        unread.append("init_lora_weights")
    if getattr(config.runtime_config, "ephemeral_gpu_offload", False):
        unread.append("runtime_config")
    if any(layer_of_E(key, adapter_name) == key for key in config.rank_pattern or ()):
        unread.append("rank_pattern")
    if unread:
        options = ", ".join(f"`{name}`" for name in sorted(unread))
        warnings.warn(f"AdaLoRA does not read {options} of its config; the adapter is trained as if it were not set.")


def check_unpruned(tuner: Any, what_follows: str) -> None:
    """Raise a `ValueError` if the adapter in training has not all of its ranks, which says what follows from it."""
    adapter_name = tuner.trainable_adapter_name
    init_r = tuner.peft_config[adapter_name].init_r
    for name, layer in adapted_layers(tuner.model, adapter_name).items():
        check_not_flattened(layer.lora_E[adapter_name])
        rank = whole_shape(layer.lora_E[adapter_name])[0]
        if rank != init_r:
            raise ValueError(
                f"{name!r} has rank {rank} instead of init_r={init_r}, because the adapter was loaded pruned, so "
                f"{what_follows}."
            )


def check_first_allocation(tuner: Any, global_step: int) -> None:
    """
    At the first allocation of an AdaDoRA adapter, raise a `ValueError` if there is nothing to allocate, and warn if
    AdaLoRA's regularization has not reached the loss.

    Args:
        tuner (`AdaLoraModel`): That of the adapter in training.
        global_step (`int`): The step that an allocation is asked for.
    """
    adapter_name = tuner.trainable_adapter_name
    config, allocator = tuner.peft_config[adapter_name], tuner.rankallocator
    if allocator.has_started or not config.use_dora_adaptive:
        return
    last = config.total_step - config.tfinal
    if global_step > last and not config.rank_pattern or global_step == last and not allocator.exp_avg_ipt:
        raise ValueError(
            f"`update_and_allocate({global_step})` is the first call, but the schedule ends its budget phase at step "
            f"{last}, so no ranks have been decided; call it after each optimizer step, from the first one on."
        )
    check_unpruned(
        tuner,
        "its schedule cannot start again; train on without `update_and_allocate`, or merge the adapter and train a "
        "new one",
    )
    if config.orth_reg_weight > 0 and not getattr(tuner, "adds_regularization", False):
        warnings.warn(
            "AdaLoRA's regularization has not reached the loss, because the model did not return one: set `task_type` "
            "and pass labels, or set `orth_reg_weight=0` to train without it."
        )
    allocator.has_started = True
