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
from collections.abc import Sequence
from itertools import islice

import torch

from .sharding import holds_on_all, is_sharded


Tensors = list[torch.Tensor]


def all_finite(tensors: Tensors) -> bool:
    """Whether no tensor has an entry that is infinite or NaN. With DTensors, every process has to call this."""
    if not tensors:
        return True
    local = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]
    largest = torch._foreach_norm([part for part in local if part.numel()] or [local[0].new_zeros(1)], torch.inf)
    finite = torch.stack([norm.to(local[0].device, torch.float32) for norm in largest]).isfinite().all()
    return bool(holds_on_all(finite) if any(map(is_sharded, tensors)) else finite)


def updated_averages(
    importance: Tensors, averages: Tensors, uncertainties: Tensors, beta1: float, beta2: float
) -> tuple[Tensors, Tensors]:
    """
    The exponential moving averages of the importance |w · ∂L/∂w| of each entry, and of its deviation from the average,
    one step on. All lists hold tensors of the same shapes, dtypes and devices.
    """
    # a multiplication and an addition each, so that they round as PEFT's do: `lerp` would fuse them
    averages = torch._foreach_mul(averages, beta1)
    torch._foreach_add_(averages, torch._foreach_mul(importance, 1 - beta1))
    change = torch._foreach_sub(importance, averages)
    torch._foreach_abs_(change)
    uncertainties = torch._foreach_mul(uncertainties, beta2)
    torch._foreach_add_(uncertainties, torch._foreach_mul(change, 1 - beta2))
    return averages, uncertainties


def mean_importance(averages: Tensors, uncertainties: Tensors, dim: int) -> Tensors:
    """The mean over `dim` of average times uncertainty, for matrices of which those of equal shape are stacked."""
    groups, means = defaultdict(list), {}
    for index, average in enumerate(averages):
        groups[average.shape, average.dtype, average.device].append(index)
    for indices in groups.values():
        products = torch.stack([averages[index] for index in indices])
        products.mul_(torch.stack([uncertainties[index] for index in indices]))
        means.update(zip(indices, products.mean(dim=1 + dim)))
    return [means[index] for index in range(len(averages))]


def keep_most_important(scores: Tensors, count: int) -> list[list[bool]]:
    """
    Which triplets to keep, for each layer, so that `count` remain in all layers together. Ties with the last one that
    is pruned are pruned too. `scores` has a tensor (r,) for each layer, in the dtype of the layer.
    """
    # on the CPU, which has to know the result, and has a deterministic `kthvalue`
    together = torch.cat([score.to(scores[0].device) for score in scores]).cpu()
    pruned = len(together) - count
    threshold = together.kthvalue(pruned)[0] if pruned else together.new_tensor(-torch.inf)
    # PEFT compares the scores of a layer with the threshold in the dtype of the layer
    thresholds = {dtype: threshold.to(dtype) for dtype in {score.dtype for score in scores}}
    limits = torch.cat([thresholds[score.dtype].expand(len(score)) for score in scores])
    return _as_lists((~(together <= limits)).split([len(score) for score in scores]))


def kept_triplets(values_of_E: dict[str, torch.Tensor]) -> dict[str, list[bool]]:
    """The triplets of each layer whose singular value is not exactly 0, by the keys of `values_of_E`, each (r, 1)."""
    return dict(zip(values_of_E, _as_lists([(values != 0).view(-1) for values in values_of_E.values()])))


def _as_lists(masks: Sequence[torch.Tensor]) -> list[list[bool]]:
    """The masks of all layers, with one transfer from their device."""
    kept = iter(torch.cat([mask.to(masks[0].device) for mask in masks]).tolist() if masks else ())
    return [list(islice(kept, len(mask))) for mask in masks]
