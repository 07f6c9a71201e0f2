"""What a run of the benchmarks was asked for."""

from dataclasses import dataclass
from typing import Optional, TypeVar

import torch


T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """
    Args:
        device: Where the tensors live.
        threads: Number of CPU threads that PyTorch uses.
        quick: Whether to run few shapes and few rounds, to see that everything works.
        gbps: Memory bandwidth of the device in GB/s, for the roofline.
        tflops: Peak of the device in TFLOP/s for the dtype of the models, for the roofline.
        latency_us: Microseconds of a collective of no bytes.
        bandwidth_gbs: Bandwidth of a collective in GB/s.
    """

    device: torch.device
    threads: int
    quick: bool = False
    gbps: Optional[float] = None
    tflops: Optional[float] = None
    latency_us: Optional[float] = None
    bandwidth_gbs: Optional[float] = None

    def pick(self, full: T, quick: T) -> T:
        """`full` or, in a quick run, `quick`."""
        return quick if self.quick else full

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"
