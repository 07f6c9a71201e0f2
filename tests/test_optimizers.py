"""PEFT's own optimizers on a model with an AdaDoRA adapter: they do what their formulas say, or refuse it."""

import pytest
import torch
from helpers import make_config, make_mlp, make_peft_mlp, svd_layers, train_by_hand
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer


def loss_of(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(32, 10, generator=generator), torch.randn(32, 4, generator=generator)
    return nn.functional.mse_loss(model(x), target)


def trained_by_hand():
    model = make_peft_mlp()
    for layer in svd_layers(model).values():
        train_by_hand(layer)
    return model.train()


def test_lorafa_is_refused_before_anything_changes():
    model = trained_by_hand()
    before = {name: (param.requires_grad, param.clone()) for name, param in model.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"LoRA-FA trains B .* use another optimizer"):
        create_lorafa_optimizer(model, r=6, lora_alpha=12, lr=1e-3)
    for name, param in model.named_parameters():
        assert param.requires_grad == before[name][0]
        assert torch.equal(param, before[name][1])


def test_lorafa_of_another_adapter_works_as_before():
    model = get_peft_model(make_mlp(), LoraConfig(r=4, target_modules=["first", "last"], lora_alpha=8))
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    first = loss_of(model)
    for _ in range(10):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model) < first


@pytest.mark.parametrize("kept", [6, 2, 0])
def test_the_riemannian_optimizer_preconditions_a_and_b_and_leaves_e_and_m_as_they_are(kept):
    model = trained_by_hand()
    pattern = {f"{name}.lora_E": [True] * kept + [False] * (6 - kept) for name in ("first", "middle", "last")}
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=1e-2)
    loss_of(model).backward()
    before = {name: (param.detach().double(), param.grad.double()) for name, param in trained(model).items()}
    optimizer.step()
    for name, param in trained(model).items():
        value, gradient = before[name]
        if "lora_A" in name:
            other = before[name.replace("lora_A", "lora_B")][0]
            gradient = torch.linalg.solve(other.T @ other + 1e-2 * torch.eye(kept).double(), gradient)
        elif "lora_B" in name:
            other = before[name.replace("lora_B", "lora_A")][0]
            gradient = torch.linalg.solve(other @ other.T + 1e-2 * torch.eye(kept).double(), gradient, left=False)
        torch.testing.assert_close(param.double(), value - gradient, rtol=1e-3, atol=1e-3)


def trained(model) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def test_loraplus_gives_b_a_learning_rate_of_its_own_and_m_that_of_the_rest():
    model = trained_by_hand()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {param: name for name, param in model.named_parameters()}
    rates = {names[param]: group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert rates.keys() == trained(model).keys()
    for name, rate in rates.items():
        assert rate == (16e-3 if "lora_B" in name else 1e-3), name
    first = loss_of(model)
    for step in range(20):
        loss_of(model).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert loss_of(model) < first


def test_a_config_of_plain_adalora_is_left_to_peft():
    model = get_peft_model(make_mlp(), make_config(target_modules=["first"], use_dora_adaptive=False))
    create_lorafa_optimizer(model, r=6, lora_alpha=12, lr=1e-3)
    assert not any(param.requires_grad for name, param in model.named_parameters() if "lora_A" in name)
