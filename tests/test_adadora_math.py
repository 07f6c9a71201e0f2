"""AdaDoRA's layer against an independent float64 reference."""

import itertools

import pytest
import torch
from helpers import allocations, make_config, make_layer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Reference, relative_error
from torch import nn

from peft.tuners.adalora import SVDLinear
from peft.tuners.adalora.adadora import squared_adapted_row_norm
from peft.tuners.adalora.variants import row_scale


LOW_PRECISION = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *LOW_PRECISION]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}

layers = st.builds(
    make_layer,
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 40),
    rank=st.integers(0, 9),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)


def assume_no_cancellation(reference: Reference) -> None:
    """
    Leave out rows where W + ΔW is much shorter than W: rounding moves n² by (‖W‖ / n)² times what it moves ‖W‖² by.
    """
    norm, base_norm = reference.row_norm(), reference.weight.norm(dim=1, keepdim=True)
    assume(bool((norm > 0.3 * base_norm).all()))


def forward_and_gradients(layer: SVDLinear, x: torch.Tensor, output_gradient: torch.Tensor):
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(output_gradient)
    gradients = {name: getattr(layer, name)["default"].grad for name in Reference.of(layer).factors()}
    return output, {"x": x.grad, **gradients}


def reference_forward_and_gradients(layer: SVDLinear, x, output_gradient, detach_norm: bool = True):
    reference = Reference.of(layer)
    x = x.double().requires_grad_()
    output = reference.forward(x, detach_norm)
    output.backward(output_gradient.double())
    return output, {"x": x.grad, **{name: factor.grad for name, factor in reference.factors().items()}}


@settings(max_examples=150, deadline=None)
@given(layer=layers, leading_shape=st.sampled_from([(1,), (7,), (2, 5), (2, 3, 4), (0,)]))
def test_forward_and_all_gradients_match_the_reference(layer, leading_shape):
    assume_no_cancellation(Reference.of(layer))
    x = torch.randn(*leading_shape, layer.in_features)
    output_gradient = torch.randn(*leading_shape, layer.out_features)
    output, gradients = forward_and_gradients(layer, x, output_gradient)
    expected, expected_gradients = reference_forward_and_gradients(layer, x, output_gradient)
    for name, scale in Reference.of(layer).sums_of_absolute_terms(x, output_gradient).items():
        # a sum whose terms cancel (the gradient of a single E of rank 1, say) loses its digits in any float32 result
        assume({**expected_gradients, "output": expected}[name].norm() >= 0.1 * scale.norm())

    assert relative_error(output, expected) < TOLERANCE[torch.float32]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.shape == expected_gradients[name].shape
        assert relative_error(gradient, expected_gradients[name]) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 4, 8])
def test_forward_and_all_gradients_match_the_reference_in_low_precision(dtype, bias, rank):
    layer = make_layer(48, 64, rank, bias=bias, dtype=dtype)
    x, output_gradient = torch.randn(32, 64).to(dtype), torch.randn(32, 48).to(dtype)
    output, gradients = forward_and_gradients(layer, x, output_gradient)
    expected, expected_gradients = reference_forward_and_gradients(layer, x, output_gradient)

    assert output.dtype == dtype
    assert relative_error(output, expected) < TOLERANCE[dtype]
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < TOLERANCE[dtype], name


def test_a_learned_magnitude_near_one_is_not_rounded_away_in_bfloat16():
    # bfloat16 has steps of 0.4 % near 1: factors that were rounded to it would be off by 0.1 % on average
    layer = make_layer(256, 64, 4, bias=False, dtype=torch.bfloat16, trained=False)
    factors = 1.01 + 0.02 * torch.rand(256, 1)
    layer.lora_magnitude["default"] = nn.Parameter(layer.lora_magnitude["default"].float() * factors)
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    base_output = layer.get_base_layer()(x).double()
    # of each row over all tokens, so that what rounding the output does averages out
    measured = (layer(x).double() * base_output).sum(0) / base_output.square().sum(0)
    assert (measured - factors.view(-1)).square().mean().sqrt() < 4e-4


def test_no_gradient_flows_through_the_norm():
    layer = make_layer(24, 32, 4)
    x, output_gradient = torch.randn(16, 32), torch.randn(16, 24)
    _, gradients = forward_and_gradients(layer, x, output_gradient)
    _, detached = reference_forward_and_gradients(layer, x, output_gradient, detach_norm=True)
    _, attached = reference_forward_and_gradients(layer, x, output_gradient, detach_norm=False)
    for name in ("lora_A", "lora_E", "lora_B"):
        assert relative_error(gradients[name], detached[name]) < 1e-5
        assert relative_error(gradients[name], attached[name]) > 1e-2


