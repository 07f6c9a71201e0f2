"""How exact the row norm is in low precision: relative errors against float64, beside those of a dense norm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from cases import dtype_name
from internals import multiplying_as_cuda, squared_adapted_row_norm
from report import Table
from settings import Settings

from peft.tuners.lora.dora import DoraLinearLayer


RANK = 16


@dataclass(frozen=True)
class Factors:
    """W (out, in), A (r, in), c · E (r, 1) and B (out, r)."""

    weight: torch.Tensor
    lora_A: torch.Tensor
    scaled_E: torch.Tensor
    lora_B: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Factors":
        return Factors(*(tensor.to(dtype) for tensor in vars(self).values()))

    def update(self) -> torch.Tensor:
        return self.lora_B @ (self.lora_A * self.scaled_E)


def random_factors(
    out_features: int, in_features: Optional[int] = None, rank: int = RANK, device: Optional[torch.device] = None
) -> Factors:
    """A weight, square unless `in_features` says otherwise, and an update of about a tenth of its length."""
    torch.manual_seed(0)
    in_features = in_features or out_features
    return Factors(
        weight=0.02 * torch.randn(out_features, in_features, device=device),
        lora_A=0.02 * torch.randn(rank, in_features, device=device),
        scaled_E=torch.randn(rank, 1, device=device),
        lora_B=0.02 * torch.randn(out_features, rank, device=device),
    )


def with_outlier_columns(factors: Factors) -> Factors:
    """Four columns of the weight are 100 times as large as the others."""
    factors.weight[:, :: factors.weight.shape[1] // 4] *= 100
    return factors


def with_small_rows(factors: Factors) -> Factors:
    """Every eighth row of the weight and of the update is 1000 times smaller than the others."""
    factors.weight[::8] *= 1e-3
    factors.lora_B[::8] *= 1e-3
    return factors


def with_cancelling_rows(factors: Factors) -> Factors:
    """The update takes away all but about 3 % of the weight."""
    factors.weight.mul_(0.03 * 0.08).sub_(factors.update())
    return factors


HARD_CASES: dict[str, Callable[[Factors], Factors]] = {
    "random": lambda factors: factors,
    "outlier columns": with_outlier_columns,
    "small rows": with_small_rows,
    "rows that nearly cancel": with_cancelling_rows,
}


def dense_norm(factors: Factors) -> torch.Tensor:
    """The row norms (out,) of PEFT's DoRA, in the dtype of the factors."""
    return DoraLinearLayer(fan_in_fan_out=False).get_weight_norm(factors.weight, factors.update(), scaling=1)


def in_one_product(factors: Factors) -> torch.Tensor:
    """The row norms (out,) as a GPU makes them of a weight in low precision, whose products it sums up in float32."""
    with multiplying_as_cuda():
        return squared_adapted_row_norm(*vars(factors).values()).sqrt().view(-1)


def norms(factors: Factors) -> dict[str, torch.Tensor]:
    """Row norms (out,) of a weight in low precision with a float32 adapter, computed in different ways."""
    return {
        "from the factors": squared_adapted_row_norm(*vars(factors).values()).sqrt().view(-1),
        "from the factors in one product": in_one_product(factors),
        "dense in the weight's dtype": dense_norm(factors.to(factors.weight.dtype)),
        "dense in float32": dense_norm(factors.to(torch.float32)),
    }


def accuracy_row(name: str, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    factors = HARD_CASES[name](random_factors(settings.pick(2048, 512)))
    factors = replace(factors, weight=factors.weight.to(dtype))
    exact = dense_norm(factors.to(torch.float64))
    on_device = Factors(*(tensor.to(settings.device) for tensor in vars(factors).values()))
    row: dict[str, Any] = {"weight": name, "dtype": dtype_name(dtype)}
    for way, norm in norms(on_device).items():
        errors = (norm.cpu().double() - exact).abs() / exact
        row |= {f"{way}: max": float(errors.max()), f"{way}: mean": float(errors.mean())}
    return row


def tables(settings: Settings) -> Iterator[Table]:
    yield Table(
        "accuracy",
        "Accuracy of the norm",
        [
            accuracy_row(name, dtype, settings)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for name in HARD_CASES
        ],
        "Relative error against float64, the largest and the mean of all rows. The weight has the dtype, the adapter "
        "is float32 as PEFT makes it. Dense is the norm of PEFT's DoRA.",
    )
    yield Table(
        "cancellation",
        "Rows that the update cancels",
        [cancellation_row(share, settings) for share in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)],
        "The update takes away this share of a float32 weight. The factor is m / n for m = ‖W‖, exact and as computed "
        "(medians over rows); the error of n is relative to float64.",
    )


def cancellation_row(share: float, settings: Settings) -> dict[str, Any]:
    factors = random_factors(settings.pick(2048, 512))
    factors = replace(factors, weight=-factors.update() / share)
    exact, computed = dense_norm(factors.to(torch.float64)), norms(factors)["from the factors"].double()
    errors, norm = (computed - exact).abs() / exact, factors.weight.double().norm(dim=1)
    return {
        "share": f"{100 * share:g} %",
        "exact factor": float((norm / exact).median()),
        "factor": float((norm / computed).median()),
        "error of n: mean": float(errors.mean()),
        "error of n: max": float(errors.max()),
    }
