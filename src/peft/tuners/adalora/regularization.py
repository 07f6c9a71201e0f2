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

from .rows import norm_dtype
from .sharding import check_not_flattened, is_sharded, layout, sum_over_shards


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
            if is_sharded(factor) and [p.dim for p in factor.placements if p.is_shard()] != [0]:
                factor = factor.full_tensor()
            groups[is_transposed, factor.shape, factor.dtype, factor.device, layout(factor)].append(factor)
    products, sharded = [], defaultdict(dict)
    for (is_transposed, shape, dtype, _, of_shards), factors in groups.items():
        if of_shards:
            local = torch.stack([factor.to_local() for factor in factors])
            sharded[of_shards][is_transposed, shape, dtype] = local.mT if is_transposed else local
        else:
            stacked = torch.stack(factors)
            products.append(stacked.mT @ stacked if is_transposed else stacked @ stacked.mT)
    for of_shards, stacks in sharded.items():
        products += products_of_shards(stacks, *of_shards)
    norms = []
    for product in products:
        identity = torch.eye(product.shape[1], dtype=product.dtype, device=product.device)
        norms.append(torch.linalg.matrix_norm(product - identity))
    return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


def products_of_shards(stacks: dict[tuple, torch.Tensor], mesh: Any, placements: tuple) -> list[torch.Tensor]:
    """
    V Vᵀ (layers, r, r) of each stack, V = A and V = Bᵀ, where FSDP2 shards the rows of A and B. An all-to-all changes
    the rows of all A for columns, and their gradients back. An all-reduce sums what each process has multiplied.
    """
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    (mesh_dim,) = (index for index, placement in enumerate(placements) if placement.is_shard())
    size, sent, columns = mesh.size(mesh_dim), [], iter(())
    for (is_transposed, (rank, length), _), rows in stacks.items():
        if not is_transposed:
            rows = nn.functional.pad(rows, (0, -length % size, 0, -(-rank // size) - rows.shape[1]))
            sent.append(rows.unflatten(2, (size, -1)).movedim(2, 0))  # (processes, layers, rows, columns)
    if sent:
        together = torch.cat([part.flatten(1) for part in sent], dim=1)
        received = all_to_all_single_autograd(together, None, None, mesh.get_group(mesh_dim))
        received = received.split([part[0].numel() for part in sent], dim=1)
        columns = (values.view(part.shape).movedim(1, 0).flatten(1, 2) for values, part in zip(received, sent))
    vectors = (stack if key[0] else next(columns)[:, : key[1][0]] for key, stack in stacks.items())
    products = [(part @ part.mT).to(norm_dtype(part.dtype)) for part in vectors]
    return sum_over_shards(products, mesh, placements)
