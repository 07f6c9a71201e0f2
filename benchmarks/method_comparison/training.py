"""One run: train an adapter, and predict."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from ablations import ALL, Ablation
from tasks import Example, model_folder, task
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model


LORA, DORA, ADALORA, ADADORA = "LoRA", "DoRA", "AdaLoRA", "AdaDoRA"
METHODS = (LORA, DORA, ADALORA, ADADORA)
# the shares of the steps before the first allocation and after the last
SCHEDULES = {"early": (0.1, 0.5), "late": (0.3, 0.2)}


@dataclass(frozen=True)
class Run:
    """
    Args:
        task: Name of the task.
        examples: How many training examples; `None` is all.
        method: Name of the method.
        rank: The average rank at the end.
        lr: The highest learning rate.
        scale: `lora_alpha` over the rank at the start, with which an update is multiplied.
        seed: Decides the training examples, their order and the start of the weights.
        split: "validation" or "test".
        steps: Number of optimizer steps.
        schedule: Name of the schedule of the adaptive methods.
        ablation: What is changed, if anything.
    """

    task: str
    examples: Optional[int]
    method: str
    rank: int
    lr: float
    scale: float
    seed: int
    split: str
    steps: int
    schedule: Optional[str] = None
    ablation: Optional[str] = None


def ablation_of(run: Run) -> Ablation:
    return ALL[run.ablation] if run.ablation else Ablation()


def config(run: Run, task_type: str) -> PeftConfig:
    common = {"task_type": task_type, "target_modules": "all-linear"}
    if run.method in (LORA, DORA):
        return LoraConfig(r=run.rank, lora_alpha=run.scale * run.rank, use_dora=run.method == DORA, **common)
    init_r = round(ablation_of(run).start * run.rank)
    tinit, tfinal = (round(share * run.steps) for share in SCHEDULES[run.schedule])
    return AdaLoraConfig(
        init_r=init_r,
        target_r=run.rank,
        lora_alpha=run.scale * init_r,
        tinit=tinit,
        tfinal=tfinal,
        total_step=run.steps,
        use_dora_adaptive=run.method == ADADORA,
        **common,
    )


def adapter_parameters(model: PeftModel) -> int:
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "lora_" in name and parameter.requires_grad
    )


def average_rank(model: PeftModel) -> float:
    ranks = [
        int((parameter != 0).sum()) if name.endswith("lora_E.default") else parameter.shape[0]
        for name, parameter in model.named_parameters()
        if name.endswith(("lora_E.default", "lora_A.default.weight"))
    ]
    return sum(ranks) / len(ranks)


def batches(
    examples: list[Any], collate: Callable[[list[Any]], dict[str, torch.Tensor]], size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield collate([examples[index] for index in order[start : start + size]])


class Training:
    """
    A model in training.

    Args:
        run: What to train. Its seed is set.
    """

    device = torch.device("cpu")
    batch_size = 16
    examples_of_start = 64  # that a start may look at
    task_type = "SEQ_CLS"

    def __init__(self, run: Run) -> None:
        self.data = task(run.task)
        self.begin(run, self.data.sample(run.examples, run.seed), self.data.collate)

    def make_base_model(self) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=self.data.labels)

    def begin(self, run: Run, examples: list[Any], collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> None:
        self.run = run
        self.ablation = ablation_of(run)
        set_seed(run.seed)
        self.model = get_peft_model(self.make_base_model(), config(run, self.task_type))
        self.ablation.change(self.model)
        self.ablation.change_by_examples(self.model, collate(examples[: self.examples_of_start]))
        self.optimizer = torch.optim.AdamW(self.ablation.groups(self.model, run.lr), lr=run.lr, weight_decay=0.0)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, run.steps // 10, run.steps)
        self.batches = batches(examples, collate, self.batch_size, run.seed)
        self.steps_done = 0
        self.model.train()

    def step(self) -> None:
        """An optimizer step, and an allocation of the adaptive methods."""
        self.steps_done += 1
        self.model(**next(self.batches)).loss.backward()
        if self.ablation.allocates_first:
            self.allocate()
        self.optimizer.step()
        self.scheduler.step()
        if not self.ablation.allocates_first:
            self.allocate()
        self.optimizer.zero_grad()

    def allocate(self) -> None:
        if self.run.method in (ADALORA, ADADORA):
            self.model.base_model.update_and_allocate(self.steps_done, self.optimizer)
            self.ablation.after_allocation(self.model, self.steps_done)

    @torch.inference_mode()
    def right(self, examples: list[Example]) -> torch.Tensor:
        """Whether the model is right, (examples,) of bool."""
        self.model.eval()
        chunks = [examples[start : start + 64] for start in range(0, len(examples), 64)]
        predicted = torch.cat([self.model(**self.data.collate(chunk)).logits.argmax(dim=1) for chunk in chunks])
        return predicted == torch.tensor([example["labels"] for example in examples])


def execute(run: Run) -> dict[str, Any]:
    """Train and predict. Which examples the model is right about is returned as a string of 0 and 1."""
    training = Training(run)
    parameters = adapter_parameters(training.model)
    start = time.process_time()
    for _ in range(run.steps):
        training.step()
    seconds = time.process_time() - start
    right = training.right(getattr(training.data, run.split))
    return {
        **asdict(run),
        "accuracy": right.double().mean().item(),
        "right": "".join(str(int(value)) for value in right),
        "parameters": parameters,
        "average_rank": average_rank(training.model),
        "seconds_per_step": seconds / run.steps,
    }
