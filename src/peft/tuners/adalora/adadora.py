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

AdaDoRA adapts a frozen weight W with an update whose rank can be pruned (AdaLoRA,
https://openreview.net/forum?id=lq62uWRJjiY) and one learned length per output row (DoRA,
https://huggingface.co/papers/2402.09353):

```
ΔW = B (c · E ⊙ A)          W, ΔW (out, in);  B (out, r);  E (r, 1);  A (r, in);  c a scalar
n  = ‖W + ΔW‖, row by row   (out, 1), outside of the gradient graph
h  = (m / n) ⊙ (W x + ΔW x) + bias            m (out, 1)
```

Nothing here builds an (out, in) matrix but `merge_rows`, and that one goes block by block. Norms are float32 whatever
the dtype of the weight (float64 for a float64 weight).
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, Optional, Protocol

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook


# At most this many elements of a weight are copied to another dtype at a time.
BLOCK_ELEMENTS = 2**20

# A CPU multiplies by so many columns faster than by a few less: by 16 in two thirds of the time that 12 take.
PRODUCT_COLUMNS = 16

# A squared row norm below this has lost its precision to underflow: the row counts as zero.
ZERO_ROW = 1e-30


_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class Memo:
    """
    What was computed from some tensors, kept until one of them is another object, has another storage, was written in
    place, or may have been by an optimizer (fused ones write without the tensor counting it).

    A write through `.data` shows in none of these, so whoever makes one has to call `clear`. Tensors that do not count
    their in-place writes (those made in inference mode, or that wrap others, such as DTensor) are never relied on.
    Copying and pickling give an empty memo.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._key: Hashable = None
        self._references: list[weakref.ref] = []
        self._value: Any = None

    def get(self, compute: Callable[[], Any], tensors: tuple[torch.Tensor, ...], *others: Hashable) -> Any:
        """The value of `compute()`, which depends on nothing but `tensors` and `others`."""
        steps = _optimizer_steps if any(tensor.requires_grad for tensor in tensors) else None
        try:
            key = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors], others, steps
        except RuntimeError:  # made in inference mode, or without storage
            return compute()
        # the id of a tensor can be that of another one that is gone
        if key != self._key or any(reference() is None for reference in self._references):
            if any(type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for tensor in tensors):
                return compute()
            self._value = compute()
            self._key = key
            self._references = [weakref.ref(tensor) for tensor in tensors]
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memo":
        return Memo()

    def __reduce__(self) -> tuple:
        return Memo, ()


class Rows(Protocol):
    """A weight of shape (out, in) that can be had only block by block, such as a quantized one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, rows: slice) -> torch.Tensor: ...


def row_blocks(weight: torch.Tensor | Rows) -> Iterator[slice]:
    """
    Slices that cut the rows of `weight` (out, in) into at least eight blocks of at most `BLOCK_ELEMENTS` elements.
    """
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


def _is_tensor_of(weight: torch.Tensor | Rows, dtype: torch.dtype) -> bool:
    """Whether the weight can be used as it is, all at once."""
    return isinstance(weight, torch.Tensor) and weight.dtype == dtype


@torch.no_grad()
def squared_row_norm(weight: torch.Tensor | Rows) -> torch.Tensor:
    """Squared L2 norm of each row.

    Args:
        weight (`torch.Tensor` or [`Rows`]): Weight W of shape (out, in), of any floating point dtype.

    Returns:
        `torch.Tensor`: ‖W‖² of shape (out, 1), float32 (float64 for a float64 weight).
    """
    dtype = norm_dtype(weight.dtype)
    if _is_tensor_of(weight, dtype):
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True).square()
    norms = [torch.linalg.vector_norm(weight[rows].to(dtype), dim=1, keepdim=True) for rows in row_blocks(weight)]
    return torch.cat(norms).square()


