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

On a CPU, and for quantized weights, one block of rows at a time is converted, and both come from it. CUDA multiplies
bfloat16 and float16 into float32 itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn


# The most elements of a weight to convert at a time: on a CPU, and on devices where kernel launches cost time.
BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS = 2**20, 2**24

# A CPU multiplies fastest by a multiple of this many columns: 16 columns take two thirds of the time of 12.
PRODUCT_COLUMNS = 16

# Whether `torch.mm` takes `out_dtype` on CUDA, also when compiled.
HAS_FLOAT32_RESULT = torch.__version__ >= (2, 10) and torch.version.hip is None

# Bit masks for float32: the exponent, and the leading bits that a lower dtype can represent.
EXPONENT_BITS = 0x7F800000
LEADING_BITS = {torch.bfloat16: -(2**16), torch.float16: -(2**13)}


@dataclass
class Rows:
    """A quantized weight of `shape` (out, in) on `device`. `rows[start:stop]` returns `dequantize(start, stop)`."""

    shape: torch.Size
    dtype: torch.dtype  # of the dequantized values
    device: torch.device
    dequantize: Callable[[int, int], torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self.dequantize(start, stop)


def row_blocks(weight: torch.Tensor | Rows) -> Iterator[slice]:
    """
    Slices that cut the rows of `weight` (out, in) into at least eight blocks. A block has at most `BLOCK_ELEMENTS`
    elements on a CPU and `DEVICE_BLOCK_ELEMENTS` elsewhere.
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
    """The rows of a weight in the dtype of its norm: block by block, or all at once if it has that dtype."""
    dtype = norm_dtype(weight.dtype)
    if isinstance(weight, torch.Tensor) and weight.dtype == dtype:
        yield weight
    else:
        for rows in row_blocks(weight):
            yield weight[rows].to(dtype)


def multiplies_into_float32(weight: torch.Tensor | Rows) -> bool:
    """Whether the device can multiply matrices of the weight's dtype into a float32 result directly."""
    is_low = weight.dtype in (torch.bfloat16, torch.float16)
    return is_low and HAS_FLOAT32_RESULT and weight.device.type in ("cuda", "meta")


def row_norm(weight: torch.Tensor | Rows) -> torch.Tensor:
    """‖W‖ of each row, (out, 1), of a weight (out, in) of any floating point dtype."""
    if isinstance(weight, torch.Tensor) and weight.device.type != "cpu":  # its kernel converts
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=norm_dtype(weight.dtype))
    return _cat([torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in blockwise(weight)])


def powers_of_two(matrix: torch.Tensor) -> torch.Tensor:
    """
    The largest power of two (r, 1) up to the largest absolute entry of each row of a float32 matrix (r, in). It is
    2⁻¹²⁶ for a row of zeros, and infinity for a row with an entry that is not finite.
    """
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=1, keepdim=True)
    return (largest.view(torch.int32) & EXPONENT_BITS).view(matrix.dtype).clamp_min(torch.finfo(matrix.dtype).tiny)


def split_rows(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Split a float32 matrix (r, in) into a high and a low part (2r, in) in bfloat16 or float16, whose sum is the matrix.

    The high part keeps the leading bits, so its conversion is exact. Rounding to `dtype` and back fails under
    `torch.compile`: Inductor skips this round trip in a fused kernel, so the low part would be zero.
    """
    high = (matrix.view(torch.int32) & LEADING_BITS[dtype]).view(matrix.dtype)
    return torch.cat([high, matrix - high]).to(dtype)


def matmul_rows(weight: torch.Tensor | Rows, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    W Rᵀ (out, r) and ‖W‖ of each row (out, 1), in the dtype of the norm of W.

    Args:
        weight (`torch.Tensor` or [`Rows`]): W (out, in) of any floating point dtype.
        right (`torch.Tensor`): R (r, in), a constant in the dtype of the norm of W.
    """
    rank = len(right)
    if multiplies_into_float32(weight):
        rows = weight[:]
        # float16 needs entries near 1; bfloat16 has the exponents of float32
        scale = powers_of_two(right) if weight.dtype == torch.float16 else None
        parts = split_rows(right if scale is None else right / scale, weight.dtype)
        products = torch.mm(rows, parts.T, out_dtype=right.dtype)
        product = products[:, :rank] + products[:, rank:]
        return product if scale is None else product * scale.T, row_norm(rows)
    pads = weight.device.type == "cpu" and rank > 4
    padded = nn.functional.pad(right, (0, 0, 0, -rank % PRODUCT_COLUMNS)) if pads else right
    products, norms = zip(*((rows @ padded.T, row_norm(rows)) for rows in blockwise(weight)))
    return _cat(products)[:, :rank], _cat(norms)


def _cat(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The blocks as one tensor, without a copy if there is only one."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
