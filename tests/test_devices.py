"""AdaDoRA on each device that there is, against the float64 reference.

`pytest -rs` names what was skipped: CUDA graphs, streams and the second device need a GPU.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Optional

import pytest
import torch
from helpers import MLP, make_config, make_layer, make_mlp, make_peft_mlp, svd_layers, train_by_hand
from reference import Reference, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft import get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.adalora import SVDLinear
from peft.tuners.adalora.adadora import squared_adapted_row_norm
from peft.tuners.adalora.rows import matmul_rows


# cuBLAS reads this at its first call, and deterministic algorithms require it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HAS_CUDA = torch.cuda.is_available()


def needs_cuda(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not HAS_CUDA, reason=f"no CUDA device: {reason}")


on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=needs_cuda("the same runs on the CPU"))]
)
LOW_PRECISION = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *LOW_PRECISION]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
FACTORS = ["lora_A", "lora_E", "lora_B", "lora_magnitude"]


def layer_on(device: str, dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype = torch.float32) -> SVDLinear:
    """A layer of 64 inputs and 48 outputs with an adapter of rank 4 that looks trained."""
    layer = make_layer(48, 64, 4, dtype=dtype).to(device)
    for name in FACTORS:
        factor = getattr(layer, name)["default"]
        factor.data = factor.data.to(adapter_dtype)
    return layer


def inputs_of(layer: SVDLinear, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """An input of 32 tokens, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    shapes = (32, layer.in_features), (32, layer.out_features)
    device = layer.get_base_layer().weight.device
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def assert_matches_reference(
    layer: SVDLinear, output: torch.Tensor, x: torch.Tensor, output_gradient: torch.Tensor, tolerance: float
) -> None:
    """Compare the output of a layer, the gradient of its input `x`, and the gradients of its factors."""
    reference = Reference.of(layer)
    exact_x = x.detach().double().requires_grad_()
    expected = reference.forward(exact_x)
    expected.backward(output_gradient.double())
    assert relative_error(output, expected) < tolerance
    assert relative_error(x.grad, exact_x.grad) < tolerance
    for name, factor in reference.factors().items():
        assert relative_error(getattr(layer, name)["default"].grad, factor.grad) < tolerance, name


# ---- dtypes and autocast


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", ["float32", "as the weight"])
def test_the_output_and_all_gradients_match_the_reference(device, dtype, adapter_dtype):
    layer = layer_on(device, dtype, torch.float32 if adapter_dtype == "float32" else dtype)
    x, output_gradient = inputs_of(layer, dtype)
    output = layer(x.requires_grad_())
    output.backward(output_gradient)
    assert output.dtype == dtype
    assert output.device.type == device
    assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[dtype])


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast_dtype", LOW_PRECISION)
def test_the_output_and_all_gradients_match_the_reference_under_autocast(device, dtype, autocast_dtype):
    layer = layer_on(device, dtype)
    x, output_gradient = inputs_of(layer)
    with torch.autocast(device, autocast_dtype):
        output = layer(x.requires_grad_())
    output.backward(output_gradient.to(output.dtype))
    assert output.dtype == autocast_dtype
    assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[autocast_dtype])


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast_dtype", LOW_PRECISION)
def test_a_scale_that_is_cached_under_autocast_is_that_of_full_precision(device, dtype, autocast_dtype):
    layer = layer_on(device, dtype).eval()
    with torch.autocast(device, autocast_dtype), torch.no_grad(), DoraCaching():
        layer(inputs_of(layer)[0])
        identity = torch.eye(layer.in_features, device=device, dtype=dtype)
        with torch.autocast(device, enabled=False):
            cached = layer(identity)
    with torch.no_grad():
        expected = layer(identity)
    assert torch.equal(cached, expected)


