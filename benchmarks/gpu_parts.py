"""The parts of `gpu.py`: what its processes are asked for, and the tables that come of it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional, Protocol

from apart import STOCK
from names import (
    ADADORA,
    ADALORA,
    BFLOAT16,
    CACHING,
    CANCELLING_ERROR,
    DORA,
    ERROR,
    FOUR_BITS,
    GENERATE,
    GRADIENT_ERROR,
    LORA,
    NOW,
    OUTPUT_ERROR,
    PHASES,
    PREFILL,
    RANK,
    TWO_PARTS,
)
from report import Table
from settings import Settings
from timing import Spread, milliseconds, ratio


# The process of each method, and the name of the method there: PEFT's own run without peft-adadora.
WITHOUT_US, WITH_US, KERNELS = "without peft-adadora", "with peft-adadora", "kernels"
METHODS = {
    LORA: (WITHOUT_US, LORA),
    DORA: (WITHOUT_US, DORA),
    STOCK: (WITHOUT_US, ADALORA),
    ADADORA: (WITH_US, ADADORA),
}


class NoAnswer(Exception):
    """A process answered with an error, not in time, or not at all."""


class OutOfTime(Exception):
    """The time of a part is up."""


@dataclass(frozen=True)
class Sizes:
    """
    Args:
        width: The hidden size.
        tokens: Of a training step, in order of their value.
        kernel_tokens: Those that the kernels are tried on; the first of them decides.
        layers: How many layers are evaluated.
        prompt: How many tokens a prefill has.
        generated: How many tokens are generated.
        share: For how many seconds a row or a table's row of methods is timed.
        rounds: In how many rounds at most.
        form_rounds: In how many rounds forms of the same thing are timed at most.
        steps: How many steps a method takes in a round.
        compiled: The methods that are compiled, those of a tuple against each other.
    """

    width: int
    tokens: tuple[int, ...]
    kernel_tokens: tuple[int, ...]
    layers: int
    prompt: int
    generated: int
    share: float
    rounds: int
    form_rounds: int
    steps: int
    compiled: tuple[tuple[str, ...], ...]


LLAMA_3_8B = Sizes(
    width=4096,
    tokens=(2048, 512, 8192),
    kernel_tokens=(2048, 512, 8192),
    layers=4,
    prompt=2048,
    generated=64,
    share=10.0,
    rounds=15,
    form_rounds=45,
    steps=5,
    compiled=((STOCK, ADADORA), (LORA, DORA)),
)
SMALL = Sizes(
    width=64,
    tokens=(16, 8),
    kernel_tokens=(16,),
    layers=1,
    prompt=16,
    generated=4,
    share=0.0,
    rounds=2,
    form_rounds=1,
    steps=1,
    compiled=((STOCK, ADADORA),),
)


class Asking(Protocol):
    """What the parts need of a run."""

    settings: Settings
    sizes: Sizes

    def left(self) -> float: ...

    def ask(self, process: str, task: str, **arguments: Any) -> Any: ...


def check_time(run: Asking) -> None:
    if run.left() <= 0:
        raise OutOfTime("its time is up")


def share(run: Asking) -> float:
    """The seconds that the next row may be timed."""
    return max(0.0, min(run.sizes.share, run.left()))


def weight_shapes(width: int) -> dict[tuple[int, int], int]:
    """(out, in) of the linear layers of a decoder layer, and how many of them have it."""
    narrow, wide = width // 4, 7 * width // 2
    return {(width, width): 2, (narrow, width): 2, (wide, width): 2, (width, wide): 1}


def microseconds(seconds: list[float]) -> Spread:
    return Spread(tuple(1e6 * value for value in seconds))


# ---------------------------------------------------------------------------------------------------- methods in turns


@dataclass
class Turns:
    """What the methods answered: some facts, the phases of each round, or what went wrong."""

    facts: dict[str, dict[str, Any]]
    phases: dict[str, list[list[float]]]
    failures: dict[str, str]

    def seconds(self, name: str) -> list[float]:
        """The seconds of all phases, for each round."""
        return [sum(phases) for phases in self.phases.get(name, [])]

    def spread(self, name: str) -> Optional[Spread]:
        return milliseconds(self.seconds(name)) if self.phases.get(name) else None

    def ratio(self, name: str, reference: str) -> Optional[Spread]:
        """The time relative to the reference, if both were timed."""
        if not self.phases.get(name) or not self.phases.get(reference):
            return None
        return ratio(self.seconds(name), self.seconds(reference))

    def phase(self, name: str, index: int) -> Optional[float]:
        """The median milliseconds of a phase."""
        if not self.phases.get(name):
            return None
        return milliseconds([phases[index] for phases in self.phases[name]]).median


def in_turns(run: Asking, names: tuple[str, ...], prepare: Optional[str], task: str, **arguments: Any) -> Turns:
    """Prepare each method, if asked to, and then time all of them in rounds. A method that fails leaves."""
    turns = Turns({}, {name: [] for name in names}, {})

    def ask(name: str, task: str, **more: Any) -> Any:
        process, variant = METHODS[name]
        try:
            return run.ask(process, task, variant=variant, **arguments, **more)
        except NoAnswer as failure:
            turns.failures[name] = str(failure)

    def prepare_those_of(process: str) -> None:
        for name in names:
            if METHODS[name][0] == process:
                turns.facts[name] = ask(name, prepare) or {}

    if prepare:
        with ThreadPoolExecutor() as threads:
            list(threads.map(prepare_those_of, {METHODS[name][0] for name in names}))
    start, most = time.perf_counter(), share(run)
    for done in range(run.sizes.rounds):
        if done >= 3 and time.perf_counter() - start > most:
            break
        for name in names:
            if name not in turns.failures:
                phases = ask(name, task, steps=run.sizes.steps)
                if phases:
                    turns.phases[name].append(phases)
    return turns


# ------------------------------------------------------------------------------------------------- A, E: training step


def counted(run: Asking, name: str, kind: str, tokens: int) -> dict[str, Any]:
    """The launches of a training step, counted, and their price; nothing if that cannot be had."""
    process, variant = METHODS[name]
    rates = {"gbps": run.settings.gbps, "tflops": run.settings.tflops}
    rates = {rate: value for rate, value in rates.items() if value is not None}
    try:
        return run.ask(process, "count", variant=variant, kind=kind, tokens=tokens, width=run.sizes.width, **rates)
    except NoAnswer:  # of 4-bit weights PEFT's DoRA makes copies, which cannot be counted
        return {}


def training_rows(run: Asking, kind: str, tokens: int) -> list[dict[str, Any]]:
    names = tuple(METHODS)
    case = {"kind": kind, "width": run.sizes.width, "tokens": tokens}
    turns = in_turns(run, names, "prepare_training", "time_training", **case)
    rows = []
    for name in names:
        count, facts = counted(run, name, kind, tokens), turns.facts[name]
        price = count["price (µs)"] / 1000 if count else None
        phases = {f"{phase} (ms)": turns.phase(name, index) for index, phase in enumerate(PHASES)}
        spread = turns.spread(name)
        priced = spread.median - phases["optimizer (ms)"] if spread else None
        rows.append(
            {
                "weights": kind,
                "tokens": tokens,
                "method": name,
                "step (ms)": spread,
                f"/ {STOCK}": turns.ratio(name, STOCK),
                f"/ {DORA}": turns.ratio(name, DORA),
                **phases,
                "peak (MiB)": facts.get("peak (MiB)"),
                "launches": facts.get("kernels"),
                "launches, counted": count.get("total"),
                "price (ms)": price,
                "time / price": priced / price if priced and price else None,
                "failure": turns.failures.get(name),
            }
        )
    return rows


def training(run: Asking, kind: str, tokens: tuple[int, ...]) -> Iterator[Table]:
    """A and E. One training step of a decoder layer, with the allocation."""
    rows: list[dict[str, Any]] = []
    for count in tokens:
        check_time(run)
        rows = sorted([*rows, *training_rows(run, kind, count)], key=lambda row: row["tokens"])
        yield Table(
            f"gpu-training-{kind}",
            f"A training step of one decoder layer, {kind} weights",
            rows,
            f"A decoder layer of Llama-3-8B (width {run.sizes.width}), 7 linear layers at rank {RANK}, adapters in "
            "float32: forward and backward pass, AdamW, allocation; median (quartiles) of the rounds, in which the "
            f"methods take turns, {STOCK} without peft-adadora. Launches: by the profiler, without AdamW; counted and "
            "priced as in `--only launches`, for the rates given there. Time / price: the step without AdamW.",
        )


def compiled_training(run: Asking) -> Iterator[Table]:
    """A, compiled: the same step of a compiled model."""
    tokens, rows = run.sizes.tokens[0], []
    case = {"kind": BFLOAT16, "width": run.sizes.width, "tokens": tokens, "is_compiled": True}
    backend = "inductor" if run.settings.on_cuda else "eager, which captures the model and compiles nothing"
    for names in run.sizes.compiled:
        check_time(run)
        turns = in_turns(run, names, "prepare_training", "time_training", **case)
        for name in names:
            facts = turns.facts[name]
            rows.append(
                {
                    "tokens": tokens,
                    "method": name,
                    "step (ms)": turns.spread(name),
                    **{f"/ {other}": turns.ratio(name, other) for other in (STOCK, LORA)},
                    "peak (MiB)": facts.get("peak (MiB)"),
                    "launches": facts.get("kernels"),
                    "first step (s)": facts.get("first step (s)"),
                    "failure": turns.failures.get(name),
                }
            )
        yield Table(
            "gpu-training-compiled",
            "A training step of one decoder layer, compiled",
            rows,
            f"As A, with `torch.compile` of the model (backend {backend}). The first step compiles.",
        )


# ------------------------------------------------------------------------------------------------------- C: evaluation


def evaluation(run: Asking) -> Iterator[Table]:
    """C. Prefill, inside and outside of `DoraCaching()`, and generation."""
    sizes, rows = run.sizes, []
    for step in (PREFILL, CACHING, GENERATE):
        check_time(run)
        case = {"width": sizes.width, "layers": sizes.layers, "tokens": sizes.prompt, "generated": sizes.generated}
        turns = in_turns(run, tuple(METHODS), None, "time_evaluation", step=step, **case)
        for name in METHODS:
            rows.append(
                {
                    "step": step,
                    "tokens": sizes.generated if step == GENERATE else sizes.prompt,
                    "method": name,
                    "time (ms)": turns.spread(name),
                    f"/ {LORA}": turns.ratio(name, LORA),
                    f"/ {DORA}": turns.ratio(name, DORA),
                    f"/ {STOCK}": turns.ratio(name, STOCK),
                    "failure": turns.failures.get(name),
                }
            )
        yield Table(
            "gpu-evaluation",
            "Evaluation",
            rows,
            f"A Llama of {sizes.layers} layers of width {sizes.width}, bfloat16, all linear layers adapted at rank "
            f"{RANK}, one sequence; median (quartiles) of the rounds, in which the methods take turns. Generate: "
            "greedily, after a prompt of 16 tokens.",
        )


# ------------------------------------------------------------------------------------------------ B, D: forms in turns


def form_rows(
    labels: dict[str, Any], found: dict[str, dict[str, Any]], reference: str, cells: Callable[[dict], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each form of one case: the labels, what `cells` makes of its facts, and what all rows have."""
    base = found[reference].get("seconds")
    for form, facts in found.items():
        seconds = facts.get("seconds")
        totals = seconds and [sum(phases) for phases in seconds]
        yield {
            **labels,
            "form": form,
            **cells(facts),
            f"/ {reference}": totals and base and ratio(totals, [sum(phases) for phases in base]),
            "launches": facts.get("launches"),
            "peak (MiB)": facts.get("peak (MiB)"),
            "failure": facts.get("failure"),
        }


