"""All names inside of `peft.tuners.adalora` that the benchmarks use, in one place, so that a rename is one edit."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from peft.tuners.adalora import rows, variants
from peft.tuners.adalora.adadora import adapted_output, squared_adapted_row_norm
from peft.tuners.adalora.base_weight import base_weight
from peft.tuners.adalora.merging import overwrite_base_weight
from peft.tuners.adalora.rows import blockwise, matmul_rows, row_norm
from peft.tuners.adalora.stock_layer import RankAllocator as StockRankAllocator


__all__ = [
    "StockRankAllocator",
    "adapted_output",
    "base_rows",
    "base_weight",
    "blockwise",
    "multiplying_as_cuda",
    "overwrite_base_weight",
    "product_alone",
    "replaced",
    "row_norm",
    "squared_adapted_row_norm",
]


def base_rows(layer: torch.nn.Module) -> torch.Tensor:
    """W of a layer as a matrix (out, in), detached."""
    return layer.get_base_rows()


def product_alone(weight: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """W Rᵀ (out, r) as the layers compute it, without the norm of W (out, in) that they compute with it."""
    with patch.object(rows, "row_norm", lambda weight: weight.new_empty(0, 1)):
        return matmul_rows(weight, right)[0]


@contextmanager
def multiplying_as_cuda() -> Iterator[None]:
    """A context in which weights in low precision are multiplied on any device as on a GPU, summed up in float32."""

    def is_low(weight: torch.Tensor) -> bool:
        return weight.dtype in (torch.bfloat16, torch.float16)

    def product(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return left.to(out_dtype) @ right.to(out_dtype)

    with patch.object(rows, "multiplies_into_float32", is_low), patch.object(torch, "mm", product):
        yield


@contextmanager
def replaced(**functions: Callable[..., torch.Tensor]) -> Iterator[None]:
    """A context in which the layers call other functions for `adapted_output` or `squared_adapted_row_norm`."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch.object(variants, name, function))
        yield
