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

"""The arithmetic of AdaDoRA, in differentiable functions of tensors that know nothing of PEFT.

AdaDoRA adapts a frozen weight W with an update whose rank can be pruned (AdaLoRA,
https://openreview.net/forum?id=lq62uWRJjiY) and one learned length per output row (DoRA,
https://huggingface.co/papers/2402.09353):

```
ΔW = B (c · E ⊙ A)          W, ΔW (out, in);  B (out, r);  E (r, 1);  A (r, in);  c a scalar
n  = ‖W + ΔW‖, row by row   (out, 1), outside of the gradient graph
h  = (m / n) ⊙ (W x + ΔW x) + bias            m (out, 1)
```

Nothing here keeps anything, or writes to a tensor that it was given. Nothing builds an (out, in) matrix but
`merged_rows`, and that one goes block by block.
"""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import nn

from .rows import Rows, full_precision, matmul_rows, norm_dtype, row_blocks, row_norm


# A squared row norm below this has lost its precision to underflow: the row counts as zero.
ZERO_ROW = 1e-30

# Where W + ΔW nearly cancels, rounding moves n² by a few machine epsilons of ‖W‖². So n² counts as at least this many.
ROUNDING = 8


def squared_adapted_row_norm(
    weight: torch.Tensor | Rows, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor
) -> torch.Tensor:
    """n² = ‖W + ΔW‖² of each row, (out, 1), from the factors of ΔW, without making it.

    Expanding the square leaves products that are at most (out, r) large (https://huggingface.co/papers/2603.22276 does
    the same for DoRA):

    ```
    n² = ‖W‖² + rowsum((2 W Rᵀ + B R Rᵀ) ⊙ B),    R = c · E ⊙ A
    ```

    Where W + ΔW nearly cancels, rounding decides the sum, so it is clamped as in [`clamp_cancelled`]. The result is a
    constant for every kind of derivative, following section 4.3 of the DoRA paper.

    Args:
        weight (`torch.Tensor` or [`Rows`]): W (out, in), detached.
        lora_A, scaled_E, lora_B (`torch.Tensor`): A (r, in), c · E (r, 1) and B (out, r).
    """
    dtype = norm_dtype(weight.dtype)
    with full_precision(weight.device):
        # `detach` stops every derivative; `no_grad` stops neither forward mode nor torch.func
        right = lora_A.detach().to(dtype) * scaled_E.detach().to(dtype)
        left = lora_B.detach().to(dtype)
        product, base_norm = matmul_rows(weight, right)
        inner = torch.addmm(product, left, right @ right.T, beta=2)
        squared_base_norm = base_norm.square()
        squared_norm = torch.baddbmm(squared_base_norm[..., None], inner[:, None], left[..., None])
    return clamp_cancelled(squared_norm.squeeze(-1), squared_base_norm)


def clamp_cancelled(squared_norm: torch.Tensor, squared_base_norm: torch.Tensor) -> torch.Tensor:
    """
    n² (out, 1), but at least `ROUNDING` machine epsilons of ‖W‖² (out, 1). In float32 n is then at least ‖W‖ / 1024,
    so m / n stays bounded, without a jump, where the update cancels a row.
    """
    return torch.maximum(squared_norm, squared_base_norm * (ROUNDING * torch.finfo(squared_norm.dtype).eps))


def magnitude_scale(magnitude: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """The factor m / n of each output row, (out, 1), in the dtype of n² (out, 1) and differentiable in m (out, 1).

    A row whose norm is zero has no direction to scale. Its factor is 1, so that its output is the base model's, and
    its magnitude gets a gradient of zero.
    """
    norm = nn.functional.threshold(squared_norm, ZERO_ROW, torch.inf).sqrt()
    return magnitude.to(norm.dtype) / norm + (squared_norm <= ZERO_ROW)


def scale_output(output: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """(m / n) ⊙ W x + b of a layer whose `output` is W x + b; `scale` m / n and the bias broadcast with the output.

    The factor stays in float32 whatever the dtype of the output, and so does the result: a learned factor is close to
    1, where bfloat16 has steps of 0.4 %.
    """
    return output * scale if bias is None else torch.addcmul(bias - scale * bias, output, scale)


def adapted_output(
    output: torch.Tensor,
    scale: torch.Tensor,
    bias: Optional[torch.Tensor],
    projected: torch.Tensor,
    scaled_B: torch.Tensor,
) -> torch.Tensor:
    """h = (m / n) ⊙ (W x + ΔW x) + b, (..., out), in the dtype of [`scale_output`].

    Args:
        output (`torch.Tensor`): W x + b (..., out).
        scale (`torch.Tensor`): m / n (out).
        bias (`torch.Tensor`, *optional*): b (out).
        projected (`torch.Tensor`): c E ⊙ A x (..., r).
        scaled_B (`torch.Tensor`): (m / n) ⊙ B (out, r).
    """
    scaled = scale_output(output, scale, bias)
    if not scaled.dtype == projected.dtype == scaled_B.dtype:
        return scaled + projected @ scaled_B.to(projected.dtype).T
    scaled, projected = (torch.atleast_2d(tensor).flatten(0, -2) for tensor in (scaled, projected))
    return torch.addmm(scaled, projected, scaled_B.T).view(output.shape)


@torch.no_grad()
def merged_rows(
    weight: torch.Tensor | Rows,
    lora_A: torch.Tensor,
    scaled_E: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The merged weight (m / n) ⊙ (W + ΔW), a block of rows at a time: which rows, and their values.

    They are computed in float32 from W (out, in), A (r, in), c · E (r, 1), B (out, r) and m (out, 1), and rounded once
    to the dtype of W.
    """
    dtype = norm_dtype(weight.dtype)
    right = lora_A.to(dtype) * scaled_E.to(dtype)
    for rows in row_blocks(weight):
        with full_precision(weight.device):
            base = weight[rows].to(dtype)
            adapted = base + lora_B[rows].to(dtype) @ right
        squared_norm = clamp_cancelled(row_norm(adapted).square(), row_norm(base).square())
        scale = magnitude_scale(magnitude[rows], squared_norm)
        yield rows, (adapted * scale).to(weight.dtype)