@on_each_device
@pytest.mark.parametrize("autocast_dtype", LOW_PRECISION)
def test_steps_that_a_gradient_scaler_skips_change_neither_weights_nor_importance(device, autocast_dtype):
    model = make_peft_mlp().to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**127)  # times a loss of more than 2, this is infinite
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=5e-2)
    allocator = model.base_model.rankallocator
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 10, generator=generator).to(device)
    target = torch.randn(32, 4, generator=generator).to(device)
    losses, skipped = [], []
    for step in range(20):
        if step in (4, 9):
            scaler.update(new_scale=2.0**127)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        averages = copy.deepcopy(scores_of(allocator))
        with torch.autocast(device, autocast_dtype):
            output = model(x)
        loss = nn.functional.mse_loss(output.float(), target, reduction="sum")
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped.append(step)
            assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
            scaler.update(new_scale=2.0**8)
        model.base_model.update_and_allocate(step)
        if step in skipped:
            assert scores_of(allocator).keys() == averages.keys()
            for name, score in averages.items():
                assert torch.equal(scores_of(allocator)[name], score), name
        optimizer.zero_grad()
        losses.append(loss.item())
    assert skipped == [0, 4, 9]
    assert all(param.isfinite().all() for param in model.parameters())
    assert losses[-1] < 0.8 * losses[0]
    assert number_of_ranks(model) == 3 * 2


def scores_of(allocator) -> dict[str, torch.Tensor]:
    """The averages of the importance; empty before the first step that counts."""
    state = allocator.state_dict()
    return {name: score for name, score in state.items() if name.startswith("exp_avg") and score.any()}


def number_of_ranks(model: nn.Module) -> int:
    """The number of singular values that are not zero."""
    return sum(int((layer.lora_E["default"] != 0).sum()) for layer in svd_layers(model).values())


# ---- precision of the norm


class Norm:
    """‖W + ΔW‖² of 200 rows at rank 12, and how far it is from the exact one."""

    def __init__(self, device: str, dtype: torch.dtype, size: float = 1.0, weight_size: float = 1.0):
        """The entries of R = c E ⊙ A are about `size` large, and B is such that ΔW is about as large as W."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, generator=generator).to(device)

        self.weight = (weight_size * randn(200, 300)).to(dtype)
        self.factors = randn(12, 300), size * (0.5 + torch.rand(12, 1, generator=generator)).to(device), randn(200, 12)
        self.factors = *self.factors[:2], self.factors[2] * (0.3 * weight_size / size)

    def exact(self) -> torch.Tensor:
        lora_A, scaled_E, lora_B = (factor.double() for factor in self.factors)
        return (self.weight.double() + lora_B @ (scaled_E * lora_A)).square().sum(dim=1, keepdim=True)

    def error(self, function: Callable = squared_adapted_row_norm) -> float:
        """The largest relative error of a row."""
        exact = self.exact()
        return float(((function(self.weight, *self.factors) - exact).abs() / exact).max())


# an operation of its own, so that a compiler neither sees into it nor fuses its inputs, as with CUDA's
@torch.library.custom_op("test_devices::multiply_into_float32", mutates_args=())
def multiply_into_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product that CUDA's `torch.mm` with `out_dtype=torch.float32` makes of bfloat16 or float16 matrices."""
    assert left.dtype == right.dtype != torch.float32
    return left.float() @ right.float()


@multiply_into_float32.register_fake
def _(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)


@multiply_into_float32.register_vmap
def _(info, in_dims, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, int]:
    assert in_dims[0] is None
    return torch.stack([multiply_into_float32(left, matrix) for matrix in right.unbind(in_dims[1])]), 0


mm = torch.mm


def mm_with_out_dtype(
    left: torch.Tensor, right: torch.Tensor, out_dtype: Optional[torch.dtype] = None
) -> torch.Tensor:
    return mm(left, right) if out_dtype is None else multiply_into_float32(left, right)


