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

"""
The frozen weight of an adapted layer as a matrix of shape (out, in), whatever the layer and however it is stored.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type

from .config import AdaLoraConfig
from .sharding import copy_whole_, is_sharded


FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# of which rows can be taken and dequantized
TORCHAO_WEIGHTS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def is_torchao(weight: torch.Tensor) -> bool:
    """Whether torchao holds a weight that is supported, told without importing it and so that it compiles."""
    return type(weight).__name__ in TORCHAO_WEIGHTS


def _is_unsupported_torchao(weight: torch.Tensor) -> bool:
    # a layer that quantizes its input as well passes no gradient back to it
    quantizes_input = any(getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    return type(weight).__module__.startswith("torchao.") and (quantizes_input or not is_torchao(weight))


def check_magnitude_support(module: nn.Module, name: str = "", fan_in_fan_out: Optional[bool] = None) -> None:
    """
    Check that the lengths of the rows of a module's weight can be learned.

    Args:
        module (`nn.Module`):
            The module to adapt.
        name (`str`, *optional*):
            The path of the module, for the error message.
        fan_in_fan_out (`bool`, *optional*):
            Whether the weight is said to be stored as (in, out). Not checked if `None`.

    Raises:
        `NotImplementedError`:
            If the module is none of `nn.Linear`, `Conv1D` of transformers, `nn.Conv2d`, the 4-bit and 8-bit linear
            layers of bitsandbytes, and `nn.Linear` of which torchao quantized the weight, but not the input, to 8
            bits, or if `fan_in_fan_out` does not say how it stores its weight.
    """
    where = f"module {name!r}" if name else "the given module"
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    weight = getattr(module, "weight", None)
    if (
        not isinstance(module, (nn.Linear, Conv1D, nn.Conv2d))
        # packed under another name, as by compressed-tensors
        or not isinstance(weight, torch.Tensor)
        # never called: the attention takes its weight and makes the product itself
        or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        or _is_unsupported_torchao(weight)
        or (not get_bnb_param_type(weight) and weight.dtype not in FLOAT_DTYPES)
    ):
        if isinstance(weight, torch.Tensor):
            kind += f" with a weight of type {type(weight).__name__} and dtype {weight.dtype}"
        raise NotImplementedError(
            "`use_dora_adaptive=True` supports nn.Linear, transformers' Conv1D, nn.Conv2d, the 4-bit and 8-bit linear "
            f"layers of bitsandbytes, and weight-only 8-bit quantization of torchao, but {where} is a {kind}; leave "
            "it out of `target_modules`."
        )
    if fan_in_fan_out and not isinstance(module, Conv1D):
        raise NotImplementedError(
            f"`fan_in_fan_out=True` does not fit {where}, a {kind}, whose weight is not stored transposed; set it to "
            "False."
        )
    if fan_in_fan_out is False and isinstance(module, Conv1D):
        raise NotImplementedError(
            f"`fan_in_fan_out=False` does not fit {where}, a {kind}, whose weight is stored transposed; set it to "
            "True."
        )


def checked_config(
    config: AdaLoraConfig, base_layer: nn.Module, use_dora_adaptive: Optional[bool] = None
) -> AdaLoraConfig:
    """
    A config with its `use_dora_adaptive` replaced, unless by `None`, after [`check_magnitude_support`] if it is set.
    """
    if use_dora_adaptive is not None:
        config = copy.copy(config)
        config.use_dora_adaptive = use_dora_adaptive
    if config.use_dora_adaptive:
        innermost = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        check_magnitude_support(innermost, fan_in_fan_out=config.fan_in_fan_out)
    return config


@dataclass
class QuantizedRows:
    """
    A quantized weight, of which indexing with a slice dequantizes a block of rows.

    Args:
        shape (`torch.Size`): (out, in).
        dtype (`torch.dtype`): That of the dequantized values.
        device (`torch.device`): Where the weight is.
        dequantize (`Callable`): Gives the rows from one index to another, of shape (rows, in).
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    dequantize: Callable[[int, int], torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self.dequantize(start, stop)


def quantization(module: nn.Module) -> Optional[str]:
    """
    How the weight of a layer is quantized: `"4bit"` or `"8bit"` by bitsandbytes, `"torchao"`, or `None` if it is not,
    or not yet; bitsandbytes quantizes when a weight moves to a device.
    """
    kind = get_bnb_param_type(module.weight)
    if kind == "4bit":
        return kind if _quant_state(module) is not None else None
    if kind == "8bit":
        return kind if module.weight.dtype == torch.int8 else None
    return "torchao" if is_torchao(module.weight) else None


def weight_rows(module: nn.Module, weight: Optional[torch.Tensor] = None) -> torch.Tensor | QuantizedRows:
    """
    The weight of a layer as a matrix of shape (out, in): a view of it or, if it is quantized, an object that
    dequantizes blocks of its rows. Nothing is copied.

    Args:
        module (`nn.Module`):
            A layer that [`check_magnitude_support`] accepts.
        weight (`torch.Tensor`, *optional*):
            What to take for its weight, stored like that one.
    """
    if weight is None:
        weight = module.weight.detach()
    kind = quantization(module)
    if kind == "4bit":
        return _rows_of_4bit(module)
    if kind == "8bit":
        return _rows_of_8bit(module)
    if kind == "torchao":
        return QuantizedRows(
            weight.shape, weight.dtype, weight.device, lambda start, stop: weight[start:stop].dequantize()
        )
    if isinstance(module, Conv1D):
        return weight.T
    return weight.flatten(1)


def stored_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that change when a weight does: those that it wraps, or the weight itself."""
    if is_torchao(weight):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight]


def _quant_state(module: nn.Module) -> Any:
    """How a 4-bit weight is quantized, or `None` if it is not yet."""
    state = getattr(module.weight, "quant_state", None)
    # the layer keeps what a sharded weight loses
    return getattr(module, "quant_state", None) if state is None else state


def _rows_of_4bit(module: nn.Module) -> QuantizedRows:
    from bitsandbytes import functional as bnb

    state = _quant_state(module)
    packed, absmax, dtype = module.weight.data.view(torch.uint8).reshape(-1, 1), state.absmax, state.dtype
    if getattr(state, "packing_format_for_cpu", False):
        # in eval mode bitsandbytes reorders weights for CPUs with AVX512-BF16; a copy, because undoing it changes the
        # state
        absmax, dtype = absmax.T.reshape(-1).float(), state.original_dtype
        state = copy.copy(state)
        state.original_nested = False
        packed, _ = bnb._convert_weight_packed_for_cpu_inverse(module.weight.data, state)
        packed = packed.view(torch.uint8).reshape(-1, 1)
    elif state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
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

    return QuantizedRows(state.shape, dtype, packed.device, dequantize)


def _rows_of_8bit(module: nn.Module) -> QuantizedRows:
    weight = module.weight
    # the largest absolute value of each row; the layer takes it over from the weight in its first forward pass
    row_max = module.state.SCB if weight.SCB is None else weight.SCB

    def dequantize(start: int, stop: int) -> torch.Tensor:
        return weight.data[start:stop] * (row_max[start:stop].to(weight.device, torch.float32).view(-1, 1) / 127)

    return QuantizedRows(weight.shape, torch.float32, weight.device, dequantize)


def check_overwrite(module: nn.Module, torchao_config: Any) -> None:
    """Raise a `NotImplementedError` if [`overwrite_weight`] cannot quantize the weight of a layer again."""
    if is_torchao(module.weight) and torchao_config is None:
        raise NotImplementedError(
            "The model does not say how torchao quantized its weights, so the merged weight cannot be quantized; load "
            "the model with the `TorchAoConfig` of transformers."
        )


@torch.no_grad()
def overwrite_weight(
    module: nn.Module, blocks: Iterable[tuple[slice, torch.Tensor]], torchao_config: Any = None
) -> None:
    """
    Give a layer another weight, which is quantized again if it was.

    Args:
        module (`nn.Module`):
            A layer that [`check_magnitude_support`] accepts.
        blocks (`Iterable[tuple[slice, torch.Tensor]]`):
            All rows of the weight as a matrix of shape (out, in), block by block: which rows, and their values.
        torchao_config (`torchao.core.config.AOBaseConfig`, *optional*):
            How to quantize, for a weight of torchao.
    """
    weight = module.weight
    if is_torchao(weight):
        from torchao import quantize_

        # it quantizes a layer, because such a weight cannot be written in place
        stand_in = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        stand_in.weight = nn.Parameter(torch.cat([values for _, values in blocks]), requires_grad=False)
        quantize_(stand_in, torchao_config)
        module.weight = stand_in.weight
    elif quantization(module) is not None:
        options = {
            key: value
            for key, value in vars(weight).items()
            if key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        # as bitsandbytes wants it: it quantizes what moves from the CPU
        values = torch.cat([values for _, values in blocks]).cpu()
        module.weight = type(weight)(values, requires_grad=False, module=module, **options).to(weight.device)
        if hasattr(module, "state"):
            module.state.reset_grads()
    elif is_sharded(weight):
        values = torch.cat([values for _, values in blocks])
        copy_whole_(weight, values.T if isinstance(module, Conv1D) else values.view(weight.shape))
    else:
        rows_of_weight = weight_rows(module)
        for rows, values in blocks:
            rows_of_weight[rows] = values