def test_a_trainable_bias_gets_its_whole_gradient():
    layer = make_layer(24, 32, 4)
    layer.get_base_layer().bias.requires_grad_()
    output_gradient = torch.randn(16, 24)
    layer(torch.randn(16, 32)).backward(output_gradient)
    assert relative_error(layer.get_base_layer().bias.grad, output_gradient.sum(0)) < 1e-6


def test_an_input_without_a_token_dimension_is_a_single_token():
    layer = make_layer(24, 32, 4)
    x = torch.randn(32)
    assert relative_error(layer(x), Reference.of(layer).forward(x.double())) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inplace", [nn.ReLU(inplace=True), lambda h: h.mul_(3), lambda h: h.view(-1).add_(1)])
def test_the_model_may_write_to_the_output_in_place(bias, inplace):
    # as Falcon does with the output of an adapted layer
    layer = make_layer(24, 32, 4, bias=bias)
    x = torch.randn(16, 32)
    inplace(layer(x)).sum().backward()
    gradient = layer.lora_magnitude["default"].grad.clone()
    reference = Reference.of(layer)
    inplace(reference.forward(x.double())).sum().backward()
    assert relative_error(gradient, reference.magnitude.grad) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_acts_on_the_update_but_not_on_the_base_layer(bias):
    layer = make_layer(12, 20, 3, bias=bias, lora_dropout=0.5)
    x = torch.randn(50, 20)
    torch.manual_seed(3)
    output = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    reference = Reference.of(layer)
    scale = reference.magnitude / reference.row_norm()
    update = reference.adapted_weight() - reference.weight
    expected = (x.double() @ reference.weight.T + dropped.double() @ update.T) * scale.T
    if bias:
        expected = expected + reference.bias
    assert relative_error(output, expected) < 1e-5


def test_dropout_is_off_in_eval_mode():
    layer = make_layer(12, 20, 3, lora_dropout=0.5).eval()
    x = torch.randn(5, 20)
    assert relative_error(layer(x), Reference.of(layer).forward(x.double())) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_adapter_does_not_change_the_output(dtype, bias):
    layer = make_layer(33, 65, 8, bias=bias, dtype=dtype, trained=False)
    x = torch.randn(9, 65).to(dtype)
    # in low precision, the magnitude itself is rounded to the dtype of the weight
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative_error(layer(x), layer.get_base_layer()(x)) < tolerance


