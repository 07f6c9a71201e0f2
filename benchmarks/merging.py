"""How exact a merged weight is: its relative error, beside that of the exact one stored in the same way."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from internals import base_rows, base_weight, overwrite_base_weight
from report import Table
from settings import Settings
from torch import nn
from transformers import TorchAoConfig
from transformers.pytorch_utils import Conv1D

from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import AdaLoraLayer


try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None
try:
    from torchao import quantization as torchao
except ImportError:
    torchao = None


def quantized(width: int, kind: str, compress_statistics: bool = False) -> nn.Module:
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(width, width, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(width, width, quant_type=kind, compress_statistics=compress_statistics)
    layer.load_state_dict(nn.Linear(width, width).state_dict())
    return layer


def quantized_by_torchao(width: int, config: Any) -> nn.Module:
    layer = nn.Linear(width, width)
    torchao.quantize_(layer, config)
    return layer


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "Linear, float32": lambda width: nn.Linear(width, width),
    "Linear, bfloat16": lambda width: nn.Linear(width, width).bfloat16(),
    "Linear, float16": lambda width: nn.Linear(width, width).half(),
    "Conv1D, float32": lambda width: Conv1D(width, width),
    "Conv2d, float32": lambda width: nn.Conv2d(width // 8, width, 3),
}
if bitsandbytes is not None:
    LAYERS |= {
        "bitsandbytes 8-bit": lambda width: quantized(width, "int8"),
        "bitsandbytes nf4": lambda width: quantized(width, "nf4"),
        "bitsandbytes nf4, double quantization": lambda width: quantized(width, "nf4", True),
        "bitsandbytes fp4": lambda width: quantized(width, "fp4"),
    }
TORCHAO = {}
if torchao is not None:
    TORCHAO = {
        "torchao int8, weight only": torchao.Int8WeightOnlyConfig(),
        "torchao int8 in groups, weight only": torchao.IntxWeightOnlyConfig(),
        "torchao int4 in groups, weight only": torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "torchao float8, weight only": torchao.Float8WeightOnlyConfig(),
    }
    LAYERS |= {name: partial(quantized_by_torchao, config=config) for name, config in TORCHAO.items()}


def matrix(layer: AdaLoraLayer) -> torch.Tensor:
    """The base weight of a layer, (out, in), float64."""
    return base_rows(layer)[:].double().cpu().clone()


def relative_error(layer: AdaLoraLayer, exact: torch.Tensor) -> float:
    return float((matrix(layer) - exact).norm() / exact.norm())


@torch.no_grad()
def store(layer: AdaLoraLayer, rows: torch.Tensor) -> None:
    """Give a layer another base weight, (out, in), in the layer's own format."""
    weight = base_weight(layer)
    values = rows.T if isinstance(layer.get_base_layer(), Conv1D) else rows.view(weight.shape)
    overwrite_base_weight(layer, values.to(weight))


@torch.no_grad()
def merge_row(name: str, settings: Settings) -> dict[str, Any]:
    torch.manual_seed(0)
    wrapped = nn.Module()
    wrapped.layer = LAYERS[name](settings.pick(1024, 256)).to(settings.device)
    # as transformers says of the models that it quantizes
    wrapped.is_loaded_in_8bit, wrapped.is_loaded_in_4bit = "8-bit" in name, "4" in name.partition("bitsandbytes")[2]
    if name in TORCHAO:
        wrapped.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(TORCHAO[name]))
    config = AdaLoraConfig(
        target_modules=["layer"], init_r=16, fan_in_fan_out="Conv1D" in name, total_step=1000, use_dora_adaptive=True
    )
    model = get_peft_model(wrapped, config)
    layer = model.base_model.model.layer
    # an update of about a tenth of the weight's length, and magnitudes moved by 10 %
    layer.lora_E["default"].normal_()
    update = layer.lora_B["default"] @ (layer.lora_A["default"] * layer.lora_E["default"])
    weight = matrix(layer)
    layer.scaling["default"] *= 0.1 * float(weight.norm() / update.norm()) / layer.scaling["default"] * 16
    magnitude = layer.lora_magnitude["default"]
    magnitude.mul_(1 + 0.1 * torch.randn_like(magnitude))

    lora_A, scaled_E, lora_B = (factor.double().cpu() for factor in layer.update_factors("default"))
    adapted = weight + lora_B @ (scaled_E * lora_A)
    exact = magnitude.double().cpu() / adapted.norm(dim=1, keepdim=True) * adapted
    stored = copy.deepcopy(layer)
    store(stored, exact)
    model.merge_adapter()
    return {
        "layer": name,
        "merged": relative_error(layer, exact),
        "the exact weight, stored": relative_error(stored, exact),
    }


def tables(settings: Settings) -> Iterator[Table]:
    yield Table(
        "merging",
        "Accuracy of merging",
        [merge_row(name, settings) for name in LAYERS],
        "‖merged − exact‖ / ‖exact‖ of the weight, the exact one being (m / n) ⊙ (W + ΔW) in float64, and the same "
        "for the exact one stored in the layer's own format.",
    )
