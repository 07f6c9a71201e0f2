"""Adapt the language model to texts that it has not seen, and compare the held-out loss per token of the methods.

    python benchmarks/method_comparison/adaptation.py               all runs, in about two hours of one core
    python benchmarks/method_comparison/adaptation.py --report benchmarks/method_comparison/adaptation.jsonl

The model is the one that `language_model.py` trains. Each run is written to `adaptation.jsonl` in the output folder
when it ends. Started again, the comparison goes on from there. `--report` makes the tables and the plot of the runs
that a log has, and says which are missing.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, get_linear_schedule_with_warmup, set_seed


sys.path.append(str(Path(__file__).parents[1]))  # where the tables of the other benchmarks are

from adaptation_plan import UNADAPTED, Plan
from adaptation_results import missing, tables, write_figure
from compare import read_log, set_up_worker
from plan import Log, Record, run_of
from texts import documents, old_documents
from training import Run, Training, ablation_of, adapter_parameters, average_rank, config

from peft import PeftModel, get_peft_model


MODEL = Path(__file__).parent / "base_model"
BATCH_SIZE = 8
EXAMPLES_OF_START = 16  # documents that a start may look at


@cache
def checksum(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def collate(batch: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Documents as a batch, padded to the longest. Padding has no label."""
    length = max(map(len, batch))
    return {
        "input_ids": torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch]),
        "labels": torch.tensor([[*ids, *[-100] * (length - len(ids))] for ids in batch]),
    }


def batches(examples: list[list[int]], seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            yield collate([examples[index] for index in order[start : start + BATCH_SIZE]])


@torch.inference_mode()
def loss_sums(model: torch.nn.Module, examples: Sequence[list[int]]) -> list[float]:
    """The loss of each document, summed over its tokens but the first."""
    sums: list[float] = []
    for start in range(0, len(examples), 50):
        batch = collate(examples[start : start + 50])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        sums += losses.sum(dim=1).tolist()
    return sums


class Adaptation(Training):
    """
    A language model in training.

    Args:
        run: What to train. Its seed is set. Its task is the name of a text.
        folder: Where the language model is.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self.ablation = ablation_of(run)
        set_seed(run.seed)
        base_model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = self.adapted(base_model)
        examples = documents(folder, run.task).sample(run.examples, run.seed)
        self.ablation.change(self.model)
        self.ablation.change_by_examples(self.model, collate(examples[:EXAMPLES_OF_START]))
        self.optimizer = torch.optim.AdamW(self.ablation.groups(self.model, run.lr), lr=run.lr, weight_decay=0.0)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, run.steps // 10, run.steps)
        self.batches = batches(examples, run.seed)
        self.steps_done = 0
        self.model.train()

    def adapted(self, base_model: LlamaForCausalLM) -> PeftModel:
        adapter = config(self.run)
        adapter.task_type = "CAUSAL_LM"
        return get_peft_model(base_model, adapter)


def execute(run: Run, folder: Path) -> Record:
    """Train, and record the loss of each document of the new text and of the old."""
    torch.set_num_threads(1)
    data = documents(folder, run.task)
    record = asdict(run)
    if run.method == UNADAPTED:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        training = Adaptation(run, folder)
        model = training.model
        record["parameters"] = adapter_parameters(model)
        for _ in range(run.steps):
            training.step()
        record["average_rank"] = round(average_rank(model), 3)
    model.eval()
    examples = getattr(data, run.split)
    sums = loss_sums(model, examples)
    record["loss"] = round(sum(sums) / sum(len(ids) - 1 for ids in examples), 5)
    if run.split == "test":
        record["new"] = [round(value, 2) for value in sums]
        record["old"] = [round(value, 2) for value in loss_sums(model, old_documents(folder))]
    if run.method == UNADAPTED:
        record["new_tokens"] = [len(ids) - 1 for ids in examples]
        record["old_tokens"] = [len(ids) - 1 for ids in old_documents(folder)]
    return {**record, "weights": checksum(folder)[:12]}


def execute_plan(plan: Plan, path: Path, folder: Path, jobs: int) -> Log:
    """Execute what is not in the log yet, `jobs` runs at a time with one thread each."""
    log = read_log(path)
    if any(record["weights"] != checksum(folder)[:12] for record in log.values()):
        raise SystemExit(f"{path} is the log of another language model than that in {folder}.")
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), set_up_worker) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        for stage in plan.stages(log):
            futures = [pool.submit(execute, run, folder) for run in dict.fromkeys(stage) if run not in log]
            for done in as_completed(futures):
                record = done.result()
                log[run_of(record)] = record
                file.write("\n" + json.dumps(record) if file.tell() else json.dumps(record))
                file.flush()
                print(progress(len(log), record), file=sys.stderr, flush=True)
    return log


def progress(number: int, record: Record) -> str:
    names = ("task", "method", "rank", "lr", "schedule", "ablation", "split", "seed")
    settings = " ".join(f"{name}={record[name]}" for name in names if record[name] is not None)
    return f"{number}: {record['loss']:.4f} {settings}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the language model")
    parser.add_argument("--output", type=Path, default=Path("build", "adaptation"), help="folder of log and plot")
    parser.add_argument("--jobs", type=int, default=max(1, torch.get_num_threads()), help="runs at a time")
    parser.add_argument("--report", type=Path, metavar="LOG", help="make tables and plot of this log only")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    plan = Plan()
    if options.report:
        log = read_log(options.report)
    else:
        log = execute_plan(plan, options.output / "adaptation.jsonl", options.model, options.jobs)
    for table in tables(plan, log):
        print(table.markdown(), flush=True)
    print(missing(plan, log) or "All runs of the plan are in the log.")
    write_figure(plan, log, options.output / "adaptation.png")


if __name__ == "__main__":
    main(sys.argv[1:])
