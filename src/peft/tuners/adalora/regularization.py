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

"""AdaLoRA's regularization, which pulls the factors towards orthogonality."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from .sharding import check_not_flattened, is_sharded


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
