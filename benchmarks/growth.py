"""How time and memory grow with rank, width and tokens, with the exponents fitted."""

from collections.abc import Iterator, Sequence
from math import log
from statistics import linear_regression
from typing import Any

import norm
from cases import LayerCase
from counters import byte_count, kept_storages, peak_bytes
from report import Table
from settings import Settings
from timing import measure, milliseconds, ratio
from variants import ADADORA, ADALORA


MIB = 2**20


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The b of values ≈ a · sizesᵇ: the least squares slope between logarithms, over the upper half of the sizes."""
    start = len(sizes) // 2
    return linear_regression([log(size) for size in sizes[start:]], [log(value) for value in values[start:]]).slope


def axes(settings: Settings) -> dict[str, list[tuple[int, LayerCase]]]:
    """For rank, width and tokens: the sizes, and the layer of each."""
    ranks = settings.pick([8, 16, 32, 64, 128, 256, 512], [8, 32, 128, 512])
    widths = settings.pick([512, 1024, 2048, 4096, 8192], [512, 1024, 2048, 4096])
    tokens = settings.pick([1, 4, 16, 64, 256, 1024, 4096], [1, 64, 512, 4096])
    return {
        "rank": [(rank, LayerCase(1024, 1024, 256, rank)) for rank in ranks],
        "width": [(width, LayerCase(width, width, 64)) for width in widths],
        "tokens": [(count, LayerCase(1024, 1024, count)) for count in tokens],
    }


def growth_row(axis: str, size: int, case: LayerCase, settings: Settings) -> dict[str, Any]:
    models, x = case.build(settings.device, (ADALORA, ADADORA)), case.inputs(settings.device)
    steps = {variant: case.training_step(model, x) for variant, model in models.items()}
    seconds = measure(steps, settings)
    kept = {
        variant: byte_count(kept_storages(lambda model=model: case.forward(model, x), model.parameters()))
        for variant, model in models.items()
    }
    from_the_factors = norm.norm_functions(case, settings.device)[norm.FACTORED]
    return {
        axis: size,
        **{f"{variant} step (ms)": milliseconds(values) for variant, values in seconds.items()},
        f"{ADADORA} / {ADALORA}": ratio(seconds[ADADORA], seconds[ADALORA]),
        **{f"{variant} keeps (MiB)": total / MIB for variant, total in kept.items()},
        "peak of the norm (MiB)": peak_bytes(from_the_factors, settings.device) / MIB,
    }


def exponents(axis: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with the fitted exponent of each column in milliseconds or bytes."""
    sizes = [row[axis] for row in rows]
    fitted: dict[str, Any] = {"grows with": axis}
    for column in rows[0]:
        if column.endswith(("(ms)", "(MiB)")):
            values = [row[column] for row in rows]
            fitted[column.rpartition(" ")[0]] = fitted_exponent(sizes, [getattr(v, "median", v) for v in values])
    return fitted


def tables(settings: Settings) -> Iterator[Table]:
    fitted = []
    for axis, points in axes(settings).items():
        rows = [growth_row(axis, size, case, settings) for size, case in points]
        fitted.append(exponents(axis, rows))
        first, last = points[0][1].labels, points[-1][1].labels
        fixed = ", ".join(f"{name} {value}" for name, value in first.items() if value == last[name])
        note = f"Training step and norm of one layer: {fixed}."
        yield Table(f"growth-{axis}", f"Growth with {axis}", rows, note, plot="growth")
    note = "The exponents b of size^b, least squares between logarithms over the upper half of the sizes."
    yield Table("growth-exponents", "Fitted exponents", fitted, note)