def phase(facts: dict[str, Any], index: int) -> Optional[list[float]]:
    """The seconds of a phase in all rounds."""
    return [phases[index] for phases in facts["seconds"]] if "seconds" in facts else None


def norm_cells(facts: dict[str, Any]) -> dict[str, Any]:
    seconds = phase(facts, 0)
    return {
        "time (µs)": seconds and microseconds(seconds),
        ERROR: facts.get(ERROR),
        CANCELLING_ERROR: facts.get(CANCELLING_ERROR),
    }


def norms(run: Asking, process: str, with_kernel: bool) -> Iterator[Table]:
    """B, and a table of D. The norm alone, in each form."""
    rows: list[dict[str, Any]] = []
    for (out_features, in_features), layers in weight_shapes(run.sizes.width).items():
        check_time(run)
        case = {"out_features": out_features, "in_features": in_features, "rank": RANK, "with_kernel": with_kernel}
        found = run.ask(process, "norms", rounds=run.sizes.form_rounds, share=share(run) / 4, **case)
        labels = {"out×in": f"{out_features}×{in_features}", "layers": layers}
        rows += form_rows(labels, found, NOW if with_kernel else TWO_PARTS, norm_cells)
        yield Table(
            "gpu-norm-kernel" if with_kernel else "gpu-norm",
            "The norm in one kernel" if with_kernel else "The norm alone",
            rows,
            f"The linear layers of a decoder layer, bfloat16, rank {RANK} in float32, with a cold cache; median "
            "(quartiles) of the rounds. Errors: the largest relative error of a row's norm against float64.",
        )


