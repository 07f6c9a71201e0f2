"""Every kind of layer that can have an AdaDoRA adapter, against the float64 reference."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import allocations, make_config, train_by_hand
from reference import Reference, relative_error
from torch import nn
from transformers import TorchAoConfig
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners import adalora
from peft.tuners.adalora import AdaLoraLayer, SVDLinear


try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None
try:
    from torchao import quantization as torchao
except ImportError:
    torchao = None


@dataclass
class Kind:
    """
    A kind of layer.

    Args:
        make: Gives such a layer, with random weights.
        rows: The weight of such a layer as a float64 matrix of shape (out, in), all at once.
        forward: The output of such a layer, float64, were its weight this matrix (and its bias zero).
        input_shape: The shape of an input.
        output_error: By how much the layer's own output may differ from the exact one of its weight, relative.
        input_gradient_error: The same of the gradient of the input, which the layer itself passes back.
        eval_error: By how much the scale may be off in eval mode, where bitsandbytes rounds the scales of 4-bit
            weights to bfloat16 on CPUs that compute with it.
        merge_error: By how much the merged weight may differ from the exact one, relative, as a function of it.
        torchao_config: How torchao quantizes such a layer.
    """

    make: Callable[[], nn.Module]
    rows: Callable[[nn.Module], torch.Tensor]
    forward: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    input_shape: tuple[int, ...]
    output_error: float = 1e-5
    input_gradient_error: float = 1e-5
    eval_error: float = 1e-5
    merge_error: Callable[[torch.Tensor], float] = lambda merged: 1e-5
    torchao_config: Any = None


def linear_forward(base: nn.Module, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return x @ matrix.T


def convolution_forward(base: nn.Conv2d, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(base).double()
    return twin._conv_forward(x, matrix.view(twin.weight.shape), None)


def make_conv1d() -> Conv1D:
    layer = Conv1D(24, 40)
    nn.init.normal_(layer.bias)
    return layer


def convolution(input_shape: tuple[int, ...] = (2, 4, 9, 8), **kwargs) -> Kind:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **kwargs}
    return Kind(
        make=lambda: nn.Conv2d(**options),
        rows=lambda base: base.weight.detach().double().flatten(1),
        forward=convolution_forward,
        input_shape=input_shape,
    )


def quantize(linear: nn.Linear, quant_type: str, compress_statistics: bool = False) -> nn.Module:
    shape = linear.in_features, linear.out_features, linear.bias is not None
    if quant_type == "int8":
        layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(*shape, quant_type=quant_type, compress_statistics=compress_statistics)
    layer.load_state_dict(linear.state_dict())
    return layer.to(linear.weight.dtype).to("cpu")


def rows_of_4bit(base: nn.Module) -> torch.Tensor:
    if getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        # only the layer itself knows how to read it
        return (base(torch.eye(base.in_features)) - (0 if base.bias is None else base.bias)).double().T
    return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()


def rows_of_8bit(base: nn.Module) -> torch.Tensor:
    row_max = base.state.SCB if base.weight.SCB is None else base.weight.SCB
    return base.weight.data.double() * row_max.double().view(-1, 1) / 127


def four_bit(quant_type: str, compress_statistics: bool = False, dtype: torch.dtype = torch.float32) -> Kind:
    def requantizing_error(merged: torch.Tensor) -> float:
        # of the very method that the layer is quantized with, all at once, and a little for different roundings
        packed, state = bnb.functional.quantize_4bit(
            merged.to(dtype), quant_type=quant_type, compress_statistics=compress_statistics
        )
        return relative_error(bnb.functional.dequantize_4bit(packed, state), merged) * 1.02

    return Kind(
        make=lambda: quantize(nn.Linear(128, 32).to(dtype), quant_type, compress_statistics),
        rows=rows_of_4bit,
        forward=linear_forward,
        input_shape=(16, 128),
        output_error=1e-5 if dtype == torch.float32 else 4e-3,
        eval_error=2e-3 if bnb.functional.has_avx512bf16() else 1e-5,
        merge_error=requantizing_error,
    )


def eight_bit_error(merged: torch.Tensor) -> float:
    row_max = merged.abs().amax(dim=1, keepdim=True)
    return relative_error((merged / row_max * 127).round() * row_max / 127, merged) * 1.02


def quantize_by_torchao(weight: torch.Tensor, config: Any, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=bias, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach())
    torchao.quantize_(layer, config)
    return layer


def torchao_kind(config: Any, dtype: torch.dtype = torch.float32, **errors: float) -> Kind:
    def requantizing_error(merged: torch.Tensor) -> float:
        return relative_error(quantize_by_torchao(merged.to(dtype), config).weight.dequantize(), merged) * 1.02

    return Kind(
        make=lambda: quantize_by_torchao(nn.Linear(128, 32).to(dtype).weight, config),
        rows=lambda base: base.weight.dequantize().double(),
        forward=linear_forward,
        input_shape=(16, 128),
        merge_error=requantizing_error,
        **errors,
        torchao_config=config,
    )


KINDS = {
    "Conv1D": Kind(make_conv1d, lambda base: base.weight.detach().double().T, linear_forward, (16, 40)),
    "Conv2d": convolution(),
    "Conv2d-strided": convolution(stride=(2, 1), padding=(1, 2), dilation=2),
    "Conv2d-reflecting": convolution(padding=2, padding_mode="reflect", bias=False),
    "Conv2d-same": convolution(padding="same", kernel_size=(3, 2)),
    "Conv2d-grouped": convolution(groups=2),
    "Conv2d-depthwise": convolution(in_channels=4, out_channels=8, groups=4),
    "Conv2d-unbatched": convolution(input_shape=(4, 9, 8)),
    "Conv2d-1x1": convolution(kernel_size=1),
}
if bnb is not None:
    KINDS |= {
        "nf4": four_bit("nf4"),
        "nf4-double": four_bit("nf4", compress_statistics=True),
        "nf4-bfloat16": four_bit("nf4", compress_statistics=True, dtype=torch.bfloat16),
        "fp4": four_bit("fp4"),
        "int8": Kind(
            make=lambda: quantize(nn.Linear(128, 32), "int8"),
            rows=rows_of_8bit,
            forward=linear_forward,
            input_shape=(16, 128),
            # the layer rounds its input to 8 bits, too
            output_error=2e-2,
            merge_error=eight_bit_error,
        ),
    }
if torchao is not None:
    KINDS |= {
        "torchao-int8": torchao_kind(torchao.Int8WeightOnlyConfig()),
        "torchao-int8-bfloat16": torchao_kind(
            torchao.Int8WeightOnlyConfig(), torch.bfloat16, output_error=4e-3, input_gradient_error=4e-3
        ),
        "torchao-intx": torchao_kind(torchao.IntxWeightOnlyConfig()),
        "torchao-int4": torchao_kind(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
        "torchao-float8": torchao_kind(torchao.Float8WeightOnlyConfig()),
    }
QUANTIZED_BY_BNB = [name for name in KINDS if name.startswith(("nf4", "fp4", "int8"))]
QUANTIZED_BY_TORCHAO = [name for name in KINDS if name.startswith("torchao")]


class Model(nn.Module):
    """A model of one layer, in a place that a config can name."""

    is_loaded_in_8bit = is_loaded_in_4bit = False

    def __init__(self, layer: nn.Module, torchao_config: Any = None) -> None:
        super().__init__()
        self.layer = layer
        if torchao_config is not None:
            self.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(torchao_config))
        if bnb is not None:
            # as transformers says of the models that it quantizes
            self.is_loaded_in_8bit = isinstance(layer, bnb.nn.Linear8bitLt)
            self.is_loaded_in_4bit = isinstance(layer, bnb.nn.Linear4bit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def make_model(kind: Kind, trained: bool = True, seed: int = 0, **config_kwargs) -> PeftModel:
    torch.manual_seed(seed)
    defaults = {"target_modules": ["layer"], "init_r": 5, "fan_in_fan_out": kind is KINDS["Conv1D"]}
    model = get_peft_model(Model(kind.make(), kind.torchao_config), make_config(**{**defaults, **config_kwargs}))
    if trained:
        train_by_hand(layer_of(model))
    return model


def layer_of(model: PeftModel) -> AdaLoraLayer:
    return model.base_model.model.layer


def reference_of(kind: Kind, layer: AdaLoraLayer) -> Reference:
    return Reference.of(layer, weight=kind.rows(layer.get_base_layer()))


def reference_output(
    kind: Kind, layer: AdaLoraLayer, reference: Reference, x: torch.Tensor, output_of_base: bool = False
) -> torch.Tensor:
    """
    The exact output of the layer or, with `output_of_base`, that of exact arithmetic around the base layer's output.
    """
    base = layer.get_base_layer()
    shape = (-1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)
    scale = (reference.magnitude / reference.row_norm().detach()).view(shape)
    bias = 0 if reference.bias is None else reference.bias.view(shape)
    if output_of_base:
        # straight through: the value is that of the layer, the gradient that of its dequantized weight
        exact = kind.forward(base, x, reference.weight)
        unscaled = exact + (base(x.float()).double() - bias - exact).detach()
        unscaled = unscaled + kind.forward(base, x, reference.adapted_weight() - reference.weight)
        return scale * unscaled + bias
    return kind.forward(base, x, reference.merged_weight()) + bias


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request) -> Kind:
    return request.param


def scale_of(layer: SVDLinear) -> torch.Tensor:
    """m / n, which the forward pass scales rows with."""
    from peft.tuners.adalora.variants import row_scale

    return row_scale(layer, "default", layer.update_factors("default"))


def test_a_copy_inside_of_a_cache_follows_its_own_weights(kind):
    layer = layer_of(make_model(kind)).eval()
    x = torch.randn(kind.input_shape)
    with torch.no_grad(), DoraCaching():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        twin.lora_magnitude["default"].data.mul_(2)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(layer(x), expected)


def test_forward_and_all_gradients_match_the_reference(kind):
    layer = layer_of(make_model(kind))
    x = torch.randn(kind.input_shape)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    reference = reference_of(kind, layer)
    output = layer(mine)
    expected = reference_output(kind, layer, reference, theirs, output_of_base=True)
    output_gradient = torch.randn_like(output)
    output.backward(output_gradient)
    expected.backward(output_gradient.double())

    assert relative_error(output, expected) < 1e-5
    assert relative_error(output, reference_output(kind, layer, reference, x.double())) < kind.output_error
    assert relative_error(mine.grad, theirs.grad) < kind.input_gradient_error
    for name, factor in reference.factors().items():
        assert relative_error(getattr(layer, name)["default"].grad, factor.grad) < 1e-5, name


def test_the_kept_scale_of_eval_mode_is_right(kind):
    model = make_model(kind).eval()
    layer, x = layer_of(model), torch.randn(kind.input_shape)
    with torch.no_grad():
        for _ in range(2):
            expected = reference_output(kind, layer, reference_of(kind, layer), x.double(), output_of_base=True)
            for _ in range(2):
                assert relative_error(model(x), expected) < kind.eval_error
            train_by_hand(layer)


def test_a_fresh_adapter_does_not_change_the_output(kind):
    model = make_model(kind, trained=False)
    base = layer_of(model).get_base_layer()
    reference = reference_of(kind, layer_of(model))
    assert relative_error(reference.magnitude, reference.weight.norm(dim=1, keepdim=True)) < 1e-6
    x = torch.randn(kind.input_shape)
    assert relative_error(model(x), base(x)) < 1e-6
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x), base(x)) < kind.eval_error


def test_an_adapter_that_starts_with_an_update_has_factors_of_one(kind):
    model = make_model(kind, trained=False, init_lora_weights=False)
    reference = reference_of(kind, layer_of(model))
    assert relative_error(reference.magnitude, reference.row_norm()) < 1e-6
    assert relative_error(reference.row_norm(), reference.weight.norm(dim=1, keepdim=True)) > 0.1
    scale = scale_of(layer_of(model))
    assert torch.equal(scale, torch.ones_like(scale))


def test_learned_magnitudes_keep_their_values_through_a_cast(kind):
    layer = layer_of(make_model(kind))
    learned = layer.lora_magnitude["default"].clone()
    layer.bfloat16()
    assert torch.equal(layer.lora_magnitude["default"], learned)
    assert layer.lora_A["default"].dtype == torch.bfloat16


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_the_merged_weight_is_the_exact_one_as_far_as_its_storage_allows(kind, merge):
    model = make_model(kind).eval()
    x = torch.randn(kind.input_shape)
    exact = reference_of(kind, layer_of(model)).merged_weight().detach()
    expected = model(x).detach()
    assert relative_error(kind.rows(layer_of(model).get_base_layer()), exact) > 0.1  # there is something to merge
    merged = getattr(model, merge)(safe_merge=True) or model
    base = merged.layer if merge == "merge_and_unload" else layer_of(model).get_base_layer()
    assert type(base) is type(kind.make()) and type(base.weight) is type(kind.make().weight)
    allowed = kind.merge_error(exact)
    assert relative_error(kind.rows(base), exact) <= allowed
    with torch.no_grad():
        assert relative_error(merged(x), expected) <= 3 * allowed + kind.output_error
        if merge == "merge_adapter":
            for call in (model.unmerge_adapter, layer_of(model).unmerge):
                with pytest.raises(NotImplementedError, match="cannot be unmerged"):
                    call()
            with pytest.raises(NotImplementedError, match="cannot be unmerged"), model.disable_adapter():
                model(x)
            assert relative_error(merged(x), expected) <= 3 * allowed + kind.output_error


def test_a_safe_merge_that_is_not_finite_changes_nothing(kind):
    model = make_model(kind)
    before = kind.rows(layer_of(model).get_base_layer())
    with torch.no_grad():
        layer_of(model).lora_E["default"][0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert not layer_of(model).merged
    assert torch.equal(kind.rows(layer_of(model).get_base_layer()), before)


@pytest.mark.parametrize("name", ["Conv1D", "Conv2d", "Conv2d-grouped"])
def test_no_weight_sized_temporary_is_allocated_in_a_training_step(name):
    if name == "Conv1D":
        base, x = Conv1D(384, 320), torch.randn(6, 320)
    else:
        base, x = nn.Conv2d(64, 128, 3, groups=1 + (name == "Conv2d-grouped")), torch.randn(1, 64, 3, 3)
    layer_class = SVDLinear if name == "Conv1D" else adalora.SVDConv2d
    layer = layer_class(base, "default", make_config(fan_in_fan_out=name == "Conv1D"), r=4)
    train_by_hand(layer)
    x.requires_grad_()
    # bytes, that is, less than a tensor of the weight's size of any dtype, but the layer itself needs scratch space
    limit = max(base.weight.numel(), *allocations(lambda: base(x).sum().backward()))
    layer(x).sum().backward()
    assert 0 < max(allocations(lambda: layer(x).sum().backward())) <= limit


def test_zero_rows_give_the_output_of_the_base_model(kind):
    torch.manual_seed(0)
    base = kind.make()
    if kind is KINDS["Conv1D"]:
        base.weight.data[:, 3] = 0
    elif isinstance(base, nn.Conv2d):
        base.weight.data[3] = 0
    elif kind.torchao_config is not None:
        weight = nn.Linear(128, 32).weight
        weight.data[3] = 0
        base = quantize_by_torchao(weight.to(base.weight.dtype), kind.torchao_config)
        if kind.rows(base).isnan().any():
            pytest.skip("torchao makes such a row of a float8 weight NaN")
    else:
        linear = nn.Linear(128, 32)
        linear.weight.data[3] = 0
        weight = base.weight
        base = quantize(linear, getattr(weight, "quant_type", "int8"), getattr(weight, "compress_statistics", False))
        if kind.rows(base)[3].abs().max() > 0:
            pytest.skip("double quantization does not keep zeros")
    config = make_config(target_modules=["layer"], init_r=5, fan_in_fan_out=kind is KINDS["Conv1D"])
    model = get_peft_model(Model(base, kind.torchao_config), config)
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_B["default"][3] = 0
        layer.lora_E["default"].normal_()
    x = torch.randn(kind.input_shape)
    row = (slice(None), 3) if x.ndim == 2 else (..., 3, slice(None), slice(None))
    output = layer(x)
    output.sum().backward()
    assert torch.equal(layer.lora_magnitude["default"][3], torch.zeros(1))
    assert torch.equal(output[row], layer.get_base_layer()(x)[row])
    for name in ("lora_A", "lora_E", "lora_B", "lora_magnitude"):
        assert torch.isfinite(getattr(layer, name)["default"].grad).all()
    model.merge_adapter()
    assert kind.rows(layer.get_base_layer())[3].abs().max() == 0


def test_a_layer_pruned_to_rank_zero_keeps_its_magnitude(kind):
    model = make_model(kind)
    layer = layer_of(model)
    magnitude = layer.lora_magnitude["default"]
    model.base_model.resize_modules_by_rank_pattern({"layer.lora_E": [False] * 5}, "default")
    assert layer.lora_magnitude["default"] is magnitude
    x = torch.randn(kind.input_shape)
    reference = reference_of(kind, layer)
    expected = reference_output(kind, layer, reference, x.double(), output_of_base=True)
    output = layer(x)
    assert relative_error(output, expected) < 1e-5
    output.sum().backward()
    expected.sum().backward()
    assert relative_error(magnitude.grad, reference.magnitude.grad) < 1e-5
    model.eval()
    with torch.no_grad():
        expected = reference_output(kind, layer, reference, x.double(), output_of_base=True)
        assert relative_error(model(x), expected) < kind.eval_error


def test_training_prunes_and_the_saved_adapter_predicts_the_same(kind, tmp_path):
    model = make_model(kind, trained=False, target_r=2)
    base = copy.deepcopy(layer_of(model).get_base_layer())
    x = torch.randn(kind.input_shape)
    target = torch.randn_like(model(x))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for step in range(20):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layer = layer_of(model)
    assert int((layer.lora_E["default"] != 0).sum()) == 2
    assert not torch.equal(layer.lora_magnitude["default"], kind.rows(base).norm(dim=1, keepdim=True).float())
    model.eval()
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Model(base), tmp_path).eval()
    assert layer_of(loaded).lora_A["default"].shape[0] == 2
    assert relative_error(loaded(x), expected) < 1e-6


def test_a_second_adapter_cannot_be_used_together_with_the_first(kind):
    model = make_model(kind)
    other = make_config(target_modules=["layer"], inference_mode=True, fan_in_fan_out=kind is KINDS["Conv1D"])
    model.add_adapter("other", other)
    with pytest.raises(NotImplementedError, match="only active adapter"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(NotImplementedError, match="only active adapter"):
        layer_of(model).merge(adapter_names=["default", "other"])


@pytest.mark.parametrize("name", ["Conv2d-grouped", "Conv2d-depthwise"])
def test_plain_adalora_fits_a_convolution_with_groups_too(name):
    kind = KINDS[name]
    model = make_model(kind, use_dora_adaptive=False)
    layer, x = layer_of(model), torch.randn(kind.input_shape)
    base = layer.get_base_layer()
    update = layer.get_delta_weight("default").detach().double().flatten(1)
    expected = base(x).double() + kind.forward(base, x.double(), update)
    assert relative_error(layer(x), expected) < 1e-5


def test_the_two_ways_to_store_a_weight_are_told_apart():
    with pytest.raises(NotImplementedError, match="fan_in_fan_out=False.*stored transposed.*set it to True"):
        SVDLinear(Conv1D(24, 40), "default", make_config(), r=5)


@pytest.mark.parametrize("name", QUANTIZED_BY_BNB + QUANTIZED_BY_TORCHAO)
def test_a_copied_model_of_quantized_weights_predicts_the_same(name):
    model = make_model(KINDS[name]).eval()
    x = torch.randn(KINDS[name].input_shape)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)


@pytest.mark.skipif(bnb is None, reason="needs bitsandbytes")
class TestBitsandbytes:
    @pytest.mark.parametrize("name", QUANTIZED_BY_BNB)
    def test_blocks_of_rows_are_those_of_the_whole_weight(self, name):
        from peft.tuners.adalora.quantized import resolve_backend

        # of sizes that do not fit the blocks of quantization
        base = quantize(nn.Linear(42, 25, bias=False), name.partition("-")[0], "double" in name)
        rows, expected = resolve_backend(base).get_base_rows(base), KINDS[name].rows(base)
        for start, stop in ((0, 25), (0, 1), (3, 4), (5, 17), (23, 30)):
            assert relative_error(rows[start:stop], expected[start:stop]) < 1e-7

    @pytest.mark.parametrize("name", QUANTIZED_BY_BNB)
    def test_no_copy_of_the_whole_weight_is_alive_in_a_training_step(self, name):
        torch.manual_seed(0)
        base = quantize(nn.Linear(1024, 1024, bias=False), name.partition("-")[0], "double" in name)
        layer = SVDLinear(base, "default", make_config(), r=4)
        peak = max(itertools.accumulate(allocations(lambda: scale_of(layer))))
        # a half at most of the weight in float32: of the eighth that is dequantized at a time, the copies that
        # dequantizing makes
        assert 0 < peak < 1024 * 1024 * 4 // 2

    def test_a_weight_that_bitsandbytes_has_reordered_for_the_cpu_is_read(self):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        from peft.tuners.adalora.quantized import resolve_backend

        torch.manual_seed(0)
        for compress_statistics in (False, True):
            base = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=compress_statistics)
            base = base.to("cpu")
            expected = rows_of_4bit(base)
            base.weight.data, base.weight.quant_state = _convert_weight_packed_for_cpu(
                base.weight.data, base.weight.quant_state
            )
            # its scales are bfloat16 then
            for _ in range(2):
                assert relative_error(resolve_backend(base).get_base_rows(base)[0:64], expected) < 4e-3


@pytest.mark.skipif(torchao is None, reason="needs torchao")
class TestTorchao:
    @pytest.mark.parametrize("name", QUANTIZED_BY_TORCHAO)
    def test_no_copy_of_the_whole_weight_is_alive_in_a_training_step(self, name):
        torch.manual_seed(0)
        base = quantize_by_torchao(nn.Linear(1024, 1024).weight, KINDS[name].torchao_config)
        layer = SVDLinear(base, "default", make_config(), r=4)
        peak = max(itertools.accumulate(allocations(lambda: scale_of(layer))))
        assert 0 < peak < 1024 * 1024 * 4

    def test_a_write_to_what_the_weight_wraps_is_followed(self):
        kind = KINDS["torchao-int8"]
        layer = layer_of(make_model(kind)).eval()
        x = torch.randn(kind.input_shape)
        with torch.no_grad(), DoraCaching():
            layer(x)
            layer.get_base_layer().weight.scale.mul_(2)
            inside = layer(x)
        assert torch.equal(inside, layer(x))

    def test_a_merge_that_could_not_be_quantized_is_refused_before_anything_changes(self):
        kind = KINDS["torchao-int8"]
        model = get_peft_model(Model(kind.make()), make_config(target_modules=["layer"]))
        layer, x = layer_of(model), torch.randn(kind.input_shape)
        train_by_hand(layer)
        expected = model(x)
        for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
            with pytest.raises(
                NotImplementedError, match="how torchao quantized.*load the model with the `TorchAoConfig`"
            ):
                merge()
        assert torch.equal(model(x), expected) and not layer.merged

    @pytest.mark.parametrize(
        "config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"]
    )
    def test_a_layer_that_passes_no_gradient_to_its_input_is_refused(self, config):
        base = quantize_by_torchao(nn.Linear(128, 32).weight, getattr(torchao, config)())
        x = torch.randn(3, 128, requires_grad=True)
        base(x).sum().backward()
        assert x.grad is None
        with pytest.raises(NotImplementedError, match="weight-only.*'layer' is a torch.nn.*; leave it out"):
            get_peft_model(Model(base), make_config(target_modules=["layer"]))

    def test_another_kind_of_weight_is_refused_by_its_path(self):
        class Int4Tensor(nn.Parameter):
            pass

        Int4Tensor.__module__ = "torchao.quantization"
        layer = nn.Linear(40, 24)
        layer.weight = Int4Tensor(layer.weight.detach())
        with pytest.raises(NotImplementedError, match="'layer'.*Int4Tensor.*; leave it out"):
            get_peft_model(Model(layer), make_config(target_modules=["layer"]))


def test_the_projection_of_an_attention_that_never_calls_it_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)

    with pytest.raises(NotImplementedError, match="'attention.out_proj'.*NonDynamicallyQuantizableLinear"):
        get_peft_model(Attention(), make_config(target_modules=["out_proj"]))


def test_a_linear_layer_that_packs_its_weight_under_another_name_is_refused_by_its_path():
    layer = nn.Linear(40, 24)
    layer.weight_packed = layer.weight
    del layer.weight
    with pytest.raises(NotImplementedError, match="'layer' is a torch.nn.modules.linear.Linear; leave it out"):
        get_peft_model(Model(layer), make_config(target_modules=["layer"]))


def test_a_weight_of_a_dtype_without_arithmetic_is_refused_by_its_path():
    layer = nn.Linear(40, 24)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(NotImplementedError, match="'layer'.*float8_e4m3fn; leave it out"):
        get_peft_model(Model(layer), make_config(target_modules=["layer"]))


@pytest.mark.parametrize("name", ["Conv1D", "Conv2d", *QUANTIZED_BY_BNB, *QUANTIZED_BY_TORCHAO])
def test_training_mode_invalidates_the_cache(name):
    layer = layer_of(make_model(KINDS[name])).eval()
    x = torch.randn(KINDS[name].input_shape)
    with torch.no_grad(), DoraCaching():
        before = layer(x)
        layer.lora_magnitude["default"].data.mul_(2)  # shows in no counter
        layer.train().eval()
        assert not torch.equal(layer(x), before)
