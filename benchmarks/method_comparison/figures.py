"""Plots of the comparison, as PNG."""

import statistics
import sys
from pathlib import Path
from typing import Any

from ablations import ABLATIONS
from plan import RANK, Cell, Log, Plan
from results import difference, pairs
from training import ADADORA, ADALORA, LORA, METHODS


def cell_name(cell: Cell) -> str:
    return f"{cell.task}, {'all' if cell.examples is None else cell.examples} examples"


def draw_accuracies(figure: Any, plan: Plan, log: Log) -> None:
    """Mean accuracy of each method against the rank, one set of axes per cell; each seed is a dot."""
    columns = min(4, len(plan.cells))
    rows = -(-len(plan.cells) // columns)
    figure.set_size_inches(3.2 * columns, 3.0 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(plan.cells) :]:
        axes.set_axis_off()
    for axes, cell in zip(grid.flat, plan.cells):
        for offset, method in enumerate(METHODS):
            places = [index + 0.12 * (offset - 1.5) for index in range(len(cell.ranks))]
            accuracies = [
                [100 * log[run]["accuracy"] for run in plan.compared(log, cell, method, rank)] for rank in cell.ranks
            ]
            (line,) = axes.plot(places, [statistics.mean(values) for values in accuracies], marker="o", label=method)
            for place, values in zip(places, accuracies):
                axes.scatter([place] * len(values), values, s=8, alpha=0.5, color=line.get_color())
        axes.set_xticks(range(len(cell.ranks)), cell.ranks)
        axes.set(title=cell_name(cell), xlabel="average rank at the end")
        axes.grid(axis="y", alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))


def draw_intervals(axes: Any, rows: list[tuple[str, tuple[float, float, float]]]) -> None:
    """A mean and its 95 % interval, in points of accuracy, for each row."""
    for place, (_, (mean, lower, upper)) in enumerate(rows):
        axes.plot([100 * lower, 100 * upper], [place, place], color="tab:blue")
        axes.plot([100 * mean], [place], marker="o", color="tab:blue")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("points of test accuracy, 95 % interval")


def draw_gains(figure: Any, plan: Plan, log: Log) -> None:
    """What AdaDoRA gains over AdaLoRA, which is the magnitude, and over LoRA in each row of the comparison."""
    names = [f"{cell_name(cell)}, rank {rank}" for cell in plan.cells for rank in cell.ranks]
    figure.set_size_inches(12, 1.2 + 0.3 * len(names))
    for axes, reference in zip(figure.subplots(1, 2, sharey=True), (ADALORA, LORA)):
        compared = pairs(plan, log, plan.cells, (ADADORA, None), (reference, None))
        draw_intervals(axes, [(name, difference(log, *pair)) for name, pair in zip(names, compared)])
        axes.set_title(f"{ADADORA} minus {reference}")


def draw_ablations(figure: Any, plan: Plan, log: Log) -> None:
    """What each change gains over AdaDoRA as it is."""
    reference = plan.compared(log, plan.ablated, ADADORA, RANK)
    rows = [(name, difference(log, plan.ablation(log, name), reference)) for name in ABLATIONS]
    figure.set_size_inches(8, 1.2 + 0.3 * len(rows))
    axes = figure.subplots()
    draw_intervals(axes, rows)
    axes.set_title(f"changed {ADADORA} minus {ADADORA}\n{cell_name(plan.ablated)}, rank {RANK}")


def write_figures(plan: Plan, log: Log, folder: Path) -> None:
    """Write the PNGs, or one line on stderr if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plots were made, because matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        return
    drawings = {"accuracies": draw_accuracies, "gains": draw_gains}
    if plan.ablated:
        drawings["ablations"] = draw_ablations
    for name, draw in drawings.items():
        figure = Figure(layout="constrained")
        draw(figure, plan, log)
        figure.savefig(folder / f"{name}.png", dpi=120)