@contextlib.contextmanager
def one_product(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes a CPU compute W Rᵀ as CUDA does: in one product of low precision matrices into float32."""
    with monkeypatch.context() as patch:
        if device == "cpu":
            patch.setattr("peft.tuners.adalora.rows.multiplies_into_float32", lambda weight: True)
            patch.setattr(torch, "mm", mm_with_out_dtype)
        yield


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_the_norm_has_float32_precision_for_updates_of_every_size(device, dtype, size, monkeypatch):
    assert Norm(device, dtype, size).error() < 1e-5
    if dtype != torch.float32:
        with one_product(device, monkeypatch):
            assert Norm(device, dtype, size).error() < 1e-5


@on_each_device
@pytest.mark.parametrize("weight_size", [1e-6, 1e-3, 1e3])
def test_the_norm_of_a_float16_weight_has_float32_precision_for_weights_of_every_size(
    device, weight_size, monkeypatch
):
    for size in (weight_size, 1.0, 1e6):
        assert Norm(device, torch.float16, size, weight_size).error() < 1e-5
        with one_product(device, monkeypatch):
            assert Norm(device, torch.float16, size, weight_size).error() < 1e-5


@on_each_device
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_each_row_of_the_update_has_a_scale_of_its_own(device, dtype, monkeypatch):
    norm = Norm(device, dtype)
    sizes = torch.logspace(-12, 12, 12, device=device)
    lora_A, scaled_E, lora_B = norm.factors
    norm.factors = lora_A, scaled_E * sizes.view(-1, 1), lora_B / sizes
    with one_product(device, monkeypatch):
        assert norm.error() < 1e-5


@on_each_device
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_pruned_triplets_leave_the_norm_finite_and_exact(device, dtype, monkeypatch):
    norm = Norm(device, dtype, 1e-6)
    norm.factors[1][::2] = 0
    with one_product(device, monkeypatch):
        assert norm.error() < 1e-5
        norm.factors[1].zero_()
        assert norm.error() < 1e-5


@on_each_device
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_triplet_that_is_not_finite_spoils_no_product_with_another_one(device, dtype, value, monkeypatch):
    norm = Norm(device, dtype)
    right = norm.factors[0].clone()
    right[3, 7] = value
    with one_product(device, monkeypatch):
        product, _ = matmul_rows(norm.weight, right)
    expected = norm.weight.double() @ right.double().T
    others = torch.arange(12, device=device) != 3
    assert not product[:, 3].isfinite().any()
    assert relative_error(product[:, others], expected[:, others]) < 1e-5


@on_each_device
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_the_norm_has_float32_precision_when_it_is_compiled(device, dtype, monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile(squared_adapted_row_norm, fullgraph=True)
    with one_product(device, monkeypatch):
        # in a fused kernel, Inductor skips roundings to a low precision and back
        for size in (1e-6, 1.0, 1e6):
            assert Norm(device, dtype, size).error(compiled) < 1e-5, size
    torch._dynamo.reset()


@on_each_device
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_norms_of_a_batch_of_adapters_have_float32_precision(device, dtype, monkeypatch):
    norm, sizes = Norm(device, dtype), torch.tensor([1e-6, 1.0, 1e6], device=device)
    lora_A, scaled_E, lora_B = norm.factors

    def squared_norm(size: torch.Tensor) -> torch.Tensor:
        return squared_adapted_row_norm(norm.weight, lora_A, scaled_E * size, lora_B / size)

    with one_product(device, monkeypatch):
        batch = torch.func.vmap(squared_norm)(sizes)
    assert batch.shape == (3, 200, 1)
    assert ((batch - norm.exact()).abs() / norm.exact()).max() < 1e-5


@on_each_device
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_gradients_of_torch_func_match_the_reference(device, dtype, monkeypatch):
    layer = layer_on(device, dtype)
    x, output_gradient = inputs_of(layer, dtype)
    names = {f"{name}.default": getattr(layer, name)["default"].detach() for name in FACTORS}

    def loss(factors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(layer, factors, (x,)).float() * output_gradient).sum()

    with one_product(device, monkeypatch):
        gradients, x.grad = torch.func.grad(loss, argnums=(0, 1))(names, x)
        output = layer(x)
    for name in FACTORS:
        getattr(layer, name)["default"].grad = gradients[f"{name}.default"]
    assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_on_the_meta_device_gives_the_shape_and_dtype_of_the_output(dtype):
    layer = layer_on("meta", dtype)
    output = layer(inputs_of(layer, dtype)[0])
    assert (output.device.type, output.shape, output.dtype) == ("meta", (32, 48), dtype)


@on_each_device
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_float16_layer_with_an_update_of_any_size_matches_the_reference(device, size, monkeypatch):
    layer = layer_on(device, torch.float16)
    with torch.no_grad():
        layer.lora_E["default"] *= size
        layer.lora_B["default"] /= size
    x, output_gradient = inputs_of(layer, torch.float16)
    with one_product(device, monkeypatch):
        output = layer(x.requires_grad_())
        output.backward(output_gradient)
    assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[torch.float16])


@pytest.fixture
def lower_matmul_precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision, bits", [("high", 11), ("medium", 8)])
def test_tf32_lowers_the_precision_of_the_norm_to_its_own(device, dtype, precision, bits, lower_matmul_precision):
    """
    A user who allows TF32 ("high") gets it in the norm too, as in every other product of float32 matrices. n then has
    a relative error below 2⁻¹¹, the unit roundoff of TF32. On CPUs with bfloat16 units, "medium" gives 2⁻⁸.
    """
    lower_matmul_precision(precision)
    # the relative error of n is half that of n²
    assert 0.5 * Norm(device, dtype).error() < 2.0**-bits


@on_each_device
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_fresh_adapter_does_not_change_the_output_when_tf32_is_on(device, precision, lower_matmul_precision):
    lower_matmul_precision(precision)
    layer = make_layer(48, 64, 4, trained=False).to(device)
    x, _ = inputs_of(layer)
    base_output = layer.get_base_layer()(x)
    assert relative_error(layer(x), base_output) < 1e-6


# ---- checkpointing, threads, determinism


def in_another_thread(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


@on_each_device
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("run", [lambda function: function(), in_another_thread], ids=["same thread", "other thread"])
@pytest.mark.parametrize("autocast_dtype", [None, *LOW_PRECISION])
def test_gradient_checkpointing_gives_the_output_and_gradients_of_the_reference(
    device, use_reentrant, run, autocast_dtype
):
    layer = layer_on(device)
    x, output_gradient = inputs_of(layer)
    with torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None):
        output = checkpoint(layer, x.requires_grad_(), use_reentrant=use_reentrant)
    run(lambda: output.backward(output_gradient.to(output.dtype)))
    assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[autocast_dtype or torch.float32])


@on_each_device
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("run", [lambda function: function(), in_another_thread], ids=["same thread", "other thread"])
def test_gradient_checkpointing_does_not_change_a_training_step_with_dropout(device, use_reentrant, run):
    model = make_peft_mlp(lora_dropout=0.5).to(device)
    for layer in svd_layers(model).values():
        train_by_hand(layer)
    x = torch.randn(32, 10, generator=torch.Generator().manual_seed(0)).to(device)
    gradients = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(5)
        loss = forward(x.clone().requires_grad_()).square().sum()
        run(loss.backward)
        gradients.append({name: param.grad.clone() for name, param in model.named_parameters() if param.requires_grad})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-6, name


@on_each_device
def test_a_backward_pass_in_another_thread_sees_the_weights_of_its_forward_pass(device):
    layer = layer_on(device)
    x, output_gradient = inputs_of(layer)
    output = layer(x.requires_grad_())
    with torch.no_grad():
        other = layer_on(device)
        train_by_hand(other)
        other(x)  # this thread goes on with other weights
    in_another_thread(lambda: output.backward(output_gradient))
    assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[torch.float32])


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_algorithms_give_the_same_bits_twice_and_match_the_reference(device, dtype):
    torch.use_deterministic_algorithms(True)  # also fills memory that nobody has written with NaN
    try:
        runs = []
        for _ in range(2):
            layer = layer_on(device, dtype)
            x, output_gradient = inputs_of(layer, dtype)
            output = layer(x.requires_grad_())
            output.backward(output_gradient)
            assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[dtype])
            runs.append([output, x.grad, *(getattr(layer, name)["default"].grad for name in FACTORS)])
        assert all(torch.equal(first, second) for first, second in zip(*runs))
    finally:
        torch.use_deterministic_algorithms(False)


@on_each_device
def test_deterministic_algorithms_train_and_prune_to_the_same_bits(device):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (Training(device).steps(range(20)).model for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert number_of_ranks(first) == 3 * 2
    assert all(torch.equal(param, other) for param, other in zip(first.parameters(), second.parameters()))


# ---- training that is moved, spread, or captured


class Spread(MLP):
    """An MLP that returns its loss, and whose layers may be on several devices."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> SimpleNamespace:
        for layer in (self.first, self.middle, self.last):
            x = layer(torch.tanh(x.to(layer.weight)))
        return SimpleNamespace(loss=(x - target.to(x)).square().mean())


class Training:
    """A training loop of 20 steps, with the orthogonality term, that can be stopped after any of them."""

    def __init__(self, device: str, spread: bool = False, **optimizer_kwargs: bool):
        base = Spread()
        base.load_state_dict(make_mlp().state_dict())
        base.to(device)
        if spread:
            base.middle.to("cpu")
        config = make_config(target_modules=["first", "middle", "last"])
        torch.manual_seed(0)
        self.model = get_peft_model(base, config)
        params = [param for param in self.model.parameters() if param.requires_grad]
        with torch.no_grad():  # the same on every device
            generator = torch.Generator().manual_seed(3)
            for layer in svd_layers(self.model).values():
                for name in FACTORS[:3]:
                    factor = getattr(layer, name)["default"]
                    factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
        self.optimizer = torch.optim.AdamW(params, lr=1e-2, **optimizer_kwargs)
        generator = torch.Generator().manual_seed(4)
        self.x, self.target = torch.randn(32, 10, generator=generator), torch.randn(32, 4, generator=generator)
        self.losses = []

    def step(self) -> None:
        """Forward and backward pass, and a step of the optimizer."""
        loss = self.model.base_model(self.x, self.target).loss
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def steps(self, steps: range) -> "Training":
        for step in steps:
            self.step()
            self.model.base_model.update_and_allocate(step)
            self.optimizer.zero_grad()
        return self

    def move(self, *args, **kwargs) -> "Training":
        """Move or convert the model, and the optimizer's state with it."""
        self.model.to(*args, **kwargs)
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        return self

    def assert_same(self, other: "Training") -> None:
        """Whether it has kept the same triplets and ended with the same weights."""
        layers, others = svd_layers(self.model), svd_layers(other.model)
        assert number_of_ranks(self.model) == 3 * 2
        for name, layer in layers.items():
            kept, expected = (it.lora_E["default"].cpu() != 0 for it in (layer, others[name]))
            assert torch.equal(kept, expected), name
        for (name, param), expected in zip(self.model.named_parameters(), other.model.parameters()):
            assert relative_error(param.cpu(), expected.cpu()) < 1e-4, name


MOVES = {
    "from the CPU to the GPU and back": pytest.param(
        "cpu",
        ({"device": "cuda"}, {"device": "cpu"}),
        marks=needs_cuda("a model cannot be moved to another device and back"),
    ),
    "from the GPU to the CPU and back": pytest.param(
        "cuda",
        ({"device": "cpu"}, {"device": "cuda"}),
        marks=needs_cuda("a model cannot be moved to another device and back"),
    ),
    "to float64 and back": pytest.param("cpu", ({"dtype": torch.float64}, {"dtype": torch.float32})),
}


@pytest.mark.parametrize("device, moves", MOVES.values(), ids=MOVES)
def test_a_model_that_is_moved_in_the_middle_of_training_ends_as_one_that_stays(device, moves):
    moved = Training(device).steps(range(5)).move(**moves[0]).steps(range(5, 9)).move(**moves[1]).steps(range(9, 20))
    moved.assert_same(Training(device).steps(range(20)))


@pytest.mark.parametrize("device, moves", MOVES.values(), ids=MOVES)
def test_a_model_that_has_been_moved_is_evaluated_with_its_weights(device, moves):
    layer = layer_on(device).eval()
    x, _ = inputs_of(layer)
    with torch.no_grad(), DoraCaching():
        before = layer(x)
        layer.to(**moves[0])
        train_by_hand(layer)
        weight = layer.get_base_layer().weight
        assert relative_error(layer(x.to(weight)), Reference.of(layer).forward(x.to(weight).double())) < 1e-5
        layer.to(**moves[1])
        after = layer(x)
        assert relative_error(after, Reference.of(layer).forward(x.double())) < 1e-5
        assert relative_error(after, before) > 0.1


@needs_cuda("a model cannot be spread over the CPU and a GPU")
def test_a_model_spread_over_two_devices_trains_and_prunes_as_one_on_a_single_device():
    spread = Training("cuda", spread=True)
    devices = {layer.lora_magnitude["default"].device.type for layer in svd_layers(spread.model).values()}
    assert devices == {"cpu", "cuda"}
    single = Training("cpu")
    spread.steps(range(20)).assert_same(single.steps(range(20)))
    for loss, expected in zip(spread.losses, single.losses):
        assert relative_error(loss.cpu(), expected) < 1e-4


@needs_cuda("a model cannot be spread over the CPU and a GPU")
def test_the_regularization_of_a_spread_model_is_that_of_the_model_on_a_single_device():
    terms = []
    for training in (Training("cuda", spread=True), Training("cpu")):
        tuner = training.model.base_model
        terms.append(tuner(training.x, training.target).loss - tuner.model(training.x, training.target).loss)
    assert terms[0].item() == pytest.approx(terms[1].item(), rel=1e-4)
    assert terms[1] > 0.1


@needs_cuda("a CUDA graph cannot be captured")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cuda_graph_of_an_evaluation_follows_the_adapter_and_the_weight(dtype):
    layer = layer_on("cuda", dtype).eval()
    x, _ = inputs_of(layer, dtype)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)
        parts = {name: getattr(layer, name)["default"] for name in FACTORS}
        parts["weight"] = layer.get_base_layer().weight
        for name, part in parts.items():
            part.mul_(1 + 0.5 * torch.rand_like(part))
            graph.replay()
            expected = Reference.of(layer).forward(x.double())
            assert relative_error(output, expected) < TOLERANCE[dtype], name
            assert relative_error(layer(x), expected) < TOLERANCE[dtype], name


