"""Tables and a plot of the losses on new kinds of text."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from ablations import DECOUPLED
from adaptation_plan import FINAL_RANK, TUNING_RANK, UNADAPTED, Plan
from plan import Candidate, Log
from report import Table
from results import Interval, resamples, with_interval
from training import ADADORA, ADALORA


class Losses:
    """
    What a log says about one kind of text.

    Args:
        plan: The plan of the log.
        log: The log.
        text: Name of the text.
    """

    def __init__(self, plan: Plan, log: Log, text: str) -> None:
        self.plan = plan
        self.log = log
        self.text = text
        self.unadapted = log[plan.unadapted(text)]

    def seeds(self, rank: int) -> int:
        """How many seeds all candidates have."""
        try:
            tests = [self.plan.tests(self.log, self.text, candidate, rank) for candidate in self.plan.candidates]
        except KeyError:  # a trial is missing
            return 0
        done = [all(run in self.log for run in runs) for runs in zip(*tests)]
        return (*done, False).index(False)

    def sums(self, candidate: Candidate, rank: int, which: str = "new") -> np.ndarray:
        """The loss of each document in each run, (seeds, documents). `which` is "new" or "old"."""
        runs = self.plan.tests(self.log, self.text, candidate, rank)[: self.seeds(rank)]
        return np.array([self.log[run][which] for run in runs])

    def tokens(self, which: str = "new") -> np.ndarray:
        """How many tokens each document has, (documents,)."""
        return np.array(self.unadapted[f"{which}_tokens"])

    def mean(self, candidate: Candidate, rank: int, which: str = "new") -> float:
        return float(self.sums(candidate, rank, which).sum(axis=1).mean() / self.tokens(which).sum())

    def start(self, which: str = "new") -> float:
        """Loss per token of the model without an adapter."""
        return sum(self.unadapted[which]) / float(self.tokens(which).sum())


def resampled(differences: np.ndarray, tokens: np.ndarray, stream: int = 0) -> np.ndarray:
    """
    Mean difference per token in each resample of seeds and documents.

    Args:
        differences: Of the loss of each document in each run, (seeds, documents).
        tokens: How many tokens each document has, (documents,).
        stream: Decides the resamples.
    """
    times_of_seeds, times_of_documents = resamples(*differences.shape, stream)
    sums = ((times_of_seeds @ differences) * times_of_documents).sum(axis=1)
    return sums / (len(differences) * (times_of_documents @ tokens))


def mean_difference(differences: np.ndarray, tokens: np.ndarray) -> float:
    return float(differences.sum() / (len(differences) * tokens.sum()))


def difference(
    losses: Losses, ranks: Sequence[int], this: Candidate, reference: Candidate, which: str = "new"
) -> Interval:
    """Mean over ranks of the loss per token beyond a reference's, with a 95 % interval from a paired bootstrap."""
    tokens = losses.tokens(which)
    gains = [losses.sums(this, rank, which) - losses.sums(reference, rank, which) for rank in ranks]
    return with_interval(
        statistics.mean(mean_difference(gain, tokens) for gain in gains),
        np.mean([resampled(gain, tokens) for gain in gains], axis=0),
    )


def interval(values: Interval) -> str:
    mean, lower, upper = values
    return f"{mean:+.3f} ({lower:+.3f} to {upper:+.3f})"


def name_of(candidate: Candidate) -> str:
    method, ablation = candidate
    return {None: method, DECOUPLED: f"{method}, decoupled"}.get(ablation, f"{method}, {ablation}")


def complete(plan: Plan, log: Log) -> list[tuple[Losses, int]]:
    """The texts and ranks that have at least two seeds of all candidates."""
    texts = [Losses(plan, log, text) for group in plan.groups for text in group if plan.unadapted(text) in log]
    return [(losses, rank) for losses in texts for rank in sorted(plan.ranks) if losses.seeds(rank) > 1]


def compared_row(losses: Losses, rank: int, which: str) -> dict[str, Any]:
    reference, *others = losses.plan.candidates
    return {
        "text": losses.text,
        "rank": rank,
        "seeds": losses.seeds(rank),
        UNADAPTED: f"{losses.start(which):.3f}",
        name_of(reference): f"{losses.mean(reference, rank, which):.3f}",
        **{
            f"{name_of(candidate)} − {name_of(reference)}": interval(
                difference(losses, [rank], candidate, reference, which)
            )
            for candidate in others
        },
    }


COMPARISONS: tuple[tuple[Candidate, Candidate], ...] = (
    ((ADADORA, None), (ADALORA, None)),
    ((ADADORA, DECOUPLED), (ADALORA, None)),
    ((ADADORA, DECOUPLED), (ADADORA, None)),
)


