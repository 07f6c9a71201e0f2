"""Compare LoRA, DoRA, AdaLoRA and AdaDoRA on real weights and data, and find out what makes the difference.

    python benchmarks/method_comparison/compare.py              all runs, in about four hours on two cores
    python benchmarks/method_comparison/compare.py --quick      a few short runs, in about 6 minutes
    python benchmarks/method_comparison/compare.py --report benchmarks/method_comparison/runs.jsonl

Each run is written to `runs.jsonl` in the output folder when it ends. Started again, the comparison goes on from
there. The tables are printed as Markdown. The output folder gets them as CSV, and plots as PNG. `--report` makes
tables and plots from a log, and runs nothing.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging


sys.path.append(str(Path(__file__).parents[1]))  # where the tables and counters of the other benchmarks are

from figures import write_figures
from plan import FULL, QUICK, Log, Plan, Record, run_of
from results import tables
from training import Run, execute


def read_log(path: Path) -> Log:
    """The complete lines of a log. The last one is cut off if the comparison was killed while it wrote."""
    log = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        log[run_of(record)] = record
    return log


def read_finished_log(plan: Plan, path: Path) -> Log:
    log = read_log(path)
    if any(run not in log for stage in plan.stages(log) for run in stage):
        raise SystemExit(f"{path} is not the log of a finished comparison; that of a quick one needs --quick.")
    return log


def set_up_worker() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress(number: int, record: Record) -> str:
    names = ("task", "examples", "method", "rank", "lr", "scale", "schedule", "ablation", "split", "seed")
    settings = " ".join(f"{name}={record[name]}" for name in names if record[name] is not None)
    return f"{number}: {record['accuracy']:.3f} {settings}"


def execute_plan(
    plan: Any,
    path: Path,
    jobs: int,
    execute: Callable[[Run], Record] = execute,
    progress: Callable[[int, Record], str] = progress,
) -> Log:
    """Execute the stages that are not in the log yet, `jobs` runs at a time with one thread each."""
    log = read_log(path)
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), set_up_worker) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        for stage in plan.stages(log):
            futures = [pool.submit(execute, run) for run in dict.fromkeys(stage) if run not in log]
            for done in as_completed(futures):
                record = done.result()
                log[run_of(record)] = record
                file.write("\n" + json.dumps(record) if file.tell() else json.dumps(record))
                file.flush()
                print(progress(len(log), record), file=sys.stderr, flush=True)
    return log


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument("--jobs", type=int, default=max(1, torch.get_num_threads()), help="runs at a time")
    parser.add_argument("--output", type=Path, help="folder for the log and the plots")
    parser.add_argument("--report", type=Path, metavar="LOG", help="make tables and plots of this log only")
    options = parser.parse_args(arguments)
    options.output = options.output or Path("build", "compare-quick" if options.quick else "compare")
    return options


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    plan = QUICK if options.quick else FULL
    options.output.mkdir(parents=True, exist_ok=True)
    set_up_worker()
    if options.report:
        log = read_finished_log(plan, options.report)
    else:
        log = execute_plan(plan, options.output / "runs.jsonl", options.jobs)
    for table in tables(plan, log):
        print(table.markdown(), flush=True)
        (options.output / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
    write_figures(plan, log, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
