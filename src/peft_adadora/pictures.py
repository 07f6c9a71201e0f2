"""Pictures of a report: figures of matplotlib, PNG files, and a page that holds all it shows.

matplotlib comes with `pip install "peft-adadora[plot]"`.
"""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .report import Report, Table, budget_table, module_table, summary


WIDTH = 10  # inches
DPI = 150
MAX_LABELED_LAYERS = 40  # more have no room for numbers in their cells
MAX_BOXES = 24
FEW_ROWS = 1000

LIGHT = {"page": "#ffffff", "ink": "#1f2328", "faint": "#d1d9e0", "line": "#0969da", "dots": "#bc4c00"}
DARK = {"page": "#0d1117", "ink": "#e6edf3", "faint": "#3d444d", "line": "#58a6ff", "dots": "#f0883e"}

CAPTIONS = {
    "ranks": "Ranks kept. Cells without a color have no adapter.",
    "magnitudes": "How the length of each row has changed: all rows, and per module the median, the quartiles and the "
    "5th and 95th percentile.",
    "magnitudes as they are": "The length of each row relative to the median of its module: all rows, and per module "
    "the median, the quartiles and the 5th and 95th percentile. This is not the change, which cannot be told without "
    "the base weights.",
    "budget": "Ranks over the steps of training.",
}

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --faint: #d1d9e0; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --faint: #3d444d; } }
body { max-width: 1100px; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
       background: var(--page); color: var(--ink); overflow-wrap: anywhere; }