def outputs(run: Asking) -> Iterator[Table]:
    """A table of D. h alone, in one kernel and as it is."""
    rows: list[dict[str, Any]] = []

    def cells(facts: dict[str, Any]) -> dict[str, Any]:
        passes = {f"{name} (µs)": phase(facts, index) for index, name in enumerate(PHASES[:2])}
        return {
            **{name: seconds and microseconds(seconds) for name, seconds in passes.items()},
            OUTPUT_ERROR: facts.get(OUTPUT_ERROR),
            GRADIENT_ERROR: facts.get(GRADIENT_ERROR),
        }

    for tokens in run.sizes.kernel_tokens:
        for features in sorted({out_features for out_features, _ in weight_shapes(run.sizes.width)}):
            check_time(run)
            case = {"tokens": tokens, "features": features, "rank": RANK}
            found = run.ask(KERNELS, "outputs", rounds=run.sizes.form_rounds, share=share(run) / 4, **case)
            rows += form_rows({"tokens": tokens, "out": features}, found, NOW, cells)
            yield Table(
                "gpu-output-kernel",
                "h in one kernel",
                rows,
                "h from W x, in bfloat16, with a cold cache; median (quartiles) of the rounds. The ratio is that of "
                "both passes. Errors: ‖difference‖ / ‖exact‖ against float64, of the gradients the largest.",
            )


