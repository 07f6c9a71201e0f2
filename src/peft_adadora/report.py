"""Report the ranks and magnitudes that a training run gave to an AdaDoRA or AdaLoRA adapter."""

import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file

from .files import CONFIG_FILE, checkpoints, find_adapter, natural_order, read_json, read_row_norms, reading


Table = tuple[list[str], list[list[str]]]  # the header and the rows


@dataclass
class Module:
    """An adapted layer."""

    name: str  # its path in the base model
    rank: int  # how many singular triplets are kept
    init_r: int  # how many the adapter started with
    magnitude: Optional[torch.Tensor] = None  # learned row lengths, of shape (out,); `None` for plain AdaLoRA
    base_norm: Optional[torch.Tensor] = None  # row norms of the base weight, of shape (out,); `None` if not found

    @property
    def change(self) -> Optional[torch.Tensor]:
        """(m − ‖W‖) / ‖W‖ of each row with ‖W‖ > 0. `None` if ‖W‖ is not known."""
        if self.magnitude is None or self.base_norm is None:
            return None
        rows = self.base_norm > 0
        return (self.magnitude[rows] - self.base_norm[rows]) / self.base_norm[rows]


@dataclass
class Report:
    """Ranks, magnitudes and log of an adapter. `print(report)` prints the text of `peft-adadora report`."""

    folder: Path  # the adapter's folder
    config: dict[str, Any]  # the saved config
    modules: list[Module]
    log: list[dict[str, float]]  # the logs of `AdaLoraCallback`
    log_file: Optional[Path] = None  # the trainer state that holds the log
    base: Optional[str] = None  # the source of the base weights, if found

    @property
    def has_magnitudes(self) -> bool:
        """Whether this is an AdaDoRA adapter. Plain AdaLoRA has no magnitudes."""
        return bool(self.config.get("use_dora_adaptive"))

    @property
    def rank(self) -> int:
        """Total number of singular triplets kept."""
        return sum(module.rank for module in self.modules)

    @property
    def change(self) -> Optional[torch.Tensor]:
        """(m − ‖W‖) / ‖W‖ of all rows with a known ‖W‖ > 0. `None` if there is no such row."""
        known = [module.change for module in self.modules if module.change is not None and len(module.change)]
        return torch.cat(known) if known else None

    def budget(self, step: int) -> int:
        """Return the total rank that the schedule allows after `update_and_allocate(step)`."""
        first, last = self.config["tinit"], self.config["total_step"] - self.config["tfinal"]
        start, end = (self.config[name] * len(self.modules) for name in ("init_r", "target_r"))
        if not first < step < last:
            return start if step <= first else end
        return int((start - end) * (1 - (step - first) / (last - first)) ** 3 + end)

    def kept(self, entry: dict[str, float]) -> int:
        """Return the total rank in an entry of the log."""
        return round(entry["adalora_mean_rank"] * len(self.modules))

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(summary(self)), *map(as_text, tables(self, max_rows=12))])


def read_report(path: str | Path, base_model: Optional[str | Path] = None) -> Report:
    """
    Read the ranks and magnitudes of an adapter, and the log of its run.

    `path` is the folder of an adapter, a checkpoint, or the output folder of a Trainer with checkpoints. A magnitude
    starts as a row norm of the base weight, so its change needs this weight. `base_model` is a folder or file of base
    weights as safetensors, or a name on the Hub to download. The default is the base model of the config, if it is on
    this machine.

    Raises `ValueError` if there is no adapter of AdaLoRA, a file is broken, or `base_model` is not the base model.
    """
    folder = find_adapter(Path(path))
    config = _read_config(folder / CONFIG_FILE)
    modules, shapes = _read_weights(folder / "adapter_model.safetensors", config)
    report = Report(folder, config, modules, *_read_log(folder, Path(path)))
    source = base_model or config.get("base_model_name_or_path")
    if report.has_magnitudes and source:
        with nullcontext() if base_model is not None else suppress(ValueError):
            norms = read_row_norms(str(source), shapes, config, download=base_model is not None)
            report.base = str(source)
            for module in modules:
                module.base_norm = norms.get(module.name)
    return report


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if (kind := config.get("peft_type")) != "ADALORA":
        raise ValueError(f"{path.parent} holds an adapter of the type {kind}, not of AdaLoRA or AdaDoRA.")
    for name in ("init_r", "target_r", "tinit", "tfinal", "total_step"):
        if type(config.get(name)) is not int:
            raise ValueError(f"{path} is broken: {name} is {config.get(name)!r} instead of a number.")
    return config


