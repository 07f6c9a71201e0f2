"""What a training run did to ranks and magnitudes, read from what it saved.

`read_report` takes a saved adapter of AdaDoRA or plain AdaLoRA, a checkpoint, or the output folder of a Trainer. A
magnitude starts as the row norm of its base weight, which the adapter does not contain; so its drift can only be told
where the base weights are at hand. Where they are not, the report has the magnitudes themselves.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_INDEX_FILE = "model.safetensors.index.json"
PREFIX = "base_model.model."

Table = tuple[list[str], list[list[str]]]


@dataclass
class Module:
    """An adapted layer."""

    name: str  # its path in the base model
    rank: int  # how many singular triplets it has kept
    init_r: int  # how many it started with
    magnitude: Optional[torch.Tensor] = None  # learned row lengths, of shape (out,); `None` for plain AdaLoRA
    base_norm: Optional[torch.Tensor] = None  # row norms of the base weight, of shape (out,), if it was at hand
    in_features: Optional[int] = None  # columns of the base weight as a matrix

    @property
    def place(self) -> tuple[str, str]:
        """The layer, which may be empty, and the name in it: `("model.layers.3", "self_attn.q_proj")`."""
        match = re.match(r"((?:.*?\.)?\d+)\.(.+)", self.name)
        return (match[1], match[2]) if match else ("", self.name)

    @property
    def change(self) -> Optional[torch.Tensor]:
        """(m − ‖W‖) / ‖W‖ of each row whose base weight is not zero, or `None` where that is not known."""
        if self.magnitude is None or self.base_norm is None:
            return None
        rows = self.base_norm > 0
        return (self.magnitude[rows] - self.base_norm[rows]) / self.base_norm[rows]


@dataclass
class Report:
    """What is known of an adapter. `str(report)` is what `peft-adadora report` prints."""

    folder: Path  # where its config and weights are
    config: dict[str, Any]  # as it was saved
    modules: list[Module]
    log: list[dict[str, float]]  # what `AdaLoraCallback` has logged, one dictionary each time
    log_file: Optional[Path] = None  # the trainer state that the log is from
    base: Optional[str] = None  # where the base weights are from, if they were at hand

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is AdaDoRA and not plain AdaLoRA."""
        return bool(self.config.get("use_dora_adaptive"))

    @property
    def rank(self) -> int:
        """The ranks kept, in total."""
        return sum(module.rank for module in self.modules)

    @property
    def change(self) -> Optional[torch.Tensor]:
        """(m − ‖W‖) / ‖W‖ of all rows for which it is known, or `None` if there are none."""
        known = [module.change for module in self.modules if module.change is not None and len(module.change)]
        return torch.cat(known) if known else None

    def budget(self, step: int) -> int:
        """How many ranks the schedule of the config allows in total after `update_and_allocate(step)`."""
        first, last = self.config["tinit"], self.config["total_step"] - self.config["tfinal"]
        start, end = sum(module.init_r for module in self.modules), self.config["target_r"] * len(self.modules)
        if not first < step < last:
            return start if step <= first else end
        return int((start - end) * (1 - (step - first) / (last - first)) ** 3 + end)

    def kept(self, entry: dict[str, float]) -> int:
        """The ranks kept, in total, according to an entry of the log."""
        return round(entry["adalora_mean_rank"] * len(self.modules))

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(summary(self)), *map(as_text, tables(self, max_rows=12))])


