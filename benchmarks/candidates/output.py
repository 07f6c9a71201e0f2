"""One Triton kernel for h = (m / n) ⊙ W x + b + (m / n) ⊙ B (c E ⊙ A x), and one for its backward pass.

The forward pass reads W x + b once and writes h once, in the dtype of W x + b. The package's own form makes float32
matrices (tokens, out) on the way. The kernels compute in float32.
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .blocks import block_rank, choices


# The backward pass starts about this many programs: four for each multiprocessor of an H100.
PROGRAMS = 528
# A program of the backward pass takes so many features,
BACKWARD_FEATURES = 128
# and at least so many tokens: the largest choice of `BLOCK_TOKENS`.
MOST_BLOCK_TOKENS = 64


@triton.autotune(
    choices(
        [
            ({"BLOCK_TOKENS": 32, "BLOCK_FEATURES": 128}, 4),
            ({"BLOCK_TOKENS": 16, "BLOCK_FEATURES": 256}, 4),
            ({"BLOCK_TOKENS": 64, "BLOCK_FEATURES": 128}, 8),
            ({"BLOCK_TOKENS": 64, "BLOCK_FEATURES": 64}, 4),
        ]
    ),
    key=["tokens", "features"],
)
@triton.jit
def forward_kernel(
    output,
    scale,
    bias,
    projected,
    scaled_B,
    result,
    tokens,
    features,
    rank,
    HAS_BIAS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    feature = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    token = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    triplet = tl.arange(0, BLOCK_RANK)
    is_feature, is_token, is_triplet = feature < features, token < tokens, triplet < rank
    place = token[:, None] * features + feature[None, :]
    is_inside = is_token[:, None] & is_feature[None, :]

    scales = tl.load(scale + feature, mask=is_feature, other=0.0).to(tl.float32)
    h = tl.load(output + place, mask=is_inside, other=0.0).to(tl.float32) * scales[None, :]
    if HAS_BIAS:
        biases = tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)
        h += (biases - scales * biases)[None, :]
    left = tl.load(
        projected + token[:, None] * rank + triplet[None, :], mask=is_token[:, None] & is_triplet[None, :], other=0.0
    )
    right = tl.load(
        scaled_B + feature[None, :] * rank + triplet[:, None],
        mask=is_feature[None, :] & is_triplet[:, None],
        other=0.0,
    )
    h = tl.dot(left.to(tl.float32), right.to(tl.float32), h, input_precision="tf32x3")
    tl.store(result + place, h.to(result.dtype.element_ty), mask=is_inside)


@triton.autotune(
    choices([({"BLOCK_TOKENS": 32}, 8), ({"BLOCK_TOKENS": 16}, 4), ({"BLOCK_TOKENS": 64}, 8)]),
    key=["tokens", "features"],
)
@triton.jit
def backward_kernel(
    gradient,
    output,
    scale,
    bias,
    projected,
    scaled_B,
    output_gradient,
    scale_gradients,
    projected_gradients,
    B_gradients,
    tokens,
    features,
    rank,
    tokens_per_program,
    HAS_BIAS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """
    One program takes some features of `tokens_per_program` tokens. What is summed over tokens or over features is
    written once by each program, and summed up afterwards, in an order that does not change from run to run.
    """
    feature = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    triplet = tl.arange(0, BLOCK_RANK)
    is_feature, is_triplet = feature < features, triplet < rank
    scales = tl.load(scale + feature, mask=is_feature, other=0.0).to(tl.float32)
    right = tl.load(
        scaled_B + feature[:, None] * rank + triplet[None, :],
        mask=is_feature[:, None] & is_triplet[None, :],
        other=0.0,
    ).to(tl.float32)
    scale_sum = tl.full((BLOCK_FEATURES,), 0.0, tl.float32)
    B_sum = tl.full((BLOCK_FEATURES, BLOCK_RANK), 0.0, tl.float32)
    start = tl.program_id(1).to(tl.int64) * tokens_per_program
    for offset in range(0, tokens_per_program, BLOCK_TOKENS):
        token = start + offset + tl.arange(0, BLOCK_TOKENS)
        is_token = token < tokens
        place = token[:, None] * features + feature[None, :]
        is_inside = is_token[:, None] & is_feature[None, :]
        g = tl.load(gradient + place, mask=is_inside, other=0.0).to(tl.float32)
        base = tl.load(output + place, mask=is_inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            base -= tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
        scaled = g * scales[None, :]
        tl.store(output_gradient + place, scaled.to(output_gradient.dtype.element_ty), mask=is_inside)
        scale_sum += tl.sum(g * base, axis=0)

        triplet_place = token[:, None] * rank + triplet[None, :]
        is_triplet_inside = is_token[:, None] & is_triplet[None, :]
        left = tl.load(projected + triplet_place, mask=is_triplet_inside, other=0.0).to(tl.float32)
        B_sum = tl.dot(tl.trans(g), left, B_sum, input_precision="tf32x3")
        partial = tl.dot(g, right, input_precision="tf32x3")
        partials = projected_gradients + tl.program_id(0).to(tl.int64) * tokens * rank
        tl.store(partials + triplet_place, partial, mask=is_triplet_inside)
    chunk = tl.program_id(1).to(tl.int64)
    tl.store(scale_gradients + chunk * features + feature, scale_sum, mask=is_feature)
    tl.store(
        B_gradients + chunk * features * rank + feature[:, None] * rank + triplet[None, :],
        B_sum,
        mask=is_feature[:, None] & is_triplet[None, :],
    )


def tokens_of_one_program(tokens: int, features: int) -> int:
    """How many tokens a program of the backward pass takes, for about [`PROGRAMS`] programs."""
    wanted = tokens * triton.cdiv(features, BACKWARD_FEATURES) // PROGRAMS
    return min(1024, max(MOST_BLOCK_TOKENS, triton.next_power_of_2(max(1, wanted))))


class AdaptedOutput(torch.autograd.Function):
    """h (tokens, out) from W x + b (tokens, out), m / n (out), b (out), c E ⊙ A x (tokens, r) and (m / n) ⊙ B."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        scale: torch.Tensor,
        bias: Optional[torch.Tensor],
        projected: torch.Tensor,
        scaled_B: torch.Tensor,
    ) -> torch.Tensor:
        output, projected, scaled_B = output.contiguous(), projected.contiguous(), scaled_B.contiguous()
        ctx.save_for_backward(output, scale, bias, projected, scaled_B)
        (tokens, features), rank = output.shape, projected.shape[1]
        result = torch.empty_like(output)

        def grid(blocks: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(features, blocks["BLOCK_FEATURES"]), triton.cdiv(tokens, blocks["BLOCK_TOKENS"])

        forward_kernel[grid](
            *(output, scale, scale if bias is None else bias, projected, scaled_B, result, tokens, features, rank),
            HAS_BIAS=bias is not None,
            BLOCK_RANK=block_rank(rank),
        )
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        output, scale, bias, projected, scaled_B = ctx.saved_tensors
        gradient = gradient.contiguous()
        (tokens, features), rank = output.shape, projected.shape[1]
        tokens_per_program = tokens_of_one_program(tokens, features)
        grid = triton.cdiv(features, BACKWARD_FEATURES), triton.cdiv(tokens, tokens_per_program)
        output_gradient = torch.empty_like(output)
        scale_gradients = scale.new_empty(grid[1], features, dtype=torch.float32)
        projected_gradients = scale.new_empty(grid[0], tokens, rank, dtype=torch.float32)
        B_gradients = scale.new_empty(grid[1], features, rank, dtype=torch.float32)
        backward_kernel[grid](
            *(gradient, output, scale, scale if bias is None else bias, projected, scaled_B),
            *(output_gradient, scale_gradients, projected_gradients, B_gradients),
            *(tokens, features, rank, tokens_per_program),
            HAS_BIAS=bias is not None,
            BLOCK_RANK=block_rank(rank),
            BLOCK_FEATURES=BACKWARD_FEATURES,
        )
        bias_gradient = None
        if ctx.needs_input_grad[2]:
            bias_gradient = (gradient.sum(0, dtype=torch.float32) * (1 - scale)).to(bias.dtype)
        return (
            output_gradient,
            scale_gradients.sum(0).to(scale.dtype),
            bias_gradient,
            projected_gradients.sum(0).to(projected.dtype),
            B_gradients.sum(0).to(scaled_B.dtype),
        )


def adapted_output(
    output: torch.Tensor,
    scale: torch.Tensor,
    bias: Optional[torch.Tensor],
    projected: torch.Tensor,
    scaled_B: torch.Tensor,
) -> torch.Tensor:
    """h (..., out) in the dtype of `output`. The arguments are those of the package's function of this name."""
    rows, triplets = (torch.atleast_2d(tensor).flatten(0, -2) for tensor in (output, projected))
    return AdaptedOutput.apply(rows, scale, bias, triplets, scaled_B).view(output.shape)