def _read_weights(path: Path, config: dict[str, Any]) -> tuple[list[Module], dict[str, tuple[int, int]]]:
    """Return the modules, and the shape (out, in) of each one's base weight as a matrix."""
    if not path.is_file():
        raise ValueError(f"There is no {path.name} in {path.parent}.")
    with reading(path):
        weights = {key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}
    names = sorted({key.rpartition(".lora_")[0] for key in weights if ".lora_" in key}, key=natural_order)
    if not names:
        raise ValueError(f"{path} holds no weights of AdaLoRA.")
    parts = ["lora_A", "lora_E", "lora_B"] + ["lora_magnitude"] * bool(config.get("use_dora_adaptive"))
    missing = [key for name in names for part in parts if (key := f"{name}.{part}") not in weights]
    if missing:
        raise ValueError(f"{path} is incomplete: {missing[0]} is missing.")
    # before the first pruning, a layer of zeros is a layer without a gradient
    values_of_E, init_r = [weights[f"{name}.lora_E"] for name in names], config["init_r"]
    is_pruned = any(len(E) < init_r or 0 < E.count_nonzero() < len(E) for E in values_of_E)
    modules, shapes = [], {}
    for name in names:
        A, E, B, *magnitudes = (weights[f"{name}.{part}"] for part in parts)
        ranks = [len(A), len(E), B.shape[1]]
        if len(set(ranks)) > 1 or len(E) > init_r:
            raise ValueError(f"The ranks of A, E and B of {name} in {path} do not fit init_r={init_r}: {ranks}.")
        shapes[name] = (len(B), math.prod(A.shape[1:]))
        m = magnitudes[0].flatten().float() if magnitudes else None
        if m is not None and not (len(m) == len(B) and m.isfinite().all()):
            raise ValueError(f"{name}.lora_magnitude in {path} is broken: it is not {len(B)} finite numbers.")
        modules.append(Module(name, int(E.count_nonzero()) if is_pruned else len(E), init_r, m))
    return modules, shapes


def _read_log(folder: Path, path: Path) -> tuple[list[dict[str, float]], Optional[Path]]:
    """Return the log and its file: beside the adapter, in the parent folder, or in the last checkpoint."""
    files = [place / "trainer_state.json" for place in (folder, folder.parent, path, *checkpoints(path))]
    file = next(filter(Path.is_file, files), None)
    history = read_json(file).get("log_history") if file else []
    if type(history) is not list:
        raise ValueError(f"{file} is broken: it has no log_history.")
    needed = {"step", "adalora_budget", "adalora_mean_rank"}
    return [entry for entry in history if isinstance(entry, dict) and needed <= entry.keys()], file


def percent(share: float | torch.Tensor, sign: str = "") -> str:
    """Format a share in per cent. `sign="+"` also gives positive ones a sign."""
    return f"{100 * float(share):{sign}.2f} %"


def summary(report: Report) -> Iterator[str]:
    """Describe the adapter as a whole, one line at a time."""
    count, change = len(report.modules), report.change
    yield f"{'AdaDoRA' if report.has_magnitudes else 'AdaLoRA'} adapter in {report.folder}"
    ranks = f"{report.rank} of {report.config['init_r'] * count} kept in {count} modules"
    yield f"Ranks: {ranks}, {report.rank / count:.1f} on average; the schedule ends at {report.config['target_r']}."
    if change is not None:
        drift = f"{percent(change.abs().mean())} mean drift |m - ‖W‖| / ‖W‖"
        yield f"Magnitudes: {drift} over {len(change):,} rows. The base weights are from {report.base}."
        unknown = sum(module.base_norm is None for module in report.modules)
        if unknown:
            yield f"The base model has no weight for {unknown} of the modules."
    elif report.has_magnitudes:
        yield "Magnitudes: no change is known, because the base weights were not found. Use --base-model."
    else:
        yield "Magnitudes: none, this is plain AdaLoRA."
    for entry in [entry for entry in report.log if "adalora_magnitude_drift" in entry][-1:]:
        drift = percent(entry["adalora_magnitude_drift"])
        yield f"The run logged a mean drift of {drift} at step {entry['step']}."


def tables(report: Report, max_rows: Optional[int] = None) -> list[Table]:
    """Return the table of the modules and, if there is a log, the table of the budget."""
    return [module_table(report), *([budget_table(report, max_rows)] if report.log else [])]


def module_table(report: Report) -> Table:
    """Return each module's rank and magnitude drift, or its magnitudes if no drift is known."""
    is_known = report.change is not None
    header = ["module", "rank", "of"]
    if report.has_magnitudes:
        header += ["mean drift", "mean change", "largest"] if is_known else ["smallest m", "median m", "largest m"]
    rows = []
    for module in report.modules:
        cells, x, m = [], module.change, module.magnitude
        if x is not None and len(x):
            cells = [percent(x.abs().mean()), percent(x.mean(), "+"), percent(x[x.abs().argmax()], "+")]
        elif report.has_magnitudes:
            cells = ["not known"] * 3 if is_known else [f"{float(q):.4g}" for q in (m.min(), m.quantile(0.5), m.max())]
        rows.append([module.name, str(module.rank), str(module.init_r), *cells])
    return header, rows


def budget_table(report: Report, max_rows: Optional[int] = None) -> Table:
    """Return budget and ranks kept at the steps of the log, or at `max_rows` steps that are evenly spaced."""
    log = report.log
    if max_rows is not None and len(log) > max_rows:
        log = [log[round(index * (len(log) - 1) / (max_rows - 1))] for index in range(max_rows)]
    header = ["step", "schedule", "logged budget", "ranks kept"] + ["mean drift"] * report.has_magnitudes
    rows = []
    for entry in log:
        # the Trainer counts steps from 1, and the allocator from 0
        row = [entry["step"], report.budget(entry["step"] - 1), entry["adalora_budget"], report.kept(entry)]
        drift = entry.get("adalora_magnitude_drift")
        row += ["" if drift is None else percent(drift)] * report.has_magnitudes
        rows.append([str(cell) for cell in row])
    return header, rows


def as_text(table: Table) -> str:
    """Format a table in columns. The first column is aligned left, the others right."""
    lines = [table[0], *table[1]]
    first, *others = (max(map(len, column)) for column in zip(*lines))
    form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    return "\n".join(form.format(*line) for line in lines)