def read_report(path: str | Path, base_model: Optional[str | Path] = None) -> Report:
    """
    Read what a training run did to ranks and magnitudes.

    `path` is the folder of a saved adapter, a checkpoint, or the output folder of a Trainer, of which the adapter
    itself is taken if it is there and the last checkpoint otherwise.

    `base_model` is a folder or a file with the base weights as safetensors, or a name on the Hub, from which they are
    downloaded if they are not in the cache. Without it those that the config names are taken if they are on this
    machine.

    Raises `ValueError` if there is no adapter, it is not one of AdaLoRA or AdaDoRA, a file is broken, files do not fit
    each other, or `base_model` is not the base model.
    """
    folder = _find_adapter(Path(path))
    config = _read_config(folder / CONFIG_FILE)
    report = Report(folder, config, _read_modules(folder / WEIGHTS_FILE, config), *_read_log(folder, Path(path)))
    source = base_model or config.get("base_model_name_or_path")
    if report.has_magnitudes and source:
        try:
            _read_base_norms(report, str(source), download=base_model is not None)
        except ValueError:
            if base_model is not None:
                raise
    return report


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Whatever goes wrong in reading the source becomes a `ValueError` of one line that names it."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if type(error) is ValueError:
            raise  # ours
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error


def _read_json(path: Path) -> dict[str, Any]:
    with _reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    if type(content) is not dict:
        raise ValueError(f"{path} is broken: it holds no JSON object.")
    return content


