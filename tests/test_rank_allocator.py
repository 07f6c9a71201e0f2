"""The rank allocator scores as PEFT's does, bit for bit."""

import copy

import pytest
import torch
from helpers import make_peft_mlp, svd_layers

from peft.tuners.adalora import RankAllocator


def scores_by_the_paper(allocator: RankAllocator, history: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]):
    """Sensitivity (eq. 8) and its two moving averages (eq. 9 and 10 of the AdaLoRA paper), one parameter at a time."""
    ipt, average, uncertainty = {}, {}, {}
    for step in history:
        for name, (param, gradient) in step.items():
            ipt[name] = (param * gradient).abs()
            average[name] = allocator.beta1 * average.get(name, 0 * param) + (1 - allocator.beta1) * ipt[name]
            deviation = (ipt[name] - average[name]).abs()
            old = uncertainty.get(name, 0 * param)
            uncertainty[name] = allocator.beta2 * old + (1 - allocator.beta2) * deviation
    return ipt, average, uncertainty


@pytest.mark.parametrize("use_dora_adaptive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scores_are_those_of_the_paper_bit_for_bit(use_dora_adaptive, dtype):
    model = make_peft_mlp(use_dora_adaptive=use_dora_adaptive, beta1=0.85, beta2=0.7).to(dtype)
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    history = []
    for _ in range(5):
        model(torch.randn(8, 10, dtype=dtype)).square().sum().backward()
        optimizer.step()
        history.append(
            {
                name: (param.detach().clone(), param.grad.clone())
                for name, param in model.base_model.model.named_parameters()
                if any(part in name for part in ("lora_A", "lora_E", "lora_B"))
            }
        )
        allocator.update_ipt(model.base_model.model)
        optimizer.zero_grad()

    for scores, expected in zip(
        (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc), scores_by_the_paper(allocator, history)
    ):
        assert scores.keys() == expected.keys()
        assert len(scores) == 9
        for name in scores:
            assert torch.equal(scores[name], expected[name]), name


def test_a_parameter_without_a_gradient_counts_as_one_of_gradient_zero():
    model = make_peft_mlp()
    allocator = model.base_model.rankallocator
    model(torch.randn(8, 10)).square().sum().backward()
    twin = copy.deepcopy(allocator)
    first = svd_layers(model)["base_model.model.first"]
    for param in first.parameters():
        param.grad = None
    allocator.update_ipt(model.base_model.model)
    assert not allocator.ipt["first.lora_A.default"].any()
    for param in first.parameters():
        param.grad = torch.zeros_like(param)
    twin.update_ipt(model.base_model.model)
    for name, score in twin.exp_avg_unc.items():
        assert torch.equal(score, allocator.exp_avg_unc[name])


def test_an_update_leaves_parameters_and_gradients_alone():
    model = make_peft_mlp()
    model(torch.randn(8, 10)).square().sum().backward()
    params = [p for p in model.parameters() if p.grad is not None]
    before = [(p.detach().clone(), p.grad.clone()) for p in params]
    model.base_model.rankallocator.update_ipt(model.base_model.model)
    for param, (value, gradient) in zip(params, before):
        assert torch.equal(param, value)
        assert torch.equal(param.grad, gradient)
