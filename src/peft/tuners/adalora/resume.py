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

"""Exact resume: the Trainer's checkpoints hold the adapter with all ranks, and the averages of the allocator."""

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .parameter_names import adapted_layers
from .sharding import copy_full_, gather_full
from .unfinished_checkpoints import STATE_FILE, lock_folder


class InCheckpoint:
    """True while the Trainer saves a checkpoint from which it may resume or load the best model."""

    def __bool__(self) -> bool:
        # events do not tell: in each of them another callback may save an adapter or request a checkpoint
        arguments = (variables["self"].args for variables in _calls_of_trainer("_save_checkpoint"))
        return any(not args.save_only_model or args.load_best_model_at_end for args in arguments)


def _calls_of_trainer(method: str) -> Iterator[dict[str, Any]]:
    """The local variables of each running call of a Trainer's method, innermost first."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:
        if frame.f_code.co_name == method and isinstance(frame.f_locals.get("self"), Trainer):
            yield frame.f_locals


class ResumableCallback(TrainerCallback):
    """
    Writes the averages of `tuner.rankallocator` into each checkpoint, as `adalora_state.safetensors`, and restores
    them. [`InCheckpoint`] in the config keeps all ranks in the checkpoint, with zeros in E for pruned ones.
    """

    tuner: Any = None
    _saved_step: int | None = None
    _lock: ClassVar[int | None] = None  # of the process, so that the next Trainer can release it after a failed save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        # before the Trainer writes: it deletes older checkpoints, and this one has to be complete by then
        self._saved_step = None
        if control.should_save and not control.should_evaluate:  # an evaluation may fail
            self._save(args, state)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        if control.should_save:
            self._save(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self._saved_step != state.global_step:
            self._save(args, state)  # an evaluation or a later callback requested the checkpoint
        self.unlock()

    @staticmethod
    def unlock() -> None:
        """Release the lock on the checkpoint that this process has written last."""
        if ResumableCallback._lock is not None:
            os.close(ResumableCallback._lock)
        ResumableCallback._lock = None

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.save_only_model or state.is_hyper_param_search:
            return  # nothing resumes from it
        self._saved_step = state.global_step
        tensors = {**self.tuner.rankallocator.state_dict(), **trained_ranknum(self.tuner)}
        tensors = {key: gather_full(tensor).cpu().contiguous() for key, tensor in tensors.items()}
        if args.should_save:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            os.makedirs(folder, exist_ok=True)
            self.unlock()
            ResumableCallback._lock = lock_folder(folder)
            path = os.path.join(folder, STATE_FILE)
            save_file({**tensors, "sha256": _checksum(tensors)}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    def restore(self, args: TrainingArguments, state: TrainerState) -> None:
        """Restore the averages. Raises a `ValueError` if the file is broken, or from another model or version."""
        # no event passes the folder
        folders = [variables.get("resume_from_checkpoint") for variables in _calls_of_trainer("train")]
        folders += [args.resume_from_checkpoint, os.path.join(args.output_dir, f"checkpoint-{state.global_step}")]
        path = os.path.join(next(folder for folder in folders if isinstance(folder, (str, os.PathLike))), STATE_FILE)
        allocator = self.tuner.rankallocator
        if not os.path.exists(path):
            if state.global_step <= allocator.peft_config.total_step - allocator.peft_config.tfinal:
                warnings.warn(f"There is no {path}, so this run resumes only approximately: averages start from zero.")
            return
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is broken ({error}); resume from another checkpoint.") from error
        if any(key.startswith("param.") for key in tensors):
            raise ValueError(f"{path} is from an earlier version of AdaLoraCallback; finish the run with it.")
        if not torch.equal(tensors.pop("sha256", torch.empty(0)), _checksum(tensors)):
            raise ValueError(f"{path} is broken (wrong checksum); resume from another checkpoint.")
        for key, param in trained_ranknum(self.tuner).items():
            if key in tensors:
                copy_full_(param, tensors.pop(key))
        allocator.load_state_dict(tensors)


def trained_ranknum(tuner: Any) -> dict[str, torch.nn.Parameter]:
    """Initial ranks that PEFT trains without saving them: of plain AdaLoRA over bfloat16 and float16 weights."""
    adapter_name = tuner.trainable_adapter_name
    params = {name: layer.ranknum[adapter_name] for name, layer in adapted_layers(tuner.model, adapter_name).items()}
    return {f"ranknum.{name}.{adapter_name}": param for name, param in params.items() if param.requires_grad}


def _checksum(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """SHA-256 of names, dtypes, shapes and values, as bytes."""
    result = hashlib.sha256()
    for key, value in sorted(state.items()):
        result.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        result.update(value.reshape(-1).view(torch.uint8).numpy())
    return torch.tensor(list(result.digest()), dtype=torch.uint8)
