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
from typing import Any, Optional

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


def gather_partitioned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or all of one that ZeRO-3 partitions. Every process has to call this."""
    if is_partitioned(tensor) and tensor.numel() != tensor.ds_numel:
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded or partitioned. Every process has to call this."""
    tensor = gather_partitioned(tensor).detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of this process of a DTensor. All of another tensor, as of [`gather_partitioned`]."""
    return tensor.to_local() if is_sharded(tensor) else gather_partitioned(tensor)


def layout(tensor: torch.Tensor) -> Optional[tuple[Any, tuple]]:
    """How FSDP2 shards a tensor: the mesh, and a placement for each of its dimensions. `None` if it does not."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else None


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor that is the same on every process, sharded like another one of its shape, without communication."""
    if is_sharded(tensor) or not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def local_indices(tensor: torch.Tensor, dim: int) -> torch.Tensor | slice:
    """Which indices of a dimension this process holds."""
    if not is_sharded(tensor):
        return slice(None)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0) if placement.is_shard(dim) else Replicate() for placement in tensor.placements]
    indices = torch.arange(tensor.shape[dim], device=tensor.device)
    return distribute_tensor(indices, tensor.device_mesh, placements, src_data_rank=None).to_local()


def sum_over_shards(parts: list[torch.Tensor], mesh: Any, placements: tuple) -> list[torch.Tensor]:
    """
    The sums of what each process has computed from its shards of DTensors of a [`layout`], in one all-reduce. In a
    backward pass the gradient of a sum, which is the same on every process, is that of each part.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    reduced = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    together = torch.cat([part.flatten() for part in parts])
    sums = DTensor.from_local(together, mesh, reduced, run_check=False).full_tensor()
    return [total.view_as(part) for total, part in zip(sums.split([part.numel() for part in parts]), parts)]


@torch.no_grad()
def copy_full_(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, the same on every process, into a tensor that may be sharded or partitioned."""
    values = shard_like(values.to(tensor.device, tensor.dtype), tensor)
    if not has_master_copy(tensor):
        tensor.copy_(values)
        return
    import deepspeed

    deepspeed.utils.safe_set_full_fp32_param(tensor, values.float())
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=is_partitioned(tensor)):
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

    def take_means(self) -> dict[str, torch.Tensor]:
        """Take the sums, averaged over all processes in one all-reduce. Every process has to call this."""
        sums, self.sums = dict(sorted(self.sums.items())), {}
        if sums and dist.is_initialized():
            together = torch.cat([gradient.flatten() for gradient in sums.values()])
            dist.all_reduce(together)
            means = (together / dist.get_world_size()).split([gradient.numel() for gradient in sums.values()])
            return {name: mean.view_as(sums[name]) for name, mean in zip(sums, means)}
        return sums

    def remove(self) -> None:
        """Stop capturing."""
        for handle in self._handles:
            handle.remove()
