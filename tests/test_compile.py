"""Training and evaluation compile without a graph break in our layers, and give the same numbers."""

import copy

import pytest
import torch
from helpers import make_layer, make_peft_mlp, svd_layers, train_by_hand
from reference import relative_error
from torch._dynamo.testing import CompileCounter
from trainer_run import RandomTokens, make_adalora_config, make_llama

from peft import get_peft_model


X = torch.randn(13, 10, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model():
    model = make_peft_mlp(lora_dropout=0.0)
    for layer in svd_layers(model).values():
        train_by_hand(layer)
    return model


def test_a_training_step_compiles_as_one_graph_with_the_same_gradients():
    eager, compiled = make_model(), make_model()
    counter = CompileCounter()
    torch.compile(compiled.base_model.model, backend=counter, fullgraph=True)(X).square().sum().backward()
    eager.base_model.model(X).square().sum().backward()
    assert counter.frame_count == 1
    gradients = dict(compiled.named_parameters())
    for name, param in eager.named_parameters():
        if param.requires_grad:
            assert relative_error(gradients[name].grad, param.grad) < 1e-5, name


def test_evaluation_compiles_as_one_graph_and_follows_the_weights():
    model = make_model().eval()
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(X), model(X)) < 1e-5
        for layer in svd_layers(model).values():
            layer.lora_magnitude["default"].mul_(1.5)
        assert relative_error(compiled(X), model(X)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_the_default_backend_gives_the_same_numbers(bias):
    layer = make_layer(24, 32, 4, bias=bias)
    twin = copy.deepcopy(layer)
    x = torch.randn(9, 32)
    output, expected = torch.compile(layer)(x), twin(x)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(output, expected) < 1e-5
    for name in ("lora_A", "lora_E", "lora_B", "lora_magnitude"):
        assert relative_error(getattr(layer, name)["default"].grad, getattr(twin, name)["default"].grad) < 1e-5


def test_training_a_model_with_a_loss_does_not_compile_again_at_each_step():
    model = get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0))
    compiled = torch.compile(model, backend="eager")
    tokens = RandomTokens()[3]["input_ids"][None]
    for _ in range(2):  # the gradients of the first step are `None` before it
        compiled(input_ids=tokens, labels=tokens).loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(input_ids=tokens, labels=tokens).loss.backward()
