"""Tables and plots of what was recorded."""

import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from ablations import ABLATIONS, LORAPLUS, LORAPLUS_RATIO, TUNED
from counters import peak_bytes
from plan import LORAPLUS_SEEDS, RANK, Cell, Log, Plan
from report import Table
from training import ADADORA, ADALORA, DORA, LORA, METHODS, Run, Training


RESAMPLES = 10_000
DIFFERENCE = f"{ADADORA} − {ADALORA}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def mean_and_deviation(log: Log, runs: Sequence[Run]) -> str:
    accuracies = [log[run]["accuracy"] for run in runs]
    return f"{percent(statistics.mean(accuracies))} ± {percent(statistics.stdev(accuracies))}"


def right(log: Log, runs: Sequence[Run]) -> np.ndarray:
    """Whether each run is right in each test example, 0 or 1, of shape (runs, examples)."""
    return np.array([[int(value) for value in log[run]["right"]] for run in runs])


@cache
def resamples(*sizes: int) -> list[np.ndarray]:
    """How many times each of `size` things is drawn in each resample, (resamples, size), for each of the sizes."""
    random = np.random.default_rng(0)
    return [random.multinomial(size, [1 / size] * size, RESAMPLES) for size in sizes]


def difference(log: Log, runs: Sequence[Run], reference: Sequence[Run]) -> tuple[float, float, float]:
    """
    How much more accurate runs are than those of a reference with the same seeds: the mean, and both ends of a 95 %
    interval from a paired bootstrap over seeds and test examples.
    """
    gain = right(log, runs) - right(log, reference)
    times_of_seeds, times_of_examples = resamples(*gain.shape)
    means = ((times_of_seeds @ gain) * times_of_examples).sum(axis=1)
    lower, upper = np.percentile(means, [2.5, 97.5]) / gain.size
    return float(gain.mean()), float(lower), float(upper)


def interval(values: tuple[float, float, float]) -> str:
    mean, lower, upper = (100 * value for value in values)
    return f"{mean:+.1f} ({lower:+.1f} to {upper:+.1f})"


def labels(cell: Cell) -> dict[str, Any]:
    return {"task": cell.task, "examples": "all" if cell.examples is None else cell.examples}


def compared_row(plan: Plan, log: Log, cell: Cell, rank: int) -> dict[str, Any]:
    runs = {method: plan.compared(log, cell, method, rank) for method in METHODS}
    return {
        **labels(cell),
        "rank": rank,
        **{method: mean_and_deviation(log, runs[method]) for method in METHODS},
        DIFFERENCE: interval(difference(log, runs[ADADORA], runs[ADALORA])),
        f"{ADADORA} − {LORA}": interval(difference(log, runs[ADADORA], runs[LORA])),
    }


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


def chosen_row(plan: Plan, log: Log, cell: Cell, method: str) -> dict[str, Any]:
    trials = ", ".join(percent(log[run]["accuracy"]) for run in plan.tuning(cell, method))
    finals = ", ".join(
        f"{run.lr:g}·{run.scale:g}: {percent(log[final]['accuracy'])}"
        for run, final in plan.finalists(log, cell, method)
    )
    return {
        **labels(cell),
        "method": method,
        **settings(plan.chosen(log, cell, method)),
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
            f"Per cent of the test examples, mean and standard deviation of {len(plan.seeds)} seeds, and differences "
            "with 95 % intervals (paired bootstrap over seeds and examples).",
        )
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
    if plan.loraplus:
        result.append(
            Table(
                "loraplus",
                f"AdaDoRA with LoRA+, of ratio {LORAPLUS_RATIO}",
                [row for cell in plan.loraplus for row in loraplus_rows(plan, log, cell)],
                f"Rank {RANK}, {len(LORAPLUS_SEEDS)} seeds. The trials are base learning rates of "
                f"{', '.join(dict.fromkeys(f'{lr:g}' for lr, _, _ in plan.trials))}, of which the better half has a "
                "second run; all else is as chosen without LoRA+.",
            )
        )
    return result + [
        Table("cost", "Cost", [cost_row(plan, log, method) for method in METHODS], "Time of the CPU, one thread."),
        Table(
            "chosen",
            "Settings chosen",
            [chosen_row(plan, log, cell, method) for cell in plan.cells for method in METHODS],
            f"Accuracy on the validation examples in per cent: of all trials at rank {RANK}, and of a second run of "
            "the best at the highest rank. The trials are learning rates of "
            f"{', '.join(dict.fromkeys(f'{lr:g}' for lr, _, _ in plan.trials))}, each with a scale of "
            f"{', '.join(dict.fromkeys(f'{scale:g}' for _, scale, _ in plan.trials))}.",
        ),
    ]
