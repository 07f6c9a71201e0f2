"""`orth_reg_decoupled`: A and B move towards orthogonality in a step of their own, and the loss is the model's own."""

import json
import warnings

import pytest
import torch
from helpers import TARGETS, make_config, make_mlp, parameter_bytes, svd_layers
from trainer_run import STEPS, RandomTokens, make_adalora_config, make_arguments, make_llama
from transformers import Adafactor, Trainer

from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraCallback


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs):
    """The adapter has the dtype of the model."""
    options = {"orth_reg_decoupled": True, "orth_reg_weight": 10.0, "target_modules": list(TARGETS), **kwargs}
    return get_peft_model(make_mlp(seed, dtype), make_config(**options), autocast_adapter_dtype=False)


def factors(model) -> dict[str, torch.Tensor]:
    return {name: param for name, param in model.named_parameters() if "lora_A" in name or "lora_B" in name}


def backward(model) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    model(x).square().mean().backward()


def exact_step(factor: torch.Tensor, step: float, is_B: bool) -> torch.Tensor:
    """The documented step in float64."""
    rows = (factor.T if is_B else factor).detach().double()
    difference = rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)
    rows = rows - step / (1 + step * difference.square().sum().sqrt()) * difference @ rows
    return rows.T if is_B else rows


def make_optimizer(model, lr_of_A: float = 0.02, lr_of_B: float = 0.005) -> torch.optim.Optimizer:
    """SGD with two groups; factors of the layer `last` are in none of them."""
    trained = {name: param for name, param in factors(model).items() if ".last." not in name}
    return torch.optim.SGD(
        [
            {"params": [param for name, param in trained.items() if "lora_A" in name], "lr": lr_of_A},
            {"params": [param for name, param in trained.items() if "lora_B" in name], "lr": lr_of_B},
        ],
        lr=1.0,
    )


