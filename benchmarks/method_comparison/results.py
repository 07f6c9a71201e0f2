"""Tables and plots of what was recorded."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Optional

import numpy as np
import torch
from ablations import ABLATIONS, ADAPTER, DECOUPLED, LORAPLUS, LORAPLUS_RATIO, SLOW_START, TUNED, layers
from counters import peak_bytes
from plan import BOTH_DECOUPLED, CHOSEN_ON, LORAPLUS_SEEDS, OTHER_REGULARIZATIONS, RANK, Candidate, Cell, Log, Plan
from report import Table
from training import ADADORA, ADALORA, DORA, LORA, METHODS, Run, Training

from peft.tuners.adalora.regularization import orthogonality_loss


RESAMPLES = 10_000
REFERENCES = (ADALORA, DORA, LORA)
Interval = tuple[float, float, float]
# runs and those of a reference with the same seeds
Pair = tuple[Sequence[Run], Sequence[Run]]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def mean_and_deviation(log: Log, runs: Sequence[Run]) -> str:
    accuracies = [log[run]["accuracy"] for run in runs]
    return f"{percent(statistics.mean(accuracies))} ± {percent(statistics.stdev(accuracies))}"


def right(log: Log, runs: Sequence[Run]) -> np.ndarray:
    """Whether each run is right in each test example, 0 or 1, of shape (runs, examples)."""
    return np.array([[int(value) for value in log[run]["right"]] for run in runs])


@cache
def resamples(seeds: int, examples: int, stream: int) -> list[np.ndarray]:
    """How many times each seed and each example is drawn in each resample, (resamples, seeds or examples) each."""
    random = np.random.default_rng(stream)
    return [random.multinomial(size, [1 / size] * size, RESAMPLES) for size in (seeds, examples)]


def resampled(log: Log, pair: Pair, stream: int = 0) -> np.ndarray:
    """How much more accurate runs are in each resample of seeds and test examples, which are the same for both."""
    gain = right(log, pair[0]) - right(log, pair[1])
    times_of_seeds, times_of_examples = resamples(*gain.shape, stream)
    return ((times_of_seeds @ gain) * times_of_examples).sum(axis=1) / gain.size


def mean_difference(log: Log, pair: Pair) -> float:
    return float((right(log, pair[0]) - right(log, pair[1])).mean())


def with_interval(mean: float, means: np.ndarray) -> Interval:
    lower, upper = np.percentile(means, [2.5, 97.5])
    return mean, float(lower), float(upper)


def difference(log: Log, runs: Sequence[Run], reference: Sequence[Run]) -> Interval:
    """
    How much more accurate runs are than those of a reference with the same seeds: the mean, and both ends of a 95 %
    interval from a paired bootstrap over seeds and test examples.
    """
    return with_interval(mean_difference(log, (runs, reference)), resampled(log, (runs, reference)))


def by_task(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    result = defaultdict(list)
    for pair in pairs:
        result[pair[0][0].task].append(pair)
    return dict(result)


def difference_of_task(log: Log, pairs: Sequence[Pair]) -> Interval:
    """The mean over rows of one task. In each resample they have the same test examples, and the same seeds."""
    means = [resampled(log, pair) for pair in pairs]
    return with_interval(statistics.mean(mean_difference(log, pair) for pair in pairs), np.mean(means, axis=0))


def difference_over_tasks(log: Log, pairs: Sequence[Pair]) -> Interval:
    """The mean over tasks, each with the mean of its rows; a bootstrap over tasks, and their seeds and examples."""
    tasks = list(by_task(pairs).values())
    mean = statistics.mean(statistics.mean(mean_difference(log, pair) for pair in rows) for rows in tasks)
    # a stream for each task, because their seeds and examples have nothing in common
    means = [
        np.mean([resampled(log, pair, stream) for pair in rows], axis=0) for stream, rows in enumerate(tasks, start=1)
    ]
    times_of_tasks = np.random.default_rng(0).multinomial(len(tasks), [1 / len(tasks)] * len(tasks), RESAMPLES)
    return with_interval(mean, (times_of_tasks.T * means).sum(axis=0) / len(tasks))


def won_and_lost(log: Log, pairs: Sequence[Pair]) -> str:
    """How many intervals lie above 0, and how many below."""
    intervals = [difference(log, *pair) for pair in pairs]
    won, lost = sum(lower > 0 for _, lower, _ in intervals), sum(upper < 0 for _, _, upper in intervals)
    return f"{won} : {lost} of {len(pairs)}"


def interval(values: Interval) -> str:
    mean, lower, upper = (100 * value for value in values)
    return f"{mean:+.1f} ({lower:+.1f} to {upper:+.1f})"


def labels(cell: Cell) -> dict[str, Any]:
    return {"task": cell.task, "examples": "all" if cell.examples is None else cell.examples}


def compared_row(plan: Plan, log: Log, cell: Cell, rank: int) -> dict[str, Any]:
    runs = {method: plan.compared(log, cell, method, rank) for method in METHODS}
    return {
        **labels(cell),
        "seeds": cell.seeds,
        "rank": rank,
        **{method: mean_and_deviation(log, runs[method]) for method in METHODS},
        **{f"{ADADORA} − {name}": interval(difference(log, runs[ADADORA], runs[name])) for name in REFERENCES},
    }


def needed_row(plan: Plan, log: Log, cell: Cell) -> dict[str, Any]:
    """How many seeds, and how many test examples, an interval of ± 1 point would have needed, each by itself."""
    gain = right(log, plan.compared(log, cell, ADADORA, RANK)) - right(log, plan.compared(log, cell, LORA, RANK))
    deviations = {"seeds": gain.mean(axis=1).std(ddof=1), "test examples": gain.mean(axis=0).std(ddof=1)}
    return {
        **labels(cell),
        **{
            name: f"{math.ceil((1.96 * deviation / 0.01) ** 2):,} instead of {count}"
            for (name, deviation), count in zip(deviations.items(), gain.shape)
        },
    }


def pairs(plan: Plan, log: Log, cells: Sequence[Cell], this: Candidate, reference: Candidate) -> list[Pair]:
    """The runs of two candidates in all rows of these cells."""
    return [
        (plan.compared(log, cell, this[0], rank, this[1]), plan.compared(log, cell, reference[0], rank, reference[1]))
        for cell in cells
        for rank in cell.ranks
    ]


def summary_rows(log: Log, columns: dict[str, list[Pair]]) -> list[dict[str, Any]]:
    """Mean differences of each task and of all, and how many rows are won and lost."""
    tasks = {name: by_task(rows) for name, rows in columns.items()}
    first = next(iter(tasks.values()))
    return [
        *(
            {"task": task, "rows": len(rows)}
            | {name: interval(difference_of_task(log, tasks[name][task])) for name in columns}
            for task, rows in first.items()
        ),
        {"task": "all tasks", "rows": sum(map(len, first.values()))}
        | {name: interval(difference_over_tasks(log, rows)) for name, rows in columns.items()},
        {"task": "rows won : lost", "rows": ""} | {name: won_and_lost(log, rows) for name, rows in columns.items()},
    ]


def tasks_rows(plan: Plan, log: Log) -> list[dict[str, Any]]:
    return summary_rows(
        log,
        {f"{ADADORA} − {name}": pairs(plan, log, plan.cells, (ADADORA, None), (name, None)) for name in REFERENCES},
    )


def short_rows(plan: Plan, log: Log, cell: Cell) -> list[dict[str, Any]]:
    """LoRA, AdaDoRA, and AdaDoRA with each change, with few steps."""
    candidates: dict[str, Candidate] = {LORA: (LORA, None), "nothing": (ADADORA, None)}
    candidates |= {name: (ADADORA, name) for name in SLOW_START}
    runs = {name: plan.compared(log, cell, method, RANK, change) for name, (method, change) in candidates.items()}
    return [
        {
            "task": cell.task,
            "changed": f"({name})" if name == LORA else name,
            **settings(tests[0]),
            "accuracy": mean_and_deviation(log, tests),
            "more": "" if name == "nothing" else interval(difference(log, tests, runs["nothing"])),
            f"more than {LORA}": "" if name == LORA else interval(difference(log, tests, runs[LORA])),
        }
        for name, tests in runs.items()
    ]


def mended_rows(plan: Plan, log: Log, change: str) -> list[dict[str, Any]]:
    """What AdaDoRA with a change gains, over the tasks that the change was not chosen on."""
    columns = {
        f"− {name}": pairs(plan, log, plan.judged, (ADADORA, change), (name, None)) for name in (ADADORA, DORA, LORA)
    }
    return [{"changed": change, **row} for row in summary_rows(log, columns)]


def decoupled_row(plan: Plan, log: Log, cell: Cell, rank: int) -> dict[str, Any]:
    """AdaDoRA with the decoupled regularization, and how much more accurate it is than the methods."""
    runs = plan.compared(log, cell, ADADORA, rank, DECOUPLED)
    references = {name: plan.compared(log, cell, name, rank) for name in (LORA, DORA, ADALORA, ADADORA)}
    references[f"{ADALORA}, decoupled"] = plan.compared(log, cell, ADALORA, rank, DECOUPLED)
    return {
        **labels(cell),
        "rank": rank,
        "learning rate": f"{runs[0].lr:g}",
        f"{LORA}'s": f"{references[LORA][0].lr:g}",
        "accuracy": mean_and_deviation(log, runs),
        **{f"− {name}": interval(difference(log, runs, reference)) for name, reference in references.items()},
    }


def regularization_rows(plan: Plan, log: Log, cell: Cell) -> list[dict[str, Any]]:
    """AdaLoRA and AdaDoRA with each form of the regularization, at one rank."""
    lora = plan.compared(log, cell, LORA, RANK)
    rows = []
    for method, name in ((ADALORA, None), (ADADORA, None), *BOTH_DECOUPLED, *OTHER_REGULARIZATIONS):
        where = replace(cell, ranks=(RANK,)) if (method, name) in OTHER_REGULARIZATIONS else cell
        runs, term = plan.compared(log, where, method, RANK, name), plan.compared(log, cell, method, RANK)
        rows.append(
            {
                **labels(cell),
                "method": method,
                "regularization": name or "term of the loss",
                **settings(runs[0]),
                "accuracy": mean_and_deviation(log, runs),
                "more than with the term": interval(difference(log, runs, term)) if name else "",
                f"more than {LORA}": interval(difference(log, runs, lora)),
            }
        )
    return rows


def gradient_rows(run: Run) -> list[dict[str, Any]]:
    """Norms of the gradients of the model's own loss and of AdaLoRA's term for all A and B together, in training."""
    training = Training(run)
    batch = training.data.collate(training.data.sample(run.examples, run.seed))
    adapted = layers(training.model)
    factors = [part[ADAPTER] for layer in adapted for part in (layer.lora_A, layer.lora_B)]
    weight = training.model.peft_config[ADAPTER].orth_reg_weight
    rows = []
    for step in range(run.steps + 1):
        if step in (0, 1, 2, 5, 10, 20, run.steps):
            training.model.eval()  # without the term
            losses = training.model(**batch).loss, weight * orthogonality_loss(adapted, ADAPTER)
            norms = [
                torch.cat([part.flatten() for part in torch.autograd.grad(loss, factors)]).norm() for loss in losses
            ]
            rows.append(
                {
                    "steps done": step,
                    "gradient of the loss": f"{norms[0]:.1e}",
                    "gradient of the term": f"{norms[1]:.1e}",
                    "term / loss": f"{norms[1] / norms[0]:.2g}" if norms[0] else "∞",
                    "mean norm of a row of A": f"{torch.cat([f.norm(dim=1) for f in factors[::2]]).mean():.2f}",
                    "mean absolute E": f"{torch.cat([layer.lora_E[ADAPTER] for layer in adapted]).abs().mean():.3f}",
                }
            )
            training.model.train()
        if step < run.steps:
            training.step()
    return rows


def equal_parameters_rows(plan: Plan, log: Log) -> list[dict[str, Any]]:
    runs = {
        method: plan.equal_parameters(log, method)
        if method in (LORA, DORA)
        else plan.compared(log, plan.ablated, method, RANK)
        for method in METHODS
    }
    return [
        {
            "method": method,
            "rank": runs[method][0].rank,
            "trainable parameters": f"{log[runs[method][0]]['parameters']:,}",
            "accuracy": mean_and_deviation(log, runs[method]),
            f"{ADADORA} − this": "" if method == ADADORA else interval(difference(log, runs[ADADORA], runs[method])),
        }
        for method in METHODS
    ]


def ablation_rows(plan: Plan, log: Log) -> list[dict[str, Any]]:
    reference = plan.compared(log, plan.ablated, ADADORA, RANK)
    rows = [
        {"changed": "nothing", **settings(reference[0]), "accuracy": mean_and_deviation(log, reference), "more": ""}
    ]
    for name in ABLATIONS:
        runs = plan.ablation(log, name)
        rows.append(
            {
                "changed": f"{name}, tuned" if name in TUNED else name,
                **settings(runs[0]),
                "accuracy": mean_and_deviation(log, runs),
                "more": interval(difference(log, runs, reference)),
            }
        )
    return rows


def loraplus_rows(plan: Plan, log: Log, cell: Cell) -> list[dict[str, Any]]:
    runs = {name: plan.loraplus_tests(log, cell, name) for name in (None, *LORAPLUS)}
    base = next(iter(LORAPLUS))
    rows = []
    for name, tests in runs.items():
        trials = plan.loraplus_trials(log, cell, name) if name else []
        finalists = plan.loraplus_finalists(log, cell, name) if name else []
        rows.append(
            {
                **labels(cell),
                "groups": name or "no LoRA+",
                "learning rate": f"{tests[0].lr:g}",
                "all trials": ", ".join(percent(log[run]["accuracy"]) for run in trials),
                "second run of the best": ", ".join(
                    f"{run.lr:g}: {percent(log[final]['accuracy'])}" for run, final in finalists
                ),
                "accuracy": mean_and_deviation(log, tests),
                "more than without": interval(difference(log, tests, runs[None])) if name else "",
                "more than at the base rate": "" if name == base else interval(difference(log, tests, runs[base])),
            }
        )
    return rows


def settings(run: Run) -> dict[str, Any]:
    return {"learning rate": f"{run.lr:g}", "scale": f"{run.scale:g}", "schedule": run.schedule or ""}


def chosen_row(plan: Plan, log: Log, cell: Cell, method: str, change: Optional[str] = None) -> dict[str, Any]:
    trials = ", ".join(percent(log[run]["accuracy"]) for run in plan.tuning(cell, method, change))
    finals = ", ".join(
        f"{run.lr:g}·{run.scale:g}: {percent(log[final]['accuracy'])}"
        for run, final in plan.finalists(log, cell, method, change)
    )
    return {
        **labels(cell),
        "method": f"{method}, {change}" if change else method,
        **settings(plan.chosen(log, cell, method, change)),
        "all trials": trials,
        "second run of the best": finals,
    }


def cost_row(plan: Plan, log: Log, method: str) -> dict[str, Any]:
    ratios, ranks = [], []
    for cell in plan.cells:
        for run, reference in zip(*(plan.compared(log, cell, name, RANK) for name in (method, ADALORA))):
            ratios.append(log[run]["seconds_per_step"] / log[reference]["seconds_per_step"])
            ranks.append(log[run]["average_rank"])
    this, reference = (plan.compared(log, plan.cells[0], name, RANK)[0] for name in (method, ADALORA))
    return {
        "method": method,
        "trainable parameters": f"{log[this]['parameters']:,}",
        "average rank at the end": statistics.mean(ranks),
        "time of a step / AdaLoRA": statistics.median(ratios),
        "peak memory of a step / AdaLoRA": peak_memory(this) / peak_memory(reference),
    }


def peak_memory(run: Run) -> int:
    """Bytes allocated at most during a training step, beyond the model's and the optimizer's own."""
    training = Training(run)
    training.step()  # which makes the optimizer's state
    return peak_bytes(training.step, training.device)


def tables(plan: Plan, log: Log) -> list[Table]:
    result = [
        Table(
            "compared",
            "Accuracy at equal final rank",
            [compared_row(plan, log, cell, rank) for cell in plan.cells for rank in cell.ranks],
            "Per cent of the test examples, mean and standard deviation over seeds, and differences with 95 % "
            "intervals (paired bootstrap over seeds and examples).",
        ),
        Table(
            "tasks",
            "Over tasks",
            tasks_rows(plan, log),
            "Mean differences over the rows of a task, and over tasks, with 95 % intervals (bootstrap over tasks, and "
            "in each over seeds and examples). A row is won if its own interval lies above 0, and lost if below.",
        ),
        Table(
            "needed",
            "Seeds and test examples that a difference of 1 point needs",
            [needed_row(plan, log, cell) for cell in plan.cells],
            f"{ADADORA} − {LORA} at rank {RANK}: for a 95 % interval of ± 1 point, by the deviation over seeds alone, "
            "and by that over test examples alone.",
        ),
    ]
    if plan.ablated:
        where = f"{plan.ablated.task}, {plan.ablated.examples} examples"
        result += [
            Table(
                "equal-parameters",
                "Accuracy at equal numbers of trainable parameters",
                equal_parameters_rows(plan, log),
                f"{where}. The adaptive methods start with rank {round(1.5 * RANK)} and end with {RANK}.",
            ),
            Table("ablations", "AdaDoRA with one thing changed", ablation_rows(plan, log), f"{where}, rank {RANK}."),
        ]
    if plan.short:
        where = "; ".join(f"{cell.task}, {cell.examples} examples, {cell.steps} steps" for cell in plan.short)
        result.append(
            Table(
                "short",
                "AdaDoRA with one thing changed, in short training",
                [row for cell in plan.short for row in short_rows(plan, log, cell)],
                f"{where}. Rank {RANK}. Each change has as many trials as a method has above.",
            )
        )
    if plan.judged:
        result.append(
            Table(
                "mended",
                "The best changes on tasks that they were not chosen on",
                [row for change in plan.mends(log) for row in mended_rows(plan, log, change)],
                "The first was best on average above, the others in one of the tasks. Each has trials of its own.",
            )
        )
    if plan.regularized:
        result += [
            Table(
                "decoupled-tasks",
                "AdaDoRA with the decoupled regularization, over tasks",
                summary_rows(
                    log,
                    {
                        f"{ADADORA} − {name}": pairs(plan, log, plan.decoupled, (ADADORA, DECOUPLED), (name, None))
                        for name in REFERENCES
                    }
                    | {
                        f"{ADADORA} − {ADALORA}, decoupled": pairs(plan, log, plan.decoupled, *BOTH_DECOUPLED),
                        f"{ADALORA}, decoupled − {ADALORA}": pairs(
                            plan, log, plan.decoupled, (ADALORA, DECOUPLED), (ADALORA, None)
                        ),
                    },
                ),
                f"50 training examples, 200 of paraphrases. The weight of 10 was chosen on {CHOSEN_ON}.",
            ),
            Table(
                "decoupled",
                "AdaDoRA with the decoupled regularization",
                [decoupled_row(plan, log, cell, rank) for cell in plan.decoupled for rank in cell.ranks],
                "It has as many trials as a method.",
            ),
            Table(
                "gradients",
                "Gradients of the loss and of the term",
                gradient_rows(plan.compared(log, plan.regularized[0], ADADORA, RANK)[0]),
                f"AdaDoRA as it is on {plan.regularized[0].task}, norms over all A and B; rank {RANK}, one seed.",
            ),
            Table(
                "regularizations",
                "Forms of the regularization",
                [row for cell in plan.regularized for row in regularization_rows(plan, log, cell)],
                f"Rank {RANK}. Each form has as many trials as a method.",
            ),
        ]
    if plan.loraplus:
        result.append(
            Table(
                "loraplus",
                f"AdaDoRA with LoRA+, of ratio {LORAPLUS_RATIO}",
                [row for cell in plan.loraplus for row in loraplus_rows(plan, log, cell)],
                f"Rank {RANK}, {LORAPLUS_SEEDS} seeds. The trials are base learning rates of "
                f"{', '.join(dict.fromkeys(f'{lr:g}' for lr, _, _ in plan.trials))}, of which the better half has a "
                "second run; all else is as chosen without LoRA+.",
            )
        )
    return result + [
        Table("cost", "Cost", [cost_row(plan, log, method) for method in METHODS], "Time of the CPU, one thread."),
        Table(
            "chosen",
            "Settings chosen",
            [chosen_row(plan, log, cell, method) for cell in plan.cells for method in METHODS]
            + [chosen_row(plan, log, cell, ADADORA, change) for cell in plan.judged for change in plan.mends(log)]
            + [chosen_row(plan, log, cell, *candidate) for cell in plan.decoupled for candidate in BOTH_DECOUPLED],
            f"Accuracy on the validation examples in per cent: of all trials at rank {RANK}, and of a second run of "
            "the best at the highest rank. The trials are learning rates of "
            f"{', '.join(dict.fromkeys(f'{lr:g}' for lr, _, _ in plan.trials))}, each with a scale of "
            f"{', '.join(dict.fromkeys(f'{scale:g}' for _, scale, _ in plan.trials))}.",
        ),
    ]
