"""Adapt the language model to texts that it has not seen, and compare the held-out loss per token of the methods.

    python benchmarks/method_comparison/adaptation.py               all runs, in about two hours of one core
    python benchmarks/method_comparison/adaptation.py --report benchmarks/method_comparison/adaptation.jsonl

The model is the one that `language_model.py` trains. Each run is written to `adaptation.jsonl` in the output folder
when it ends. Started again, the comparison goes on from there. `--report` makes the tables and the plot of the runs
that a log has, and says which are missing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM


sys.path.append(str(Path(__file__).parents[1]))  # where the tables of the other benchmarks are

import compare
from adaptation_plan import UNADAPTED, Plan
from adaptation_results import missing, tables, write_figure
from compare import read_log
from language_model import checksum
from plan import Log, Record
from texts import documents, old_documents
from training import Run, Training, adapter_parameters, average_rank


MODEL = Path(__file__).parent / "base_model"


def collate(batch: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Documents as a batch, padded to the longest. Padding has no label."""
    length = max(map(len, batch))
    return {
        "input_ids": torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch]),
        "labels": torch.tensor([[*ids, *[-100] * (length - len(ids))] for ids in batch]),
    }


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

    batch_size = 8
    examples_of_start = 16
    task_type = "CAUSAL_LM"

    def __init__(self, run: Run, folder: Path) -> None:
        self.folder = folder
        self.begin(run, documents(folder, run.task).sample(run.examples, run.seed), collate)

    def make_base_model(self) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32)


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
    weights = checksum(folder)[:12]
    if any(record["weights"] != weights for record in read_log(path).values()):
        raise SystemExit(f"{path} is the log of another language model than that in {folder}.")
    return compare.execute_plan(plan, path, jobs, partial(execute, folder=folder), progress)


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
        (options.output / f"adaptation-{table.name}.csv").write_text(table.csv(), encoding="utf-8")
    print(missing(plan, log) or "All runs of the plan are in the log.")
    write_figure(plan, log, options.output / "adaptation.png")


if __name__ == "__main__":
    main(sys.argv[1:])
