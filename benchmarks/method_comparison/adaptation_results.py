"""Tables and a plot of the losses on new kinds of text."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from ablations import DECOUPLED
from adaptation_plan import FINAL_RANK, REFERENCE, UNADAPTED, Plan
from plan import RANK, Candidate, Log
from report import Table
from results import Interval, resamples, with_interval
from training import ADADORA, ADALORA, DORA


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
        """How many seeds all candidates have but those that come later."""
        plan = self.plan
        return min(plan.seeds_done(self.log, self.text, candidate, rank) for candidate in plan.candidates)

    def has(self, candidate: Candidate, rank: int) -> bool:
        """Whether a candidate has all these seeds."""
        return self.plan.seeds_done(self.log, self.text, candidate, rank) >= self.seeds(rank)

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
    return ", ".join(filter(None, (method, {DECOUPLED: "decoupled"}.get(ablation, ablation))))


def complete(plan: Plan, log: Log) -> list[tuple[Losses, int]]:
    """The texts and ranks that have at least two seeds of all candidates but those that come later."""
    texts = [Losses(plan, log, text) for text in plan.texts if plan.unadapted(text) in log]
    return [(losses, rank) for losses in texts for rank in sorted(plan.ranks) if losses.seeds(rank) > 1]


def compared(losses: Losses, ranks: Sequence[int], this: Candidate, reference: Candidate, which: str = "new") -> str:
    """The difference of two candidates, or nothing if runs are missing."""
    if not all(losses.has(candidate, rank) for rank in ranks for candidate in (this, reference)):
        return ""
    return interval(difference(losses, ranks, this, reference, which))


def begun(done: list[tuple[Losses, int]]) -> tuple[Candidate, ...]:
    """The candidates that at least one row has."""
    plan = done[0][0].plan
    later = (candidate for candidate in plan.later if any(losses.has(candidate, rank) for losses, rank in done))
    return (*plan.candidates, *later)


def compared_row(losses: Losses, rank: int, candidates: Sequence[Candidate], which: str) -> dict[str, Any]:
    reference, *others = candidates
    return {
        "text": losses.text,
        "rank": rank,
        "seeds": losses.seeds(rank),
        UNADAPTED: f"{losses.start(which):.3f}",
        name_of(reference): f"{losses.mean(reference, rank, which):.3f}",
        **{
            f"{name_of(candidate)} − {name_of(reference)}": compared(losses, [rank], candidate, reference, which)
            for candidate in others
        },
    }


COMPARISONS: tuple[tuple[Candidate, Candidate], ...] = (
    ((ADADORA, None), (ADALORA, None)),
    ((ADADORA, DECOUPLED), (ADALORA, None)),
    ((ADADORA, DECOUPLED), (DORA, None)),
    ((ADADORA, DECOUPLED), (ADADORA, None)),
    ((ADADORA, DECOUPLED), (ADALORA, DECOUPLED)),
    ((ADALORA, DECOUPLED), (ADALORA, None)),
)


def summary_row(done: list[tuple[Losses, int]], this: Candidate, reference: Candidate) -> dict[str, Any]:
    """The mean difference over the ranks of each text, and how many rows are better and worse."""
    texts = {losses.text: losses for losses, _ in done}
    ranks = {text: [rank for losses, rank in done if losses.text == text] for text in texts}
    rows = [
        difference(losses, [rank], this, reference)
        for losses, rank in done
        if losses.has(this, rank) and losses.has(reference, rank)
    ]
    return {
        "difference": f"{name_of(this)} − {name_of(reference)}",
        **{text: compared(losses, ranks[text], this, reference) for text, losses in texts.items()},
        "better : worse": f"{sum(upper < 0 for *_, upper in rows)} : {sum(lower > 0 for _, lower, _ in rows)} "
        f"of {len(rows)}",
    }


def changed_rows(plan: Plan, done: list[tuple[Losses, int]]) -> list[dict[str, Any]]:
    """The differences to `REFERENCE` at the first rank, also of what was run at that rank alone."""
    first = [losses for losses, rank in done if rank == plan.ranks[0]]
    others = (candidate for candidate in plan.candidates + plan.later if candidate != REFERENCE)
    rows = [
        {
            "method": method,
            "changed": change or "",
            "trials": "of the reference" if (method, change) in plan.changed else "its own",
            **{losses.text: compared(losses, plan.ranks[:1], (method, change), REFERENCE) for losses in first},
        }
        for method, change in (*others, *plan.forms, *plan.changed)
    ]
    return [row for row in rows if any(row[losses.text] for losses in first)]


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
            f"{first.lr:g}·{first.scale:g}: {log[second]['loss']:.3f}"
            for first, second in plan.finalists(log, text, candidate)
        ),
    }


def tables(plan: Plan, log: Log) -> list[Table]:
    done = complete(plan, log)
    if not done:
        return []
    candidates = begun(done)
    pairs = [(candidate, candidates[0]) for candidate in candidates[1:]]
    pairs += [pair for pair in COMPARISONS if set(pair) <= set(candidates)]
    intervals = "Differences with 95 % intervals (paired bootstrap over seeds and documents); less is better."
    return [
        Table(
            "loss",
            "Held-out loss per token of the new text",
            [compared_row(*row, candidates, "new") for row in done],
            intervals,
        ),
        Table(
            "summary",
            "Held-out loss per token, mean over ranks",
            [summary_row(done, *pair) for pair in pairs],
            "A row of the table above is better if its interval lies below 0, and worse if above.",
        ),
        Table(
            "changed",
            f"Held-out loss per token at rank {plan.ranks[0]} less that of {name_of(REFERENCE)}",
            changed_rows(plan, done),
            intervals,
        ),
        Table(
            "forgetting",
            "Held-out loss per token of the old text after adaptation",
            [compared_row(*row, candidates, "old") for row in done],
            intervals,
        ),
        Table(
            "chosen",
            "Settings chosen",
            [
                chosen_row(plan, log, text, candidate)
                for text in dict.fromkeys(losses.text for losses, _ in done)
                for candidate in candidates
            ],
            f"Loss per token of the validation documents: of all trials at rank {RANK}, and of a second run of "
            f"the best at rank {FINAL_RANK}. The trials are learning rates and scales of "
            f"{', '.join(f'{lr:g}·{scale:g}' for lr, scale, _ in plan.settings)}.",
        ),
    ]


def missing(plan: Plan, log: Log) -> Optional[str]:
    """A sentence that says which candidates and ranks have fewer seeds than planned on any text."""
    everywhere = [(candidate, rank) for candidate in plan.candidates + plan.later for rank in plan.ranks]
    counts = {
        f"{name_of(candidate)}, rank {rank}": min(plan.seeds_done(log, text, candidate, rank) for text in plan.texts)
        for candidate, rank in [*everywhere, *((other, plan.ranks[0]) for other in plan.changed + plan.forms)]
    }
    fewer = [f"{name}: {count}" for name, count in counts.items() if count < plan.seeds]
    return f"Fewer than {plan.seeds} seeds on some text: {'; '.join(fewer)}." if fewer else None


def write_figure(plan: Plan, log: Log, path: Path) -> None:
    """Loss per token of each method less LoRA's, with intervals, by text: of the new text above, of the old below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot was made, because matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        return
    done = complete(plan, log)
    if not done:
        return
    texts = list(dict.fromkeys(losses.text for losses, _ in done))
    reference, *others = begun(done)
    figure = Figure(figsize=(1 + 3.2 * len(texts), 6.4), layout="constrained")
    grid = figure.subplots(2, len(texts), squeeze=False, sharey="row", sharex=True)
    for row, which in enumerate(("new", "old")):
        for axes, text in zip(grid[row], texts):
            cells = [(losses, rank) for losses, rank in done if losses.text == text]
            for offset, candidate in enumerate(others):
                values = {
                    place + 0.12 * (offset - (len(others) - 1) / 2): difference(
                        losses, [rank], candidate, reference, which
                    )
                    for place, (losses, rank) in enumerate(cells)
                    if losses.has(candidate, rank)
                }
                means = np.array([mean for mean, _, _ in values.values()])
                errors = np.abs(np.array([bounds for _, *bounds in values.values()]).reshape(-1, 2).T - means)
                axes.errorbar(list(values), means, errors, fmt="o", markersize=4, label=name_of(candidate))
            axes.axhline(0, color="black", linewidth=1)
            axes.grid(axis="y", alpha=0.3)
            axes.set_xticks(range(len(cells)), [rank for _, rank in cells])
            axes.set_xlim(-0.5, len(cells) - 0.5)
            axes.set_title(f"{text}: {'new' if which == 'new' else 'old'} text")
    for axes, which in zip(grid[:, 0], ("new", "old")):
        axes.set_ylabel(f"loss per token of the {which} text\nless {name_of(reference)}'s")
    for axes in grid[-1]:
        axes.set_xlabel("average rank at the end")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(others))
    figure.savefig(path, dpi=120)
