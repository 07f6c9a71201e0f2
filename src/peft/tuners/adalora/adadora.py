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

"""The arithmetic of AdaDoRA, in functions of tensors that know nothing of PEFT.

AdaDoRA adapts a frozen weight W with an update whose rank can be pruned (AdaLoRA, https://openreview.net/forum?id=lq62uWRJjiY)
and one learned length per output row (DoRA, https://huggingface.co/papers/2402.09353):

    ΔW = c · B (E ⊙ A)          W, ΔW (out, in);  B (out, r);  E (r, 1);  A (r, in);  c a scalar
    n  = ‖W + ΔW‖, row by row   (out, 1), outside of the gradient graph
    h  = (m / n) ⊙ (W x + ΔW x) + bias            m (out, 1)

Nothing here builds an (out, in) matrix but `merge_rows`, and that one goes block by block. Norms are float32 whatever the
dtype of the weight (float64 for a float64 weight).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Optional

import torch


# At most this many elements of a weight are copied to another dtype at a time.
BLOCK_ELEMENTS = 2**20

# A squared row norm below this has lost its precision to underflow: the row counts as zero.
ZERO_ROW = 1e-30


def row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices that cut the rows of `weight` (out, in) into at least eight blocks of at most `BLOCK_ELEMENTS` elements."""
    out_features, in_features = weight.shape
    rows = max(1, min(BLOCK_ELEMENTS // max(1, in_features), -(-out_features // 8)))
    for start in range(0, out_features, rows):
        yield slice(start, start + rows)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms, scales and merges of a weight of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context in which autocast does not lower the precision of matrix products on `device`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@torch.no_grad()
def squared_row_norm(weight: torch.Tensor) -> torch.Tensor:
    """Squared L2 norm of each row.

    Args:
        weight (`torch.Tensor`): Weight W of shape (out, in), of any floating point dtype.

    Returns:
        `torch.Tensor`: ‖W‖² of shape (out, 1), float32 (float64 for a float64 weight).
    """
    dtype = norm_dtype(weight.dtype)
    if weight.dtype == dtype:
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True).square()
    norms = [torch.linalg.vector_norm(weight[rows].to(dtype), dim=1, keepdim=True) for rows in row_blocks(weight)]
    return torch.cat(norms).square()


@torch.no_grad()
def squared_adapted_row_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_E: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """Squared L2 norm of each row of W + ΔW from the factors of ΔW, without making it.

    Expanding the square leaves products that are at most (out, r) large (https://huggingface.co/papers/2603.22276 does
    the same for DoRA):

        n² = ‖W‖² + 2c · rowsum((W (E⊙A)ᵀ) ⊙ B) + c² · rowsum((B G) ⊙ B),    G = (E⊙A)(E⊙A)ᵀ

    Rounding can push the sum below zero where W + ΔW nearly cancels, so it is clamped. The result is outside of the
    gradient graph, following section 4.3 of the DoRA paper.

    Args:
        weight (`torch.Tensor`): Weight W of shape (out, in).
        lora_A (`torch.Tensor`): Right singular vectors A of shape (r, in).
        lora_E (`torch.Tensor`): Singular values E of shape (r, 1).
        lora_B (`torch.Tensor`): Left singular vectors B of shape (out, r).
        scaling (`torch.Tensor`): The scalar c.

    Returns:
        `torch.Tensor`: n² of shape (out, 1), float32 (float64 for a float64 weight).
    """
    dtype = norm_dtype(weight.dtype)
    with full_precision(weight.device):
        right = lora_A.to(dtype) * lora_E.to(dtype)
        left = lora_B.to(dtype) * scaling.to(dtype)
        if weight.dtype == dtype:
            cross = weight @ right.T
        else:
            cross = torch.cat([weight[rows].to(dtype) @ right.T for rows in row_blocks(weight)])
        update = ((2 * cross + left @ (right @ right.T)) * left).sum(dim=1, keepdim=True)
    return (squared_row_norm(weight) + update).clamp_min(0)


def magnitude_scale(magnitude: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """The factor m / n of each output row, differentiable in m.

    A row whose norm is zero has no direction to scale. Its factor is 1, so that its output is the base model's, and its
    magnitude gets a gradient of zero.

    Args:
        magnitude (`torch.Tensor`): m of shape (out, 1).
        squared_norm (`torch.Tensor`): n² of shape (out, 1).

    Returns:
        `torch.Tensor`: m / n of shape (out, 1), in the dtype of `squared_norm`.
    """
    is_zero = squared_norm <= ZERO_ROW
    norm = squared_norm.masked_fill(is_zero, 1).sqrt()
    return (magnitude.to(norm.dtype) / norm).masked_fill(is_zero, 1)


def scale_output(output: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Multiply each output feature with its factor, but not the bias that the output already holds.

    Args:
        output (`torch.Tensor`): (W + ΔW) x + bias of shape (..., out).
        scale (`torch.Tensor`): m / n of shape (out, 1), float32 or float64.
        bias (`torch.Tensor`, *optional*): Bias of shape (out,).

    Returns:
        `torch.Tensor`: h of shape (..., out), in the dtype of `output`.
    """
    # The factor stays in float32: a learned one is close to 1, where bfloat16 has steps of 0.4 %.
    scale = scale.view(-1)
    if bias is None:
        return (output * scale).to(output.dtype)
    return torch.addcmul(bias - scale * bias, output, scale).to(output.dtype)


@torch.no_grad()
def merge_rows(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_E: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: torch.Tensor,
    magnitude: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The merged weight (m / n) ⊙ (W + ΔW), a block of rows at a time.

    Args:
        weight (`torch.Tensor`): Weight W of shape (out, in).
        lora_A (`torch.Tensor`): Right singular vectors A of shape (r, in).
        lora_E (`torch.Tensor`): Singular values E of shape (r, 1).
        lora_B (`torch.Tensor`): Left singular vectors B of shape (out, r).
        scaling (`torch.Tensor`): The scalar c.
        magnitude (`torch.Tensor`): m of shape (out, 1).

    Yields:
        `tuple[slice, torch.Tensor]`: Which rows, and their merged values, computed in float32 and rounded once to the
        dtype of the weight.
    """
    dtype = norm_dtype(weight.dtype)
    with full_precision(weight.device):
        right = lora_A.to(dtype) * lora_E.to(dtype) * scaling.to(dtype)
        for rows in row_blocks(weight):
            adapted = weight[rows].to(dtype) + lora_B[rows].to(dtype) @ right
            scale = magnitude_scale(magnitude[rows], squared_row_norm(adapted))
            yield rows, (adapted * scale).to(weight.dtype)