def summary_row(done: list[tuple[Losses, int]], this: Candidate, reference: Candidate) -> dict[str, Any]:
    """The mean difference over the ranks of each text, and how many rows are won and lost."""
    rows = [difference(losses, [rank], this, reference) for losses, rank in done]
    texts = {losses.text: losses for losses, _ in done}
    return {
        "difference": f"{name_of(this)} − {name_of(reference)}",
        **{
            text: interval(difference(losses, [rank for other, rank in done if other.text == text], this, reference))
            for text, losses in texts.items()
        },
        "better : worse": f"{sum(upper < 0 for *_, upper in rows)} : {sum(lower > 0 for _, lower, _ in rows)} "
        f"of {len(rows)}",
    }


def chosen_row(plan: Plan, log: Log, text: str, candidate: Candidate) -> dict[str, Any]:
    run = plan.chosen(log, text, candidate)
    return {
        "text": text,
        "method": name_of(candidate),
        "learning rate": f"{run.lr:g}",
        "scale": f"{run.scale:g}",
        "schedule": run.schedule or "",
        "all trials": ", ".join(f"{log[trial]['loss']:.3f}" for trial in plan.trials(text, candidate)),
        "second run of the best": ", ".join(
            f"{first.lr:g}: {log[second]['loss']:.3f}" for first, second in plan.finalists(log, text, candidate)
        ),
    }


def tables(plan: Plan, log: Log) -> list[Table]:
    done = complete(plan, log)
    if not done:
        return []
    pairs = [(candidate, plan.candidates[0]) for candidate in plan.candidates[1:]]
    pairs += [pair for pair in COMPARISONS if set(pair) <= set(plan.candidates)]
    intervals = "Differences with 95 % intervals (paired bootstrap over seeds and documents); less is better."
    return [
        Table(
            "loss", "Held-out loss per token of the new text", [compared_row(*cell, "new") for cell in done], intervals
        ),
        Table(
            "summary",
            "Held-out loss per token, mean over ranks",
            [summary_row(done, *pair) for pair in pairs],
            "A row of the table above is better if its interval lies below 0, and worse if above.",
        ),
        Table(
            "forgetting",
            "Held-out loss per token of the old text after adaptation",
            [compared_row(*cell, "old") for cell in done],
            intervals,
        ),
        Table(
            "chosen",
            "Settings chosen",
            [
                chosen_row(plan, log, text, candidate)
                for text in dict.fromkeys(losses.text for losses, _ in done)
                for candidate in plan.candidates
            ],
            f"Loss per token of the validation documents: of all trials at rank {TUNING_RANK}, and of a second run of "
            f"the best at rank {FINAL_RANK}. The trials are learning rates of "
            f"{', '.join(f'{lr:g}' for lr in plan.learning_rates)}; AdaLoRA and AdaDoRA have a scale of 4 at the first "
            "two.",
        ),
    ]


def missing(plan: Plan, log: Log) -> Optional[str]:
    """A sentence that says which rows have fewer seeds than planned, if any."""
    counts = {
        (text, rank): Losses(plan, log, text).seeds(rank) if plan.unadapted(text) in log else 0
        for group in plan.groups
        for text in group
        for rank in plan.ranks
    }
    rows = [f"{text}, rank {rank}: {count}" for (text, rank), count in counts.items() if count < plan.seeds]
    return f"Rows with fewer than {plan.seeds} seeds: {'; '.join(rows)}." if rows else None


def write_figure(plan: Plan, log: Log, path: Path) -> None:
    """Loss per token of each method less LoRA's, with intervals, by text: of the new text above, of the old below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot was made, because matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        return
    done = complete(plan, log)
    texts = list(dict.fromkeys(losses.text for losses, _ in done))
    reference, *others = plan.candidates
    figure = Figure(figsize=(1 + 3.2 * len(texts), 6.4), layout="constrained")
    grid = figure.subplots(2, len(texts), squeeze=False, sharey="row", sharex=True)
    for row, which in enumerate(("new", "old")):
        for axes, text in zip(grid[row], texts):
            cells = [(losses, rank) for losses, rank in done if losses.text == text]
            for offset, candidate in enumerate(others):
                values = [difference(losses, [rank], candidate, reference, which) for losses, rank in cells]
                places = [place + 0.13 * (offset - 2) for place in range(len(cells))]
                means = np.array([mean for mean, _, _ in values])
                errors = np.abs(np.array([bounds for _, *bounds in values]).T - means)
                axes.errorbar(places, means, errors, fmt="o", markersize=4, label=name_of(candidate))
            axes.axhline(0, color="black", linewidth=1)
            axes.grid(axis="y", alpha=0.3)
            axes.set_xticks(range(len(cells)), [rank for _, rank in cells])
            axes.set_title(f"{text}: {'new' if which == 'new' else 'old'} text")
    for axes, which in zip(grid[:, 0], ("new", "old")):
        axes.set_ylabel(f"loss per token of the {which} text\nless {name_of(reference)}'s")
    for axes in grid[-1]:
        axes.set_xlabel("average rank at the end")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(others))
    figure.savefig(path, dpi=120)
