"""A small training run with the Trainer of transformers that can be killed and resumed; it is as random as a real one.

Run in a process of its own (`run_in_process`), it can be killed with SIGKILL. The processes are forked from a server
that has imported everything, so that one takes a second and not ten.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from peft import AdaLoraConfig, get_peft_model
from peft.tuners import adalora


STEPS = 16
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "peft.tuners.adalora.callback",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "transformers.trainer",
    ]
)


class RandomTokens(Dataset):
    """Sentences of 8 tokens that follow a rule, so that there is something to learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(8) * (index % 5 + 1) + index) % 32
        return {"input_ids": tokens, "labels": tokens}


def make_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )


def make_adalora_config(**kwargs: Any) -> AdaLoraConfig:
    """
    Allocates at steps 3 to 11 of 16, with dropout, which makes a run depend on the state of the random generators.
    """
    defaults = {
        "init_r": 4,
        "target_r": 2,
        "tinit": 3,
        "tfinal": 5,
        "deltaT": 2,
        "total_step": STEPS,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora_adaptive": True,
    }
    return AdaLoraConfig(**{**defaults, **kwargs})


def make_arguments(output_dir: str | Path, **kwargs: Any) -> TrainingArguments:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(str(output_dir), **{**defaults, **kwargs})


def make_trainer(
    output_dir: str | Path,
    config: Optional[AdaLoraConfig] = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    eval_dataset: Optional[Dataset] = None,
    dtype: torch.dtype = torch.float32,
    base_model: Optional[LlamaForCausalLM] = None,
    **arguments: Any,
) -> Trainer:
    return Trainer(
        model=get_peft_model(base_model or make_llama().to(dtype), config or make_adalora_config()),
        args=make_arguments(output_dir, **arguments),
        train_dataset=RandomTokens(),
        eval_dataset=eval_dataset,
        callbacks=[adalora.AdaLoraCallback(), *callbacks],
    )


class KillAt(TrainerCallback):
    """Kills the process in the given event at the given step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self.kill)

    def kill(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    output_dir: str | Path,
    kill_at: Optional[tuple[str, int]] = None,
    config_kwargs: Optional[dict[str, Any]] = None,
    **arguments: Any,
) -> None:
    """Train, from the last checkpoint if there is one, to the end or to `kill_at`, an event and a step."""
    torch.set_num_threads(1)
    trainer = make_trainer(
        output_dir,
        make_adalora_config(**(config_kwargs or {})),
        (KillAt(*kill_at),) if kill_at is not None else (),
        **arguments,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir) is not None)


def run_in_process(
    function: Callable[..., None], *args: Any, kill_after: Optional[float] = None, **kwargs: Any
) -> int:
    """
    The exit code of a process that calls the function: 0, 1 after an exception, or -9 if it was killed, at the latest
    `kill_after` seconds after its start.
    """
    process = CONTEXT.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode
