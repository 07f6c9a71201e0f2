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

"""Products and norms of a frozen weight in float32, without a float32 copy of the whole weight.

On a CPU, and for quantized weights, both come from one block of rows at a time, which is converted once. CUDA
multiplies bfloat16 and float16 into float32 by itself.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn


# The largest number of elements of a weight to convert at a time: on a CPU, and where kernel launches count.
BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS = 2**20, 2**24

# A CPU multiplies faster by a multiple of this many columns: by 16 columns in two thirds of the time of 12.
PRODUCT_COLUMNS = 16

# Whether `torch.mm` takes `out_dtype` on CUDA, also when compiled.
HAS_FLOAT32_RESULT = torch.__version__ >= (2, 10) and torch.version.hip is None


class Rows(Protocol):
    """A weight of shape (out, in) that gives its rows block by block, such as a quantized one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, rows: slice) -> torch.Tensor: ...


def row_blocks(weight: torch.Tensor | Rows) -> Iterator[slice]:
    """
    Slices that cut the rows of `weight` (out, in) into at least eight blocks of at most `BLOCK_ELEMENTS` elements, or
    `DEVICE_BLOCK_ELEMENTS` if it is not on a CPU.
    """
    out_features, in_features = weight.shape
    elements = BLOCK_ELEMENTS if weight.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    rows = max(1, min(elements // max(1, in_features), -(-out_features // 8)))
    for start in range(0, out_features, rows):
        yield slice(start, start + rows)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, scales and merges of a weight of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context in which autocast does not lower the precision of matrix products on `device`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def blockwise(weight: torch.Tensor | Rows) -> Iterator[torch.Tensor]:
    """The rows of a weight in the dtype of its norm: one block after the other, or all at once if nothing converts."""
    dtype = norm_dtype(weight.dtype)
    if isinstance(weight, torch.Tensor) and weight.dtype == dtype:
        yield weight
    else:
        for rows in row_blocks(weight):
            yield weight[rows].to(dtype)


def multiplies_into_float32(weight: torch.Tensor | Rows) -> bool:
    """Whether the device multiplies matrices of the weight's dtype into a float32 result, without converting them."""
    is_low = weight.dtype in (torch.bfloat16, torch.float16)
    return is_low and HAS_FLOAT32_RESULT and weight.device.type in ("cuda", "meta")


def row_norm(weight: torch.Tensor | Rows) -> torch.Tensor:
    """‖W‖ of each row, (out, 1), of a weight (out, in) of any floating point dtype."""
    if isinstance(weight, torch.Tensor) and weight.device.type != "cpu":  # converts in its kernel
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=norm_dtype(weight.dtype))
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in blockwise(weight)])


def matmul_rows(weight: torch.Tensor | Rows, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    W Rᵀ (out, r) and ‖W‖ of each row (out, 1), in the dtype of the norm of W.

    Args:
        weight (`torch.Tensor` or [`Rows`]): W (out, in) of any floating point dtype.
        right (`torch.Tensor`): R (r, in), a constant in the dtype of the norm of W.
    """
    rank = len(right)
    if multiplies_into_float32(weight):
        # two parts of R have twice the bits of one
        parts = right.new_empty(2 * rank, right.shape[1], dtype=weight.dtype)
        parts[:rank].copy_(right)
        parts[rank:].copy_(right - parts[:rank])
        rows = weight[:]
        products = torch.mm(rows, parts.T, out_dtype=right.dtype)
        return products[:, :rank] + products[:, rank:], row_norm(rows)
    padded = right if rank <= 4 else nn.functional.pad(right, (0, 0, 0, -rank % PRODUCT_COLUMNS))
    products, norms = zip(*((rows @ padded.T, row_norm(rows)) for rows in blockwise(weight)))
    return torch.cat(products)[:, :rank], torch.cat(norms)
