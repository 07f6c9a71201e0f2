"""Forms of the row norm n = ‖W + ΔW‖ (out, 1), as functions of W (out, in), A (r, in), c · E (r, 1) and B (out, r)."""

from collections.abc import Callable

import torch
from internals import blockwise, product_alone, row_norm, squared_adapted_row_norm
from names import BLOCKS, DENSE_NORM, KEPT, ONE_PART, TWO_PARTS


Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def from_products(
    squared_base_norm: torch.Tensor, products: torch.Tensor, right: torch.Tensor, left: torch.Tensor
) -> torch.Tensor:
    """n from ‖W‖² (out, 1), W Rᵀ (out, r), R = c · E ⊙ A (r, in) and B (out, r)."""
    inner = torch.addmm(products, left, right @ right.T, beta=2)
    squared_norm = torch.baddbmm(squared_base_norm[..., None], inner[:, None], left[..., None])
    return squared_norm.squeeze(-1).clamp_min(0).sqrt()


def product_in_one_part(weight: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """W Rᵀ (out, r) in float32, with R (r, in) rounded to the dtype of W."""
    rounded = right.to(weight.dtype)
    if weight.device.type == "cpu":
        return weight.to(right.dtype) @ rounded.to(right.dtype).T
    return torch.mm(weight, rounded.T, out_dtype=right.dtype)


def as_it_is(weight: torch.Tensor, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    return squared_adapted_row_norm(weight, lora_A, scaled_E, lora_B).sqrt()


def with_base_norm(squared_base_norm: torch.Tensor) -> Norm:
    """The form as it is, without the time of ‖W‖², which is given."""

    def norm(weight: torch.Tensor, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        right = lora_A * scaled_E
        return from_products(squared_base_norm, product_alone(weight, right), right, lora_B)

    return norm


def in_one_part(
    weight: torch.Tensor, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor
) -> torch.Tensor:
    right = lora_A * scaled_E
    return from_products(row_norm(weight).square(), product_in_one_part(weight, right), right, lora_B)


def in_float32_blocks(
    weight: torch.Tensor, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor
) -> torch.Tensor:
    right = lora_A * scaled_E
    products = torch.cat([rows @ right.T for rows in blockwise(weight)])
    return from_products(row_norm(weight).square(), products, right, lora_B)


def dense(weight: torch.Tensor, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight + lora_B @ (lora_A * scaled_E), dim=1, keepdim=True)


def forms(weight: torch.Tensor) -> dict[str, Norm]:
    """All forms by name, with ‖W‖² of this weight kept for the form that keeps it."""
    return {
        TWO_PARTS: as_it_is,
        KEPT: with_base_norm(row_norm(weight).square()),
        ONE_PART: in_one_part,
        BLOCKS: in_float32_blocks,
        DENSE_NORM: dense,
    }
