"""Compares a DoRA layer of LoRA before and after `dora-norm`: time, memory, and accuracy against float64.

    python upstream/dora_norm.py build/fork    a fork that `make fork` has made

Each row is a layer with as many input as output features, rank 16, and a batch of 256 tokens. The time is the median
of a forward and backward pass of what DoRA adds to the base layer. The memory is its peak beyond the weights and the
input. The error is that of the norm, relative to float64, the largest of all rows.
"""

import argparse
import ctypes
import statistics
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import apply
import check
import torch
from torch import nn


DORA = "src/peft/tuners/lora/dora.py"
RANK, TOKENS, SCALING = 16, 256, 2.0


def module_at(fork: Path, commit: str, folder: Path) -> ModuleType:
    """PEFT's module `dora` as it is in a commit; what it imports comes from the installed PEFT."""
    path = folder / f"dora_{commit.strip('~')}_{len(commit)}.py"
    path.write_text(apply.git(fork, "show", f"{commit}:{DORA}").stdout)
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Layer:
    """A DoRA layer over a frozen weight, with an adapter in float32."""

    def __init__(self, dora: ModuleType, size: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.base = nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.Linear(size, RANK, bias=False, device=device)
        self.lora_B = nn.Linear(RANK, size, bias=False, device=device)
        self.dora = dora.DoraLinearLayer(fan_in_fan_out=False)
        self.x = torch.randn(TOKENS, size, device=device)
        self.base_result = self.base(self.x.to(dtype)).float()
        self.factors = {"lora_A": self.lora_A.weight, "lora_B": self.lora_B.weight}
        self.dora.update_layer(base_layer=self.base, **self.factors, scaling=SCALING)

    def step(self) -> None:
        layers = {"lora_A": self.lora_A, "lora_B": self.lora_B, "base_layer": self.base}
        self.dora(self.x, **layers, scaling=SCALING, base_result=self.base_result).sum().backward()
        if self.x.is_cuda:
            torch.cuda.synchronize()

    def milliseconds(self, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    def mebibytes(self) -> float:
        if self.x.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        self.step()
        return (resident("VmHWM") - before) / 2**10

    def error(self) -> float:
        A, B = self.lora_A.weight.detach().double(), self.lora_B.weight.detach().double()
        expected = torch.linalg.vector_norm(self.base.weight.double() + SCALING * B @ A, dim=1)
        # the magnitude is the norm of the layer as it starts
        return ((self.dora.weight.double() - expected).abs() / expected).max().item()


def resident(key: str) -> int:
    """Kibibytes of the process, as the kernel of Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fork", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    subject = apply.series.message(apply.series.DORA_NORM).splitlines()[0]
    search = ["log", "--format=%H", "--fixed-strings", f"--grep={subject}", apply.BRANCH]
    commit = apply.git(options.fork, *search).stdout.split()[0]
    with TemporaryDirectory() as folder:
        commits = {"before": f"{commit}~", "after": commit}
        modules = {when: module_at(options.fork, each, Path(folder)) for when, each in commits.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    print("| weight | DoRA | ms | MiB | error of the norm |\n|---|---|---|---|---|")
    for size in options.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for when, dora in modules.items():
                layer = Layer(dora, size, dtype, device)
                layer.step()
                ms, mib, error = layer.milliseconds(options.repeats), layer.mebibytes(), layer.error()
                weight = f"{size} × {size}, {str(dtype).removeprefix('torch.')}"
                check.print_row([weight, when, f"{ms:.1f}", f"{mib:.1f}", f"{error:.1e}"])


if __name__ == "__main__":
    main()
