"""Plots of the tables, as PNG."""

import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from report import Table
from timing import Spread


def row_label(row: dict[str, Any]) -> str:
    """What tells a row from the others: the cells in front of the first measurement."""
    return " · ".join(str(value) for value in takewhile(lambda value: not isinstance(value, Spread), row.values()))


def draw_bars(figure: Any, table: Table) -> None:
    """A group of bars for each row: the ratios to the reference, with their quartiles."""
    figure.set_size_inches(8, 1.5 + 0.6 * len(table.rows))
    axes = figure.subplots()
    measured = [name for name, value in table.rows[0].items() if isinstance(value, Spread)]
    reference = next(name.removesuffix(" (ms)") for name in measured if name.endswith("(ms)"))
    columns = [name for name in measured if not name.endswith("(ms)")]
    height = 0.8 / len(columns)
    for index, column in enumerate(columns):
        spreads = [row[column] for row in table.rows]
        medians = [spread.median for spread in spreads]
        errors = [[abs(spread.quartiles[side] - spread.median) for spread in spreads] for side in (0, 1)]
        places = [row + (index + 0.5) * height - 0.4 for row in range(len(table.rows))]
        axes.barh(places, [median - 1 for median in medians], height, left=1, xerr=errors, label=column)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"time relative to {reference}")
    axes.set_yticks(range(len(table.rows)), [row_label(row) for row in table.rows])
    axes.invert_yaxis()
    axes.set_title(table.title)
    axes.legend()


def draw_growth(figure: Any, table: Table) -> None:
    """Times and bytes against the size, which is the first column, all on logarithmic axes."""
    figure.set_size_inches(10, 4)
    size = next(iter(table.rows[0]))
    for axes, unit in zip(figure.subplots(1, 2), ("ms", "MiB")):
        for column in (name for name in table.rows[0] if name.endswith(f"({unit})")):
            values = [row[column] for row in table.rows]
            axes.plot(
                [row[size] for row in table.rows],
                [value.median if isinstance(value, Spread) else value for value in values],
                marker="o",
                label=column.removesuffix(f" ({unit})"),
            )
        axes.set(xlabel=size, ylabel=unit)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks([row[size] for row in table.rows])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
    figure.suptitle(table.title)


DRAW = {"bars": draw_bars, "growth": draw_growth}


def write_plots(tables: list[Table], folder: Path) -> None:
    """Write a PNG for each table that says how to plot it, or one line on stderr if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plots were made, because matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        return
    for table in tables:
        if table.plot:
            figure = Figure(layout="constrained")
            DRAW[table.plot](figure, table)
            figure.savefig(folder / f"{table.name}.png", dpi=120)
