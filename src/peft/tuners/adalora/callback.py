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

"""AdaLoRA and AdaDoRA in the `Trainer` of transformers: allocation, logs, and checkpoints that resume exactly."""

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional, TypeVar

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .allocator import RankAllocator
from .base_weight import base_row_norm
from .config import AdaLoraConfig
from .layer import AdaLoraLayer
from .model import AdaLoraModel
from .parameter_names import DIM_OF_RANK, WEIGHTS, adapted_layers, key_of_E
from .sharding import FSDP1_MESSAGE, copy_full_, full_shape, gather_full
from .validation import check_unpruned


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


STATE_FILE = "adalora_state.safetensors"

T = TypeVar("T", bound=nn.Module)


class AdaLoraCallback(TrainerCallback):
    """
    Trains AdaLoRA and AdaDoRA adapters with the `Trainer` of transformers, and trainers built on it, such as TRL's.

    After each optimizer step it calls [`AdaLoraModel.update_and_allocate`], with the number of steps of the run as
    `total_step`. It adds to the logs the budget (`adalora_budget`, ranks in total), the mean rank of a layer
    (`adalora_mean_rank`), the share of the initial ranks that is pruned (`adalora_pruned`) and, for AdaDoRA, by how
    much of its initial value a magnitude has changed on average (`adalora_magnitude_drift`).

    Each checkpoint gets a file `adalora_state.safetensors` with the unpruned factors, the ranks kept and the averages
    of the importance; `resume_from_checkpoint` then goes on bit by bit as if the run had never stopped. A checkpoint
    that a kill left half written is renamed `unfinished-checkpoint-<step>` when the next run starts, so that
    `resume_from_checkpoint=True` finds the one before it.

    The adapter may also come from `model.add_adapter` of transformers or from `inject_adapter_in_model`. What is added
    to the loss for the orthogonality of A and B is then missing, because [`AdaLoraModel`] is.

    Magnitudes of quantized weights that the trainer has cast to bfloat16, as TRL's do, are made float32 again.

    Raises:
        `NotImplementedError`:
            When the trainer is made, if it uses FSDP1; FSDP2 works.
        `ValueError`:
            When training starts, if the model has no AdaLoRA adapter to train, if the schedule does not fit the number
            of steps, if the adapter was loaded pruned, or if the checkpoint's `adalora_state.safetensors` is broken.

    Example:

    ```python
    trainer = Trainer(model=get_peft_model(model, AdaLoraConfig(...)), callbacks=[AdaLoraCallback()], ...)
    trainer.train()
    ```
    """

    def __init__(self) -> None:
        self._tuner: Optional[AdaLoraModel | _InjectedAdaLora] = None
        self._saved_step: Optional[int] = None
        self._lock: Optional[int] = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if getattr(AcceleratorState._shared_state.get("fsdp_plugin"), "fsdp_version", 2) == 1:
            raise NotImplementedError(FSDP1_MESSAGE)
        for layer in _modules(model, AdaLoraLayer):
            _upcast_quantized_magnitudes(layer)
        if (tuner := _find_tuner(model)) is not None:
            _keep_shapes(tuner)
        with args.main_process_first(local=False, desc="looking for unfinished checkpoints"):
            if args.process_index == 0:
                _set_aside_unfinished_checkpoints(args.output_dir)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._tuner = _tuner_of(model)
        self._saved_step = None
        _keep_shapes(self._tuner)
        check_unpruned(
            self._tuner,
            "what further training would save could not be loaded; resume from a checkpoint of the Trainer, or merge "
            "the adapter and train a new one",
        )
        adapter_name = self._tuner.trainable_adapter_name
        if any(
            layer.ranknum[adapter_name].requires_grad
            for layer in adapted_layers(self._tuner.model, adapter_name).values()
        ):
            warnings.warn(
                "Over bfloat16 and float16 weights PEFT trains `ranknum`, the number that AdaLoRA's update is divided "
                "by, and does not save it, so the saved adapter will predict otherwise than the trained one; call "
                "`requires_grad_(False)` on these parameters before training."
            )
        if args.deepspeed is not None:
            if args.fp16:
                raise ValueError(
                    "AdaLoraCallback cannot tell the loss scale of DeepSpeed in float16; train in bfloat16 or float32."
                )
            self._tuner.rankallocator.capture_gradients(self._tuner.model)
        _set_total_step(self._tuner, state.max_steps)
        if state.global_step > 0:
            folders = [os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")]
            if args.resume_from_checkpoint is not None:
                folders.insert(0, args.resume_from_checkpoint)
            _restore(self._tuner, [os.path.join(folder, STATE_FILE) for folder in folders])

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        config = self._tuner.rankallocator.peft_config
        is_last_allocation = state.global_step == config.total_step - config.tfinal
        if getattr(optimizer, "step_was_skipped", False) and not is_last_allocation:
            return  # an overflow in float16: there are no gradients to learn from, and nothing has changed
        other = _optimizer_of(optimizer)
        self._tuner.update_and_allocate(state.global_step, other)
        is_first = state.global_step == 0 and _swaps_weights(optimizer)
        if is_first and not self._tuner.rankallocator.mask_other_weights(self._tuner.model, other):
            warnings.warn(
                f"{type(other).__name__} evaluates with other weights than it trains, and does not keep them where "
                "AdaLoraCallback finds them, so pruned singular values may come back in evaluation and in the saved "
                "adapter."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # before the Trainer writes its part, so that it deletes no older checkpoint while this one lacks ours
        if control.should_save:
            self._save(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            self._save(args, state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._saved_step == state.global_step and _swaps_weights(optimizer):
            self._saved_step = None
            self._save(args, state)  # the weights that were evaluated, which the Trainer is about to save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save(args, state)  # if not on_step_end but an evaluation, say, has asked for the checkpoint
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.save_only_model or state.is_hyper_param_search or self._saved_step == state.global_step:
            return  # nothing resumes from it
        self._saved_step = state.global_step
        tensors = _training_state(self._tuner)  # on all processes, of which each may hold a part
        if args.should_save:
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            os.makedirs(folder, exist_ok=True)
            self._lock = self._lock or _lock(folder)
            _write(tensors, folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Optional[dict[str, float]] = None,
        **kwargs: Any,
    ) -> None:
        if self._tuner is None or logs is None or "loss" not in logs:
            return
        metrics = _metrics(self._tuner, state.global_step - 1)
        logs.update(metrics)
        state.log_history[-1].update(metrics)


@dataclass
class _InjectedAdaLora:
    """The part of [`AdaLoraModel`] that allocation needs, for an adapter that was injected into a model without it."""

    model: nn.Module
    peft_config: dict[str, AdaLoraConfig]
    trainable_adapter_name: str
    rankallocator: RankAllocator

    update_and_allocate = AdaLoraModel.update_and_allocate


def _optimizer_of(optimizer: Any) -> Optional[torch.optim.Optimizer]:
    """The optimizer of PyTorch in that of accelerate, if it is one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def _swaps_weights(optimizer: Any) -> bool:
    """Whether an optimizer has other weights for evaluation than for training, as schedule-free ones do."""
    return callable(getattr(_optimizer_of(optimizer), "eval", None))


def _modules(model: nn.Module, kind: type[T]) -> Iterator[T]:
    return (module for module in model.modules() if isinstance(module, kind))


def _find_tuner(model: nn.Module) -> Optional[AdaLoraModel | _InjectedAdaLora]:
    for tuner in _modules(model, AdaLoraModel):
        if hasattr(tuner, "rankallocator"):
            return tuner
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if isinstance(config, AdaLoraConfig) and not config.inference_mode:
                return _InjectedAdaLora(module, configs, name, RankAllocator(module, config, name))
    return None


def _tuner_of(model: nn.Module) -> AdaLoraModel | _InjectedAdaLora:
    if (tuner := _find_tuner(model)) is not None:
        return tuner
    raise ValueError("AdaLoraCallback needs a model with an AdaLoRA adapter to train, but this model has none.")


def _layers(tuner: AdaLoraModel | _InjectedAdaLora) -> dict[str, AdaLoraLayer]:
    return adapted_layers(tuner.model, tuner.trainable_adapter_name)


def _set_total_step(tuner: AdaLoraModel | _InjectedAdaLora, total_step: int) -> None:
    config = tuner.rankallocator.peft_config
    if config.total_step == total_step:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataclasses.replace(config, total_step=total_step)  # raises if the schedule does not fit
    warnings.warn(
        f"The AdaLoRA config has total_step={config.total_step} but this run takes {total_step} optimizer steps; its "
        f"schedule now ends at step {total_step}."
    )
    config.total_step = total_step


def _adapter_params(tuner: AdaLoraModel | _InjectedAdaLora) -> dict[str, nn.Parameter]:
    """
    A, E, B and m of each layer that the allocator looks after, by their names in the model, and the initial rank
    (`ranknum`) if it is trained, as PEFT 0.21 does with plain AdaLoRA over bfloat16 and float16 weights.
    """
    adapter_name = tuner.trainable_adapter_name
    params = {}
    for name, layer in _layers(tuner).items():
        for part in (*WEIGHTS, "ranknum"):
            param = getattr(layer, part).get(adapter_name)
            if param is not None and (part != "ranknum" or param.requires_grad):
                params[f"{name}.{part}.{adapter_name}"] = param
    return params


def _rank_pattern(tuner: AdaLoraModel | _InjectedAdaLora) -> dict[str, torch.Tensor]:
    """Which triplets are kept, bool of shape (r,), by the name of each layer."""
    state, adapter_name = tuner.rankallocator.state_dict(), tuner.trainable_adapter_name
    return {
        name: state.get(
            f"rank_pattern.{name}.lora_E.{adapter_name}",
            torch.ones(full_shape(layer.lora_E[adapter_name])[0], dtype=torch.bool),
        )
        for name, layer in _layers(tuner).items()
    }


def _training_state(tuner: AdaLoraModel | _InjectedAdaLora) -> dict[str, torch.Tensor]:
    """The unpruned adapter and the state of the allocator, all that a checkpoint of a pruned adapter lacks."""
    state = tuner.rankallocator.state_dict()
    state.update({f"param.{name}": gather_full(param) for name, param in _adapter_params(tuner).items()})
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    result = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        result.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        result.update(value.reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def _write(tensors: dict[str, torch.Tensor], folder: str) -> None:
    path = os.path.join(folder, STATE_FILE)
    save_file(tensors, f"{path}.tmp", metadata={"format": "pt", "sha256": _checksum(tensors)})
    os.replace(f"{path}.tmp", path)


def _read(path: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            expected = (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}); resume from another checkpoint.") from error
    if _checksum(tensors) != expected:
        raise ValueError(f"{path} is broken (wrong checksum); resume from another checkpoint.")
    return tensors


@torch.no_grad()
def _restore(tuner: AdaLoraModel | _InjectedAdaLora, paths: list[str]) -> None:
    """Put back what the first of the files that exists holds, if it goes with the adapter that has been loaded."""
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        warnings.warn(
            f"There is no {paths[0]}, so this run resumes only approximately: pruned triplets start afresh, and the "
            "averages of the importance from zero."
        )
        return
    state = _read(path)
    saved = {key.removeprefix("param."): state.pop(key) for key in list(state) if key.startswith("param.")}
    params = _adapter_params(tuner)
    for name in saved.keys() ^ params.keys():
        raise ValueError(f"{path} does not fit the model, which has another adapter: {name!r} is only in one of them.")

    # the loaded weights are those that are kept, in front
    adapter_name = tuner.trainable_adapter_name
    for layer_name, layer in _layers(tuner).items():
        name_of_E = f"{layer_name}.lora_E.{adapter_name}"
        kept = state.get(f"rank_pattern.{name_of_E}", torch.ones(len(saved[name_of_E]), dtype=torch.bool))
        if adapter_name in layer.lora_magnitude:
            kept = kept | (saved[name_of_E].view(-1) != 0)  # see `keep_saved_ranks`
        for part, dim in (*DIM_OF_RANK.items(), ("lora_magnitude", None)):
            name = f"{layer_name}.{part}.{adapter_name}"
            if name not in params:
                continue
            expected, loaded = saved[name], gather_full(params[name]).to(saved[name].device)
            if dim is not None and not torch.equal(expected, loaded):  # FSDP2 loads what has not been pruned
                expected = expected.index_select(dim, kept.nonzero().view(-1))
                loaded = loaded.narrow(dim, 0, min(expected.shape[dim], loaded.shape[dim]))
            if saved[name].shape != full_shape(params[name]) or not torch.equal(expected, loaded):
                raise ValueError(
                    f"{name!r} in {path} is not what has been loaded into the model; one of the files of the "
                    "checkpoint is broken, or from another run."
                )
    try:
        tuner.rankallocator.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    for name, param in params.items():
        copy_full_(param, saved[name])


@torch.no_grad()
def _metrics(tuner: AdaLoraModel | _InjectedAdaLora, step: int) -> dict[str, float]:
    allocator = tuner.rankallocator
    rank_pattern = _rank_pattern(tuner)
    kept = sum(int(mask.sum()) for mask in rank_pattern.values())
    metrics = {
        "adalora_budget": allocator.budget_schedule(step)[0],
        "adalora_mean_rank": kept / len(rank_pattern),
        "adalora_pruned": 1 - kept / allocator.init_bgt,
    }
    drifts = [
        magnitude_drift(layer, allocator.adapter_name)
        for layer in _layers(tuner).values()
        if allocator.adapter_name in layer.lora_magnitude
    ]
    if drifts:
        metrics["adalora_magnitude_drift"] = torch.cat([drift.flatten().cpu() for drift in drifts]).mean().item()
    return metrics


@torch.no_grad()
def magnitude_drift(layer: AdaLoraLayer, adapter_name: str) -> torch.Tensor:
    """
    By how much of its initial value each magnitude has changed, of shape (rows whose base weight is not zero,).
    """
    norm = base_row_norm(layer)
    change = (gather_full(layer.lora_magnitude[adapter_name]).to(norm.dtype) - norm).abs() / norm
    return change[norm > 0]


@torch.no_grad()
def _upcast_quantized_magnitudes(layer: AdaLoraLayer) -> None:
    """
    Give magnitudes of a quantized weight that were cast to a low precision float32 again.

    TRL's trainers cast all of an adapter over quantized weights to bfloat16 but for magnitudes with LoRA's name for
    them. There the steps of an optimizer are smaller than those from one number to the next, so that a magnitude stays
    as it is (https://github.com/huggingface/trl/issues/7268).
    """
    for magnitude in layer.lora_magnitude.values() if layer.quantization_backend is not None else ():
        if magnitude.dtype.itemsize < 4:
            norm = base_row_norm(layer)
            # of all that rounds to what is there, what it started as
            is_rounded = norm.to(magnitude.dtype) == magnitude
            magnitude.data = torch.where(is_rounded, norm, magnitude.float())


def _keep_shapes(tuner: AdaLoraModel | _InjectedAdaLora) -> None:
    """
    Let the weights of pruned adapters be loaded into parameters that keep their shapes, because an optimizer may hold
    them: the triplets that there are first, and behind them those of the model with a singular value of 0.
    """
    for name, layer in _layers(tuner).items():
        if not layer.keeps_shapes:
            layer.keeps_shapes = True
            hook = partial(_before_loading, name=name, configs=tuner.peft_config)
            layer.register_load_state_dict_pre_hook(hook)


def _before_loading(
    layer: AdaLoraLayer,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
    name: str,
    configs: dict[str, AdaLoraConfig],
) -> None:
    for adapter_name in layer.lora_E:
        rank = len(layer.lora_E[adapter_name])
        kept = _fill_up(layer, adapter_name, state_dict, prefix)
        if kept < rank:
            config, names = configs[adapter_name], (f"{name}.lora_E.{adapter_name}", key_of_E(name))
            others = {key: mask for key, mask in (config.rank_pattern or {}).items() if key not in names}
            config.rank_pattern = {**others, key_of_E(name): [index < kept for index in range(rank)]}


def _fill_up(layer: AdaLoraLayer, adapter_name: str, weights: dict[str, torch.Tensor], prefix: str) -> int:
    """Give loaded weights of a layer, whose names have a prefix, its shapes, in place. Returns their rank."""
    rank = len(layer.lora_E[adapter_name])
    kept = len(weights.get(f"{prefix}lora_E.{adapter_name}", layer.lora_E[adapter_name]))
    for part, dim in DIM_OF_RANK.items():
        name = f"{prefix}{part}.{adapter_name}"
        if name in weights and weights[name].shape[dim] < rank:
            rest = getattr(layer, part)[adapter_name].detach().narrow(dim, kept, rank - kept).to(weights[name])
            rest = torch.zeros_like(rest) if part == "lora_E" else rest
            weights[name] = torch.cat([weights[name], rest], dim)
    return kept


def _lock(folder: str) -> Optional[int]:
    """
    A file descriptor that locks the folder for as long as it is open and this process lives, or `None` if the folder
    is locked already or its file system knows no locks.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _set_aside_unfinished_checkpoints(output_dir: str) -> None:
    """
    Rename the newest checkpoints of the folder as long as they are ones that this callback saw begun but not ended.
    """
    while os.path.isdir(output_dir) and (folder := get_last_checkpoint(output_dir)) is not None:
        names = os.listdir(folder)
        # safetensors 0.8 writes to a file `.tmp…` first
        is_begun = not names or any(name.startswith((STATE_FILE, ".tmp")) for name in names)
        if not is_begun or _is_trainer_state(os.path.join(folder, TRAINER_STATE_NAME)):
            return
        lock = _lock(folder)
        if lock is None:
            return  # it is being written
        parent, name = os.path.split(folder)
        target = os.path.join(parent, f"unfinished-{name}")
        while os.path.exists(target):
            target += "-again"
        os.rename(folder, target)
        os.close(lock)
        warnings.warn(f"{folder} is unfinished, its writer must have been killed; it is now called {target}.")


def _is_trainer_state(path: str) -> bool:
    try:
        TrainerState.load_from_json(path)
    except (OSError, ValueError, TypeError):
        return False
    return True
