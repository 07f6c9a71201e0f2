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

"""Which layers can have a magnitude, checked before a model is touched."""

import copy
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers

from .base_weight import has_computed_weight
from .config import AdaLoraConfig
from .parameter_names import layers_of_state_dict
from .quantized import resolve_backend


FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Forward passes that compute W x + b, or the convolution, from the weight and the bias of the module.
KNOWN_FORWARDS = {
    "torch.nn.modules.linear.Linear.forward",
    "torch.nn.modules.conv.Conv2d.forward",
    "torch.nn.modules.conv.Conv2d._conv_forward",
    "transformers.pytorch_utils.Conv1D.forward",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
    "bitsandbytes.nn.modules.Linear4bit.forward",
    "bitsandbytes.nn.modules.Linear8bitLt.forward",
}


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward pass of a module is not one of `KNOWN_FORWARDS`, whatever its base class is."""
    # accelerate's hooks replace the forward pass by one that calls it
    forwards = [getattr(module, "_old_forward", module.forward), getattr(module, "_conv_forward", module.forward)]
    names = {f"{forward.__module__}.{getattr(forward, '__qualname__', '')}" for forward in forwards}
    return not names <= KNOWN_FORWARDS


def check_magnitude_support(module: nn.Module, name: str = "", fan_in_fan_out: Optional[bool] = None) -> None:
    """
    Check that a module, called `name` in the message, can have a magnitude.

    Raises:
        `NotImplementedError`:
            If the module is not an `nn.Linear`, a `Conv1D` of transformers, an `nn.Conv2d`, or a linear layer whose
            weight PEFT can dequantize; if it has a forward pass of its own, or a computed weight; or if its weight is
            not stored as `fan_in_fan_out` says, (in, out) or (out, in).
    """
    where = f"module {name!r}" if name else "the given module"
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if has_computed_weight(module):
        raise NotImplementedError(
            f"The weight of {where}, a {kind}, is computed for each forward pass, as by weight_norm, spectral_norm or "
            "pruning, so a merged weight would not last; remove what computes it, or leave the module out of "
            "`target_modules`."
        )
    weight, backend = getattr(module, "weight", None), resolve_backend(module)
    if (
        not (backend.supports_merge if backend else isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)))
        # packed under another name, as by compressed-tensors
        or not isinstance(weight, torch.Tensor)
        # never called: the attention takes its weight and makes the product itself
        or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        or isinstance(weight, nn.parameter.UninitializedTensorMixin)
        or (backend is None and weight.dtype not in FLOAT_DTYPES)
    ):
        if isinstance(weight, torch.Tensor):
            kind += f" with a weight of type {type(weight).__name__} and dtype {weight.dtype}"
        raise NotImplementedError(
            "`use_dora_adaptive=True` supports nn.Linear, transformers' Conv1D, nn.Conv2d, the 4-bit and 8-bit linear "
            f"layers of bitsandbytes, and weight-only quantization of torchao, but {where} is a {kind}; leave it out "
            "of `target_modules`."
        )
    if has_own_forward(module):
        raise NotImplementedError(
            f"The forward pass of {where}, a {kind}, is not a known one, so it may not compute with the stored "
            "weight; leave the module out of `target_modules`."
        )
    if fan_in_fan_out is not None and fan_in_fan_out != isinstance(module, Conv1D):
        stored = "is not stored transposed" if fan_in_fan_out else "is stored transposed"
        raise NotImplementedError(
            f"`fan_in_fan_out={fan_in_fan_out}` does not fit {where}, a {kind}, whose weight {stored}; set it to "
            f"{not fan_in_fan_out}."
        )


def check_targets(
    tuner: BaseTuner, model: nn.Module, config: AdaLoraConfig, state_dict: Optional[dict[str, Any]]
) -> None:
    """Raise as [`check_magnitude_support`] if a module that `inject_adapter` would adapt is not supported."""
    # on a copy, because `inject_adapter` warns about what it resolves in the config itself
    config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
    config = _maybe_include_all_linear_layers(config, model)
    names_in_state_dict = layers_of_state_dict(state_dict or {}, tuner.prefix)
    inside_adapter_layer = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside_adapter_layer):
            continue
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
            inside_adapter_layer = (*inside_adapter_layer, f"{name}.")
        if name in names_in_state_dict if state_dict else tuner._check_target_module_exists(config, name):
            check_magnitude_support(module, name)


def avoid_fast_path(model: nn.Module) -> None:
    """
    Have `nn.TransformerEncoder` call its adapted layers. Its fast path in eval mode reads their weights instead, and
    is not taken where a layer has a hook.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(layer, BaseTunerLayer) for layer in module.modules()
        ):
            module.use_nested_tensor = False  # only the fast path computes with nested tensors
        for layer in module.children() if isinstance(module, nn.TransformerEncoderLayer) else ():
            if isinstance(layer, BaseTunerLayer) and _do_nothing not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_do_nothing)


def _do_nothing(*_: Any) -> None:
    """A hook that does nothing."""
