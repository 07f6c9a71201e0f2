"""The Triton kernels of the benchmarks agree with float64 in Triton's interpreter, and they compile for a GPU."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton", reason="there is no triton here")
pytestmark = [pytest.mark.overlay, pytest.mark.project]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of one rounding; the interpreter cuts bfloat16 off instead of rounding it
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def candidates():
    """The kernels' modules. Only a process of this file imports them."""
    sys.path.insert(0, str(BENCHMARKS))
    from candidates import norm, output

    return output, norm


def run_output(output, scale, bias, projected, scaled_B, gradient):
    """h and the gradients of what takes one."""
    kernels, _ = candidates()
    arguments = [output, scale, bias, projected, scaled_B]
    h = kernels.adapted_output(*arguments)
    inputs = [argument for argument in arguments if argument is not None and argument.requires_grad]
    return [h.detach(), *torch.autograd.grad(h, inputs, gradient)]


def run_norm(*factors):
    _, kernels = candidates()
    return kernels.squared_adapted_row_norm(*factors)


def compile_kernel(name, dtype, constants, capability):
    """The names of what the compiler made of a kernel for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    output, norm = candidates()
    kernel = getattr(norm if name == "norm_kernel" else output, name).fn
    in_dtype = {"output", "result", "bias", "gradient", "output_gradient", "weight"}
    numbers = {"tokens", "features", "rank", "tokens_per_program", "rows", "columns", "row_stride", "column_stride"}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in numbers:
            signature[argument] = "i32"
        else:
            signature[argument] = f"*{dtype}" if argument in in_dtype else "*fp32"
    source = ASTSource(kernel, signature, constants)
    return list(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm)


def process(**environment):
    """
    A pool of one process with other environment variables. Triton reads what concerns the interpreter when it is
    imported, which other tests of this process may have done.
    """
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    pool.submit(int).result()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return pool


@pytest.fixture(scope="module")
def interpreter():
    with process(TRITON_INTERPRET="1") as pool:
        yield pool


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    with process(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))) as pool:
        yield pool


def assert_near(value, exact, dtype):
    """Each value is as near to the exact one as one rounding to the dtype takes it, and float32 sums before."""
    error = (value.double() - exact).abs()
    assert (error <= PRECISION[dtype] * exact.abs() + 1e-5 * exact.abs().max()).all()


class TestOutput:
    def inputs(self, dtype, has_bias, shape=(70, 150), rank=12):
        torch.manual_seed(0)
        features = shape[-1]
        output, gradient = torch.randn(*shape).to(dtype), torch.randn(*shape).to(dtype)
        bias = torch.randn(features).to(dtype) if has_bias else None
        scale, projected = 0.5 + torch.rand(features), torch.randn(*shape[:-1], rank)
        tensors = [output, scale, bias, projected, torch.randn(features, rank)]
        return [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors], gradient

    def exact(self, tensors, gradient):
        """h = (m / n) ⊙ W x + b + (m / n) ⊙ B (c E ⊙ A x) and its gradients, from the definition in float64."""
        doubles = [tensor if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]
        output, scale, bias, projected, scaled_B = doubles
        shift = 0 if bias is None else bias
        h = scale * (output - shift) + projected @ scaled_B.T + shift
        return [h.detach(), *torch.autograd.grad(h, [d for d in doubles if d is not None], gradient.double())]

    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_output_and_gradients_are_those_of_float64(self, interpreter, dtype, has_bias):
        tensors, gradient = self.inputs(dtype, has_bias)
        found = interpreter.submit(run_output, *tensors, gradient).result()
        wanted = [tensor for tensor in tensors if tensor is not None]
        assert [value.dtype for value in found] == [dtype, *(tensor.dtype for tensor in wanted)]
        for value, exact in zip(found, self.exact(tensors, gradient), strict=True):
            assert value.shape == exact.shape
            assert_near(value, exact, value.dtype)

    @pytest.mark.parametrize(
        "shape, rank", [((3, 5), 1), ((130, 300), 20), ((2, 33, 128), 4), ((24,), 3), ((64, 64), 0)]
    )
    def test_any_shape_and_rank_will_do(self, interpreter, shape, rank):
        tensors, gradient = self.inputs(torch.float32, True, shape, rank)
        found = interpreter.submit(run_output, *tensors, gradient).result()
        for value, exact in zip(found, self.exact(tensors, gradient), strict=True):
            assert value.shape == exact.shape
            if value.numel() > 0:
                assert_near(value, exact, torch.float32)

    def test_more_tokens_than_one_program_takes_are_summed_up(self, interpreter):
        tensors, gradient = self.inputs(torch.float32, False, (200, 16), 2)
        found = interpreter.submit(run_output, *tensors, gradient).result()
        for value, exact in zip(found, self.exact(tensors, gradient), strict=True):
            assert_near(value, exact, torch.float32)

    def test_a_frozen_bias_gets_no_gradient(self, interpreter):
        tensors, gradient = self.inputs(torch.bfloat16, True)
        tensors[2] = tensors[2].detach()
        found = interpreter.submit(run_output, *tensors, gradient).result()
        exact = self.exact(tensors, gradient)
        del exact[3]
        for value, expected in zip(found, exact, strict=True):
            assert_near(value, expected, value.dtype)


class TestNorm:
    def factors(self, dtype, rows=100, columns=300, rank=12):
        torch.manual_seed(0)
        return (
            torch.randn(rows, columns).to(dtype),
            torch.randn(rank, columns),
            torch.randn(rank, 1),
            torch.randn(rows, rank),
        )

    def exact(self, weight, lora_A, scaled_E, lora_B):
        adapted = weight.double() + lora_B.double() @ (scaled_E.double() * lora_A.double())
        return adapted.square().sum(1, keepdim=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_norm_is_that_of_float64_whatever_the_dtype_of_the_weight(self, interpreter, dtype):
        factors = self.factors(dtype)
        value = interpreter.submit(run_norm, *factors).result()
        assert value.shape == (100, 1) and value.dtype == torch.float32
        torch.testing.assert_close(value.double(), self.exact(*factors), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("rows, columns, rank", [(1, 3, 1), (33, 128, 20), (64, 257, 0)])
    def test_any_shape_and_rank_will_do(self, interpreter, rows, columns, rank):
        factors = self.factors(torch.bfloat16, rows, columns, rank)
        value = interpreter.submit(run_norm, *factors).result()
        torch.testing.assert_close(value.double(), self.exact(*factors), rtol=1e-6, atol=0)

    def test_a_transposed_weight_is_read_as_it_is(self, interpreter):
        weight, *others = self.factors(torch.float16)
        transposed = weight.T.contiguous().T
        value = interpreter.submit(run_norm, transposed, *others).result()
        torch.testing.assert_close(value.double(), self.exact(weight, *others), rtol=1e-6, atol=0)

    def test_factors_too_small_or_too_large_for_float16_keep_their_precision(self, interpreter):
        weight, lora_A, scaled_E, lora_B = self.factors(torch.float16)
        for size in (1e-6, 1e6):
            factors = weight, lora_A * size, scaled_E, lora_B / size
            value = interpreter.submit(run_norm, *factors).result()
            torch.testing.assert_close(value.double(), self.exact(*factors), rtol=1e-5, atol=0)

    def test_a_row_that_cancels_is_not_negative(self, interpreter):
        weight, lora_A, scaled_E, lora_B = self.factors(torch.float32)
        weight = -lora_B @ (scaled_E * lora_A)
        value = interpreter.submit(run_norm, weight, lora_A, scaled_E, lora_B).result()
        assert (value >= 0).all()
        assert (value <= 1e-5 * weight.square().sum(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "name, constants",
    [
        ("forward_kernel", {"HAS_BIAS": True, "BLOCK_RANK": 16, "BLOCK_TOKENS": 64, "BLOCK_FEATURES": 128}),
        ("backward_kernel", {"HAS_BIAS": True, "BLOCK_RANK": 16, "BLOCK_TOKENS": 64, "BLOCK_FEATURES": 128}),
        ("norm_kernel", {"BLOCK_RANK": 16, "BLOCK_ROWS": 32, "BLOCK_COLUMNS": 128}),
    ],
)
def test_the_kernels_compile_for_an_h100(compiler, name, constants, dtype):
    assert "cubin" in compiler.submit(compile_kernel, name, dtype, constants, 90).result()
