"""What a reviewer would ask: AdaDoRA with one thing changed."""

from typing import Any

import torch
from torch import nn

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.adalora import AdaLoraLayer, SVDLinear


ADAPTER = "default"
NO_REGULARIZATION = 1e-9  # has no effect, like 0; all runs in the logs have this weight
LORAPLUS_RATIO = 16  # of B's learning rate to A's, as the authors of LoRA+ have it


class Ablation:
    """No change at all. Each ablation overrides what it changes."""

    allocates_first = False
    # the first rank over the last: AdaLoRA starts with 1.5 times the rank that it ends with, as its authors did
    start = 1.5

    def change(self, model: PeftModel) -> None:
        """Change a fresh model."""

    def change_by_examples(self, model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
        """Change a fresh model by what training examples show."""

    def groups(self, model: PeftModel, lr: float) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters."""
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]

    def after_allocation(self, model: PeftModel, step: int) -> None:
        """Called at the end of each step, with its number, counted from 1."""


def layers(model: PeftModel) -> list[AdaLoraLayer]:
    return [module for module in model.modules() if isinstance(module, AdaLoraLayer)]


@torch.no_grad()
def start_along(layer: AdaLoraLayer, left: torch.Tensor, right: torch.Tensor) -> None:
    """Let B and A of a layer start with the first of some directions: of `left` (out, n) and of `right` (n, in)."""
    rank = layer.r[ADAPTER]
    layer.lora_B[ADAPTER].copy_(left[:, :rank])
    layer.lora_A[ADAPTER].copy_(right[:rank])


class FixedMagnitude(Ablation):
    def change(self, model: PeftModel) -> None:
        for layer in layers(model):
            layer.lora_magnitude[ADAPTER].requires_grad_(False)


class DifferentiatedNormLinear(SVDLinear):
    """AdaDoRA with a dense norm that gradients flow through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base_layer = self.get_base_layer()
        adapted = base_layer.weight + self.get_delta_weight(ADAPTER)
        magnitude = self.lora_magnitude[ADAPTER]
        norm = torch.linalg.vector_norm(adapted, dim=1, keepdim=True)
        return nn.functional.linear(x, magnitude / norm * adapted, base_layer.bias)


class DifferentiatedNorm(Ablation):
    def change(self, model: PeftModel) -> None:
        for layer in layers(model):
            layer.__class__ = DifferentiatedNormLinear


class LearningRate(Ablation):
    """Some of the parameters have a learning rate of their own."""

    def __init__(self, part: str, factor: float) -> None:
        self.part = part
        self.factor = factor

    def groups(self, model: PeftModel, lr: float) -> list[dict[str, Any]]:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for name, parameter in named if self.part not in name]},
            {"params": [parameter for name, parameter in named if self.part in name], "lr": self.factor * lr},
        ]


class Regularization(Ablation):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def change(self, model: PeftModel) -> None:
        model.peft_config[ADAPTER].orth_reg_weight = self.weight


class RegularizationInTurns(Regularization):
    """The weight of the regularization is another one from the step on at which pruning begins."""

    def __init__(self, before: float, after: float) -> None:
        super().__init__(before)
        self.after = after

    def after_allocation(self, model: PeftModel, step: int) -> None:
        config = model.peft_config[ADAPTER]
        if step == config.tinit:
            config.orth_reg_weight = self.after


