"""The methods that are compared.

- AdaLoRA: PEFT's own, the reference of all ratios.
- LoRA: PEFT's own, at the same rank; only where a section asks for it.
- DoRA: PEFT's LoRA with `use_dora=True`, at the same rank.
- AdaDoRA: `AdaLoraConfig(use_dora_adaptive=True)`.
- AdaDoRA, dense norm: the yardstick, AdaDoRA as one would write it down at first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from names import ADADORA, ADALORA, DENSE, DORA, LORA, RANK
from torch import nn

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.adalora import SVDLinear
from peft.tuners.tuners_utils import BaseTunerLayer


ADAPTER = "default"
LORA_ALPHA = 16


class DenseNormSVDLinear(SVDLinear):
    """AdaDoRA with a dense norm: each forward pass makes W + ΔW of shape (out, in) to take the norm of its rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base_layer = self.get_base_layer()
        lora_A, lora_E, lora_B = self.lora_A[ADAPTER], self.lora_E[ADAPTER], self.lora_B[ADAPTER]
        scaling = self.scaling[ADAPTER] / (self.ranknum[ADAPTER] + 1e-5)
        with torch.no_grad():
            adapted = base_layer.weight + self.get_delta_weight(ADAPTER)  # (out, in)
            norm = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)  # (out, 1)
        scale = (self.lora_magnitude[ADAPTER] / norm).view(-1)
        result = nn.functional.linear(x, base_layer.weight)
        update = self.lora_dropout[ADAPTER](x.to(lora_A.dtype)) @ (lora_A * lora_E).T @ lora_B.T * scaling
        output = (scale * (result + update)).to(result.dtype)
        return output if base_layer.bias is None else output + base_layer.bias


@dataclass(frozen=True)
class Variant:
    """
    Args:
        config: Makes the PEFT config from a rank and the targets.
        layer_class: Replaces the class of the adapted layers, if given.
    """

    config: Callable[..., PeftConfig]
    layer_class: Optional[type[SVDLinear]] = None


def adalora_config(rank: int, **kwargs: Any) -> AdaLoraConfig:
    schedule = {
        "init_r": rank,
        "target_r": max(1, rank // 2),
        "tinit": 100,
        "tfinal": 100,
        "total_step": 1000,
        "deltaT": 1,
    }
    return AdaLoraConfig(**schedule, lora_alpha=LORA_ALPHA, **kwargs)


def adadora_config(rank: int, **kwargs: Any) -> AdaLoraConfig:
    return adalora_config(rank, use_dora_adaptive=True, **kwargs)


def lora_config(rank: int, **kwargs: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=LORA_ALPHA, **kwargs)


def dora_config(rank: int, **kwargs: Any) -> LoraConfig:
    return lora_config(rank, use_dora=True, **kwargs)


VARIANTS = {
    ADALORA: Variant(adalora_config),
    DORA: Variant(dora_config),
    ADADORA: Variant(adadora_config),
    DENSE: Variant(adadora_config, DenseNormSVDLinear),
}
WITH_LORA = {LORA: Variant(lora_config), **VARIANTS}


@torch.no_grad()
def randomize_adapter(model: nn.Module) -> None:
    """Give an adapter the look of a trained one: no factor is zero, and the magnitudes have moved by 10 %."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=1.0 if "lora_E" in name else 0.02)


def adapt(base: nn.Module, variant: str, rank: int = RANK, **config_kwargs: Any) -> PeftModel:
    """Adapt a model in place. The adapter weights are random, and the same for both kinds of AdaDoRA."""
    choice = WITH_LORA[variant]
    model = get_peft_model(base, choice.config(rank, **config_kwargs))
    randomize_adapter(model)
    if choice.layer_class is not None:
        for layer in adapted_layers(model):
            layer.__class__ = choice.layer_class
    return model


def adapted_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
