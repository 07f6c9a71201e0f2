"""AdaDoRA written down once more, in float64, with dense matrices and nothing of PEFT's or ours."""

from dataclasses import dataclass
from typing import Optional

import torch


@dataclass
class Reference:
    """A layer with an AdaDoRA adapter, all tensors float64 leaves that require gradients where ours do.

    W (out, in), A (r, in), E (r, 1), B (out, r), m (out, 1), bias (out,), c a float.
    """

    weight: torch.Tensor
    bias: Optional[torch.Tensor]
    lora_A: torch.Tensor
    lora_E: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor
    c: float

    @classmethod
    def of(cls, layer, adapter_name: str = "default", weight: Optional[torch.Tensor] = None) -> "Reference":
        """That of a layer, whose weight is given unless it is stored as (out, in)."""

        def leaf(tensor):
            return tensor.detach().double().clone().requires_grad_()

        base = layer.get_base_layer()
        return cls(
            weight=(base.weight if weight is None else weight).detach().double().clone(),
            bias=None if base.bias is None else base.bias.detach().double().clone(),
            lora_A=leaf(layer.lora_A[adapter_name]),
            lora_E=leaf(layer.lora_E[adapter_name]),
            lora_B=leaf(layer.lora_B[adapter_name]),
            magnitude=leaf(layer.lora_magnitude[adapter_name]),
            c=float(layer.scaling[adapter_name]) / (float(layer.ranknum[adapter_name]) + 1e-5),
        )

    def adapted_weight(self) -> torch.Tensor:
        return self.weight + self.c * self.lora_B @ torch.diag(self.lora_E.flatten()) @ self.lora_A

    def row_norm(self) -> torch.Tensor:
        return (self.adapted_weight() ** 2).sum(dim=1, keepdim=True) ** 0.5

    def merged_weight(self, detach_norm: bool = True) -> torch.Tensor:
        norm = self.row_norm()
        if detach_norm:
            norm = norm.detach()
        return self.magnitude / norm * self.adapted_weight()

    def forward(self, x: torch.Tensor, detach_norm: bool = True) -> torch.Tensor:
        output = x @ self.merged_weight(detach_norm).T
        return output if self.bias is None else output + self.bias

    def factors(self) -> dict[str, torch.Tensor]:
        return {
            "lora_A": self.lora_A,
            "lora_E": self.lora_E,
            "lora_B": self.lora_B,
            "lora_magnitude": self.magnitude,
        }

    def sums_of_absolute_terms(self, x: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output and each gradient if none of the products that they sum cancelled: their natural scales."""
        norm = self.row_norm().detach()
        factors = {name: factor.detach().abs().requires_grad_() for name, factor in self.factors().items()}
        x = x.detach().abs().double().requires_grad_()
        update = self.c * factors["lora_B"] @ (factors["lora_E"] * factors["lora_A"])
        output = x @ (self.weight.abs() + update).T
        if self.bias is not None:
            # the output of the base layer holds the bias, and its rounding error with it
            output = output + self.bias.abs()
        output = output * (factors["lora_magnitude"] / norm).T
        gradients = torch.autograd.grad(output, [x, *factors.values()], output_gradient.abs().double())
        return {"output": output.detach(), **dict(zip(["x", *factors], gradients))}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over L2 norm of the expected value; both zero counts as no error."""
    assert value.shape == expected.shape
    difference = (value.detach().double() - expected.detach().double()).norm()
    # not `difference > 0`, which NaN is not
    return 0.0 if difference == 0 else float(difference / expected.detach().double().norm())
