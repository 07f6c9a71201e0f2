"""Which runs make the comparison, and what was recorded of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Optional

from ablations import ABLATIONS, DECOUPLED, LORAPLUS, SLOW_START, SLOWER_HEAD, TUNED, WITHOUT
from training import ADADORA, ADALORA, DORA, LORA, METHODS, Run


Record = dict[str, Any]
Log = dict[Run, Record]
Candidate = tuple[str, Optional[str]]  # a method, and what is changed
# each method tries the same learning rates and scales, and the adaptive ones take turns between the schedules
TRIALS = tuple(
    (lr, scale, ("early", "late")[(row + column) % 2])
    for (row, lr), (column, scale) in product(enumerate((7e-4, 2.5e-3, 9e-3, 3e-2)), enumerate((1.0, 4.0)))
)
TUNING_SEEDS = (1000, 1001)
# so many of the trials have a second run, at the highest rank, where too high a learning rate shows
FINALISTS = 3
# of the tuning runs, the ablations and the comparison at equal numbers of parameters
RANK = 4
# LoRA+ tries the learning rates alone, and has more seeds, because its two groups may differ by little
LORAPLUS_FINALISTS = 2
LORAPLUS_SEEDS = 8
BOTH_DECOUPLED = ((ADADORA, DECOUPLED), (ADALORA, DECOUPLED))
# at one rank
OTHER_REGULARIZATIONS = ((ADADORA, WITHOUT), (ADADORA, SLOWER_HEAD))
CHOSEN_ON = "headlines and digits"  # by the accuracy and loss of validation examples, 50 steps, 2 seeds


@dataclass(frozen=True)
class Cell:
    """
    Where the methods are compared.

    Args:
        task: Name of the task.
        examples: How many training examples; `None` is all.
        steps: Number of optimizer steps.
        ranks: The budgets.
        seeds: How many seeds the runs that are tested have.
    """

    task: str
    examples: Optional[int]
    steps: int
    ranks: tuple[int, ...]
    seeds: int


def tuning(
    cell: Cell, trials: Sequence[tuple[float, float, str]], method: str, ablation: Optional[str] = None
) -> list[Run]:
    """The trials of a method, each of a learning rate, a scale and the schedule of the adaptive methods."""
    return [
        Run(
            task=cell.task,
            examples=cell.examples,
            steps=cell.steps,
            method=method,
            rank=RANK,
            lr=lr,
            scale=scale,
            seed=TUNING_SEEDS[0],
            split="validation",
            schedule=schedule if method in (ADALORA, ADADORA) else None,
            ablation=ablation,
        )
        for lr, scale, schedule in trials
    ]


def best_with_second_run(log: Log, trials: list[Run], count: int, **changes: Any) -> list[list[Run]]:
    runs = sorted(trials, key=lambda run: -log[run]["accuracy"])
    return [[run, replace(run, seed=TUNING_SEEDS[1], **changes)] for run in runs[:count]]


def accuracy(log: Log, runs: list[Run]) -> float:
    return sum(log[run]["accuracy"] for run in runs) / len(runs)


def best_of(log: Log, finalists: list[list[Run]]) -> list[Run]:
    return max(finalists, key=lambda runs: accuracy(log, runs))


def tests(run: Run, seeds: int, **changes: Any) -> list[Run]:
    return [replace(run, seed=seed, split="test", **changes) for seed in range(seeds)]


@dataclass(frozen=True)
class Plan:
    """
    Args:
        cells: Where the methods are compared.
        trials: Learning rate, scale and schedule of the trials that each method has in each cell.
        ablated: The cell of the ablations and of the comparison at equal numbers of parameters, if any.
        loraplus: The cells where the groups of LoRA+ are compared.
        short: The cells with few steps, where the changes of `SLOW_START` are compared.
        judged: The cells where the best of those changes are judged.
        decoupled: The cells where the decoupled regularization is judged. Its weight was chosen on `CHOSEN_ON`.
        regularized: Those of them where forms of the regularization are compared.
    """

    cells: tuple[Cell, ...]
    trials: tuple[tuple[float, float, str], ...]
    ablated: Optional[Cell] = None
    loraplus: tuple[Cell, ...] = ()
    short: tuple[Cell, ...] = ()
    judged: tuple[Cell, ...] = ()
    decoupled: tuple[Cell, ...] = ()
    regularized: tuple[Cell, ...] = ()

    def tuning(self, cell: Cell, method: str, ablation: Optional[str] = None) -> list[Run]:
        return tuning(cell, self.trials, method, ablation)

    def finalists(self, log: Log, cell: Cell, method: str, ablation: Optional[str] = None) -> list[list[Run]]:
        """Both runs of the best trials, of equals the first."""
        return best_with_second_run(log, self.tuning(cell, method, ablation), FINALISTS, rank=max(cell.ranks))

    def chosen(self, log: Log, cell: Cell, method: str, ablation: Optional[str] = None) -> Run:
        return best_of(log, self.finalists(log, cell, method, ablation))[0]

    def compared(self, log: Log, cell: Cell, method: str, rank: int, ablation: Optional[str] = None) -> list[Run]:
        return tests(self.chosen(log, cell, method, ablation), cell.seeds, rank=rank)

    def ablation(self, log: Log, name: str) -> list[Run]:
        run = self.chosen(log, self.ablated, ADADORA, name if name in TUNED else None)
        return tests(run, self.ablated.seeds, ablation=name)

    def equal_parameters(self, log: Log, method: str) -> list[Run]:
        """LoRA or DoRA at the rank that has nearly as many parameters as AdaDoRA trains."""
        aim = log[self.compared(log, self.ablated, ADADORA, RANK)[0]]["parameters"]
        lora, this = (log[self.compared(log, self.ablated, name, RANK)[0]]["parameters"] for name in (LORA, method))
        rank = RANK + round((aim - this) / (lora / RANK))
        return tests(self.chosen(log, self.ablated, method), self.ablated.seeds, rank=rank)

    def loraplus_trials(self, log: Log, cell: Cell, name: str) -> list[Run]:
        """Each base learning rate, with the scale and the schedule of AdaDoRA without LoRA+."""
        run = replace(self.chosen(log, cell, ADADORA), ablation=name)
        return [replace(run, lr=lr) for lr in dict.fromkeys(lr for lr, _, _ in self.trials)]

    def loraplus_finalists(self, log: Log, cell: Cell, name: str) -> list[list[Run]]:
        return best_with_second_run(log, self.loraplus_trials(log, cell, name), LORAPLUS_FINALISTS)

    def loraplus_tests(self, log: Log, cell: Cell, name: Optional[str]) -> list[Run]:
        """With the groups of that name, or without LoRA+ if it is `None`."""
        run = best_of(log, self.loraplus_finalists(log, cell, name))[0] if name else self.chosen(log, cell, ADADORA)
        return tests(run, LORAPLUS_SEEDS)

    def mends(self, log: Log) -> list[str]:
        """The changes that do best with few steps: on average, and in each of those cells."""
        scores = [
            {name: accuracy(log, best_of(log, self.finalists(log, cell, ADADORA, name))) for name in SLOW_START}
            for cell in self.short
        ]
        total = {name: sum(of_cell[name] for of_cell in scores) for name in SLOW_START}
        return list(dict.fromkeys(max(each, key=each.get) for each in (total, *scores)))

    def choice(self, log: Log, cell: Cell, candidates: Sequence[Candidate]) -> Iterator[list[Run]]:
        """The runs that the settings of methods and their changes are chosen by."""
        yield [run for candidate in candidates for run in self.tuning(cell, *candidate)]
        yield [runs[1] for candidate in candidates for runs in self.finalists(log, cell, *candidate)]

    def comparison(self, log: Log, cell: Cell, candidates: Sequence[Candidate]) -> Iterator[list[Run]]:
        yield from self.choice(log, cell, candidates)
        yield [
            run
            for rank in cell.ranks
            for method, ablation in candidates
            for run in self.compared(log, cell, method, rank, ablation)
        ]

    def stages(self, log: Log) -> Iterator[list[Run]]:
        """All runs, in lists that need the records of those before."""
        for cell in self.cells:
            yield from self.comparison(log, cell, [(method, None) for method in METHODS])
            if cell == self.ablated:
                yield from self.choice(log, cell, [(ADADORA, name) for name in TUNED])
                yield [run for name in ABLATIONS for run in self.ablation(log, name)]
                yield [run for method in (LORA, DORA) for run in self.equal_parameters(log, method)]
        for cell in self.short:
            candidates = [(LORA, None), (ADADORA, None), *((ADADORA, name) for name in SLOW_START)]
            yield from self.comparison(log, cell, candidates)
        for cell in self.judged:
            yield from self.comparison(log, cell, [(ADADORA, name) for name in self.mends(log)])
        for cell in self.decoupled:
            yield from self.comparison(log, cell, BOTH_DECOUPLED)
        for cell in self.regularized:
            yield from self.comparison(log, replace(cell, ranks=(RANK,)), OTHER_REGULARIZATIONS)
        for cell in self.loraplus:
            yield [run for name in LORAPLUS for run in self.loraplus_trials(log, cell, name)]
            yield [runs[1] for name in LORAPLUS for runs in self.loraplus_finalists(log, cell, name)]
            yield [run for name in (None, *LORAPLUS) for run in self.loraplus_tests(log, cell, name)]


RANKS = (2, 4, 8)
FEWEST = Cell("headlines", 50, steps=50, ranks=RANKS, seeds=5)
ABLATED = Cell("headlines", 200, steps=100, ranks=RANKS, seeds=5)
DIGITS = Cell("digits", 200, steps=100, ranks=RANKS, seeds=5)
TWEETS = Cell("tweets", 50, steps=50, ranks=RANKS, seeds=5)
SPEAKERS = Cell("speakers", 50, steps=50, ranks=RANKS, seeds=5)
PARAPHRASES = Cell("paraphrases", 200, steps=100, ranks=RANKS, seeds=3)
REVIEWS = Cell("reviews", 50, steps=50, ranks=RANKS, seeds=5)
FULL = Plan(
    cells=(
        FEWEST,
        ABLATED,
        Cell("headlines", None, steps=120, ranks=RANKS, seeds=5),
        DIGITS,
        TWEETS,
        Cell("tweets", None, steps=100, ranks=RANKS, seeds=3),
        SPEAKERS,
        Cell("speakers", None, steps=100, ranks=RANKS, seeds=3),
        PARAPHRASES,
        Cell("paraphrases", None, steps=100, ranks=RANKS, seeds=3),
        REVIEWS,
    ),
    trials=TRIALS,
    ablated=ABLATED,
    loraplus=(FEWEST, DIGITS),
    short=(
        Cell("headlines", 50, steps=25, ranks=(RANK,), seeds=5),
        Cell("digits", 200, steps=50, ranks=(RANK,), seeds=5),
    ),
    judged=(TWEETS, SPEAKERS, PARAPHRASES),
    decoupled=(REVIEWS, TWEETS, SPEAKERS, PARAPHRASES),
    regularized=(REVIEWS, TWEETS),
)
QUICK = Plan(
    cells=(
        Cell("headlines", 50, steps=30, ranks=(RANK,), seeds=2),
        Cell("digits", 200, steps=30, ranks=(RANK,), seeds=2),
    ),
    trials=TRIALS[2:6],
)


def run_of(record: Record) -> Run:
    return Run(**{field.name: record[field.name] for field in fields(Run)})
