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

"""Parameters of which each process may hold but a part (FSDP2's DTensor)."""

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor, of which each process may hold but a part (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def has_sharded_parameters(model: nn.Module) -> bool:
    return any(is_sharded(param) for param in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded. Every process has to call this."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


@torch.no_grad()
def copy_whole_(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, the same on every process, into a tensor that may be sharded."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = values.to(tensor.device, tensor.dtype)
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