figure { margin: 2rem 0; }
img { width: 100%; height: auto; }
div { max-height: 32rem; overflow: auto; margin: 2rem 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--page); }
th:first-child, td:first-child { text-align: left; }
"""


def figures(report: Report, dark: bool = False) -> dict[str, Figure]:
    """
    Draw a report.

    Args:
        report (`Report`):
            What `read_report` returned.
        dark (`bool`):
            For a dark page instead of a light one. Defaults to `False`.

    Returns:
        `dict[str, Figure]`: `"ranks"`, a heat map of the ranks, layer by module; `"magnitudes"`, how the changes of
        the magnitudes are distributed, or the magnitudes where their change is not known (not for plain AdaLoRA); and
        `"budget"`, the ranks over the steps of training against the schedule.
    """
    colors = DARK if dark else LIGHT
    style = {
        **{f"{part}.facecolor": colors["page"] for part in ("figure", "axes", "savefig")},
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colors["ink"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), colors["faint"]),
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        drawn = {"ranks": _ranks(report)}
        if report.has_magnitudes:
            drawn["magnitudes"] = _magnitudes(report, colors)
        drawn["budget"] = _budget(report, colors)
    return drawn


def _figure(height: float) -> Figure:
    return Figure((WIDTH, height), layout="constrained")


def _ranks(report: Report) -> Figure:
    layers = list(dict.fromkeys(module.place[0] for module in report.modules))
    names = list(dict.fromkeys(module.place[1] for module in report.modules))
    cells = [[float("nan")] * len(layers) for _ in names]
    for module in report.modules:
        layer, name = module.place
        cells[names.index(name)][layers.index(layer)] = module.rank
    parents = {layer.rpartition(".")[0] for layer in layers if layer}
    figure = _figure(1.6 + 0.32 * len(names) + 0.9 * (len(parents) > 1))
    axes = figure.subplots()
    init_r = max(module.init_r for module in report.modules)
    image = axes.imshow(cells, aspect="auto", vmin=0, vmax=init_r, cmap="viridis")
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(4, integer=True), fraction=0.02, pad=0.01)
    if len(layers) <= MAX_LABELED_LAYERS:
        for module in report.modules:
            layer, name = module.place
            color = "black" if module.rank >= init_r / 2 else "white"
            place = layers.index(layer), names.index(name)
            axes.annotate(str(module.rank), place, ha="center", va="center", color=color, fontsize=8)
    short = [layer.rpartition(".")[2] if len(parents) == 1 else layer for layer in layers]
    step = -(-len(layers) // MAX_LABELED_LAYERS)
    axes.set_xticks(range(0, len(layers), step), [label or "-" for label in short[::step]])
    if len(parents) > 1:
        axes.tick_params(axis="x", rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"layer of {min(parents)}" if len(parents) == 1 else "layer")
    axes.set_title(f"Ranks kept, of {init_r}")
    return figure


def _magnitudes(report: Report, colors: dict[str, str]) -> Figure:
    known = report.change is not None
    values: dict[str, list[Any]] = {}
    for module in report.modules:
        relative = module.change if known else module.magnitude / module.magnitude.quantile(0.5).clamp_min(1e-30)
        if relative is not None and len(relative):
            values.setdefault(module.place[1], []).extend(relative.tolist())
    if len(values) > MAX_BOXES:  # experts, say: keep the last part of their names apart
        short: dict[str, list[Any]] = {}
        for name, rows in values.items():
            short.setdefault(name.rpartition(".")[2], []).extend(rows)
        values = short
    figure = _figure(max(3.6, 1.4 + 0.32 * len(values)))
    left, right = figure.subplots(1, 2)
    everything = [value for rows in values.values() for value in rows]
    few = len(everything) < FEW_ROWS  # a logarithmic axis would have no labels
    left.hist(everything, bins=20 if few else 60, color=colors["line"], log=not few)
    if not few:
        left.set_ylim(bottom=0.7)
    left.set_ylabel("rows")
    right.boxplot(
        list(values.values()),
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        widths=0.6,
        boxprops={"color": colors["line"]},
        whiskerprops={"color": colors["line"]},
        capprops={"color": colors["line"]},
        medianprops={"color": colors["dots"], "linewidth": 2},
    )
    right.set_yticks(range(1, len(values) + 1), list(values))
    right.invert_yaxis()
    for axes in (left, right):
        axes.axvline(0 if known else 1, color=colors["ink"], linewidth=0.8)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        if known:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("(m - ‖W‖) / ‖W‖" if known else "m / median of the module")
    figure.suptitle("Change of the magnitudes" if known else "Magnitudes as they are; their change is not known")
    return figure


def _budget(report: Report, colors: dict[str, str]) -> Figure:
    drifts = [(entry["step"], entry.get("adalora_magnitude_drift")) for entry in report.log]
    drifts = [(step, drift) for step, drift in drifts if drift is not None]
    figure = _figure(5.6 if drifts else 3.6)
    axes, *lower = figure.subplots(
        1 + bool(drifts), 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + bool(drifts)]
    )[:, 0]
    steps = range(1, report.config["total_step"] + 1)
    axes.plot(steps, [report.budget(step - 1) for step in steps], color=colors["line"], label="schedule of the config")
    if report.log:
        logged = [entry["step"] for entry in report.log]
        axes.plot(logged, [report.kept(entry) for entry in report.log], ".", color=colors["dots"], label="ranks kept")
    else:
        axes.axhline(report.rank, color=colors["dots"], linestyle="--", label="ranks kept in this adapter")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ranks in total")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend()
    for panel in lower:
        panel.plot(*zip(*drifts), color=colors["dots"])
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.set_ylabel("mean drift of\nmagnitudes")
    for panel in (axes, *lower):
        panel.grid()
    (lower or [axes])[-1].set_xlabel("step")
    axes.set_title("Ranks over the steps of training" if report.log else "The schedule; no log of the run was found")
    return figure


def write(report: Report, folder: str | Path) -> Path:
    """
    Write `report.html`, which needs no other file, and each figure as `<name>.png` and `<name>-dark.png`.

    Args:
        report (`Report`):
            What `read_report` returned.
        folder (`str` or `Path`):
            Where to write; made if it is not there.

    Returns:
        `Path`: The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, list[str]] = {}
    for dark in (False, True):
        for name, figure in figures(report, dark).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
            (folder / f"{name}{'-dark' * dark}.png").write_bytes(buffer.getvalue())
            images.setdefault(name, []).append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    page = folder / "report.html"
    page.write_text(_page(report, images), encoding="utf-8")
    return page


def _page(report: Report, images: dict[str, list[str]]) -> str:
    title, *sentences = (escape(line) for line in summary(report))
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title>\n<style>{STYLE}</style>",
        f"<h1>{title}</h1>",
        *(f"<p>{sentence}</p>" for sentence in sentences),
    ]
    for name, (light, dark) in images.items():
        caption = CAPTIONS["magnitudes as they are" if name == "magnitudes" and report.change is None else name]
        parts.append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{escape(caption)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
        )
    parts.append(_html_table(module_table(report)))
    if report.log:
        parts.append(_html_table(budget_table(report)))
    return "\n".join(parts) + "\n</html>\n"


def _html_table(table: Table) -> str:
    header, rows = table
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<div><table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
