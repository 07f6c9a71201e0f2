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

"""The importance of AdaLoRA's singular triplets, in functions of lists of tensors (section 3.2 of the AdaLoRA paper,
https://openreview.net/forum?id=lq62uWRJjiY). All layers are computed at once, and round as PEFT's allocator does."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from .parameter_names import DIM_OF_RANK, FACTORS
from .rows import norm_dtype
from .sharding import check_not_flattened, full_shape, is_sharded, layout, local_indices, local_part, sum_over_shards


Tensors = list[torch.Tensor]


def all_finite(tensors: Tensors) -> torch.Tensor | bool:
    """
    Whether no tensor has an entry that is infinite or NaN: a tensor, so that the host need not wait for a device or
    another process, or a bool if all tensors are on the host. With DTensors, every process has to call this.
    """
    local = [part for part in map(local_part, tensors) if part.numel()] or [torch.zeros(1)]
    largest = torch._foreach_norm(local, torch.inf)
    finite = torch.stack([norm.to(local[0].device, torch.float32) for norm in largest]).isfinite().all()
    for of_mesh in {tensor.device_mesh: layout(tensor) for tensor in tensors if is_sharded(tensor)}.values():
        finite = sum_over_shards([(~finite).int()], *of_mesh)[0] == 0
    return finite if finite.device.type != "cpu" or any(map(is_sharded, tensors)) else bool(finite)


def gradients_of(model: nn.Module) -> Tensors:
    """The dense gradients of all parameters that have one."""
    return [param.grad for param in model.parameters() if param.grad is not None and not param.grad.is_sparse]


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def update_scores_(
    scores: Sequence[Tensors], importance: Tensors, finite: torch.Tensor | bool, beta1: float, beta2: float
) -> None:
    """
    Update the scores of each entry by one step, unless a gradient is not finite. `scores` has three lists of tensors:
    the importance |w · ∂L/∂w|, its exponential moving average, and the moving average of its deviation from that
    average. `importance` has the new importance.
    """
    if finite is False:
        return
    # a multiplication and an addition each, so that they round as PEFT's do: `lerp` would fuse them
    average = torch._foreach_mul(scores[1], beta1)
    torch._foreach_add_(average, torch._foreach_mul(importance, 1 - beta1))
    change = torch._foreach_sub(importance, average)
    torch._foreach_abs_(change)
    uncertainty = torch._foreach_mul(scores[2], beta2)
    torch._foreach_add_(uncertainty, torch._foreach_mul(change, 1 - beta2))
    for old, new in zip(scores, (importance, average, uncertainty)):
        if finite is not True:
            chosen = torch.where(finite.to(new[0].device), flat(new), flat(old))
            new = [part.view_as(tensor) for part, tensor in zip(chosen.split([tensor.numel() for tensor in old]), old)]
        torch._foreach_copy_(old, new)


def mean_products(factors: Sequence[Tensors], dims: Sequence[int]) -> Tensors:
    """
    The mean over one dimension of the elementwise product of matrices, one from each list in `factors`. Those of equal
    shape are stacked. Each process multiplies its shards of DTensors, and one all-reduce sums the results.
    """
    groups, parts, means = defaultdict(list), defaultdict(dict), {}
    for index, (matrix, dim) in enumerate(zip(factors[0], dims)):
        check_not_flattened(matrix)
        groups[dim, full_shape(matrix), matrix.dtype, matrix.device, layout(matrix)].append(index)
    for (dim, shape, dtype, *_), indices in groups.items():
        products = torch.stack([local_part(factors[0][index]) for index in indices])
        for others in factors[1:]:
            products.mul_(torch.stack([local_part(others[index]) for index in indices]))
        first = factors[0][indices[0]]
        if is_sharded(first):
            sums = products.sum(dim=1 + dim, dtype=norm_dtype(dtype)) / shape[dim]
            of_all = sums.new_zeros(len(indices), shape[1 - dim])
            of_all[:, local_indices(first, 1 - dim)] = sums
            parts[layout(first)].update(zip(indices, of_all))
        else:
            means.update(zip(indices, products.mean(dim=1 + dim)))
    for of_mesh, of_indices in parts.items():
        sums = sum_over_shards(list(of_indices.values()), *of_mesh)
        means.update((index, total.to(factors[0][index].dtype)) for index, total in zip(of_indices, sums))
    return [means[index] for index in range(len(dims))]


def triplet_scores(averages: dict[str, torch.Tensor], uncertainties: dict[str, torch.Tensor], names: list) -> Tensors:
    """
    The importance of the triplets of each layer, (r,): the importance of the singular value plus the mean importance
    of each vector's elements. `names` has a place for the name of the factor.
    """
    keys = [name % part for part in FACTORS for name in names]
    dims = [1 - dim for dim in DIM_OF_RANK.values() for _ in names]
    means = mean_products([[scores[key] for key in keys] for scores in (averages, uncertainties)], dims)
    of = {part: means[index * len(names) : (index + 1) * len(names)] for index, part in enumerate(FACTORS)}
    return torch._foreach_add(of["lora_E"], torch._foreach_add(of["lora_A"], of["lora_B"]))


def keep_most_important(scores: Tensors, pruned: int) -> list[list[bool]]:
    """
    Which triplets to keep, for each layer, if `pruned` of all layers together go. Ties with the last one that is
    pruned are pruned too. `scores` has a tensor (r,) for each layer, in the dtype of the layer.
    """
    # on the CPU, which has to know the result, and has a deterministic `kthvalue`
    together = torch.cat([score.to(scores[0].device) for score in scores]).cpu()
    threshold = together.kthvalue(pruned)[0] if pruned else together.new_tensor(-torch.inf)
    # PEFT compares the scores of a layer with the threshold in the dtype of the layer
    thresholds = {dtype: threshold.to(dtype) for dtype in {score.dtype for score in scores}}
    limits = torch.cat([thresholds[score.dtype].expand(len(score)) for score in scores])
    return _as_lists((~(together <= limits)).split([len(score) for score in scores]))


def kept_triplets(values_of_E: dict[str, torch.Tensor]) -> dict[str, list[bool]]:
    """The triplets of each layer whose singular value is not exactly 0, by the keys of `values_of_E`, each (r, 1)."""
    full = mean_products([list(values_of_E.values())], [1] * len(values_of_E))
    return dict(zip(values_of_E, _as_lists([values != 0 for values in full])))


def _as_lists(masks: Sequence[torch.Tensor]) -> list[list[bool]]:
    """The masks of all layers, with one transfer from their device."""
    kept = iter(torch.cat([mask.to(masks[0].device) for mask in masks]).tolist() if masks else ())
    return [list(islice(kept, len(mask))) for mask in masks]
