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

"""Products of a weight in bfloat16 or float16 with a float32 matrix, in float32, without converting the weight.

CUDA multiplies such matrices into a float32 result. The float32 matrix is split into two of the lower precision.
"""

import torch


# Whether `torch.mm` takes `out_dtype` on CUDA, also when compiled.
HAS_FLOAT32_RESULT = torch.__version__ >= (2, 10) and torch.version.hip is None

# Bit masks for float32: the exponent, and the leading bits that a lower dtype can represent.
EXPONENT_BITS = 0x7F800000
LEADING_BITS = {torch.bfloat16: -(2**16), torch.float16: -(2**13)}


def multiplies_into_float32(weight: torch.Tensor) -> bool:
    """Whether the device multiplies matrices of the weight's dtype into a float32 result, without converting them."""
    return weight.dtype in LEADING_BITS and HAS_FLOAT32_RESULT and weight.device.type in ("cuda", "meta")


def matmul_into_float32(weight: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """W Rᵀ (out, r) in float32, given W (out, in) in bfloat16 or float16 and R (r, in) in float32."""
    # float16 needs entries near 1; bfloat16 has the exponents of float32
    scale = powers_of_two(right) if weight.dtype == torch.float16 else None
    parts = split_rows(right if scale is None else right / scale, weight.dtype)
    products = torch.mm(weight, parts.T, out_dtype=right.dtype)
    product = products[:, : len(right)] + products[:, len(right) :]
    return product if scale is None else product * scale.T


def powers_of_two(matrix: torch.Tensor) -> torch.Tensor:
    """
    A power of two (r, 1) for each row of a float32 matrix (r, in): the largest one up to the row's largest magnitude.
    A row of zeros has 2⁻¹²⁶. A row with an entry that is not finite has infinity.
    """
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=1, keepdim=True)
    return (largest.view(torch.int32) & EXPONENT_BITS).view(matrix.dtype).clamp_min(torch.finfo(matrix.dtype).tiny)


def split_rows(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    A float32 matrix (r, in) as a high and a low part, (2r, in), in bfloat16 or float16. Their sum is the matrix.

    The high part keeps the leading bits, so its conversion is exact. Rounding to `dtype` and back would not do under
    `torch.compile`: Inductor skips such a round trip in a fused kernel, and the low part would be zero.
    """
    high = (matrix.view(torch.int32) & LEADING_BITS[dtype]).view(matrix.dtype)
    return torch.cat([high, matrix - high]).to(dtype)
