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

"""AdaLoRA's regularization, which pulls the factors towards orthogonality: a term of the loss or a step."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any, Optional

import torch
from torch import nn

from .parameter_names import adapted_layers
from .sharding import check_not_flattened, copy_full_, gather_full, has_master_copy, is_sharded


def add_orthogonality_loss(
    outputs: Any,
    layers: Collection[nn.Module],
    adapter_name: str,
    weight: float,
    on_gradient: Callable[[], None],
) -> None:
    """
    Add `weight` times [`orthogonality_loss`] to the loss of a model's outputs, if they have one. A backward pass of
    this loss calls `on_gradient`; trainers that compute a loss of their own never start one.
    """
    if not layers or not isinstance(getattr(outputs, "loss", None), torch.Tensor):
        return
    term = weight * orthogonality_loss(layers, adapter_name)
    if torch.compiler.is_compiling():  # which would have to leave the graph for a hook
        on_gradient()
    elif term.requires_grad:
        term.register_hook(lambda _: on_gradient())
    outputs.loss = outputs.loss + term


def orthogonality_loss(layers: Iterable[nn.Module], adapter_name: str) -> torch.Tensor:
    """
    The mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius norms) over all layers, for A (r, in) and B (out, r), which may be
    sharded by FSDP2. Factors of equal shape are multiplied at once.
    """
    groups = defaultdict(list)
    for layer in layers:
        for factor, is_transposed in ((layer.lora_A[adapter_name], False), (layer.lora_B[adapter_name], True)):
            check_not_flattened(factor)
            factor = factor.full_tensor() if is_sharded(factor) else factor
            groups[is_transposed, factor.shape, factor.dtype, factor.device].append(factor)
    norms = []
    for (is_transposed, *_), factors in groups.items():
        stacked = torch.stack(factors)
        products = stacked.mT @ stacked if is_transposed else stacked @ stacked.mT
        identity = torch.eye(products.shape[1], dtype=products.dtype, device=products.device)
        norms.append(torch.linalg.matrix_norm(products - identity))
    return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


def factors_to_orthogonalize(
    model: nn.Module, adapter_name: str, optimizer: Optional[torch.optim.Optimizer]
) -> dict[tuple[Any, ...], list[nn.Parameter]]:
    """
    A and B of all layers that an optimizer trains, for [`orthogonalize_`]: by whether columns have to be orthogonal
    (those of B), shape, dtype, device and learning rate.

    Raises:
        `ValueError`: If there is no optimizer, or if it trains none of the factors.
        `NotImplementedError`: With DeepSpeed, which trains copies of the factors.
    """
    layers = adapted_layers(model, adapter_name).values()
    factors = [(layer.lora_A[adapter_name], False) for layer in layers]
    factors += [(layer.lora_B[adapter_name], True) for layer in layers]
    if any(has_master_copy(factor) for factor, _ in factors):
        raise NotImplementedError(
            "`orth_reg_decoupled=True` does not work with DeepSpeed, which trains copies of the factors; set it to "
            "`False`."
        )
    rates = {param: group["lr"] for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}
    groups = defaultdict(list)
    for factor, is_transposed in factors:
        if factor in rates:
            check_not_flattened(factor)
            groups[is_transposed, factor.shape, factor.dtype, factor.device, rates[factor]].append(factor)
    if not groups:
        raise ValueError(
            "`orth_reg_decoupled=True` needs the optimizer that trains the adapter; call `update_and_allocate(step, "
            "optimizer)`."
        )
    return groups


@torch.no_grad()
def orthogonalize_(groups: dict[tuple[Any, ...], list[nn.Parameter]], weight: float) -> None:
    """
    Move A (r, in) and B (out, r) towards orthogonality, apart from the optimizer's moments, as AdamW does with weight
    decay (Loshchilov and Hutter, ICLR 2019):

        A ← A − η D A / (1 + η ‖D‖)    with D = A Aᵀ − I and η = learning rate · weight
        B ← B − η B D / (1 + η ‖D‖)    with D = Bᵀ B − I

    D A is a quarter of the gradient of ‖D‖². The denominator keeps large factors from overshooting.

    Args:
        groups (`dict[tuple, list[nn.Parameter]]`): What [`factors_to_orthogonalize`] has returned.
        weight (`float`): `orth_reg_weight` of the config.
    """
    for (is_transposed, *_, rate), factors in groups.items():
        stacked = torch.stack([gather_full(factor) for factor in factors]).float()
        rows = stacked.mT if is_transposed else stacked
        difference = rows @ rows.mT - torch.eye(rows.shape[1], device=rows.device)
        step = rate * weight / (1 + rate * weight * torch.linalg.matrix_norm(difference, keepdim=True))
        rows = rows - step * difference @ rows
        for factor, values in zip(factors, rows.mT if is_transposed else rows):
            copy_full_(factor, values)
