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

"""Checks of adapter names, options and schedules of AdaDoRA, and warnings of options that AdaLoRA does not read."""

import re
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from .config import AdaLoraConfig
from .parameter_names import FACTORS, adapted_layers, layer_of_E
from .sharding import check_not_flattened, full_shape, gather_full


# LoRA's options without an effect on AdaLoRA, besides `r`, of which PEFT warns
UNREAD_OPTIONS = [
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
]

# the number of an expert in names such as `experts.3.up_proj` and `experts.expert_3.wi`
EXPERT = re.compile(r"(expert[^\d.]*(?:\.(?:expert[^\d.]*)?)?)\d+")


def check_name(adapter_name: str) -> None:
    """Raise a `ValueError` if torch does not allow the name of an adapter as the name of a parameter."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"An adapter cannot be called {adapter_name!r}, which torch does not allow as the name of a parameter; "
            "choose another name."
        )


def check_options(config: AdaLoraConfig, adapter_name: str) -> None:
    """
    Check the options of an adapter to be trained. Warn of a schedule that may prune nothing in the end, and of options
    that AdaLoRA does not read.

    Raises:
        `ValueError`: If the ranks cannot work, or if the config targets single parameters.
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
    if config.tfinal == 0 and config.deltaT > 1:
        warnings.warn(
            f"With `tfinal=0` and `deltaT={config.deltaT}`, the steps after the last allocation move pruned singular "
            "values off zero, so the adapter may end with all its ranks; set `tfinal` to at least 1."
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
    """Raise a `ValueError` that ends with `what_follows` if a layer of the adapter in training has lost ranks."""
    adapter_name = tuner.trainable_adapter_name
    init_r = tuner.peft_config[adapter_name].init_r
    for name, layer in adapted_layers(tuner.model, adapter_name).items():
        check_not_flattened(layer.lora_E[adapter_name])
        rank = full_shape(layer.lora_E[adapter_name])[0]
        if rank != init_r:
            raise ValueError(
                f"{name!r} has rank {rank} instead of init_r={init_r}, because the adapter was loaded pruned, so "
                f"{what_follows}."
            )


def warn_of_uncalled_layers(
    layers: dict[str, nn.Module], adapter_name: str, averages: dict[str, torch.Tensor]
) -> None:
    """
    Warn of layers that have got no gradient by the first allocation. The experts of a mixture count as one layer,
    because some may have seen no token.

    Args:
        layers (`dict[str, nn.Module]`): The adapted layers by their names in the model.
        adapter_name (`str`): The adapter in training.
        averages (`dict[str, torch.Tensor]`): The average importance of each factor, by its name in the model.
    """
    called = defaultdict(dict)
    for name, layer in layers.items():
        # A and B get gradients from the regularization without a forward pass
        parts = ["lora_E"] if layer.lora_E[adapter_name].requires_grad else FACTORS
        trained = {part: factor for part in parts if (factor := getattr(layer, part)[adapter_name]).requires_grad}
        if trained:
            called[EXPERT.sub(r"\1*", name)][name] = any(
                factor.grad is not None or bool(gather_full(averages[f"{name}.{part}.{adapter_name}"]).any())
                for part, factor in trained.items()
            )
    uncalled = [name for group in called.values() if not any(group.values()) for name in group]
    if uncalled:
        warnings.warn(
            f"{', '.join(map(repr, uncalled))} got no gradient before the first allocation, so these layers lose "
            "their ranks first. If the model reads the weight of a layer without calling it, or does not use the "
            "layer, the adapter has no effect there; leave it out of `target_modules`."
        )


def check_allocation(tuner: Any, global_step: int) -> None:
    """
    Check that the adapter in training can be allocated at a step. At the first allocation of an AdaDoRA adapter, warn
    if AdaLoRA's regularization has not reached the loss.

    Args:
        tuner (`AdaLoraModel`): The model of the adapter in training.
        global_step (`int`): The step, counted from 0.

    Raises:
        `ValueError`: If there is no adapter in training, if no ranks have been decided when the budget phase ends, or
            if the adapter was loaded pruned.
    """
    adapter_name = tuner.trainable_adapter_name
    if adapter_name is None:
        raise ValueError("The model has no adapter in training; load one with `is_trainable=True`, or add one.")
    allocator, config = tuner.rankallocator, tuner.peft_config[adapter_name]
    last = config.total_step - config.tfinal
    can_decide = global_step < last or (global_step == last and allocator.has_averages())
    if config.use_dora_adaptive and not can_decide and not allocator.kept:
        raise ValueError(
            f"`update_and_allocate({global_step})` finds no ranks to keep, because the budget phase ends at step "
            f"{last} and no call before has seen finite gradients; call it after each optimizer step, from the first "
            "one on."
        )
    if not config.use_dora_adaptive or allocator.exp_avg_ipt or global_step > last:
        return
    check_unpruned(
        tuner,
        "its schedule cannot start again; train on without `update_and_allocate`, or merge the adapter and train a "
        "new one",
    )
    if config.orth_reg_weight > 0 and not config.orth_reg_decoupled and allocator.expects_regularization:
        allocator.expects_regularization = False
        warnings.warn(
            "AdaLoRA's regularization has not reached the gradients, because the loss is not the model's own "
            "`outputs.loss`, as in TRL's trainers, or the model returns none. Set `orth_reg_decoupled=True` and "
            "`orth_reg_weight=10` to regularize apart from the loss, set `task_type` and pass labels, or set "
            "`orth_reg_weight=0` to train without it."
        )
