"""Pictures of a report: figures of matplotlib, PNG files, and a page that holds all it shows."""

import base64
import math
import re
from html import escape
from pathlib import Path
from string import Template

import numpy
import torch

from .report import Report, Table, summary, tables


try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ModuleNotFoundError as error:
    raise ImportError('there are no pictures without matplotlib: pip install "peft-adadora[plot]"') from error


WIDTH = 10  # inches
DPI = 150
MAX_LABELED_LAYERS = 40  # more have no room for numbers in their cells
FEW_ROWS = 1000  # fewer have no labels on a logarithmic axis

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: white; --ink: black; }
@media (prefers-color-scheme: dark) { :root { --page: black; --ink: white; } }
body { max-width: 1100px; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
       background: var(--page); color: var(--ink); overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; margin: 1rem 0; }
div { max-height: 32rem; overflow: auto; margin: 2rem 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid gray; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--page); }
th:first-child, td:first-child { text-align: left; }
</style>
<h1>$title</h1>
$body
</html>
""")
PICTURE = '<picture><source media="(prefers-color-scheme: dark)" srcset="{1}"><img src="{0}" alt="{2}"></picture>'


def figures(report: Report, dark: bool = False) -> dict[str, Figure]:
    """
    Draw a report, for a dark page if `dark` is true and for a light one otherwise.

    Returns `"ranks"`, a heat map of the ranks, layer by module; `"magnitudes"`, how the changes of the magnitudes are
    distributed, or the magnitudes where their change is not known (not for plain AdaLoRA); and `"budget"`, the ranks
    over the steps of training against the schedule.
    """
    with matplotlib.style.context("dark_background" if dark else "default"):
        drawn = {"ranks": _ranks(report)}
        if report.has_magnitudes:
            drawn["magnitudes"] = _magnitudes(report)
        return {**drawn, "budget": _budget(report)}


def _ranks(report: Report) -> Figure:
    layers, names = (list(dict.fromkeys(parts)) for parts in zip(*(module.place for module in report.modules)))
    init_r = max(module.init_r for module in report.modules)
    # no wider than needed, so that it can be read on a narrow screen
    figure = Figure((min(WIDTH, 4 + 0.25 * len(layers)), 2 + 0.32 * len(names)), layout="constrained")
    figure.suptitle(f"Ranks kept, of {init_r}; cells without a color have no adapter")
    axes = figure.subplots()
    cells = numpy.full((len(names), len(layers)), numpy.nan)
    for module in report.modules:
        column, row = layers.index(module.place[0]), names.index(module.place[1])
        cells[row, column] = module.rank
        if len(layers) <= MAX_LABELED_LAYERS:
            color = "black" if module.rank >= init_r / 2 else "white"
            axes.text(column, row, str(module.rank), ha="center", va="center", color=color, fontsize=8)
    image = axes.imshow(cells, aspect="auto", vmin=0, vmax=init_r)
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(4, integer=True), fraction=0.02, pad=0.01)
    parents = {layer.rpartition(".")[0] for layer in layers if layer}
    parent = min(parents) if len(parents) == 1 else ""
    labels = [layer.removeprefix(f"{parent}.") or "-" for layer in layers]
    step = math.ceil(len(layers) / MAX_LABELED_LAYERS)
    axes.set_xticks(range(0, len(layers), step), labels[::step], rotation=0 if parent else 90)
    axes.set_xlabel(f"layer of {parent}" if parent else "layer")
    axes.set_yticks(range(len(names)), names)
    return figure


def _magnitudes(report: Report) -> Figure:
    is_known = report.change is not None
    values: dict[str, list[torch.Tensor]] = {}
    for module in report.modules:
        shares = module.change if is_known else module.magnitude / module.magnitude.quantile(0.5).clamp_min(1e-30) - 1
        if shares is not None and len(shares):
            # the experts of a layer share a box
            values.setdefault(re.sub(r"\.\d+\b", ".*", module.place[1]), []).append(shares)
    boxes = {name: torch.cat(parts).numpy() for name, parts in values.items()}
    rows = numpy.concatenate(list(boxes.values()))
    figure = Figure((WIDTH, max(3.6, 1.4 + 0.32 * len(boxes))), layout="constrained")
    title = "Change of the magnitudes" if is_known else "Magnitudes as they are, for their change is not known"
    figure.suptitle(f"{title}: all rows, and percentiles 5, 25, 50, 75 and 95")
    left, right = figure.subplots(1, 2)
    left.hist(rows, bins=20 if len(rows) < FEW_ROWS else 60, log=len(rows) >= FEW_ROWS)
    left.set_ylabel("rows")
    right.boxplot(boxes.values(), orientation="horizontal", whis=(5, 95), showfliers=False, tick_labels=boxes)
    right.invert_yaxis()
    for axes in (left, right):
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("(m - ‖W‖) / ‖W‖" if is_known else "(m - median of the module) / median")
    return figure


def _budget(report: Report) -> Figure:
    figure = Figure((WIDTH, 3.6), layout="constrained")
    figure.suptitle("Ranks over the steps of training" if report.log else "The schedule; no log of the run was found")
    axes = figure.subplots()
    steps = range(1, report.config["total_step"] + 1)
    axes.plot(steps, [report.budget(step - 1) for step in steps], label="schedule of the config")
    if report.log:
        logged = [entry["step"] for entry in report.log]
        axes.plot(logged, [report.kept(entry) for entry in report.log], ".", label="ranks kept")
    else:
        axes.axhline(report.rank, color="tab:orange", linestyle="--", label="ranks kept in this adapter")
    axes.set(xlabel="step", ylabel="ranks in total", ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write(report: Report, folder: str | Path) -> Path:
    """
    Write `report.html`, which needs no other file, and each figure as `<name>.png` and `<name>-dark.png`, into a
    folder that need not exist. Returns the path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    title, *sentences = map(escape, summary(report))
    body = [f"<p>{sentence}</p>" for sentence in sentences]
    for (name, light), dark in zip(figures(report).items(), figures(report, dark=True).values()):
        sources = _save(light, folder / f"{name}.png"), _save(dark, folder / f"{name}-dark.png")
        body.append(PICTURE.format(*sources, escape(light.get_suptitle())))
    body += map(_html_table, tables(report))
    page = folder / "report.html"
    page.write_text(PAGE.substitute(title=title, body="\n".join(body)), encoding="utf-8")
    return page


def _save(figure: Figure, file: Path) -> str:
    """Write a picture. Returns it as an address that holds all of it."""
    figure.savefig(file, dpi=DPI)
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _html_table(table: Table) -> str:
    header, rows = table
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<div><table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
