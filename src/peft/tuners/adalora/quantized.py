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

"""Quantized weights by blocks of rows, which PEFT's backends lack: they dequantize a weight all at once.

[`resolve_backend`] returns PEFT's `QuantizationBackend` of a layer, with a method `get_base_rows` if single rows can
be dequantized.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from peft.utils.integrations import get_bnb_param_type
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    TorchaoBackend,
    resolve_quantization_backend,
)

from .sharding import gather_full


# torchao's weights that give single rows to dequantize
TORCHAO_WEIGHTS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def resolve_backend(base_layer: nn.Module) -> Optional[QuantizationBackend]:
    """PEFT's backend for the weight of a layer, or `None` if it is not quantized."""
    weight = getattr(base_layer, "weight", None)
    kind = get_bnb_param_type(weight)
    if kind:
        return RowsOf4bit() if kind == "4bit" else RowsOf8bit()
    if not type(weight).__module__.startswith("torchao."):
        return resolve_quantization_backend(base_layer)
    # a layer that quantizes its input as well passes no gradient back to it
    quantizes_input = any(getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    if quantizes_input or type(weight).__name__ not in TORCHAO_WEIGHTS:
        return ForwardOnlyQuantizationBackend("torchao")
    return RowsOfTorchao(None)


def learn_how_to_quantize(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Give layers with torchao weights the function of the model's config that quantizes again after a merge."""
    quantization_config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    how = getattr(quantization_config, "get_apply_tensor_subclass", None)
    for layer in layers:
        if isinstance(layer.quantization_backend, TorchaoBackend):
            layer.quantization_backend.get_apply_tensor_subclass = how


@dataclass
class Rows:
    """A quantized weight of `shape` (out, in), on `device`. `rows[start:stop]` are `dequantize(start, stop)`."""

    shape: torch.Size
    dtype: torch.dtype  # of the dequantized values
    device: torch.device
    dequantize: Callable[[int, int], torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self.dequantize(start, stop)


def get_quantized_rows(backend: QuantizationBackend, base_layer: nn.Module) -> torch.Tensor | Rows:
    """The rows of a quantized weight block by block, or all of them if the backend dequantizes it all at once."""
    return getattr(backend, "get_base_rows", backend.get_base_weight)(base_layer)


class RowsOf8bit(Bnb8bitBackend):
    """8-bit weights of bitsandbytes: an integer for each value, and a scale for each row."""

    def get_base_rows(self, base_layer: nn.Module) -> torch.Tensor | Rows:
        weight = base_layer.weight
        if weight.dtype != torch.int8:
            return weight.detach()  # not yet: bitsandbytes quantizes when a weight moves to a device
        # the largest absolute value of each row; the layer takes it over from the weight in its first forward pass
        row_max = base_layer.state.SCB if weight.SCB is None else weight.SCB

        def dequantize(start: int, stop: int) -> torch.Tensor:
            return weight.data[start:stop] * (row_max[start:stop].to(weight.device, torch.float32).view(-1, 1) / 127)

        return Rows(weight.shape, torch.float32, weight.device, dequantize)


class RowsOf4bit(Bnb4bitBackend):
    """4-bit weights of bitsandbytes: two values to a byte, and a scale for each block of them."""

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return self.get_base_rows(base_layer)[:]  # of packed ones, too

    def get_base_rows(self, base_layer: nn.Module) -> torch.Tensor | Rows:
        from bitsandbytes import functional as bnb

        weight = base_layer.weight
        # the layer keeps what a sharded weight loses
        state = getattr(weight, "quant_state", None) or getattr(base_layer, "quant_state", None)
        if state is None:
            return weight.detach()  # not yet: bitsandbytes quantizes when a weight moves to a device
        packed, absmax, dtype = gather_full(weight.data), state.absmax, state.dtype
        if getattr(state, "packing_format_for_cpu", False):
            # in eval mode bitsandbytes reorders weights for CPUs with AVX512-BF16; a copy, because undoing it changes
            # the state
            absmax, dtype = absmax.T.reshape(-1).float(), state.original_dtype
            state = copy.copy(state)
            state.original_nested = False
            packed, _ = bnb._convert_weight_packed_for_cpu_inverse(packed, state)
        elif state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        if packed.dtype != torch.uint8:  # an option of bitsandbytes; the tracer of jit does not know such views
            packed = packed.view(torch.uint8)
        packed = packed.reshape(-1, 1)
        out_features, in_features = state.shape
        size = state.blocksize

        def dequantize(start: int, stop: int) -> torch.Tensor:
            # whole blocks of quantization, two values to a byte
            first, last = start * in_features // size, -(-stop * in_features // size)
            end = min(last * size, out_features * in_features)
            part = bnb.QuantState(
                absmax=absmax[first:last],
                shape=torch.Size([end - first * size]),
                code=state.code,
                blocksize=size,
                quant_type=state.quant_type,
                dtype=dtype,
            )
            values = bnb.dequantize_4bit(packed[first * size // 2 : -(-end // 2)], part).view(-1)
            return values[start * in_features - first * size :][: (stop - start) * in_features].view(-1, in_features)

        return Rows(state.shape, dtype, packed.device, dequantize)


class RowsOfTorchao(TorchaoBackend):
    """
    Weight-only quantization of torchao. `get_apply_tensor_subclass` tells how to quantize again after a merge. It is
    `None` if the model was loaded without a `TorchAoConfig`.
    """

    def get_base_rows(self, base_layer: nn.Module) -> Rows:
        weight: Any = base_layer.weight

        def dequantize(start: int, stop: int) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return weight[start:stop].dequantize().detach()
            if torch.jit.is_tracing():
                # as an operation on the weight: the tensors that it wraps would be constants that cannot be compared
                identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
                return nn.functional.linear(identity, weight)[:, start:stop].T.detach()
            # inside of torch.func's transforms a slice would be no tensor of torchao's, and inference mode refuses it
            with torch.inference_mode(False), torch._C._DisableFuncTorch():
                return weight[start:stop].dequantize().detach()

        return Rows(weight.shape, weight.dtype, weight.device, dequantize)
