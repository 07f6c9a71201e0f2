"""Tables, written as Markdown, CSV, and JSON with the machine and the versions that they were measured on."""

import csv
import io
import json
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from settings import Settings
from timing import Spread


@dataclass(frozen=True)
class Table:
    """
    Args:
        name: Short name, for file names.
        title: Heading.
        rows: Each row by column; all rows have the same columns.
        note: What the numbers mean, in a sentence or two.
        plot: How to plot it: "bars", "growth" or not at all.
    """

    name: str
    title: str
    rows: list[dict[str, Any]]
    note: str = ""
    plot: str = ""

    def markdown(self) -> str:
        columns = list(self.rows[0])
        lines = [columns, ["---"] * len(columns), *([cell(row[column]) for column in columns] for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"## {self.title}", self.note, table) if part) + "\n"

    def csv(self) -> str:
        """The rows as comma-separated values, with the median of each `Spread`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.rows[0])
        for row in self.rows:
            writer.writerow([cell(v.median if isinstance(v, Spread) else v).replace("\\|", "|") for v in row.values()])
        return text.getvalue()


def number(value: float) -> str:
    """Three or four digits that can be read: 1.018, 12.3, 1,234 or 1.2e-07."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.1e}"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Spread):
        lower, upper = value.quartiles
        return f"{number(value.median)} ({number(lower)}–{number(upper)})"
    return number(value) if isinstance(value, float) else str(value).replace("|", "\\|")


def as_json(value: Any) -> Any:
    """What JSON does not know: a `Spread`, with the values of all rounds."""
    if isinstance(value, Spread):
        lower, upper = value.quartiles
        return {"median": value.median, "quartiles": [lower, upper], "rounds": value.values}
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def processor() -> str:
    """The name of the CPU's model."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str:
    """The version of a package, or a word that says that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def environment(settings: Settings, more_packages: tuple[str, ...] = ()) -> dict[str, Any]:
    packages = ("torch", "peft", "transformers", "peft-adadora", *more_packages)
    return {
        "device": torch.cuda.get_device_name(settings.device) if settings.on_cuda else processor(),
        "threads": settings.threads,
        "versions": {"python": platform.python_version(), **{package: installed(package) for package in packages}},
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def heading(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    return "\n".join(
        [
            "# Benchmarks",
            "",
            f"- machine: {machine['device']}, {machine['threads']} threads",
            f"- versions: {versions}",
            f"- command: `{machine['command']}`, {machine['date']}",
            "",
        ]
    )


def write_json(path: Path, machine: dict[str, Any], tables: list[Table]) -> None:
    contents = {
        "machine": machine,
        "tables": {table.name: {"title": table.title, "note": table.note, "rows": table.rows} for table in tables},
    }
    path.write_text(json.dumps(contents, default=as_json, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