@needs_cuda("a CUDA graph cannot be captured")
def test_a_cuda_graph_of_a_whole_training_step_trains_and_prunes_as_the_eager_loop():
    eager, captured = (Training("cuda", capturable=True) for _ in range(2))
    for training in (eager, captured):
        training.x, training.target = training.x.cuda(), training.target.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.steps(range(3))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(3, 20):
        graph.replay()
        captured.model.base_model.update_and_allocate(step)
    captured.assert_same(eager.steps(range(20)))


@needs_cuda("there are no streams")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_on_a_side_stream_matches_the_reference(dtype):
    layer = layer_on("cuda", dtype)
    x, output_gradient = inputs_of(layer, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # what does not wait for this stream computes with the weights of before
        torch.cuda._sleep(10**8)
        train_by_hand(layer)
        output = layer(x.requires_grad_())
        output.backward(output_gradient)
    torch.cuda.current_stream().wait_stream(stream)
    assert_matches_reference(layer, output, x, output_gradient, TOLERANCE[dtype])


@needs_cuda("there are no streams")
def test_a_cached_scale_that_a_side_stream_has_computed_is_right_on_the_main_stream():
    layer = layer_on("cuda").eval()
    x, _ = inputs_of(layer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), DoraCaching():
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        assert relative_error(layer(x), Reference.of(layer).forward(x.double())) < 1e-5