def _natural(name: str) -> list[Any]:
    """A key that sorts layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a Trainer in its output folder, the last one first."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: _natural(path.name), reverse=True)


def _find_adapter(path: Path) -> Path:
    for folder in (path, *_checkpoints(path)):
        if (folder / CONFIG_FILE).is_file():
            return folder
        # PEFT saves an adapter that is not called "default" in a folder of that name
        places = sorted(file.parent for file in folder.glob(f"*/{CONFIG_FILE}"))
        named = [place for place in places if "checkpoint-" not in place.name]
        if len(named) > 1:
            raise ValueError(f"There are several adapters in {folder}; choose {' or '.join(map(str, named))}.")
        if named:
            return named[0]
    raise ValueError(f"There is no adapter in {path}: neither it nor a checkpoint in it has an {CONFIG_FILE}.")


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    kind = config.get("peft_type")
    if kind != "ADALORA":
        raise ValueError(f"{path.parent} holds an adapter of the type {kind}, not of AdaLoRA or AdaDoRA.")
    for name in ("init_r", "target_r", "tinit", "tfinal", "total_step"):
        if type(config.get(name)) is not int:
            raise ValueError(f"{path} is broken: {name} is {config.get(name)!r} instead of a number.")
    return config


def _read_modules(path: Path, config: dict[str, Any]) -> list[Module]:
    if not path.is_file():
        raise ValueError(f"There is no {WEIGHTS_FILE} in {path.parent}.")
    with _reading(path):
        weights = {key.removeprefix(PREFIX): value for key, value in load_file(path).items()}
    parts = ["lora_A", "lora_E", "lora_B"] + ["lora_magnitude"] * bool(config.get("use_dora_adaptive"))
    names = {key.rpartition(".lora_")[0] for key in weights if ".lora_" in key}
    if not names:
        raise ValueError(f"{path} holds no weights of AdaLoRA.")
    rank_pattern = config.get("rank_pattern") or {}
    masks = {key.removeprefix(PREFIX).partition(".lora_E")[0]: mask for key, mask in rank_pattern.items()}
    modules = []
    for name in sorted(names, key=_natural):
        for part in parts:
            if f"{name}.{part}" not in weights:
                raise ValueError(f"{path} is not whole: {name}.{part} is missing.")
        A, E, B, *magnitude = (weights[f"{name}.{part}"] for part in parts)
        mask = masks.get(name, [True] * (len(E) if masks else config["init_r"]))
        # what is saved is pruned already, unless the model did not know of ranks
        if not len(A) == len(E) == B.shape[1] or len(E) not in (sum(mask), len(mask)):
            raise ValueError(
                f"{name} has the ranks {len(A)}, {len(E)} and {B.shape[1]} in A, E and B in {path}, which do not fit "
                f"each other or the config, according to which {sum(mask)} of {len(mask)} are kept."
            )
        module = Module(name, rank=sum(mask), init_r=len(mask), in_features=math.prod(A.shape[1:]))
        if magnitude:
            module.magnitude = magnitude[0].flatten().float()
            if len(module.magnitude) != len(B) or not module.magnitude.isfinite().all():
                raise ValueError(f"{name}.lora_magnitude in {path} is broken: it is not {len(B)} finite numbers.")
        modules.append(module)
    return modules


def _read_log(folder: Path, path: Path) -> tuple[list[dict[str, float]], Optional[Path]]:
    """The log of the run, and its file: beside the adapter, around its folder, or in the last checkpoint."""
    files = [place / "trainer_state.json" for place in (folder, folder.parent, path, *_checkpoints(path))]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        return [], None
    history = _read_json(file).get("log_history")
    if type(history) is not list:
        raise ValueError(f"{file} is broken: it has no log_history.")
    needed = {"step", "adalora_budget", "adalora_mean_rank"}
    return [entry for entry in history if isinstance(entry, dict) and needed <= entry.keys()], file


def _read_base_norms(report: Report, source: str, download: bool) -> None:
    """Give the row norms of the base weights to those modules that have one in the source."""
    modules = {module.name: module for module in report.modules}
    with _reading(source):
        files = _base_files(source, report.config.get("revision"), download)
        keys = _base_keys(list(modules), files)
        if not keys:
            raise ValueError(f"{source} is not the base model: it has no weight of {report.modules[0].name}.")
        is_transposed = bool(report.config.get("fan_in_fan_out"))
        norms = {name: _row_norm(files[key], key, modules[name], is_transposed) for name, key in keys.items()}
    for name, norm in norms.items():
        modules[name].base_norm = norm
    report.base = source


def _base_files(source: str, revision: Optional[str], download: bool) -> dict[str, Path]:
    """The file of each weight in a file, in a folder, or under a name on the Hub."""
    path = Path(source)
    if not path.exists():
        from huggingface_hub import snapshot_download

        wanted = ["model*.safetensors", BASE_INDEX_FILE]
        path = Path(snapshot_download(source, revision=revision, allow_patterns=wanted, local_files_only=not download))
    if (path / BASE_INDEX_FILE).is_file():
        return {key: path / name for key, name in _read_json(path / BASE_INDEX_FILE)["weight_map"].items()}
    file = path / "model.safetensors" if path.is_dir() else path
    with safe_open(file, "pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def _base_keys(names: list[str], keys: Iterable[str]) -> dict[str, str]:
    """
    The name of the base weight of each module, where there is one.

    A model is often saved without the head that it has in training, and all names then lack the first part, or have
    one more. Of all such prefixes the one is taken with which the most modules are found.
    """
    first = f"{names[0]}.weight"
    prefixes = [("", first[: match.end()]) for match in re.finditer(r"^|\.", names[0])]
    prefixes += [(key.removesuffix(first), "") for key in keys if key.endswith(f".{first}")]
    guesses = [{name: f"{added}{name.removeprefix(removed)}.weight" for name in names} for added, removed in prefixes]
    return max(({name: key for name, key in guess.items() if key in keys} for guess in guesses), key=len)


def _row_norm(file: Path, key: str, module: Module, is_transposed: bool) -> torch.Tensor:
    """
    ‖W‖ of each row of W as a matrix of shape (out, in), of shape (out,), in float32 whatever the dtype of the weight.
    A `Conv1D` of transformers stores it as (in, out); if it is square, only `is_transposed` tells.
    """
    needed = (len(module.magnitude), module.in_features)
    with safe_open(file, "pt") as opened:
        weight = opened.get_slice(key)
        dtype, shape = weight.get_dtype(), tuple(weight.get_shape())
        fits = (*shape[:1], math.prod(shape[1:])) == needed
        fits_transposed = shape[::-1] == needed
        if dtype not in ("F16", "BF16", "F32", "F64") or not (fits or fits_transposed):
            raise ValueError(
                f"{key} in {file} is {dtype} of shape {shape}, but the adapter needs floating point numbers of shape "
                f"{needed}; name its base model, not quantized."
            )
        matrix = weight[:].T if fits_transposed and (is_transposed or not fits) else weight[:].flatten(1)
        return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)


def percent(value: float | torch.Tensor, sign: str = "") -> str:
    """A share in per cent, with the sign `"+"` too if that is given."""
    return f"{100 * float(value):{sign}.2f} %"


def summary(report: Report) -> list[str]:
    """What there is to say of the adapter as a whole, in sentences."""
    modules, change = report.modules, report.change
    start, mean = sum(module.init_r for module in modules), report.rank / len(modules)
    ranks = f"{report.rank} of {start} kept in {len(modules)} modules, {mean:.1f} on average; the schedule ends at "
    ranks += f"{report.config['target_r']}."
    if not report.has_magnitudes:
        magnitudes = "none, this is plain AdaLoRA."
    elif change is None:
        magnitudes = "as they are, not how far they have drifted, because the base weights were not found; name them "
        magnitudes += "with --base-model."
    else:
        unknown = sum(module.base_norm is None for module in modules)
        rest = f"; {unknown} of the modules without a weight there" if unknown else ""
        magnitudes = f"{percent(change.abs().mean())} mean drift |m - ‖W‖| / ‖W‖ over {len(change):,} rows, base "
        magnitudes += f"weights from {report.base}{rest}."
    method = "AdaDoRA" if report.has_magnitudes else "AdaLoRA"
    lines = [f"{method} adapter in {report.folder}", f"Ranks: {ranks}", f"Magnitudes: {magnitudes}"]
    logged = [entry for entry in report.log if "adalora_magnitude_drift" in entry]
    if logged:
        drift = percent(logged[-1]["adalora_magnitude_drift"])
        lines.append(f"The run logged a mean drift of {drift} at step {logged[-1]['step']}.")
    return lines


def tables(report: Report, max_rows: Optional[int] = None) -> list[Table]:
    """The table of the modules and, if there is a log, that of the budget."""
    return [module_table(report), *([budget_table(report, max_rows)] if report.log else [])]


def module_table(report: Report) -> Table:
    """Rank kept and magnitude drift, or the magnitudes themselves where the drift is not known, for each module."""
    header = ["module", "rank", "of"]
    rows = [[module.name, str(module.rank), str(module.init_r)] for module in report.modules]
    if report.has_magnitudes:
        is_known = report.change is not None
        header += ["mean drift", "mean change", "largest"] if is_known else ["smallest m", "median m", "largest m"]
        for row, module in zip(rows, report.modules):
            row += _changes(module.change) if is_known else _magnitudes(module.magnitude)
    return header, rows


def _changes(change: Optional[torch.Tensor]) -> list[str]:
    if change is None or not len(change):
        return ["not known"] * 3
    return [percent(change.abs().mean()), percent(change.mean(), "+"), percent(change[change.abs().argmax()], "+")]


def _magnitudes(m: torch.Tensor) -> list[str]:
    return [f"{float(value):.4g}" for value in (m.min(), m.quantile(0.5), m.max())]


def budget_table(report: Report, max_rows: Optional[int] = None) -> Table:
    """Schedule, logged budget and ranks kept over the steps of the log, or over at most `max_rows` of them, evenly."""
    log = report.log
    if max_rows is not None and len(log) > max_rows:
        log = [log[round(index * (len(log) - 1) / (max_rows - 1))] for index in range(max_rows)]
    header = ["step", "schedule", "logged budget", "ranks kept"] + ["mean drift"] * report.has_magnitudes
    rows = []
    for entry in log:
        # the callback allocates with the number of steps done before
        row = [entry["step"], report.budget(entry["step"] - 1), entry["adalora_budget"], report.kept(entry)]
        if report.has_magnitudes:
            row.append(percent(entry["adalora_magnitude_drift"]) if "adalora_magnitude_drift" in entry else "")
        rows.append([str(cell) for cell in row])
    return header, rows


def as_text(table: Table) -> str:
    """The table in columns, the first to the left and the others to the right."""
    lines = [table[0], *table[1]]
    first, *others = (max(map(len, column)) for column in zip(*lines))
    form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    return "\n".join(form.format(*line) for line in lines)
