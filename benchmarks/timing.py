"""Fair comparison of run times: all steps in one process and in turn, ratios taken within a round.

A round runs every step for a short block of time (`torch.utils.benchmark.Timer.blocked_autorange`, which warms up
first and synchronises with the GPU), so whatever slows the machine down for a while slows all of them down. The ratio
of two steps is taken within each round, and its median over the rounds is the result.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from settings import Settings
from torch.utils.benchmark import Timer


Steps = dict[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Spread:
    """The values that the rounds gave, told by their median and quartiles."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        lower, _, upper = statistics.quantiles(self.values, n=4, method="inclusive")
        return lower, upper


def measure(
    steps: Steps, settings: Settings, min_rounds: Optional[int] = None, share: Optional[float] = None
) -> Seconds:
    """
    Time steps against each other, in rounds of A B C … A B C ….

    Args:
        steps: What to run, by name.
        settings: Of the run.
        min_rounds: How many rounds each step takes part in at least.
        share: For how many seconds each step may run in total. When it has used them up it leaves, so that a slow step
            does not hold up the others.

    Returns:
        Seconds per call of each step, one value for each round that it took part in, the first round first.
    """
    block, max_rounds = settings.pick((0.1, 15), (0.01, 7))
    min_rounds = min_rounds or settings.pick(5, 3)
    share = share or settings.pick(2.0, 0.15)
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=settings.threads) for name, step in steps.items()
    }
    seconds: Seconds = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    for _ in range(max_rounds):
        for name, timer in timers.items():
            if len(seconds[name]) < min_rounds or spent[name] < share:
                start = time.perf_counter()
                seconds[name].append(timer.blocked_autorange(min_run_time=block).median)
                spent[name] += time.perf_counter() - start
    return seconds


def milliseconds(seconds: Sequence[float]) -> Spread:
    return Spread(tuple(1e3 * value for value in seconds))


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> Spread:
    """How many times as long as the reference, round by round, in the rounds that both took part in."""
    return Spread(tuple(value / by for value, by in zip(seconds, reference)))


def comparison(seconds: Seconds, reference: str) -> dict[str, Spread]:
    """Columns of a table: the milliseconds of the reference, and the ratio of each other step to it."""
    ratios = {name: ratio(values, seconds[reference]) for name, values in seconds.items() if name != reference}
    return {f"{reference} (ms)": milliseconds(seconds[reference]), **ratios}
