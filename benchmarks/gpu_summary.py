"""The answers that the tables of `gpu.py` give, in a few sentences."""

from collections.abc import Iterator
from typing import Any, Optional

from apart import STOCK
from gpu_parts import Sizes
from names import (
    ADADORA,
    BFLOAT16,
    BLOCKS,
    CACHING,
    CANCELLING_ERROR,
    DENSE_NORM,
    DORA,
    ERROR,
    GENERATE,
    KEPT,
    LORA,
    NOW,
    ONE_PART,
    PREFILL,
    TWO_PARTS,
)
from report import Table, number
from timing import Spread


Row = dict[str, Any]
# A kernel goes into the package if it saves at least this share of a whole training step.
WORTH = 0.10


def rows(tables: dict[str, Table], name: str, **labels: Any) -> list[Row]:
    """The rows of a table with these labels; none if there is no such table."""
    found = tables[name].rows if name in tables else []
    return [row for row in found if all(row[label] == value for label, value in labels.items())]


def median(value: Optional[Spread]) -> Optional[float]:
    return None if value is None else value.median


def times(value: Optional[Spread]) -> str:
    return "not measured" if value is None else f"{value.median:.3f}×"


def step_of(tables: dict[str, Table], method: str, tokens: int) -> Optional[Row]:
    found = rows(tables, f"gpu-training-{BFLOAT16}", method=method, tokens=tokens)
    return found[0] if found else None


def training_answer(tables: dict[str, Table], sizes: Sizes) -> Iterator[str]:
    for tokens in sorted(sizes.tokens):
        row = step_of(tables, ADADORA, tokens)
        if row is None or row["step (ms)"] is None:
            yield f"A. {tokens:,} tokens: not measured."
            continue
        price = "" if row["time / price"] is None else f"; it took {row['time / price']:.2f}× its price"
        yield (
            f"A. {tokens:,} tokens: a training step of {ADADORA} takes {number(row['step (ms)'].median)} ms, "
            f"{times(row[f'/ {STOCK}'])} {STOCK}'s step and {times(row[f'/ {DORA}'])} {DORA}'s{price}."
        )


def norm_answer(tables: dict[str, Table], sizes: Sizes) -> Iterator[str]:
    """B: what the forms cost in all linear layers of a decoder layer, and how exact they are."""
    totals: dict[str, float] = {}
    for form in (TWO_PARTS, KEPT, ONE_PART, BLOCKS, DENSE_NORM):
        found = rows(tables, "gpu-norm", form=form)
        if not found or any(row["time (µs)"] is None for row in found):
            yield f"B. {form}: not measured."
            continue
        totals[form] = sum(row["layers"] * row["time (µs)"].median for row in found)
        yield (
            f"B. {form}: {number(totals[form])} µs for {sum(row['layers'] for row in found)} linear layers; largest "
            f"relative error {number(max(row[ERROR] for row in found))}, of rows that nearly cancel "
            f"{number(max(row[CANCELLING_ERROR] for row in found))}."
        )
    step = step_of(tables, ADADORA, sizes.tokens[0])
    if step is not None and step["step (ms)"] is not None and {TWO_PARTS, KEPT} <= totals.keys():
        more, whole = totals[TWO_PARTS] - totals[KEPT], 1e3 * step["step (ms)"].median
        yield (
            f"B. To take ‖W‖² anew costs {number(more)} µs, {100 * more / whole:.2f} % of a training step at "
            f"{sizes.tokens[0]:,} tokens; the whole norm is {100 * totals[TWO_PARTS] / whole:.2f} % of it."
        )


def evaluation_answer(tables: dict[str, Table]) -> Iterator[str]:
    for step in (PREFILL, CACHING, GENERATE):
        for row in rows(tables, "gpu-evaluation", step=step, method=ADADORA):
            if row["time (ms)"] is None:
                yield f"C. {step}: not measured."
                continue
            ratios = ", ".join(f"{times(row[f'/ {name}'])} {name}" for name in (LORA, DORA, STOCK))
            yield f"C. {step}: {ADADORA} takes {number(row['time (ms)'].median)} ms, {ratios}."


def kernel_answer(tables: dict[str, Table], sizes: Sizes) -> Iterator[str]:
    """D: what each kernel saves of a whole training step."""
    found = rows(tables, "gpu-training-kernels", tokens=sizes.kernel_tokens[0])
    if not found:
        yield "D. The kernels were not measured."
    for row in found:
        if row["form"] == NOW:
            continue
        value = median(row[f"/ {NOW}"])
        if value is None:
            yield f"D. {row['form']}: not measured ({row['failure']})."
            continue
        verdict = "worth it" if value <= 1 - WORTH else "not worth it"
        yield (
            f"D. {row['form']}: {value:.3f}× the training step as it is, at {sizes.kernel_tokens[0]:,} tokens; "
            f"{verdict} (a kernel has to save {100 * WORTH:.0f} %)."
        )


def summary(tables: dict[str, Table], sizes: Sizes, failures: list[str]) -> list[str]:
    """The answers, part by part, and what was not finished."""
    return [
        *training_answer(tables, sizes),
        *norm_answer(tables, sizes),
        *evaluation_answer(tables),
        *kernel_answer(tables, sizes),
        *(f"Not finished: {failure}." for failure in failures),
    ]