@torch.no_grad()
def squared_adapted_row_norm(
    weight: torch.Tensor | Rows,
    lora_A: torch.Tensor,
    scaled_E: torch.Tensor,
    lora_B: torch.Tensor,
    squared_base_norm: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Squared L2 norm of each row of W + ΔW from the factors of ΔW, without making it.

    Expanding the square leaves products that are at most (out, r) large (https://huggingface.co/papers/2603.22276 does
    the same for DoRA):

    ```
    n² = ‖W‖² + rowsum((2 W Rᵀ + B R Rᵀ) ⊙ B),    R = c · E ⊙ A
    ```

    Rounding can push the sum below zero where W + ΔW nearly cancels, so it is clamped. The result is outside of the
    gradient graph, following section 4.3 of the DoRA paper.

    Args:
        weight (`torch.Tensor` or [`Rows`]): Weight W of shape (out, in).
        lora_A (`torch.Tensor`): Right singular vectors A of shape (r, in).
        scaled_E (`torch.Tensor`): Singular values times scaling, c · E of shape (r, 1).
        lora_B (`torch.Tensor`): Left singular vectors B of shape (out, r).
        squared_base_norm (`torch.Tensor`, *optional*): ‖W‖² of shape (out, 1), computed if it is not given.

    Returns:
        `torch.Tensor`: n² of shape (out, 1), float32 (float64 for a float64 weight).
    """
    dtype = norm_dtype(weight.dtype)
    with full_precision(weight.device):
        right = lora_A.to(dtype) * scaled_E.to(dtype)
        left = lora_B.to(dtype)
        rank = len(right)
        padded = right if rank <= 4 else nn.functional.pad(right, (0, 0, 0, -rank % PRODUCT_COLUMNS))
        if _is_tensor_of(weight, dtype):
            cross = (weight @ padded.T)[:, :rank]
        else:
            cross = torch.cat([weight[rows].to(dtype) @ padded.T for rows in row_blocks(weight)])[:, :rank]
        update = torch.addmm(cross, left, right @ right.T, beta=2).mul_(left).sum(dim=1, keepdim=True)
    if squared_base_norm is None:
        squared_base_norm = squared_row_norm(weight)
    return (squared_base_norm + update).clamp_min_(0)


def magnitude_scale(magnitude: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """The factor m / n of each output row, differentiable in m.

    A row whose norm is zero has no direction to scale. Its factor is 1, so that its output is the base model's, and
    its magnitude gets a gradient of zero.

    Args:
        magnitude (`torch.Tensor`): m of shape (out, 1).
        squared_norm (`torch.Tensor`): n² of shape (out, 1).

    Returns:
        `torch.Tensor`: m / n of shape (out, 1), in the dtype of `squared_norm`.
    """
    is_zero = squared_norm <= ZERO_ROW
    norm = squared_norm.masked_fill(is_zero, 1).sqrt()
    return (magnitude.to(norm.dtype) / norm).masked_fill(is_zero, 1)


def add_update_and_scale(
    output: torch.Tensor,
    projected: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    squared_norm: torch.Tensor,
    bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """Add the update to the output of the base layer, and scale the sum but not its bias: the layer's output h.

    Differentiable in all arguments but `squared_norm`. `output` is overwritten, unless this is compiled.

    Args:
        output (`torch.Tensor`): W x + bias of shape (..., out).
        projected (`torch.Tensor`): (c · E ⊙ A) dropout(x) of shape (..., r).
        lora_B (`torch.Tensor`): Left singular vectors B of shape (out, r).
        magnitude (`torch.Tensor`): m of shape (out, 1).
        squared_norm (`torch.Tensor`): n² of shape (out, 1), float32 or float64.
        bias (`torch.Tensor`, *optional*): Bias of shape (out,).

    Returns:
        `torch.Tensor`: h of shape (..., out), in the dtype of `output`.
    """
    if torch.compiler.is_compiling():
        update = projected @ lora_B.to(projected.dtype).T
        return scale_output(output + update, magnitude_scale(magnitude, squared_norm), bias).to(output.dtype)
    return _AddUpdateAndScale.apply(output, projected, lora_B, magnitude, squared_norm, bias)


def add_update_and_scale_(
    output: torch.Tensor,
    projected: torch.Tensor,
    lora_B: torch.Tensor,
    scale: torch.Tensor,
    bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """
    [`add_update_and_scale`] in place, for tensors that need no gradients, given the factor m / n of shape (out, 1).
    """
    sum_ = _add_update_(output, projected, lora_B)
    scaled = scale_output(sum_, scale, bias, out=sum_)
    return scaled if sum_.dtype == output.dtype else output.copy_(scaled)


def _add_update_(output: torch.Tensor, projected: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """W x + bias + ΔW x, in `output` itself unless the update has a higher precision than that."""
    if output.dtype != projected.dtype:
        dtype = torch.promote_types(output.dtype, projected.dtype)
        output, projected = output.to(dtype), projected.to(dtype)
    output = output.contiguous()
    matrix = _as_matrix(output)
    matrix.addmm_(_as_matrix(projected), lora_B.to(projected.dtype).T)
    return output


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """All leading dimensions as one."""
    return tensor if tensor.ndim == 2 else tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def scale_output(
    output: torch.Tensor, scale: torch.Tensor, bias: Optional[torch.Tensor], out: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Multiply each output feature with its factor, but not the bias that the output already holds.

    The factor stays in float32 whatever the dtype of the output: a learned one is close to 1, where bfloat16 has steps
    of 0.4 %.

    Args:
        output (`torch.Tensor`): (W + ΔW) x + bias of shape (..., out).
        scale (`torch.Tensor`): m / n of shape (out, 1), float32 or float64.
        bias (`torch.Tensor`, *optional*): Bias of shape (out,).
        out (`torch.Tensor`, *optional*): Where to write the result.

    Returns:
        `torch.Tensor`: h of shape (..., out), in the dtype of `out`, or the higher one of `output` and `scale`.
    """
    scale = scale.view(-1)
    if bias is None:
        return torch.mul(output, scale, out=out)
    if output.dtype == scale.dtype == bias.dtype:
        return torch.lerp(bias, output, scale, out=out)
    return torch.addcmul(bias - scale * bias, output, scale, out=out)


class _AddUpdateAndScale(torch.autograd.Function):
    """
    Keeps z = W x + bias + ΔW x for the backward pass. To keep h instead, which the next layer often keeps anyway,
    would save memory, but h belongs to the model, and models write to it in place.

    ```
    dz = s ⊙ dh,  dm = Σ dh ⊙ (z − bias) / n,  dP = dh (s ⊙ B),  dB = s ⊙ (dhᵀ P)    with s = m / n
    ```
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        output: torch.Tensor,
        projected: torch.Tensor,
        lora_B: torch.Tensor,
        magnitude: torch.Tensor,
        squared_norm: torch.Tensor,
        bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        scale = magnitude_scale(magnitude, squared_norm)
        # detached, but with the version counter of `output`: should somebody need its old value, autograd says so
        unscaled = _add_update_(output.detach(), projected, lora_B)
        ctx.save_for_backward(unscaled.to(output.dtype), projected, lora_B, scale, squared_norm, bias)
        ctx.magnitude_dtype = magnitude.dtype
        return scale_output(unscaled, scale, bias).to(output.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        unscaled, projected, lora_B, scale, squared_norm, bias = ctx.saved_tensors
        d_output = d_projected = d_B = d_magnitude = d_bias = None

        # one buffer of the size of the output, for dm first and then for dz
        buffer = grad * unscaled if bias is None else torch.sub(unscaled, bias.to(unscaled.dtype)).mul_(grad)
        if ctx.needs_input_grad[3]:
            dot = buffer.sum(tuple(range(grad.ndim - 1)), dtype=scale.dtype)
            # where the norm counts as zero, the scale is 1 whatever the magnitude is
            d_magnitude = (dot.unsqueeze(1) * squared_norm.rsqrt()).masked_fill(squared_norm <= ZERO_ROW, 0)
            d_magnitude = d_magnitude.to(ctx.magnitude_dtype)
        if ctx.needs_input_grad[0]:
            d_output = torch.mul(grad, scale.view(-1), out=buffer)
        dtype = torch.promote_types(grad.dtype, projected.dtype)
        grad_matrix = _as_matrix(grad).to(dtype)
        if ctx.needs_input_grad[1]:
            d_projected = (grad_matrix @ (scale * lora_B).to(dtype)).view(projected.shape).to(projected.dtype)
        if ctx.needs_input_grad[2]:
            d_B = (scale * (grad_matrix.T @ _as_matrix(projected).to(dtype))).to(lora_B.dtype)
        if ctx.needs_input_grad[5]:
            # the rest of it, s ⊙ Σ dh, arrives through the output of the base layer
            d_bias = ((1 - scale.view(-1)) * _as_matrix(grad).sum(0, dtype=scale.dtype)).to(bias.dtype)
        return d_output, d_projected, d_B, d_magnitude, None, d_bias


@torch.no_grad()
def merge_rows(
    weight: torch.Tensor | Rows,
    lora_A: torch.Tensor,
    scaled_E: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The merged weight (m / n) ⊙ (W + ΔW), a block of rows at a time.

    Args:
        weight (`torch.Tensor` or [`Rows`]): Weight W of shape (out, in).
        lora_A (`torch.Tensor`): Right singular vectors A of shape (r, in).
        scaled_E (`torch.Tensor`): Singular values times scaling, c · E of shape (r, 1).
        lora_B (`torch.Tensor`): Left singular vectors B of shape (out, r).
        magnitude (`torch.Tensor`): m of shape (out, 1).

    Yields:
        `tuple[slice, torch.Tensor]`: Which rows, and their merged values, computed in float32 and rounded once to the
        dtype of the weight.
    """
    dtype = norm_dtype(weight.dtype)
    with full_precision(weight.device):
        right = lora_A.to(dtype) * scaled_E.to(dtype)
        for rows in row_blocks(weight):
            adapted = weight[rows].to(dtype) + lora_B[rows].to(dtype) @ right
            scale = magnitude_scale(magnitude[rows], squared_row_norm(adapted))
            yield rows, (adapted * scale).to(weight.dtype)
