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

"""A callback that allocates and logs ranks of AdaLoRA and AdaDoRA in the `Trainer` of transformers."""

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerState, TrainingArguments

from .allocator import RankAllocator
from .base_weight import base_row_norm
from .config import AdaLoraConfig
from .layer import AdaLoraLayer
from .model import AdaLoraModel
from .parameter_names import adapted_layers
from .resume import InCheckpoint, ResumableCallback, trained_ranknum
from .sharding import FSDP1_MESSAGE, gather_full
from .unfinished_checkpoints import set_aside_unfinished_checkpoints
from .validation import check_unpruned


class AdaLoraCallback(ResumableCallback):
    """
    Trains an AdaLoRA or AdaDoRA adapter in the `Trainer` of transformers, and in trainers built on it, such as TRL's.

    - Allocation: calls [`AdaLoraModel.update_and_allocate`] after each optimizer step. If the run takes another number
      of steps than `total_step`, it scales `tinit` and `tfinal` and warns.
    - Logs: `adalora_budget` (total rank that the schedule allows), `adalora_mean_rank` (of a layer), `adalora_pruned`
      (share of the initial ranks) and, for AdaDoRA, `adalora_magnitude_drift` (mean relative change).
    - Resume: `resume_from_checkpoint` continues bit for bit, see [`ResumableCallback`]. When you make a Trainer, the
      callback renames checkpoints that a kill left half written to `unfinished-checkpoint-<step>`.
    - Precision: casts magnitudes that TRL cast over quantized weights back to float32.

    Adapters from `model.add_adapter` of transformers or `inject_adapter_in_model` train without the regularization.

    Raises:
        `NotImplementedError`:
            When the Trainer is made, if it uses FSDP1; FSDP2 works.
        `ValueError`:
            When training starts, if there is no AdaLoRA adapter to train, if the adapter was loaded pruned, or if
            [`ResumableCallback.restore`] raises it.
    """

    def on_init_end(self, args: TrainingArguments, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        if getattr(AcceleratorState._shared_state.get("fsdp_plugin"), "fsdp_version", 2) == 1:
            raise NotImplementedError(FSDP1_MESSAGE)
        for module in model.modules():
            upcast_magnitudes(module)
        with args.main_process_first(local=False, desc="looking for unfinished checkpoints"):
            if args.process_index == 0:
                self.unlock()
                set_aside_unfinished_checkpoints(args.output_dir)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any, **__: Any) -> None:
        self.tuner = tuner = _tuner_of(model)
        check_unpruned(tuner, "its schedule cannot start again; resume from a checkpoint, or merge it and train anew")
        if trained_ranknum(tuner):
            warnings.warn(
                "Over bfloat16 and float16 weights PEFT trains `ranknum`, which divides the update, but does not save "
                "it, so saved adapters predict differently; call `requires_grad_(False)` on it before training."
            )
        if args.deepspeed is not None:
            if args.fp16:
                raise ValueError("AdaLoraCallback does not know DeepSpeed's loss scale; train in bfloat16 or float32.")
            tuner.rankallocator.capture_gradients(tuner.model)
        config = _config_of_run(tuner.rankallocator.peft_config, state.max_steps)
        tuner.peft_config[tuner.trainable_adapter_name] = tuner.rankallocator.peft_config = config
        tuner.rankallocator.read_kept(tuner.model)
        tuner.rankallocator.reset_ipt()  # of an earlier run that stopped before its last allocation
        if state.global_step > 0:
            self.restore(args, state)

    def on_optimizer_step(self, args: Any, state: TrainerState, *_: Any, optimizer: Any = None, **__: Any) -> None:
        tuner, config = self.tuner, self.tuner.rankallocator.peft_config
        is_last_allocation = state.global_step == config.total_step - config.tfinal
        if getattr(optimizer, "step_was_skipped", False) and not is_last_allocation:
            if args.deepspeed is not None:
                tuner.rankallocator.capture_gradients(tuner.model)  # drops the gradients of this step
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        AdaLoraModel.update_and_allocate(tuner, state.global_step, optimizer)
        is_first = state.global_step == 0 and callable(getattr(optimizer, "eval", None))  # as of schedule-free ones
        if is_first and not tuner.rankallocator.mask_other_weights(tuner.model, optimizer):
            warnings.warn(
                f"{type(optimizer).__name__} evaluates with other weights than it trains, and AdaLoraCallback cannot "
                "find them, so pruned singular values may come back in evaluation and in the saved adapter."
            )

    def on_train_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.load_best_model_at_end:  # saving plain AdaLoRA prunes by this pattern
            allocator = self.tuner.rankallocator
            allocator.read_kept(self.tuner.model)
            allocator.peft_config.rank_pattern = allocator.kept

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        if self.tuner is not None and "loss" in (logs or {}):
            metrics = _metrics(self.tuner, state.global_step - 1)
            logs.update(metrics)
            state.log_history[-1].update(metrics)