def test_the_magnitude_starts_as_the_row_norm_of_the_base_weight():
    layer = make_layer(33, 65, 8, trained=False)
    expected = layer.get_base_layer().weight.double().norm(dim=1, keepdim=True)
    assert layer.lora_magnitude["default"].shape == (33, 1)
    assert relative_error(layer.lora_magnitude["default"], expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_that_starts_with_an_update_keeps_the_row_lengths_of_the_adapted_weight(dtype):
    """As PEFT's DoRA does, so that the fresh layer gives W x + ΔW x."""
    layer = make_layer(33, 65, 8, trained=False, dtype=dtype, init_lora_weights=False)
    reference = Reference.of(layer)
    assert reference.lora_E.abs().min() > 0
    assert relative_error(layer.lora_magnitude["default"], reference.row_norm()) < 1e-5
    x = torch.randn(5, 65).to(dtype)
    expected = x.double() @ reference.adapted_weight().T + reference.bias
    assert relative_error(layer(x), expected) < TOLERANCE[dtype]


def test_an_adapter_that_starts_with_an_update_leaves_out_a_merged_adapter():
    layer = make_layer(33, 65, 8, use_dora_adaptive=False)
    layer.merge()
    layer.update_layer("second", 8, 12, config=make_config(init_lora_weights=False))
    layer.unmerge()
    lora_A, scaled_E, lora_B = (factor.double() for factor in layer.update_factors("second"))
    adapted = layer.get_base_layer().weight.double() + lora_B @ (lora_A * scaled_E)
    assert relative_error(layer.lora_magnitude["second"], adapted.norm(dim=1, keepdim=True)) < 1e-5


@settings(max_examples=60, deadline=None)
@given(layer=layers)
def test_merged_equals_unmerged(layer):
    assume_no_cancellation(Reference.of(layer))
    x = torch.randn(11, layer.in_features)
    unmerged = layer(x)
    expected_weight = Reference.of(layer).merged_weight()
    layer.merge()
    assert layer.merged_adapters == ["default"]
    assert relative_error(layer.get_base_layer().weight, expected_weight) < 1e-5
    assert relative_error(layer(x), unmerged) < 1e-5


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_a_low_precision_merge_rounds_the_exact_merged_weight_once(dtype):
    layer = make_layer(96, 128, 8, dtype=dtype)
    exact = Reference.of(layer).merged_weight().detach()
    layer.merge()
    merged = layer.get_base_layer().weight
    assert merged.dtype == dtype
    rounding_error = (exact.to(dtype).double() - exact).norm()
    # float32 can tip a value that lies within 1e-7 of the middle between two neighbours: nothing the norm can see
    assert (merged.double() - exact).norm() <= rounding_error * (1 + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_scale", [0.0, 1e-7, 1e-20, 1e-30, 1e-38])
def test_zero_and_near_zero_rows_give_the_output_of_the_base_model(dtype, row_scale):
    torch.manual_seed(0)
    base = nn.Linear(64, 32).to(dtype)
    with torch.no_grad():
        base.weight[::3] *= row_scale
    x = torch.randn(10, 64).to(dtype).requires_grad_()
    expected = base(x)
    expected[:, ::3].sum().backward()
    expected_x_gradient, x.grad = x.grad, None

    layer = SVDLinear(base, "default", make_config(), r=4, lora_alpha=12)
    output = layer(x)
    output[:, ::3].sum().backward()

    assert torch.isfinite(output).all()
    torch.testing.assert_close(output[:, ::3], expected[:, ::3], rtol=TOLERANCE[dtype], atol=1e-30)
    assert relative_error(x.grad, expected_x_gradient) < TOLERANCE[dtype]
    for name in ("lora_A", "lora_E", "lora_B", "lora_magnitude"):
        assert torch.isfinite(getattr(layer, name)["default"].grad).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_stay_finite_and_equal_to_the_base_model_after_training_and_merging(dtype):
    layer = make_layer(30, 40, 4, dtype=dtype, trained=False)
    base = layer.get_base_layer()
    with torch.no_grad():
        base.weight[::2] = 0
    layer.reset_lora_parameters("default")
    x = torch.randn(10, 40).to(dtype)
    expected = base(x).detach()
    with torch.no_grad():
        layer.lora_E["default"].normal_()
    output = layer(x)
    output.square().sum().backward()
    assert torch.equal(output[:, ::2], expected[:, ::2])
    for name in ("lora_A", "lora_E", "lora_B", "lora_magnitude"):
        assert torch.isfinite(getattr(layer, name)["default"].grad).all(), name
    layer.merge(safe_merge=True)
    assert torch.equal(layer(x)[:, ::2], expected[:, ::2])


def test_what_a_hook_adds_to_a_row_of_zeros_is_left_as_it_is():
    layer = make_layer(6, 8, 2)
    base = layer.get_base_layer()
    with torch.no_grad():
        base.weight[::2] = 0
        layer.lora_B["default"][::2] = 0
    base.register_forward_hook(lambda module, args, output: output + 3)
    x = torch.randn(5, 8)
    assert torch.equal(layer(x)[:, ::2], base(x)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_where_the_update_cancels_the_weight_stay_finite(dtype):
    layer = make_layer(6, 8, 2, bias=False, dtype=dtype, trained=False)
    with torch.no_grad():
        # rank one: W = u v', and the update is -u v' up to rounding
        u, v = torch.randn(6, 1), torch.randn(1, 8)
        layer.get_base_layer().weight.copy_(u @ v)
        layer.lora_A["default"].copy_(torch.cat([v, v]))
        layer.lora_B["default"].copy_(torch.cat([-u, 0 * u], dim=1))
        layer.lora_E["default"].fill_(float(layer.ranknum["default"]) / layer.scaling["default"])
    output = layer(torch.randn(5, 8).to(dtype).requires_grad_())
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(getattr(layer, n)["default"].grad).all() for n in Reference.of(layer).factors())


def test_a_row_that_the_update_cancels_counts_as_a_thousandth_of_the_weight():
    # in half of so many rows, rounding would push n² below zero
    lora_A, scaled_E, lora_B = torch.randn(4, 64), torch.rand(4, 1) + 0.5, torch.randn(1000, 4)
    weight = -lora_B @ (scaled_E * lora_A)
    squared_norm = squared_adapted_row_norm(weight, lora_A, scaled_E, lora_B)
    assert squared_norm.shape == (1000, 1)
    assert relative_error(squared_norm.sqrt(), weight.double().norm(dim=1, keepdim=True) / 1024) < 1e-6


def cancelling_layer(share: float, dtype: torch.dtype = torch.float32) -> SVDLinear:
    """A layer whose update is -`share` times its weight, which has rank 4."""
    layer = make_layer(200, 64, 4, bias=False, trained=False, dtype=dtype)
    layer.lora_B["default"].data.normal_()
    layer.lora_A["default"].data.normal_()
    layer.lora_E["default"].data.fill_(float(layer.ranknum["default"]) / layer.scaling["default"])
    update = Reference.of(layer).adapted_weight() - layer.get_base_layer().weight.double()
    layer.get_base_layer().weight.data = (-update / share).to(dtype)
    layer.lora_magnitude["default"].data = layer.get_base_layer().weight.float().norm(dim=1, keepdim=True)
    return layer


@pytest.mark.parametrize(("share", "error"), [(0.5, 1e-6), (0.9, 1e-4), (0.99, 1e-2)])
def test_the_norm_of_a_row_that_is_nearly_cancelled_loses_as_much_as_the_guide_says(share, error):
    layer = cancelling_layer(share)
    factors = layer.update_factors("default")
    squared_norm = squared_adapted_row_norm(layer.get_base_layer().weight.detach(), *factors)
    exact = Reference.of(layer).row_norm()
    assert ((squared_norm.double().sqrt() - exact).abs() / exact).max() < error


def test_the_factor_of_a_row_has_no_jump_where_the_update_cancels_it():
    """It grows to 1024 m / ‖W‖ and stays there; a row of zeros alone has the factor 1."""
    factors = []
    for share in (0.9, 0.99, 0.999, 0.9999, 0.99999, 1.0):
        layer = cancelling_layer(share)
        x = torch.eye(64)
        merged = layer.lora_variant["default"].merge_safe(layer, "default", layer.get_base_layer().weight)
        torch.testing.assert_close(layer(x).T, merged, rtol=0.3, atol=0.2 * float(merged.abs().max()))
        factors.append(row_scale(layer, "default", layer.update_factors("default")))
    assert (factors[0] - 10).abs().max() < 0.1
    for smaller, larger in itertools.pairwise(factors):
        assert (larger >= 0.99 * smaller).all()
    assert (factors[-1] <= 1024 * (1 + 1e-5)).all()
    assert (factors[-1] > 500).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("rank", [0, 1, 12])
def test_the_one_product_that_a_gpu_makes_is_as_exact_as_float32(monkeypatch, dtype, rank):
    dtypes = []

    def product_into_float32(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        dtypes.append((left.dtype, right.dtype, out_dtype))
        return left.to(out_dtype) @ right.to(out_dtype)

    weight, lora_A = torch.randn(200, 300).to(dtype), torch.randn(rank, 300)
    scaled_E, lora_B = torch.randn(rank, 1), torch.randn(200, rank)
    expected = (weight.double() + (lora_B @ (scaled_E * lora_A)).double()).square().sum(dim=1, keepdim=True)
    in_blocks = squared_adapted_row_norm(weight, lora_A, scaled_E, lora_B)
    monkeypatch.setattr("peft.tuners.adalora.rows.multiplies_into_float32", lambda weight: True)
    monkeypatch.setattr(torch, "mm", product_into_float32)
    at_once = squared_adapted_row_norm(weight, lora_A, scaled_E, lora_B)
    assert dtypes == [(dtype, dtype, torch.float32)]
    for squared_norm in (in_blocks, at_once):
        assert ((squared_norm - expected) / expected).abs().max() < 1e-5


def test_a_layer_pruned_to_rank_zero_keeps_its_magnitude():
    layer = make_layer(14, 18, 0)
    x = torch.randn(6, 18)
    base = layer.get_base_layer()
    scale = layer.lora_magnitude["default"] / base.weight.norm(dim=1, keepdim=True)
    expected = nn.functional.linear(x, base.weight * scale, base.bias)
    assert relative_error(layer(x), expected) < 1e-6
    assert relative_error(layer(x), base(x)) > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_no_weight_sized_temporary_is_allocated_in_a_training_step(dtype, bias, fresh):
    out_features, in_features = 384, 320
    layer = make_layer(out_features, in_features, 4, bias=bias, dtype=dtype, trained=not fresh)
    x = torch.randn(6, in_features).to(dtype).requires_grad_()
    # bytes, that is, less than an (out, in) tensor of any dtype, but matrix products on CPUs need scratch space
    limit = max(out_features * in_features, *allocations(lambda: layer.get_base_layer()(x).sum().backward()))
    layer(x).sum().backward()  # the gradient buffers of the parameters exist from here on
    allocated = allocations(lambda: layer(x).sum().backward())
    assert 0 < max(allocated) <= limit


def test_the_allocation_recorder_sees_a_weight_sized_temporary():
    weight = torch.randn(384, 320)
    assert max(allocations(lambda: (weight + weight).sum())) == weight.nbytes
