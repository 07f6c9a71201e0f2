"""One command that answers what is open about GPUs, for a machine that can be had for a few minutes.

    python benchmarks/run.py --device cuda --preset gpu --minutes 6 --output build/gpu

It runs its parts in order of value, each for its share of the time. It writes each table as soon as it has it, as
JSON and as Markdown: `A.json`, `A.md` and so on. `summary.md` has the answers. `log.txt` has what the processes write
besides, and how long they took for each request.

Processes of their own do the work. So an error of the device, or a step that hangs, costs one table, and PEFT's
methods run without peft-adadora.
"""

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Optional

import apart
from gpu_parts import (
    KERNELS,
    LLAMA_3_8B,
    SMALL,
    WITH_US,
    WITHOUT_US,
    NoAnswer,
    OutOfTime,
    Sizes,
    all_parts,
    check_time,
)
from gpu_summary import summary
from report import Table, environment, heading, write_json
from settings import Settings


# A process may answer so many seconds after the end of its part, if there is time.
GRACE = 10.0
# The run ends so many seconds before its time is up.
RESERVE = 3.0


@dataclass
class Worker:
    """A process of `gpu_worker.py`. It is started anew after it has hung, ended, or lost its device."""

    with_us: bool
    settings: Settings
    log: IO
    process: Optional[subprocess.Popen] = None

    def start(self) -> None:
        """Start the process, if it is not there."""
        if self.process is not None:
            return
        arguments = self.settings.device.type, str(self.settings.threads)
        self.process = apart.start("gpu_worker", *arguments, with_us=self.with_us, errors=self.log)

    def ask(self, seconds: float, **request: Any) -> Any:
        """The result of a task, or a `NoAnswer` that says what is wrong."""
        self.start()
        is_there, start = True, time.perf_counter()
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            is_there = bool(select.select([self.process.stdout], [], [], max(0.0, seconds))[0])
            line = self.process.stdout.readline() if is_there else ""
        except BrokenPipeError:
            line = ""
        print(f"{time.perf_counter() - start:.2f} s: {request}", file=self.log, flush=True)
        if not line:
            self.stop()
            raise NoAnswer("the process ended" if is_there else f"no answer in {seconds:.0f} s")
        answer = json.loads(line)
        if "error" in answer:
            if "CUDA error" in answer["error"]:
                self.stop()  # nothing more can be had of the device in this process
            raise NoAnswer(answer["error"])
        return answer["result"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass
class Run:
    """
    Args:
        settings: Of the run.
        sizes: Of its models.
        folder: Where everything is written.
        seconds: How long it may take.
        workers: Its processes by name.
    """

    settings: Settings
    sizes: Sizes
    folder: Path
    seconds: float
    workers: dict[str, Worker]
    tables: dict[str, Table] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.deadline = self.until = self.start + self.seconds - RESERVE
        self.machine = environment(self.settings, ("triton", "bitsandbytes", "accelerate"))

    def left(self) -> float:
        """The seconds that the part has left."""
        return self.until - time.perf_counter()

    def ask(self, process: str, task: str, **arguments: Any) -> Any:
        until = min(self.until + GRACE, self.deadline)
        return self.workers[process].ask(until - time.perf_counter(), task=task, **arguments)

    def release(self) -> None:
        """Free the memory of all processes."""
        for name, worker in self.workers.items():
            if worker.process is not None:
                try:
                    self.ask(name, "release")
                except NoAnswer:
                    worker.stop()

    def write(self, name: str, tables: dict[str, Table]) -> None:
        """Write the tables of a part as they stand."""
        self.tables.update(tables)
        text = heading(self.machine) + "".join(f"\n{table.markdown()}" for table in tables.values())
        (self.folder / f"{name}.md").write_text(text, encoding="utf-8")
        write_json(self.folder / f"{name}.json", self.machine, list(tables.values()))

    def part(self, name: str, title: str, end: float, tables: Iterator[Table]) -> None:
        """Run a part until this share of the time: write each table as soon as it is there, and what went wrong."""
        self.until = min(self.start + end * self.seconds, self.deadline)
        found: dict[str, Table] = {}
        try:
            check_time(self)
            for table in tables:
                found[table.name] = table
                self.write(name, found)
        except Exception as error:  # noqa: BLE001 - a part that fails does not lose the others
            is_known = isinstance(error, NoAnswer | OutOfTime)
            failure = str(error) if is_known else f"{type(error).__name__} {error}"
            self.failures.append(f"{name} ({title}), {failure}")
            failed = Table(f"{name}-failure", f"{title}: not finished", [{"failure": failure}])
            found[failed.name] = failed
            self.write(name, found)
        self.release()
        for table in found.values():
            print(table.markdown(), flush=True)
        print(f"{name}: at {time.perf_counter() - self.start:.0f} s", file=sys.stderr, flush=True)


def main(settings: Settings, folder: Path, minutes: float) -> None:
    """Run all parts in so many minutes, and print and write their tables and the summary."""
    sizes = LLAMA_3_8B if settings.on_cuda and not settings.quick else SMALL
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        workers = {WITHOUT_US: Worker(False, settings, log), WITH_US: Worker(True, settings, log)}
        # which may lose the device to an error of a kernel; on a CPU there is none to lose
        workers[KERNELS] = Worker(True, settings, log) if settings.on_cuda else workers[WITH_US]
        run = Run(settings, sizes, folder, 60 * minutes, workers)
        print(heading(run.machine), flush=True)
        try:
            for worker in workers.values():
                worker.start()  # all at once, because their imports take a while
            for part in all_parts(run):
                run.part(*part)
        finally:
            for worker in workers.values():
                worker.stop()
    answers = summary(run.tables, sizes, run.failures)
    text = "\n".join(["## Summary", "", *(f"- {answer}" for answer in answers), ""])
    print(text, flush=True)
    (folder / "summary.md").write_text(heading(run.machine) + "\n" + text, encoding="utf-8")
    contents = {"machine": run.machine, "summary": answers, "seconds": time.perf_counter() - run.start}
    (folder / "summary.json").write_text(json.dumps(contents, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
