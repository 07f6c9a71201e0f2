"""One Triton kernel for n² = ‖W + ΔW‖² of each row: it reads W once, for W Rᵀ and ‖W‖² alike.

Each program takes some rows of W, and computes R Rᵀ itself on the way, so nothing else is launched. The products have
the precision of float32, by TF32 products of parts. TF32 holds every bfloat16 and float16 value exactly, and R is not
rounded to the dtype of W.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .blocks import block_rank, choices


@triton.autotune(
    choices(
        [
            ({"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 128}, 4),
            ({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}, 4),
            ({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256}, 4),
            ({"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64}, 4),
            ({"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64}, 4),
        ]
    ),
    key=["rows", "columns"],
)
@triton.jit
def norm_kernel(
    weight,
    lora_A,
    scaled_E,
    lora_B,
    squared_norm,
    rows,
    columns,
    rank,
    row_stride,
    column_stride,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    triplet = tl.arange(0, BLOCK_RANK)
    is_row, is_triplet = row < rows, triplet < rank
    singular = tl.load(scaled_E + triplet, mask=is_triplet, other=0.0).to(tl.float32)
    base = tl.full((BLOCK_ROWS,), 0.0, tl.float32)
    products = tl.full((BLOCK_ROWS, BLOCK_RANK), 0.0, tl.float32)
    gram = tl.full((BLOCK_RANK, BLOCK_RANK), 0.0, tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < columns
        w = tl.load(
            weight + row[:, None] * row_stride + column[None, :] * column_stride,
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        ).to(tl.float32)
        right = tl.load(
            lora_A + triplet[:, None] * columns + column[None, :],
            mask=is_triplet[:, None] & is_column[None, :],
            other=0.0,
        )
        right = right.to(tl.float32) * singular[:, None]
        base += tl.sum(w * w, axis=1)
        products = tl.dot(w, tl.trans(right), products, input_precision="tf32x3")
        gram = tl.dot(right, tl.trans(right), gram, input_precision="tf32x3")
    left = tl.load(
        lora_B + row[:, None] * rank + triplet[None, :], mask=is_row[:, None] & is_triplet[None, :], other=0.0
    ).to(tl.float32)
    inner = tl.dot(left, gram, 2.0 * products, input_precision="tf32x3")
    tl.store(squared_norm + row, tl.maximum(base + tl.sum(inner * left, axis=1), 0.0), mask=is_row)


@torch.no_grad()
def squared_adapted_row_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor, *_: Any
) -> torch.Tensor:
    """n² (out, 1) in float32, of W (out, in), A (r, in), c · E (r, 1) and B (out, r)."""
    rows, columns = weight.shape
    rank = len(lora_A)
    squared_norm = torch.empty(rows, 1, dtype=torch.float32, device=weight.device)
    norm_kernel[lambda blocks: (triton.cdiv(rows, blocks["BLOCK_ROWS"]),)](
        *(weight, lora_A.contiguous(), scaled_E.contiguous(), lora_B.contiguous(), squared_norm),
        *(rows, columns, rank, *weight.stride()),
        BLOCK_RANK=block_rank(rank),
    )
    return squared_norm