@pytest.mark.parametrize("use_dora_adaptive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_the_step_is_the_formula_with_the_learning_rate_of_each_group(use_dora_adaptive, dtype, scale):
    model = make_model(dtype=dtype, use_dora_adaptive=use_dora_adaptive)
    with torch.no_grad():
        for factor in factors(model).values():
            factor.mul_(scale)  # singular values of about 0.1, and of about 20
    optimizer = make_optimizer(model)
    backward(model)
    for factor in factors(model).values():
        factor.grad.zero_()  # so that the optimizer's own step changes nothing
    before = {name: factor.detach().clone() for name, factor in factors(model).items()}
    optimizer.step()
    model.base_model.update_and_allocate(0, optimizer)
    for name, factor in factors(model).items():
        if ".last." in name:
            assert torch.equal(factor, before[name])
        else:
            is_B = "lora_B" in name
            exact = exact_step(before[name], 10 * (0.005 if is_B else 0.02), is_B)
            tolerance = 1e-6 if dtype == torch.float32 else 4e-3
            assert not torch.equal(factor, before[name])
            assert (factor.double() - exact).norm() <= tolerance * exact.norm(), name


@pytest.mark.parametrize("lr", [0.02, torch.tensor([0.02], dtype=torch.float64)], ids=["number", "tensor (1,)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_has_the_precision_of_the_factors_within_autocast_too(dtype, lr):
    model = make_model(dtype=dtype, orth_reg_weight=10.1)
    optimizer = torch.optim.SGD(factors(model).values(), lr=lr)
    backward(model)
    before = {name: factor.detach().clone() for name, factor in factors(model).items()}
    with torch.autocast("cpu", torch.bfloat16):
        model.base_model.update_and_allocate(0, optimizer)
    for name, factor in factors(model).items():
        exact = exact_step(before[name], 10.1 * 0.02, "lora_B" in name)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert (factor.double() - exact).norm() <= tolerance * exact.norm(), name


def test_large_and_small_factors_become_orthonormal_without_overshooting():
    model = make_model(total_step=400, tfinal=100)
    with torch.no_grad():
        for index, factor in enumerate(factors(model).values()):
            factor.mul_((0.1, 1.0, 500.0)[index % 3])
    optimizer = torch.optim.SGD(factors(model).values(), lr=0.05)
    backward(model)
    for factor in factors(model).values():
        factor.grad.zero_()
    signs = {name: factor[0, 0].sign() for name, factor in factors(model).items()}
    for step in range(200):
        model.base_model.update_and_allocate(step, optimizer)
    for layer in svd_layers(model).values():
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        if B.shape[0] >= B.shape[1]:  # `last` has fewer outputs than ranks
            torch.testing.assert_close(B.T @ B, torch.eye(B.shape[1]), rtol=0, atol=1e-3)
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-3)
    assert all(factor[0, 0].sign() == signs[name] for name, factor in factors(model).items() if "first" in name)


@pytest.mark.parametrize("use_dora_adaptive", [True, False])
def test_the_loss_is_the_models_own_and_no_warning_says_that_the_term_is_missing(use_dora_adaptive):
    config = make_adalora_config(orth_reg_decoupled=True, use_dora_adaptive=use_dora_adaptive)
    model = get_peft_model(make_llama(), config).train()
    tokens = torch.arange(10).view(1, -1)
    outputs = model(input_ids=tokens, labels=tokens)
    with model.disable_adapter():
        assert torch.equal(outputs.loss, model(input_ids=tokens, labels=tokens).loss)  # E is 0
    optimizer = torch.optim.SGD(factors(model).values(), lr=0.1)
    outputs.logits.square().mean().backward()  # as trainers with a loss of their own do
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.base_model.update_and_allocate(0, optimizer)


@pytest.mark.parametrize("fault", ["no optimizer", "another model's optimizer", "zero_grad came first"])
def test_a_call_that_is_refused_changes_nothing(fault):
    model = make_model()
    optimizer = make_optimizer(make_model(seed=1) if fault == "another model's optimizer" else model)
    backward(model)
    if fault == "zero_grad came first":
        model.zero_grad()
    before = parameter_bytes(model)
    with pytest.raises(ValueError, match="update_and_allocate"):
        model.base_model.update_and_allocate(0, None if fault == "no optimizer" else optimizer)
    assert parameter_bytes(model) == before
    assert not model.base_model.rankallocator.exp_avg_ipt


def test_an_optimizer_without_a_learning_rate_is_refused_and_nothing_has_changed():
    model = make_model()
    optimizer = Adafactor(factors(model).values(), lr=None)  # which chooses one of its own
    backward(model)
    before = parameter_bytes(model)
    with pytest.raises(ValueError, match="and its learning rate"):
        model.base_model.update_and_allocate(0, optimizer)
    assert parameter_bytes(model) == before
    assert not model.base_model.rankallocator.exp_avg_ipt


def test_factors_that_are_all_frozen_stay_although_the_optimizer_has_them():
    model = make_model(init_lora_weights=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: factor.detach().clone() for name, factor in factors(model).items()}
    for factor in factors(model).values():
        factor.requires_grad_(False)
    for step in range(3):
        backward(model)
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    assert all(torch.equal(factor, before[name]) for name, factor in factors(model).items())


@pytest.mark.parametrize("step", [1, 15, 18], ids=["before pruning", "the last allocation", "after pruning"])
@pytest.mark.parametrize("where", ["lora_A", "lora_magnitude"])
def test_a_step_that_a_gradient_scaler_skips_moves_no_factor(where, step):
    model = make_model()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    for current in range(step + 1):
        backward(model)
        if current == step:
            next(param for name, param in model.named_parameters() if where in name).grad.fill_(torch.inf)
        before = {name: factor.detach().clone() for name, factor in factors(model).items()}
        scaler.scale(torch.ones(()))  # which starts the scaler; the gradients are of a scale of 1
        scaler.step(optimizer)
        scaler.update()
        model.base_model.update_and_allocate(current, optimizer)
        moved = any(not torch.equal(factor, before[name]) for name, factor in factors(model).items())
        assert moved is (current != step)
        optimizer.zero_grad()


def test_a_weight_of_zero_needs_no_optimizer_and_changes_no_factor():
    model = make_model(orth_reg_weight=0)
    backward(model)
    before = {name: factor.detach().clone() for name, factor in factors(model).items()}
    model.base_model.update_and_allocate(0)
    assert all(torch.equal(factor, before[name]) for name, factor in factors(model).items())


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_frozen_factor_stays_although_the_optimizer_has_it(part):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for name, factor in factors(model).items():
        factor.requires_grad_(part not in name)
    before = {name: factor.detach().clone() for name, factor in factors(model).items()}
    backward(model)
    model.base_model.update_and_allocate(0, optimizer)
    for name, factor in factors(model).items():
        assert torch.equal(factor, before[name]) == (part in name)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="`orth_reg_weight` should be greater than or equal to 0"):
        AdaLoraConfig(orth_reg_decoupled=True, orth_reg_weight=-1, total_step=10)


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_option_is_saved_and_a_config_saved_without_it_has_the_term_in_the_loss(decoupled, tmp_path):
    make_model(orth_reg_decoupled=decoupled).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
    assert loaded.peft_config["default"].orth_reg_decoupled is decoupled
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["orth_reg_decoupled"]
    path.write_text(json.dumps(config))
    assert AdaLoraConfig.from_pretrained(tmp_path).orth_reg_decoupled is False


def test_pruned_triplets_stay_at_zero_and_the_budget_is_kept():
    model = make_model()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    for step in range(20):
        backward(model)
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    kept = sum(int(layer.lora_E["default"].count_nonzero()) for layer in svd_layers(model).values())
    assert kept == 2 * 3


@pytest.mark.parametrize("use_dora_adaptive", [True, False])
def test_the_callback_does_what_a_loop_does_and_resumes_bit_for_bit(use_dora_adaptive, tmp_path):
    options = {"orth_reg_decoupled": True, "orth_reg_weight": 10.0, "use_dora_adaptive": use_dora_adaptive}
    options["lora_dropout"] = 0.0  # of which the runs would draw differently

    def make_trainer(folder, **kwargs):
        arguments = make_arguments(folder, max_grad_norm=0.0, **kwargs)
        model = get_peft_model(make_llama(), make_adalora_config(**options))
        return Trainer(model, arguments, train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()])

    trainer = make_trainer(tmp_path / "a", save_steps=4, lr_scheduler_type="linear")
    inputs, rates = [], []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    trainer.create_optimizer_and_scheduler(STEPS)
    trainer.optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.train()
    trained = trainer.model.state_dict()

    model = get_peft_model(make_llama(), make_adalora_config(**options))
    groups = trainer.optimizer.param_groups
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.0)
    defaults = {key: groups[0][key] for key in ("betas", "eps")}
    optimizer.param_groups[0].update(defaults)
    per_step = len(inputs) // STEPS
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rates[step]
        for micro_batch in inputs[per_step * step : per_step * (step + 1)]:
            model(**micro_batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, msg=name)

    resumed = make_trainer(tmp_path / "a", save_steps=STEPS + 1, lr_scheduler_type="linear")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trained[name]), name
