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
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Optional

import torch
from torch import nn

from .config import AdaLoraConfig
from .parameter_names import adapted_layers
from .rows import full_precision, norm_dtype
from .sharding import check_not_flattened, has_master_copy, is_sharded, layout, local_part, sum_over_shards


Factor = tuple[torch.Tensor, bool]  # A or B, and whether it is B, whose columns have to be orthogonal


def add_orthogonality_loss(
    outputs: Any, layers: Collection[nn.Module], adapter_name: str, weight: float, on_gradient: Callable[[], None]
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


def factors_of(layers: Iterable[nn.Module], adapter_name: str) -> list[Factor]:
    """A and B of each layer."""
    factors = []
    for layer in layers:
        factors += [(layer.lora_A[adapter_name], False), (layer.lora_B[adapter_name], True)]
    for factor, _ in factors:
        check_not_flattened(factor)
    return factors


def orthogonality_loss(layers: Iterable[nn.Module], adapter_name: str) -> torch.Tensor:
    """
    The mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius norms) over all layers, for A (r, in) and B (out, r), which may be
    sharded by FSDP2.
    """
    norms = [torch.linalg.matrix_norm(matrices) for _, matrices in differences(factors_of(layers, adapter_name))]
    return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()


def differences(factors: Sequence[Factor]) -> list[tuple[list[int], torch.Tensor]]:
    """
    A Aᵀ − I and Bᵀ B − I (factors, r, r), of factors of equal shape at once, with the indices of these factors. The
    matrices of sharded factors are the same on every process.
    """
    groups = defaultdict(list)
    for index, (factor, is_B) in enumerate(factors):
        if is_sharded(factor) and [placement.dim for placement in factor.placements if placement.is_shard()] != [0]:
            factor = factor.full_tensor()
        groups[is_B, factor.shape, factor.dtype, factor.device, layout(factor)].append((index, factor))
    products, sharded = [], defaultdict(dict)
    for (is_B, shape, dtype, _, of_shards), members in groups.items():
        indices, tensors = map(list, zip(*members))
        if of_shards:
            local = torch.stack([factor.to_local() for factor in tensors])
            sharded[of_shards][is_B, shape, dtype] = indices, local.mT if is_B else local
        else:
            stacked = torch.stack(tensors)
            products.append((indices, stacked.mT @ stacked if is_B else stacked @ stacked.mT))
    for of_shards, stacks in sharded.items():
        sums = products_of_shards({key: stack for key, (_, stack) in stacks.items()}, *of_shards)
        products += zip((indices for indices, _ in stacks.values()), sums)
    return [
        (indices, product - torch.eye(product.shape[1], dtype=product.dtype, device=product.device))
        for indices, product in products
    ]


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


def factors_to_orthogonalize(
    model: nn.Module, adapter_name: str, config: AdaLoraConfig, optimizer: Optional[torch.optim.Optimizer]
) -> list[tuple[Factor, Any]]:
    """
    A and B of all layers that an optimizer trains, each with its learning rate, for [`orthogonalize_`]. None if the
    config does not decouple the regularization, or gives it no weight.

    Raises:
        `ValueError`:
            If there is no optimizer, or if it trains none of the factors.
        `NotImplementedError`:
            With DeepSpeed, which trains copies of the factors.
    """
    if not config.orth_reg_decoupled or not config.orth_reg_weight:
        return []
    rates = {param: group["lr"] for group in getattr(optimizer, "param_groups", ()) for param in group["params"]}
    factors = factors_of(adapted_layers(model, adapter_name).values(), adapter_name)
    if any(has_master_copy(factor) for factor, _ in factors):
        raise NotImplementedError(
            "`orth_reg_decoupled=True` does not work with DeepSpeed, which trains copies of the factors; leave it "
            "out, and set `orth_reg_weight` back to 0.5."
        )
    # transformers' Adafactor has a rate of `None` if it chooses its own
    known = [((factor, is_B), rates[factor]) for factor, is_B in factors if rates.get(factor) is not None]
    if not known:
        raise ValueError(
            "`orth_reg_decoupled=True` needs the optimizer that trains the adapter, and its learning rate; call "
            "`update_and_allocate(step, optimizer)`."
        )
    # a frozen factor may be in the optimizer, which passes it over
    return [(factor, rate) for factor, rate in known if factor[0].requires_grad]


@torch.no_grad()
def orthogonalize_(trained: list[tuple[Factor, Any]], weight: float | torch.Tensor) -> None:
    """
    Move A (r, in) and B (out, r) towards orthogonality, apart from the optimizer's moments, as AdamW does with weight
    decay (Loshchilov and Hutter, ICLR 2019):

    ```
    A ← A − η D A / (1 + η ‖D‖)    with D = A Aᵀ − I and η = learning rate · weight
    B ← B − η B D / (1 + η ‖D‖)    with D = Bᵀ B − I
    ```

    D A is a quarter of the gradient of ‖D‖². The denominator keeps large factors from overshooting.

    Args:
        trained (`list[tuple[Factor, Any]]`): What [`factors_to_orthogonalize`] has returned, if that is not empty.
        weight (`float` or `torch.Tensor`): `orth_reg_weight` of the config, or 0 if the optimizer's step was skipped.
    """
    factors = [factor for (factor, _), _ in trained]
    leaves = [factor.detach().to(norm_dtype(factor.dtype)).requires_grad_() for factor in factors]
    with torch.enable_grad(), full_precision(leaves[0].device):
        terms = []
        for indices, matrices in differences([(leaf, is_B) for leaf, ((_, is_B), _) in zip(leaves, trained)]):
            # a learning rate may be a tensor (1,)
            rates = [torch.as_tensor(trained[index][1], dtype=matrices.dtype).reshape(()) for index in indices]
            rate = torch.stack(rates).to(matrices) * torch.as_tensor(weight, dtype=matrices.dtype).to(matrices.device)
            norm = torch.linalg.matrix_norm(matrices.detach())
            step = rate / (1 + rate * norm)
            terms.append((step * matrices.square().sum(dim=(1, 2))).sum() / 4)
        updates = torch.autograd.grad(terms, leaves)
    new = torch._foreach_sub([local_part(leaf) for leaf in leaves], [local_part(update) for update in updates])
    torch._foreach_copy_([local_part(factor) for factor in factors], new)
