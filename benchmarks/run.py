"""Measure what AdaDoRA costs against PEFT's AdaLoRA and DoRA, in time and memory, and how exact its norm is.

    python benchmarks/run.py                        everything, in about half an hour on two cores
    python benchmarks/run.py --quick                a few shapes of everything, in about 3 minutes
    python benchmarks/run.py --only layer,memory    some sections
    python benchmarks/run.py --device cuda --gbps 3350 --tflops 989
    python benchmarks/run.py --device cuda --preset gpu --minutes 6
                                                    what is open about GPUs, in 6 minutes (see gpu.py)

It prints the tables as Markdown. The output folder gets each table as CSV, plots, and `benchmarks.json` with the
machine and the versions.
"""

import argparse
import gc
import importlib
import sys
import time
import warnings
from pathlib import Path

import gpu
import torch
from plot import write_plots
from report import environment, heading, write_json
from settings import Settings


# The sections and their modules, which are imported when they run.
SECTIONS = {
    "layer": "layer",
    "norm": "norm",
    "model": "model",
    "compile": "compiled",
    "memory": "memory",
    "growth": "growth",
    "accuracy": "accuracy",
    "merging": "merging",
    "allocator": "allocator",
    "step": "step",
    "launches": "launches",
    "collectives": "collectives",
}


def section_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return names


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=section_names, default=list(SECTIONS), help=f"sections: {','.join(SECTIONS)}")
    parser.add_argument("--preset", choices=["gpu"], help="all that is open about GPUs, instead of sections")
    parser.add_argument("--minutes", type=float, default=6.0, help="how long a preset may take (6)")
    parser.add_argument("--quick", action="store_true", help="few shapes and few rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (PyTorch's default)")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder for JSON and plots")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--gbps", type=float, help="memory bandwidth of the device in GB/s, for the roofline")
    parser.add_argument("--tflops", type=float, help="peak of the device in TFLOP/s, for the roofline")
    parser.add_argument("--latency-us", type=float, help="of a collective (10 in a machine, 25 between machines)")
    parser.add_argument(
        "--bandwidth-gbs", type=float, help="of a collective in GB/s (450, NVLink; 50, 400 Gb/s between machines)"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; use --device cpu")
    return options


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    rates = (options.gbps, options.tflops, options.latency_us, options.bandwidth_gbs)
    settings = Settings(device, options.threads, options.quick, *rates)
    if options.preset:
        gpu.main(settings, options.output, options.minutes)
    else:
        run_sections(settings, options.only, options.output)


def run_sections(settings: Settings, names: list[str], folder: Path) -> None:
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(settings.threads)
    sections = {name: importlib.import_module(SECTIONS[name]) for name in names}
    gc.freeze()  # the counters collect garbage often, and need not look at what the imports made
    folder.mkdir(parents=True, exist_ok=True)

    machine = environment(settings)
    print(heading(machine), flush=True)
    tables = []
    for name, section in sections.items():
        start = time.perf_counter()
        for table in section.tables(settings):
            print(table.markdown(), flush=True)
            (folder / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
            tables.append(table)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        write_json(folder / "benchmarks.json", machine, tables)
    write_plots(tables, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