class Decoupled(Ablation):
    """The regularization is a step of its own after the optimizer's, not a term of the loss."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def change(self, model: PeftModel) -> None:
        config = model.peft_config[ADAPTER]
        config.orth_reg_decoupled, config.orth_reg_weight = True, self.weight


class AllocationFirst(Ablation):
    allocates_first = True


class ScaleOfKeptRank(Ablation):
    """Divide `lora_alpha` by the rank that is kept instead of that of the start."""

    @torch.no_grad()
    def after_allocation(self, model: PeftModel, step: int) -> None:
        for layer in layers(model):
            layer.ranknum[ADAPTER].fill_(max(1, int(layer.lora_E[ADAPTER].count_nonzero())))


class OrthonormalStart(Ablation):
    @torch.no_grad()
    def change(self, model: PeftModel) -> None:
        for layer in layers(model):
            nn.init.orthogonal_(layer.lora_A[ADAPTER])
            nn.init.orthogonal_(layer.lora_B[ADAPTER])


class LoraStart(Ablation):
    """
    E is 1, B is 0 and A as in LoRA, so that B learns from the first step on; without the regularization, which B
    fails.
    """

    @torch.no_grad()
    def change(self, model: PeftModel) -> None:
        model.peft_config[ADAPTER].orth_reg_weight = NO_REGULARIZATION
        for layer in layers(model):
            nn.init.kaiming_uniform_(layer.lora_A[ADAPTER], a=5**0.5)
            nn.init.ones_(layer.lora_E[ADAPTER])
            nn.init.zeros_(layer.lora_B[ADAPTER])


class ConstantRank(Ablation):
    """All layers have the final rank from the first step to the last, so nothing is pruned."""

    start = 1.0


class GradientStart(Ablation):
    """B and A start along the directions of their rank in which the loss falls fastest. E stays 0."""

    def change_by_examples(self, model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
        weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers(model)]
        with model.disable_adapter():
            gradients = torch.autograd.grad(model(**batch).loss, weights)
        for layer, weight, gradient in zip(layers(model), weights, gradients):
            weight.requires_grad_(False)
            left, _, right = torch.svd_lowrank(gradient, q=layer.r[ADAPTER] + 4, niter=4)
            start_along(layer, left, right.T)


class WeightStart(Ablation):
    """B and A start along the directions of their rank in which the base weight is largest. E stays 0."""

    @torch.no_grad()
    def change(self, model: PeftModel) -> None:
        for layer in layers(model):
            left, _, right = torch.linalg.svd(layer.get_base_layer().weight, full_matrices=False)
            start_along(layer, left, right)


class Together(Ablation):
    """Ablations of which the last decides about the optimizer's groups."""

    def __init__(self, *ablations: Ablation) -> None:
        self.ablations = ablations

    def change(self, model: PeftModel) -> None:
        for ablation in self.ablations:
            ablation.change(model)

    def change_by_examples(self, model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
        for ablation in self.ablations:
            ablation.change_by_examples(model, batch)

    def groups(self, model: PeftModel, lr: float) -> list[dict[str, Any]]:
        return self.ablations[-1].groups(model, lr)

    def after_allocation(self, model: PeftModel, step: int) -> None:
        for ablation in self.ablations:
            ablation.after_allocation(model, step)


class LoraPlus(Ablation):
    """
    The groups of PEFT's `create_loraplus_optimizer`, which gives the magnitude the base learning rate.

    Args:
        magnitude_with_b: Give it B's instead, which the magnitude of PEFT's DoRA has.
    """

    def __init__(self, magnitude_with_b: bool) -> None:
        self.magnitude_with_b = magnitude_with_b

    def groups(self, model: PeftModel, lr: float) -> list[dict[str, Any]]:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=LORAPLUS_RATIO)
        base, *others = ({"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups)
        if self.magnitude_with_b:
            magnitudes = [layer.lora_magnitude[ADAPTER] for layer in layers(model)]
            moved = {id(magnitude) for magnitude in magnitudes}
            base["params"] = [param for param in base["params"] if id(param) not in moved]
            others.append({"params": magnitudes, "lr": LORAPLUS_RATIO * lr})
        return [base, *others]


ABLATIONS = {
    "magnitude fixed": FixedMagnitude(),
    "norm in the gradient": DifferentiatedNorm(),
    "learning rate of m / 10": LearningRate("lora_magnitude", 0.1),
    "learning rate of m · 10": LearningRate("lora_magnitude", 10),
    "learning rate of E · 10": LearningRate("lora_E", 10),
    "no regularization": Regularization(NO_REGULARIZATION),
    "allocation before the optimizer's step": AllocationFirst(),
    "scale by the rank kept": ScaleOfKeptRank(),
    "orthonormal start": OrthonormalStart(),
    "LoRA's start": LoraStart(),
}
# another learning rate may suit these, so they have trials of their own
TUNED = ("orthonormal start", "LoRA's start")
# how LoRA+ can treat the magnitude, with base learning rates that are tuned
LORAPLUS = {
    "LoRA+, m at the base rate": LoraPlus(magnitude_with_b=False),
    "LoRA+, m at B's rate": LoraPlus(magnitude_with_b=True),
}
FASTER_E = LearningRate("lora_E", 10)
# what may mend the slow start; each has trials of its own
SLOW_START = {
    "start along the gradient": GradientStart(),
    "learning rate of E · 10": FASTER_E,
    "start along the gradient, learning rate of E · 10": Together(GradientStart(), FASTER_E),
    "start along the gradient, no regularization": Together(GradientStart(), Regularization(NO_REGULARIZATION)),
    "start along the weight": WeightStart(),
    "orthonormal start": OrthonormalStart(),
    "LoRA's start": LoraStart(),
    "constant rank": ConstantRank(),
    "no regularization": Regularization(NO_REGULARIZATION),
}
DECOUPLED, WITHOUT = "decoupled regularization", "no regularization"
UNTIL_PRUNING, FROM_PRUNING = "regularization until pruning", "regularization from pruning on"
ORTHONORMAL = "orthonormal start, no regularization"
SLOWER_HEAD = "learning rate of the classifier / 4"
PEFT_WEIGHT = 0.5  # PEFT's default for the regularization
# forms of the regularization, and what may stand in for one; each has trials of its own
REGULARIZATIONS = {
    DECOUPLED: Decoupled(10.0),
    WITHOUT: Regularization(NO_REGULARIZATION),
    UNTIL_PRUNING: RegularizationInTurns(PEFT_WEIGHT, NO_REGULARIZATION),
    FROM_PRUNING: RegularizationInTurns(NO_REGULARIZATION, PEFT_WEIGHT),
    ORTHONORMAL: Together(OrthonormalStart(), Regularization(NO_REGULARIZATION)),
    SLOWER_HEAD: LearningRate("classifier", 0.25),
}
# the decoupled regularization with one thing changed
OF_DECOUPLED = {
    f"decoupled, {name}": Together(REGULARIZATIONS[DECOUPLED], ABLATIONS[name])
    for name in (
        "magnitude fixed",
        "norm in the gradient",
        "learning rate of m / 10",
        "learning rate of m · 10",
        "scale by the rank kept",
    )
} | {f"decoupled, weight {weight:g}": Decoupled(weight) for weight in (3.0, 30.0)}
ALL = ABLATIONS | LORAPLUS | SLOW_START | REGULARIZATIONS | OF_DECOUPLED
