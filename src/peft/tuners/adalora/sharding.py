# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Parameters of which each process holds a part: FSDP2's DTensor, and DeepSpeed's ZeRO."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn


FSDP1_MESSAGE = (
    "AdaLoRA cannot be trained with FSDP1, which flattens the parameters whose ranks it compares; use FSDP2, with "
    "`fsdp_version: 2` in the config of accelerate or `fully_shard` of PyTorch."
)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor, of which each process may hold a part (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 partitions the values, so that they have to be gathered."""
    return hasattr(tensor, "ds_id")


def has_master_copy(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO trains copies of the values, and overwrites these after each step."""
    return is_partitioned(tensor) or hasattr(tensor, "_hp_mapping")


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of [`gather_full`]."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape


def check_not_flattened(tensor: torch.Tensor) -> None:
    """Raise a `NotImplementedError` if a factor is flattened, because AdaLoRA needs its rows and columns."""
    if len(full_shape(tensor)) != 2:
        raise NotImplementedError(FSDP1_MESSAGE)


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded or partitioned. Every process has to call this."""
    if is_partitioned(tensor) and tensor.numel() != tensor.ds_numel:
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def holds_on_all(condition: torch.Tensor) -> torch.Tensor:
    """Whether a condition holds on every process. Every process has to call this."""
    holds = condition.int()
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return holds


@torch.no_grad()
def copy_full_(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, the same on every process, into a tensor that may be sharded or partitioned."""
    values = values.to(tensor.device, tensor.dtype)
    if has_master_copy(tensor):
        import deepspeed

        deepspeed.utils.safe_set_full_fp32_param(tensor, values.float())
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(values)
        return
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


class GradientCapture:
    """
    Sums of the gradients of backward passes, for engines such as DeepSpeed's that clear gradients at once.

    `sums` has them by the names of the parameters, as this process computes them.
    """

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        self.sums = {}
        self._handles = [
            param.register_hook(partial(self._add, name)) for name, param in params.items() if param.requires_grad
        ]

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        if name in self.sums:
            self.sums[name] += gradient
        else:
            self.sums[name] = gradient.detach().clone()

    def mean_over_processes(self, name: str) -> torch.Tensor:
        """Take the sum of a parameter, averaged over all processes. Every process has to call this."""
        gradient = self.sums.pop(name)
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        return gradient

    def remove(self) -> None:
        """Stop capturing."""
        for handle in self._handles:
            handle.remove()
