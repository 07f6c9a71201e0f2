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

"""Products and norms of a frozen weight in float32 or float64, without a copy of the weight in that dtype."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from .low_precision import matmul_into_float32, multiplies_into_float32


# The largest number of elements of a weight to convert at a time: on a CPU, and where kernel launches count.
BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS = 2**20, 2**24

# A CPU multiplies faster by a multiple of this many columns: by 16 columns in two thirds of the time of 12.
PRODUCT_COLUMNS = 16


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """Slices that cut the rows of a weight (out, in) into blocks of limited size, at least eight."""
    out_features, in_features = weight.shape
    elements = BLOCK_ELEMENTS if weight.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    rows = max(1, min(elements // max(1, in_features), -(-out_features // 8)))
    return [slice(start, start + rows) for start in range(0, out_features, rows)]


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, scales and merges of a weight of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context in which autocast does not lower the precision of matrix products on `device`."""
    is_available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_available else nullcontext()


def blockwise(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a weight in the dtype of its norm: one block after the other, or all at once if nothing converts."""
    dtype = norm_dtype(weight.dtype)
    if isinstance(weight, torch.Tensor) and weight.dtype == dtype:
        yield weight
    else:
        for rows in row_blocks(weight):
            yield weight[rows].to(dtype)


def row_norm(weight: torch.Tensor) -> torch.Tensor:
    """‖W‖ of each row, (out, 1), of a weight (out, in) of any floating point dtype."""
    if isinstance(weight, torch.Tensor) and weight.device.type != "cpu":  # converts in its kernel
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=norm_dtype(weight.dtype))
    norm = partial(torch.linalg.vector_norm, dim=1, keepdim=True)
    return _cat(list(map(norm, blockwise(weight))))


def matmul_rows(weight: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W Rᵀ (out, r) and [`row_norm`] of W, given R (r, in), a constant in the dtype of the norm."""
    rank = len(right)
    if multiplies_into_float32(weight):
        rows = weight[:]
        return matmul_into_float32(rows, right), row_norm(rows)
    pads = weight.device.type == "cpu" and rank > 4
    padded = nn.functional.pad(right, (0, 0, 0, -rank % PRODUCT_COLUMNS)) if pads else right

    def multiply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rows @ padded.T, row_norm(rows)

    # `map` drops a block before it asks for the next one
    products, norms = zip(*map(multiply, blockwise(weight)))
    return _cat(products)[:, :rank], _cat(norms)


def _cat(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The blocks as one tensor, without a copy if there is one alone."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
