"""Which runs compare the methods on new kinds of text."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ablations import DECOUPLED
from plan import TUNING_SEEDS, Candidate, Log
from training import ADADORA, ADALORA, DORA, LORA, Run


STEPS = 50
EXAMPLES = 200  # documents that a run is trained with
SEEDS = 5
TUNING_RANK, FINAL_RANK = 4, 8  # of the trials, and of the second run of the best
RANKS = (4, 2, 8)  # in the order of execution
LEARNING_RATES = (7e-4, 2.5e-3, 9e-3, 3e-2)
ADAPTIVE_SCALES = (4.0, 4.0, 1.0, 1.0)  # of the adaptive methods at those learning rates; 1 for the others
FINALISTS = 2
UNADAPTED = "unadapted"
CANDIDATES: tuple[Candidate, ...] = (
    (LORA, None),
    (DORA, None),
    (ADALORA, None),
    (ADADORA, None),
    (ADADORA, DECOUPLED),
)
# each group of texts is a comparison of its own, so that a part of the runs is a whole result
GROUPS = (("tweets", "captions", "reviews"),)


@dataclass(frozen=True)
class Plan:
    """
    Args:
        groups: Names of the texts, in groups that are done one after the other.
        candidates: Methods, with what is changed.
        learning_rates: Those of the trials.
        ranks: The budgets, in the order of execution.
        seeds: How many seeds the tested runs have.
        steps: Number of optimizer steps.
        examples: How many documents a run is trained with.
    """

    groups: tuple[tuple[str, ...], ...] = GROUPS
    candidates: tuple[Candidate, ...] = CANDIDATES
    learning_rates: tuple[float, ...] = LEARNING_RATES
    ranks: tuple[int, ...] = RANKS
    seeds: int = SEEDS
    steps: int = STEPS
    examples: int = EXAMPLES

    def unadapted(self, text: str) -> Run:
        return Run(text, 0, UNADAPTED, rank=0, lr=0.0, scale=0.0, seed=0, split="test", steps=0)

    def trials(self, text: str, candidate: Candidate) -> list[Run]:
        """Each learning rate, with the adaptive methods' schedules in turn."""
        method, ablation = candidate
        return [
            Run(
                task=text,
                examples=self.examples,
                steps=self.steps,
                method=method,
                rank=TUNING_RANK,
                lr=lr,
                scale=ADAPTIVE_SCALES[index] if method in (ADALORA, ADADORA) else 1.0,
                seed=TUNING_SEEDS[0],
                split="validation",
                schedule=("early", "late")[index % 2] if method in (ADALORA, ADADORA) else None,
                ablation=ablation,
            )
            for index, lr in enumerate(self.learning_rates)
        ]

    def finalists(self, log: Log, text: str, candidate: Candidate) -> list[tuple[Run, Run]]:
        """Both runs of the best trials. The second has the highest rank and another seed."""
        best = sorted(self.trials(text, candidate), key=lambda run: log[run]["loss"])[:FINALISTS]
        return [(run, replace(run, seed=TUNING_SEEDS[1], rank=FINAL_RANK)) for run in best]

    def chosen(self, log: Log, text: str, candidate: Candidate) -> Run:
        return min(self.finalists(log, text, candidate), key=lambda runs: sum(log[run]["loss"] for run in runs))[0]

    def tests(self, log: Log, text: str, candidate: Candidate, rank: int) -> list[Run]:
        run = self.chosen(log, text, candidate)
        return [replace(run, rank=rank, seed=seed, split="test") for seed in range(self.seeds)]

    def stages(self, log: Log) -> Iterator[list[Run]]:
        """All runs, in lists that need the records of those before. Seeds take turns, so that a part has them all."""
        for group in self.groups:
            pairs = [(text, candidate) for text in group for candidate in self.candidates]
            yield [self.unadapted(text) for text in group] + [run for pair in pairs for run in self.trials(*pair)]
            yield [second for pair in pairs for _, second in self.finalists(log, *pair)]
            for rank in self.ranks:
                yield [run for runs in zip(*(self.tests(log, *pair, rank) for pair in pairs)) for run in runs]
