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

No function writes to a tensor that it was given. Only `merged_rows` builds rows of W + ΔW, one block after the other.
"""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import nn

from .rows import full_precision, matmul_rows, norm_dtype, row_blocks, row_norm


# A squared row norm below this has lost its precision to underflow: the row counts as zero.
ZERO_ROW = 1e-30

# Where W + ΔW nearly cancels, rounding moves n² by a few machine epsilons of ‖W‖². So n² counts as at least this many.
ROUNDING = 8


def squared_adapted_row_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor
) -> torch.Tensor:
    """
    n² = ‖W + ΔW‖² of each row, (out, 1), given W, A, c · E and B: a constant for every kind of derivative, following
    section 4.3 of the DoRA paper.

    Expanding the square leaves products that are at most (out, r) large, with R = c · E ⊙ A
    (https://huggingface.co/papers/2603.22276 does the same for DoRA): n² = ‖W‖² + rowsum((2 W Rᵀ + B R Rᵀ) ⊙ B).
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
    """n², but at least `ROUNDING` machine epsilons of ‖W‖², which bounds m / n where the update cancels a row."""
    return torch.maximum(squared_norm, squared_base_norm * (ROUNDING * torch.finfo(squared_norm.dtype).eps))


def magnitude_scale(magnitude: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """
    The factor m / n of each output row, (out, 1), given m and n². A row whose norm is zero has no direction to scale:
    its factor is 1, as in the base model, and its magnitude gets a gradient of zero.
    """
    norm = nn.functional.threshold(squared_norm, ZERO_ROW, torch.inf).sqrt()
    return magnitude.to(norm.dtype) / norm + (squared_norm <= ZERO_ROW)


def scale_output(output: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """(m / n) ⊙ W x + b, given W x + b, m / n and b, in float32: m / n is near 1, where bfloat16 is too coarse."""
    return output * scale if bias is None else torch.addcmul(bias - scale * bias, output, scale)


def adapted_output(
    output: torch.Tensor,
    scale: torch.Tensor,
    bias: Optional[torch.Tensor],
    projected: torch.Tensor,
    scaled_B: torch.Tensor,
) -> torch.Tensor:
    """h (..., out), given W x + b, m / n (out), b, c E ⊙ A x (..., r) and (m / n) ⊙ B, dtypes as in `scale_output`."""
    scaled = scale_output(output, scale, bias)
    if not scaled.dtype == projected.dtype == scaled_B.dtype:
        return scaled + projected @ scaled_B.to(projected.dtype).T
    scaled, projected = (torch.atleast_2d(tensor).flatten(0, -2) for tensor in (scaled, projected))
    return torch.addmm(scaled, projected, scaled_B.T).view(output.shape)


@torch.no_grad()
def merged_rows(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    scaled_E: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The merged weight (m / n) ⊙ (W + ΔW) in blocks: which rows, and their values, rounded once to the dtype of W."""
    dtype = norm_dtype(weight.dtype)
    right = lora_A.to(dtype) * scaled_E.to(dtype)
    for rows in row_blocks(weight):
        with full_precision(weight.device):
            base = weight[rows].to(dtype)
            adapted = base + lora_B[rows].to(dtype) @ right
        squared_norm = clamp_cancelled(row_norm(adapted).square(), row_norm(base).square())
        yield rows, (adapted * magnitude_scale(magnitude[rows], squared_norm)).to(weight.dtype)
