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

"""AdaLoRA's regularization of the factors towards orthogonality."""

import torch
from torch import nn


def orthogonality_loss(layers: list[nn.Module], adapter_name: str) -> torch.Tensor:
    """
    The mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius norms) over all layers, for A (r, in) and B (out, r) that FSDP2
    may have sharded.
    """
    losses = []
    for layer in layers:
        for factor, is_transposed in ((layer.lora_A[adapter_name], False), (layer.lora_B[adapter_name], True)):
            rows = factor.full_tensor() if hasattr(factor, "full_tensor") else factor
            rows = rows.T if is_transposed else rows
            identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            losses.append(torch.linalg.norm(rows @ rows.T - identity))
    return torch.stack(losses).mean()
