"""The median of several runs, number by number.

python benchmarks/median.py build/benchmarks-1 build/benchmarks-2 build/benchmarks-3
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from report import Table


def typical(values: list[Any]) -> Any:
    """The median of what the runs have in one cell, or what they all have."""
    if all(isinstance(value, dict) for value in values):
        return statistics.median(value["median"] for value in values)
    if all(isinstance(value, float) for value in values):
        return statistics.median(values)
    if any(value != values[0] for value in values):
        raise SystemExit(f"the runs do not go together: {values}")
    return values[0]


def medians(runs: list[dict[str, Any]]) -> list[Table]:
    """The tables of the first run, with the median of all runs in each cell."""
    tables = []
    for name, table in runs[0]["tables"].items():
        all_rows = zip(*(run["tables"][name]["rows"] for run in runs))
        rows = [{column: typical([row[column] for row in same]) for column in same[0]} for same in all_rows]
        tables.append(Table(name, table["title"], rows, f"Median of {len(runs)} runs. {table['note']}"))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="what --output named in each run")
    folders = parser.parse_args().folders
    for table in medians([json.loads((folder / "benchmarks.json").read_text()) for folder in folders]):
        print(table.markdown())


if __name__ == "__main__":
    main()
