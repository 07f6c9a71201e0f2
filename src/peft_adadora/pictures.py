"""Draw a report with matplotlib."""

import math
import os
import re

import numpy

from .report import Report


try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ModuleNotFoundError as error:
    raise ImportError("pictures need matplotlib: pip install matplotlib") from error


NARROW, WIDE = 6, 10  # inches; labels of a narrow figure are readable on a phone
MAX_LABELED_LAYERS = 40  # with more layers, cells are too small for numbers


def figures(report: Report, dark: bool = False) -> dict[str, Figure]:
    """
    Draw a report, for a dark page if `dark` is true. Returns figures by name: `"ranks"` (a heat map of layers and
    modules), `"magnitudes"` (their changes, or their values if no base weights are known; AdaDoRA only), and
    `"budget"` (ranks and schedule over the steps).
    """
    with matplotlib.style.context("dark_background" if dark else "default"):
        magnitudes = {"magnitudes": _magnitudes(report)} if report.has_magnitudes else {}
        return {"ranks": _ranks(report), **magnitudes, "budget": _budget(report)}


def _place(name: str) -> tuple[str, str]:
    """Split a module's path into its layer, which may be empty, and its name there."""
    return re.fullmatch(r"(?:((?:.*?\.)?\d+)\.)?(.+)", name).groups("")


def _ranks(report: Report) -> Figure:
    layers, names = (list(dict.fromkeys(parts)) for parts in zip(*(_place(module.name) for module in report.modules)))
    init_r = report.config["init_r"]
    figure = Figure((min(WIDE, max(NARROW, 4 + len(layers) / 4)), 2 + 0.32 * len(names)), layout="constrained")
    figure.suptitle(f"Ranks kept, of {init_r}\n(cells without a color have no adapter)")
    axes = figure.subplots()
    cells = numpy.full((len(names), len(layers)), numpy.nan)
    for module in report.modules:
        layer, name = _place(module.name)
        row, column = names.index(name), layers.index(layer)
        cells[row, column] = module.rank
        if len(layers) <= MAX_LABELED_LAYERS:
            color = "black" if module.rank >= init_r / 2 else "white"
            axes.text(column, row, str(module.rank), ha="center", va="center", color=color, fontsize=8)
    image = axes.imshow(cells, aspect="auto", vmin=0, vmax=init_r)
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(4, integer=True), fraction=0.02, pad=0.01)
    parent = os.path.commonprefix(list(filter(None, layers))).rpartition(".")[0]
    labels = [layer.removeprefix(f"{parent}.") or "-" for layer in layers]
    step = math.ceil(len(layers) / MAX_LABELED_LAYERS)
    axes.set_xticks(range(0, len(layers), step), labels[::step], rotation=90 if len(max(labels, key=len)) > 3 else 0)
    axes.set_xlabel(f"layer of {parent}" if parent else "layer")
    axes.set_yticks(range(len(names)), names)
    return figure


def _magnitudes(report: Report) -> Figure:
    is_known = report.change is not None
    boxes: dict[str, numpy.ndarray] = {}
    for module in report.modules:
        x = module.change if is_known else module.magnitude / module.magnitude.quantile(0.5).clamp_min(1e-30) - 1
        if x is not None and len(x):
            kind = re.sub(r"\.\d+\b", ".*", _place(module.name)[1])  # one box for all experts of a layer
            boxes[kind] = numpy.concatenate([boxes.get(kind, x[:0]), x])
    rows = numpy.concatenate(list(boxes.values()))
    figure = Figure((NARROW, 4.5 + 0.32 * len(boxes)), layout="constrained")
    title = "Change of the magnitudes" if is_known else "Magnitudes; their change is not known"
    figure.suptitle(f"{title}:\nall rows, and percentiles 5, 25, 50, 75 and 95")
    top, bottom = figure.subplots(2)
    # the labels of a logarithmic axis need many rows
    top.hist(rows, bins=min(60, 20 + len(rows) // 25), log=len(rows) >= 1000)
    top.set_ylabel("rows")
    bottom.boxplot(boxes.values(), orientation="horizontal", whis=(5, 95), showfliers=False, tick_labels=boxes)
    bottom.invert_yaxis()
    for axes in (top, bottom):
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("(m - ‖W‖) / ‖W‖" if is_known else "(m - median of the module) / median")
    return figure


def _budget(report: Report) -> Figure:
    figure = Figure((NARROW, 3.6), layout="constrained")
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
    axes.locator_params(nbins=6, integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
