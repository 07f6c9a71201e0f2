"""Find an adapter's files and read base weights. A file that cannot be read raises a `ValueError` that names it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open


CONFIG_FILE = "adapter_config.json"
BASE_FILES = "model*.safetensors"


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn an error in reading the source into a `ValueError` of one line that names the source."""
    try:
        yield
    except (IndexError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def natural_order(name: str) -> list[Any]:
    """Return a key that sorts layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in the output folder of a Trainer. The last one comes first."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: natural_order(path.name), reverse=True)


def find_adapter(path: Path) -> Path:
    """Return the folder of the adapter in `path`, or else in the last checkpoint that has one."""
    for folder in (path, *checkpoints(path)):
        if (folder / CONFIG_FILE).is_file():
            return folder
        # PEFT saves an adapter that is not called "default" in a folder of that name
        named = sorted({file.parent for file in folder.glob(f"*/{CONFIG_FILE}")}.difference(checkpoints(folder)))
        if len(named) > 1:
            raise ValueError(f"There are several adapters in {folder}; choose {' or '.join(map(str, named))}.")
        if named:
            return named[0]
    raise ValueError(f"There is no adapter in {path}: neither it nor a checkpoint in it has an {CONFIG_FILE}.")


def read_row_norms(source: str, shapes: dict[str, tuple], config: dict, download: bool) -> dict[str, torch.Tensor]:
    """
    Read ‖W‖ of each row, as float32 of shape (out,), for the modules with a base weight in the source.

    The source is a safetensors file, a folder, or a name on the Hub. `shapes` gives each module's (out, in).
    """
    path = Path(source)
    files = {}
    with reading(source):
        if not path.exists():
            from huggingface_hub import snapshot_download

            options = {"allow_patterns": BASE_FILES, "local_files_only": not download}
            path = Path(snapshot_download(source, revision=config.get("revision"), **options))
        for file in sorted(path.glob(BASE_FILES)) if path.is_dir() else [path]:
            with safe_open(file, "pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
    keys = _weight_keys(list(shapes), files)
    if not keys:
        raise ValueError(f"{source} is not the base model: it has no weight of {next(iter(shapes))}.")
    return {name: _row_norm(files[key], key, shapes[name], config.get("fan_in_fan_out")) for name, key in keys.items()}


def _weight_keys(names: list[str], keys: dict[str, Path]) -> dict[str, str]:
    # a model saved with another head has another prefix; take the prefix that finds the most modules
    first = f"{names[0]}.weight"
    prefixes = [(first[: match.end()], "") for match in re.finditer(r"^|\.", names[0])]
    prefixes += [("", key.removesuffix(first)) for key in keys if key.endswith(f".{first}")]
    guesses = [{name: f"{new}{name.removeprefix(old)}.weight" for name in names} for old, new in prefixes]
    return max(({name: key for name, key in guess.items() if key in keys} for guess in guesses), key=len)


def _row_norm(file: Path, key: str, shape: tuple[int, int], is_transposed: Optional[bool]) -> torch.Tensor:
    with reading(file), safe_open(file, "pt") as opened:
        stored = opened.get_slice(key)
        dtype, weight = stored.get_dtype(), stored[:]
    # `Conv1D` of transformers stores (in, out); the shape shows this unless it is square
    is_transposed = weight.shape == shape[::-1] and (is_transposed or weight.shape != shape)
    matrix = weight.T if is_transposed else weight.reshape(len(weight), -1)
    if dtype not in ("F16", "BF16", "F32", "F64") or matrix.shape != shape:
        found = f"{key} in {file} is {dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"{found}, but the base model has floating point numbers of shape {shape}, not quantized.")
    return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)
