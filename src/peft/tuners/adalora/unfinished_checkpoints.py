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

"""Rename checkpoints that a kill left half written, so that `resume_from_checkpoint=True` works."""

import os
import warnings
from contextlib import suppress

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

STATE_FILE = "adalora_state.safetensors"


def lock_folder(folder: str) -> int | None:
    """A file descriptor that locks a folder while it is open, or `None` if the folder cannot be locked."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def set_aside_unfinished_checkpoints(output_dir: str) -> None:
    """Rename the newest checkpoints of a folder that are unfinished and that no process is writing."""
    while os.path.isdir(output_dir) and (folder := get_last_checkpoint(output_dir)) is not None:
        names = os.listdir(folder)
        # only checkpoints that we began; safetensors 0.8 writes to a file `.tmp…` first
        if names and not any(name.startswith((STATE_FILE, ".tmp")) for name in names):
            return
        with suppress(OSError, ValueError, TypeError):
            TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
            return  # finished, because the Trainer writes this last
        if (lock := lock_folder(folder)) is None:
            return
        target = os.path.join(output_dir, f"unfinished-{os.path.basename(folder)}")
        while os.path.exists(target):
            target += "-again"
        os.rename(folder, target)
        os.close(lock)
        warnings.warn(f"{folder} is unfinished, because a kill interrupted its save; it is renamed to {target}.")
