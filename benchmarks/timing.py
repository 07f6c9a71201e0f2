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

import torch
from settings import Settings
from torch.utils.benchmark import Timer


Steps = dict[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


class Stopwatch:
    """
    The times between marks: by events of the device on CUDA, and by the clock on a CPU.

    Events stand in the device's own queue, so that the time between two of them is the device's, idle times included.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The seconds between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:]))
        if not self.on_cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]


def take_turns(
    steps: dict[str, Callable[[Stopwatch], None]],
    device: torch.device,
    rounds: int,
    share: float,
    is_cold: bool = True,
) -> dict[str, list[list[float]]]:
    """
    Time steps against each other, once in each round.

    Args:
        steps: Each marks where its phases begin and end.
        device: Where they run.
        rounds: How many rounds there are at most.
        share: After this many seconds no further round begins, but for the first three.
        is_cold: Whether the caches of the device hold nothing of use when a step begins.

    Returns:
        By the name of the step, for each round: the seconds of each phase.
    """
    # larger than any cache; writing it gives the CPU the time to queue up all of a step
    flush = torch.empty(2**27 if device.type == "cuda" else 1, device=device)
    for step in steps.values():
        step(Stopwatch(device))
    seconds: dict[str, list[list[float]]] = {name: [] for name in steps}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > share:
            break
        for name, step in steps.items():
            stopwatch = Stopwatch(device)
            if is_cold:
                flush.zero_()
            step(stopwatch)
            seconds[name].append(stopwatch.seconds())
    return seconds


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
    """The time relative to the reference, round by round, in the rounds that both took part in."""
    return Spread(tuple(value / by for value, by in zip(seconds, reference)))


def comparison(seconds: Seconds, reference: str) -> dict[str, Spread]:
    """Columns of a table: the milliseconds of the reference, and the ratio of each other step to it."""
    ratios = {name: ratio(values, seconds[reference]) for name, values in seconds.items() if name != reference}
    return {f"{reference} (ms)": milliseconds(seconds[reference]), **ratios}
