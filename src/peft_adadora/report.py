"""What a training run did to ranks and magnitudes, read from what it saved.

`read_report` takes a saved adapter of AdaDoRA or plain AdaLoRA, a checkpoint, or the output folder of a Trainer. A
magnitude starts as the row norm of its base weight, which the adapter does not contain; so its drift can only be told
where the base weights are at hand. Where they are not, the report has the magnitudes themselves.

`peft_adadora.pictures` draws a report.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TRAINER_STATE_FILE = "trainer_state.json"
BASE_FILE = "model.safetensors"
BASE_INDEX_FILE = "model.safetensors.index.json"
PREFIX = "base_model.model."
BLOCK_ROWS = 1024
FLOATS = ("F16", "BF16", "F32", "F64")

Table = tuple[list[str], list[list[str]]]


@dataclass
class Module:
    """
    An adapted layer.

    Args:
        name (`str`):
            Its path in the base model.
        rank (`int`):
            How many singular triplets it has kept.
        init_r (`int`):
            How many it started with.
        magnitude (`torch.Tensor`, *optional*):
            Learned row lengths, of shape (out,). `None` for plain AdaLoRA.
        base_norm (`torch.Tensor`, *optional*):
            Row norms of the base weight, of shape (out,), if it was at hand.
        in_features (`int`, *optional*):
            Columns of the base weight as a matrix.
    """

    name: str
    rank: int
    init_r: int
    magnitude: Optional[torch.Tensor] = None
    base_norm: Optional[torch.Tensor] = None
    in_features: Optional[int] = None

    @property
    def place(self) -> tuple[str, str]:
        """
        The layer and the name in it: `("model.layers.3", "self_attn.q_proj")`. Outside of a layer the first is empty.
        """
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
    """
    What is known of an adapter. `str(report)` is what `peft-adadora report` prints.

    Args:
        folder (`Path`):
            Where its config and weights are.
        config (`dict[str, Any]`):
            The config as it was saved.
        modules (`list[Module]`):
            The adapted layers.
        log (`list[dict[str, float]]`):
            What `AdaLoraCallback` has logged, one dictionary each time; empty if there is none.
        log_file (`Path`, *optional*):
            The trainer state that the log is from.
        base (`str`, *optional*):
            Where the base weights are from, if they were at hand.
    """

    folder: Path
    config: dict[str, Any]
    modules: list[Module]
    log: list[dict[str, float]] = field(default_factory=list)
    log_file: Optional[Path] = None
    base: Optional[str] = None

    @property
    def has_magnitudes(self) -> bool:
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
        tinit, tfinal, total_step = self.config["tinit"], self.config["tfinal"], self.config["total_step"]
        start = sum(module.init_r for module in self.modules)
        end = self.config["target_r"] * len(self.modules)
        if step <= tinit:
            return start
        if step > total_step - tfinal:
            return end
        return int((start - end) * (1 - (step - tinit) / (total_step - tfinal - tinit)) ** 3 + end)

    def kept(self, entry: dict[str, float]) -> int:
        """The ranks kept, in total, according to an entry of the log."""
        return round(entry["adalora_mean_rank"] * len(self.modules))

    def __str__(self) -> str:
        parts = ["\n".join(summary(self)), as_text(module_table(self))]
        if self.log:
            parts.append(as_text(budget_table(self, max_rows=12)))
        return "\n\n".join(parts)


def read_report(path: str | Path, base_model: Optional[str | Path] = None) -> Report:
    """
    Read what a training run did to ranks and magnitudes.

    Args:
        path (`str` or `Path`):
            The folder of a saved adapter, a checkpoint, or the output folder of a Trainer, of which the adapter itself
            is taken if it is there and the last checkpoint otherwise.
        base_model (`str` or `Path`, *optional*):
            A folder or a file with the base weights as safetensors, or a name on the Hub, from which they are
            downloaded if they are not in the cache. Without it those that the config names are taken if they are on
            this machine.

    Raises:
        `ValueError`:
            If there is no adapter, it is not one of AdaLoRA or AdaDoRA, a file is broken, files do not fit each other,
            or `base_model` is not the base model.
    """
    path = Path(path)
    folder = _find_adapter(path)
    config = _read_config(folder)
    modules = _read_modules(folder, config)
    log, log_file = _read_log(folder, path)
    report = Report(folder, config, modules, log, log_file)
    if report.has_magnitudes:
        _find_base_norms(report, base_model)
    return report


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a Trainer in its output folder, the last one first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir() if path.is_dir()}
    return sorted((path for path in steps if steps[path]), key=lambda path: -int(steps[path][1]))


def _find_adapter(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; name the one of an adapter, a checkpoint, or a Trainer's output.")
    for folder in (path, *_checkpoints(path)):
        if (folder / CONFIG_FILE).is_file():
            return folder
        # PEFT saves an adapter that is not called "default" in a folder of that name
        named = [
            file.parent for file in sorted(folder.glob(f"*/{CONFIG_FILE}")) if "checkpoint-" not in file.parent.name
        ]
        if len(named) > 1:
            raise ValueError(f"There are several adapters in {folder}; choose {' or '.join(map(str, named))}.")
        if named:
            return named[0]
    raise ValueError(f"There is no adapter in {path}: neither it nor a checkpoint in it has an {CONFIG_FILE}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if type(content) is not dict:
        raise ValueError(f"{path} is broken: it holds no JSON object.")
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    config = _read_json(path)
    if config.get("peft_type") != "ADALORA":
        raise ValueError(
            f"{folder} holds an adapter of the type {config.get('peft_type')}, not of AdaLoRA or AdaDoRA."
        )
    for name in ("init_r", "target_r", "tinit", "tfinal", "total_step"):
        if type(config.get(name)) is not int:
            raise ValueError(f"{path} is broken: {name} is {config.get(name)!r} instead of a number.")
    return config


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _read_modules(folder: Path, config: dict[str, Any]) -> list[Module]:
    path = folder / WEIGHTS_FILE
    try:
        weights = {key.removeprefix(PREFIX): value for key, value in load_file(path).items()}
    except FileNotFoundError as error:
        raise ValueError(f"There is no {WEIGHTS_FILE} in {folder}.") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    parts = ["lora_A", "lora_E", "lora_B"] + ["lora_magnitude"] * bool(config.get("use_dora_adaptive"))
    names = {name for name, _, part in (key.rpartition(".") for key in weights) if part in parts}
    if not names:
        raise ValueError(f"{path} holds no weights of AdaLoRA.")
    masks = {
        name.partition(".lora_E")[0].removeprefix(PREFIX): mask
        for name, mask in (config.get("rank_pattern") or {}).items()
    }
    modules = []
    for name in sorted(names, key=_natural):
        for part in parts:
            if f"{name}.{part}" not in weights:
                raise ValueError(f"{path} is not whole: {name}.{part} is missing.")
        A, E, B = (weights[f"{name}.{part}"] for part in parts[:3])
        mask = masks.get(name, [True] * (len(E) if masks else config["init_r"]))
        # what is saved is pruned already, unless the model did not know of ranks
        if not len(A) == len(E) == B.shape[1] or len(E) not in (sum(mask), len(mask)):
            raise ValueError(
                f"{name} has the ranks {len(A)}, {len(E)} and {B.shape[1]} in A, E and B in {path}, which do not fit "
                f"each other or the config, according to which {sum(mask)} of {len(mask)} are kept."
            )
        module = Module(name, rank=sum(mask), init_r=len(mask), in_features=math.prod(A.shape[1:]))
        if len(parts) == 4:
            module.magnitude = weights[f"{name}.lora_magnitude"].flatten().float()
            if len(module.magnitude) != len(B) or not module.magnitude.isfinite().all():
                raise ValueError(f"{name}.lora_magnitude in {path} is broken: it is not {len(B)} finite numbers.")
        modules.append(module)
    return modules


def _read_log(folder: Path, path: Path) -> tuple[list[dict[str, float]], Optional[Path]]:
    places = [folder, path, *_checkpoints(path)]
    if folder.parent.name.startswith("checkpoint-"):
        places.insert(1, folder.parent)
    file = next((place / TRAINER_STATE_FILE for place in places if (place / TRAINER_STATE_FILE).is_file()), None)
    if file is None:
        return [], None
    history = _read_json(file).get("log_history")
    if type(history) is not list:
        raise ValueError(f"{file} is broken: it has no log_history.")
    needed = {"step", "adalora_budget", "adalora_mean_rank"}
    return [entry for entry in history if isinstance(entry, dict) and needed <= entry.keys()], file


def _find_base_norms(report: Report, base_model: Optional[str | Path]) -> None:
    """
    Give the modules the row norms of their base weights: those of `base_model`, else those on this machine, if any.
    """
    source = base_model or report.config.get("base_model_name_or_path")
    if not source:
        return
    try:
        files = _base_weights(
            _base_folder(str(source), report.config.get("revision"), download=base_model is not None)
        )
        keys = _base_keys(report.modules, files)
        if not keys:
            raise ValueError(f"{source} is not the base model: it has no weight of {report.modules[0].name}.")
        transposed = bool(report.config.get("fan_in_fan_out"))
        norms = {
            module.name: _row_norm(files[keys[module.name]], keys[module.name], module, transposed)
            for module in report.modules
            if module.name in keys
        }
    except (OSError, ValueError, SafetensorError) as error:
        if base_model is None:
            return  # it was not asked for, and the report says that it is not there
        raise (
            error
            if type(error) is ValueError
            else ValueError(f"{source} cannot be read: {' '.join(str(error).split())}")
        ) from error
    for module in report.modules:
        module.base_norm = norms.get(module.name)
    report.base = str(source)


def _base_folder(source: str, revision: Optional[str], download: bool) -> Path:
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["model*.safetensors", BASE_INDEX_FILE]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=not download))


def _base_weights(path: Path) -> dict[str, Path]:
    """The file of each weight."""
    if (path / BASE_INDEX_FILE).is_file():
        return {key: path / name for key, name in _read_json(path / BASE_INDEX_FILE)["weight_map"].items()}
    file = path / BASE_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"There is no {BASE_FILE} in {path}.")
    with safe_open(file, "pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def _base_keys(modules: Sequence[Module], keys: Sequence[str]) -> dict[str, str]:
    """
    The name of the base weight of each module, where there is one.

    A model is often saved without the head that it has in training, and all names then lack the first part, or have
    one more. Of all such prefixes the one is taken with which the most modules are found.
    """
    first = modules[0].name
    added = {key.removesuffix(f"{first}.weight") for key in keys if key.endswith(f".{first}.weight")}
    removed = {first[: match.end()] for match in re.finditer(r"\.", first)}
    best: dict[str, str] = {}
    for more, less in [("", ""), *((more, "") for more in sorted(added)), *(("", less) for less in sorted(removed))]:
        names = {module.name: f"{more}{module.name.removeprefix(less)}.weight" for module in modules}
        found = {name: key for name, key in names.items() if key in keys}
        best = max(best, found, key=len)
    return best


def _row_norm(file: Path, key: str, module: Module, transposed: bool) -> torch.Tensor:
    """
    ‖W‖ of each row of W as a matrix of shape (out, in), of shape (out,), in float32 whatever the dtype of the weight.

    A `Conv1D` of transformers stores it as (in, out). A square one can be told from a linear layer by `transposed`
    only.
    """
    out_features, in_features = len(module.magnitude), module.in_features
    with safe_open(file, "pt") as opened:
        weight = opened.get_slice(key)
        dtype, shape = weight.get_dtype(), tuple(weight.get_shape())
        as_rows = shape[:1] == (out_features,) and math.prod(shape[1:]) == in_features
        as_columns = shape == (in_features, out_features)
        if dtype not in FLOATS or not (as_rows or as_columns):
            raise ValueError(
                f"{key} in {file} is {dtype} of shape {shape}, but the adapter needs floating point numbers of shape "
                f"{(out_features, in_features)}; name its base model, not quantized."
            )
        blocks = (weight[start : start + BLOCK_ROWS].float() for start in range(0, shape[0], BLOCK_ROWS))
        if as_rows and not (as_columns and transposed):
            return torch.cat([torch.linalg.vector_norm(block.flatten(1), dim=1) for block in blocks])
        return sum(block.square().sum(0) for block in blocks).sqrt()


def percent(value: float, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.2f} %"


def summary(report: Report) -> list[str]:
    """What there is to say of the adapter as a whole, in sentences."""
    config, modules = report.config, report.modules
    method = "AdaDoRA" if report.has_magnitudes else "AdaLoRA"
    lines = [
        f"{method} adapter in {report.folder}",
        (
            f"Ranks: {report.rank} of {sum(module.init_r for module in modules)} kept in {len(modules)} modules, "
            f"{report.rank / len(modules):.1f} on average; the schedule ends at {config['target_r']}."
        ),
    ]
    if not report.has_magnitudes:
        return [*lines, "Magnitudes: none, this is plain AdaLoRA."]
    logged = [entry for entry in report.log if "adalora_magnitude_drift" in entry]
    change = report.change
    if change is not None:
        unknown = sum(module.base_norm is None for module in modules)
        rest = f"; {unknown} of the modules without a weight there" if unknown else ""
        lines.append(
            f"Magnitudes: {percent(change.abs().mean().item())} mean drift |m - ‖W‖| / ‖W‖ over {len(change):,} rows, "
            f"base weights from {report.base}{rest}."
        )
    else:
        lines.append(
            "Magnitudes: as they are, not how far they have drifted, because the base weights were not found; name "
            "them with --base-model."
        )
    if logged:
        lines.append(
            f"The run logged a mean drift of {percent(logged[-1]['adalora_magnitude_drift'])} at step "
            f"{logged[-1]['step']}."
        )
    return lines


def module_table(report: Report) -> Table:
    """Rank kept and magnitude drift, or the magnitudes themselves where the drift is not known, for each module."""
    header = ["module", "rank", "of"]
    if report.has_magnitudes:
        known = report.change is not None
        header += ["mean drift", "mean change", "largest"] if known else ["smallest m", "median m", "largest m"]
    rows = []
    for module in report.modules:
        row = [module.name, str(module.rank), str(module.init_r)]
        change = module.change
        if report.has_magnitudes and not known:
            m = module.magnitude
            row += [f"{value.item():.4g}" for value in (m.min(), m.quantile(0.5), m.max())]
        elif report.has_magnitudes and (change is None or not len(change)):
            row += ["not known"] * 3
        elif report.has_magnitudes:
            row += [
                percent(change.abs().mean().item()),
                percent(change.mean().item(), sign=True),
                percent(change[change.abs().argmax()].item(), sign=True),
            ]
        rows.append(row)
    return header, rows


def budget_table(report: Report, max_rows: Optional[int] = None) -> Table:
    """
    Schedule, logged budget and ranks kept over the steps of the log, of which at most `max_rows` evenly spread ones.
    """
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
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )
