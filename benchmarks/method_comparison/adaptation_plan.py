"""Which runs compare the methods on new kinds of text."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ablations import DECOUPLED, FROM_PRUNING, OF_DECOUPLED, ORTHONORMAL, UNTIL_PRUNING, WITHOUT
from plan import TUNING_SEEDS, Candidate, Cell, Log, tuning
from training import ADADORA, ADALORA, DORA, LORA, Run


STEPS = 50
EXAMPLES = 200  # documents that a run is trained with
SEEDS = 5
FINAL_RANK = 8  # of the second run of the best trials, which have `RANK`
RANKS = (4, 2, 8)  # in the order of execution
# learning rates and scales, and the schedules of the adaptive methods
TRIALS = (
    (2.5e-3, 4.0, "late"),
    (9e-3, 1.0, "early"),
    (9e-3, 4.0, "late"),
    (3e-2, 1.0, "late"),
    (3e-2, 4.0, "early"),
    (9e-2, 4.0, "late"),
)
FINALISTS = 2
UNADAPTED = "unadapted"
CANDIDATES: tuple[Candidate, ...] = (
    (LORA, None),
    (DORA, None),
    (ADALORA, None),
    (ADADORA, None),
    (ADADORA, DECOUPLED),
)
# compared after all runs of those above
LATER: tuple[Candidate, ...] = ((ADALORA, DECOUPLED),)
# at one rank, and compared with this
REFERENCE: Candidate = (ADADORA, DECOUPLED)
CHANGED: tuple[Candidate, ...] = tuple((ADADORA, name) for name in OF_DECOUPLED)
FORMS: tuple[Candidate, ...] = (
    (ADALORA, WITHOUT),
    (ADADORA, WITHOUT),
    (ADADORA, UNTIL_PRUNING),
    (ADADORA, FROM_PRUNING),
    (ADADORA, ORTHONORMAL),
)
TEXTS = ("tweets", "captions", "reviews")


@dataclass(frozen=True)
class Plan:
    """
    Args:
        texts: Names of the texts.
        candidates: Methods, with what is changed. The first is what the others are compared with.
        later: Candidates whose runs are executed after those above.
        changed: Candidates that differ from `REFERENCE` in one thing and have its settings. Only at the first rank.
        forms: Candidates with trials of their own, whose tested runs have only the first rank.
        settings: Learning rates and scales of the trials, and the schedules of the adaptive methods.
        ranks: The budgets, in the order of execution.
        seeds: How many seeds the tested runs have.
        steps: Number of optimizer steps.
        examples: How many documents a run is trained with.
    """

    texts: tuple[str, ...] = TEXTS
    candidates: tuple[Candidate, ...] = CANDIDATES
    later: tuple[Candidate, ...] = LATER
    changed: tuple[Candidate, ...] = CHANGED
    forms: tuple[Candidate, ...] = FORMS
    settings: tuple[tuple[float, float, str], ...] = TRIALS
    ranks: tuple[int, ...] = RANKS
    seeds: int = SEEDS
    steps: int = STEPS
    examples: int = EXAMPLES

    def unadapted(self, text: str) -> Run:
        return Run(text, 0, UNADAPTED, rank=0, lr=0.0, scale=0.0, seed=0, split="test", steps=0)

    def trials(self, text: str, candidate: Candidate) -> list[Run]:
        return tuning(Cell(text, self.examples, self.steps, self.ranks, self.seeds), self.settings, *candidate)

    def finalists(self, log: Log, text: str, candidate: Candidate) -> list[tuple[Run, Run]]:
        """Both runs of the best trials. The second has the highest rank and another seed."""
        best = sorted(self.trials(text, candidate), key=lambda run: log[run]["loss"])[:FINALISTS]
        return [(run, replace(run, seed=TUNING_SEEDS[1], rank=FINAL_RANK)) for run in best]

    def chosen(self, log: Log, text: str, candidate: Candidate) -> Run:
        if candidate in self.changed:
            return replace(self.chosen(log, text, REFERENCE), ablation=candidate[1])
        return min(self.finalists(log, text, candidate), key=lambda runs: sum(log[run]["loss"] for run in runs))[0]

    def tests(self, log: Log, text: str, candidate: Candidate, rank: int) -> list[Run]:
        run = self.chosen(log, text, candidate)
        return [replace(run, rank=rank, seed=seed, split="test") for seed in range(self.seeds)]

    def seeds_done(self, log: Log, text: str, candidate: Candidate, rank: int) -> int:
        """How many of the tested runs are in the log without a gap, 0 if a trial is missing."""
        try:
            done = [run in log for run in self.tests(log, text, candidate, rank)]
        except KeyError:
            return 0
        return [*done, False].index(False)

    def stages(self, log: Log) -> Iterator[list[Run]]:
        """All runs, in lists that need the records of those before. Texts, candidates and seeds take turns."""
        yield [self.unadapted(text) for text in self.texts]
        every_rank, one_rank = self.ranks, self.ranks[:1]
        for candidates, ranks in (
            (self.candidates, every_rank),
            (self.later, every_rank),
            (self.changed, one_rank),
            (self.forms, one_rank),
        ):
            pairs = [(text, candidate) for text in self.texts for candidate in candidates]
            tuned = [pair for pair in pairs if pair[1] not in self.changed]
            yield [run for pair in tuned for run in self.trials(*pair)]
            yield [second for pair in tuned for _, second in self.finalists(log, *pair)]
            for rank in ranks:
                yield [run for runs in zip(*(self.tests(log, *pair, rank) for pair in pairs)) for run in runs]