@torch.no_grad()
def upcast_magnitudes(module: torch.nn.Module) -> None:
    """
    Cast magnitudes over a quantized weight back to float32. TRL's trainers cast them to bfloat16, which loses small
    optimizer steps (https://github.com/huggingface/trl/issues/7268). Warn if they were trained before the cast,
    because it has rounded them.
    """
    is_quantized = getattr(module, "quantization_backend", None) is not None
    for magnitude in getattr(module, "lora_magnitude", torch.nn.ParameterDict()).values() if is_quantized else ():
        if magnitude.dtype.itemsize < 4:
            norm = base_row_norm(module)
            # If the cast value equals the rounded initial norm, restore that norm exactly.
            is_rounded = norm.to(magnitude.dtype) == magnitude
            if not is_rounded.all():
                warnings.warn(
                    f"Magnitudes that had been trained were cast to {magnitude.dtype}, which rounded them; load the "
                    "adapter's weights again after the Trainer is made, with `set_peft_model_state_dict`."
                )
            magnitude.data = torch.where(is_rounded, norm, magnitude.float())


def _tuner_of(model: torch.nn.Module) -> AdaLoraModel | SimpleNamespace:
    """The [`AdaLoraModel`] of the adapter in training. For an injected adapter, the parts that allocation needs."""
    for module in model.modules():
        if isinstance(module, AdaLoraModel) and module.trainable_adapter_name is not None:
            return module
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if isinstance(config, AdaLoraConfig) and not config.inference_mode:
                parts = {"model": module, "peft_config": configs, "trainable_adapter_name": name}
                return SimpleNamespace(**parts, rankallocator=RankAllocator(module, config, name))
    raise ValueError("AdaLoraCallback needs a model with an AdaLoRA adapter to train, but this model has none.")


def _config_of_run(config: AdaLoraConfig, total_step: int) -> AdaLoraConfig:
    """Copy a config and scale its schedule, or the one that an earlier run has scaled, to `total_step` steps."""
    copied = copy.copy(config)
    copied.saves_all_ranks = InCheckpoint()
    schedule = config.total_step, config.tinit, config.tfinal
    if config.unscaled_schedule and _scaled(config.unscaled_schedule, config.total_step) == schedule:
        schedule = config.unscaled_schedule
    copied.unscaled_schedule = schedule
    copied.total_step, copied.tinit, copied.tfinal = _scaled(schedule, total_step)
    if schedule[0] != total_step:
        warnings.warn(
            f"The AdaLoRA config has total_step={schedule[0]} but this run takes {total_step} optimizer steps, "
            f"so its schedule is scaled to tinit={copied.tinit} and tfinal={copied.tfinal} (from {schedule[1]} and "
            f"{schedule[2]})."
        )
    return copied


def _scaled(schedule: tuple[int, int, int], total_step: int) -> tuple[int, int, int]:
    """`total_step`, `tinit` and `tfinal` of a schedule for another number of steps."""
    before, tinit, tfinal = schedule
    # rounds up, so that a short run has a last allocation too
    tfinal = min(-(-tfinal * total_step // before), total_step - 1)
    return total_step, min(tinit * total_step // before, total_step - tfinal - 1), tfinal


def magnitude_drift(layer: AdaLoraLayer, adapter_name: str) -> torch.Tensor:
    """|m − ‖W‖| / ‖W‖ of each row (out) whose base weight is not zero."""
    norm = base_row_norm(layer)
    return ((gather_full(layer.lora_magnitude[adapter_name]).to(norm.dtype) - norm).abs() / norm)[norm > 0]


@torch.no_grad()
def _metrics(tuner: AdaLoraModel | SimpleNamespace, step: int) -> dict[str, float]:
    allocator, config = tuner.rankallocator, tuner.rankallocator.peft_config
    layers = adapted_layers(tuner.model, allocator.adapter_name).values()
    # the step of the last allocation: after a resume between two allocations, E does not show it
    decided = step - step % config.deltaT if step < config.total_step - config.tfinal else step
    budget = allocator.budget_schedule(decided)[0]
    masks = allocator.kept if budget < allocator.init_bgt else None
    kept = min(budget, sum(map(sum, masks.values()))) if masks else allocator.init_bgt
    metrics = {
        "adalora_budget": allocator.budget_schedule(step)[0],
        "adalora_mean_rank": kept / len(layers),
        "adalora_pruned": 1 - kept / allocator.init_bgt,
    }
    if config.use_dora_adaptive:
        drifts = [magnitude_drift(layer, allocator.adapter_name).cpu() for layer in layers]
        metrics["adalora_magnitude_drift"] = torch.cat(drifts).mean().item()
    return metrics