def training_with_kernels(run: Asking) -> Iterator[Table]:
    """The table of D that decides: a whole training step of AdaDoRA with the kernels."""
    rows: list[dict[str, Any]] = []

    def cells(facts: dict[str, Any]) -> dict[str, Any]:
        seconds = facts.get("seconds")
        phases = {f"{name} (ms)": phase(facts, index) for index, name in enumerate(PHASES)}
        return {
            "step (ms)": seconds and milliseconds([sum(phases) for phases in seconds]),
            **{name: values and milliseconds(values).median for name, values in phases.items()},
        }

    for tokens in run.sizes.kernel_tokens:
        check_time(run)
        case = {"width": run.sizes.width, "tokens": tokens}
        found = run.ask(KERNELS, "training_with_kernels", rounds=run.sizes.form_rounds, share=share(run), **case)
        rows = sorted([*rows, *form_rows({"tokens": tokens}, found, NOW, cells)], key=lambda row: row["tokens"])
        yield Table(
            "gpu-training-kernels",
            f"A training step of {ADADORA} with parts of it in one kernel",
            rows,
            "As A, with parts of AdaDoRA replaced; median (quartiles) of the rounds, in which the forms take turns.",
        )


def candidates(run: Asking) -> Iterator[Table]:
    """D. The kernels, in a whole training step and alone. What fails of it does not lose the rest."""
    failures: list[str] = []
    for tables in (training_with_kernels(run), outputs(run), norms(run, KERNELS, with_kernel=True)):
        try:
            yield from tables
        except NoAnswer as failure:
            failures.append(str(failure))
    if failures:
        raise NoAnswer("; ".join(dict.fromkeys(failures)))


def all_parts(run: Asking) -> Iterator[tuple[str, str, float, Iterator[Table]]]:
    """Name and title of each part, the share of all time at which it has to end, and its tables; in order of value."""
    tokens = run.sizes.tokens
    yield "A", "Training step", 0.35, training(run, BFLOAT16, tokens)
    yield "B", "The norm", 0.45, norms(run, WITH_US, with_kernel=False)
    yield "C", "Evaluation", 0.58, evaluation(run)
    yield "D", "Kernels", 0.82, candidates(run)
    yield "E", "4-bit weights", 0.90, training(run, FOUR_BITS, tokens[:-1])
    yield "A-compiled", "Training step, compiled", 0.98, compiled_training(run)
