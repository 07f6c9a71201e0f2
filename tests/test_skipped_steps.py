"""A step that a gradient scaler skips, because a gradient has overflowed, has no influence on the ranks."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import parameter_bytes
from trainer_run import STEPS, RandomTokens, make_adalora_config, make_llama, make_trainer
from transformers import TrainerCallback

from peft import get_peft_model
from peft.tuners.adalora import AdaLoraCallback


LAST_ALLOCATION = STEPS - 5


def batch(index: int) -> dict[str, torch.Tensor]:
    return {key: row[None] for key, row in RandomTokens()[index].items()}


class AroundSteps(TrainerCallback):
    """Records the parameters before and after each optimizer step and the allocation that follows it."""

    def __init__(self):
        self.before, self.after = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.before.append(parameter_bytes(model))

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.after.append(parameter_bytes(model))


@pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
@pytest.mark.parametrize(
    ("optim", "skipped"),
    [
        # at an allocation, at the last allocation, and after it
        ("adamw_torch", 8),
        ("adamw_torch", LAST_ALLOCATION),
        ("adamw_torch", 13),
        # a fused optimizer skips within its step, and `step_was_skipped` stays False
        ("adamw_torch_fused", 0),
        ("adamw_torch_fused", 9),
    ],
)
def test_a_run_with_a_step_that_a_scaler_skips_ends_as_a_loop_that_leaves_it_out(
    optim, skipped, use_dora_adaptive, tmp_path
):
    # allocations at the steps 4, 8 and 11
    config_kwargs = {"use_dora_adaptive": use_dora_adaptive, "lora_dropout": 0.0, "deltaT": 4}
    around = AroundSteps()
    trainer = make_trainer(
        tmp_path,
        make_adalora_config(**config_kwargs),
        (around,),
        optim=optim,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # the gradient of one parameter overflows
    param = next(param for name, param in trainer.model.named_parameters() if "lora_B" in name)
    param.register_hook(lambda grad: grad * torch.inf if trainer.state.global_step == skipped else grad)
    inputs = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    trainer.train()
    unchanged = [step for step in range(STEPS) if around.before[step] == around.after[step]]
    assert unchanged == ([] if skipped == LAST_ALLOCATION else [skipped])

    model = get_peft_model(make_llama(), make_adalora_config(**config_kwargs))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        for micro_batch in inputs[2 * step : 2 * step + 2]:
            model(**micro_batch).loss.backward()
        if step != skipped:
            optimizer.step()
        if step != skipped or step == LAST_ALLOCATION:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    pattern = trainer.model.peft_config["default"].rank_pattern
    assert pattern == model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 12
    for (name, param), other in zip(trainer.model.named_parameters(), model.parameters()):
        torch.testing.assert_close(param, other, msg=name)


def run(config, steps, value, part: str = "lora_E", fused: bool = False, is_told: bool = False):
    """
    A loop that calls `update_and_allocate` after every step, where a gradient gets a value in some steps. The scaler
    skips these. `is_told` keeps the allocator from seeing their gradients. Returns the averages after each step, too.
    """
    model = get_peft_model(make_llama(), config)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer, scaler = torch.optim.AdamW(params, lr=1e-2, fused=fused), torch.amp.GradScaler("cpu", init_scale=64.0)
    overflowing = next(param for name, param in model.named_parameters() if part in name and param.requires_grad)
    averages = []
    for step in range(STEPS):
        scaler.scale(model(**batch(step)).loss).backward()
        if step in steps:
            overflowing.grad[0] = value
        scaler.step(optimizer)
        scaler.update()
        with pytest.MonkeyPatch.context() as patch:
            if is_told and step in steps:
                patch.setattr(model.base_model.rankallocator, "update_ipt", lambda _: None)
            model.base_model.update_and_allocate(step)
        averages.append(model.base_model.rankallocator.state_dict())
        optimizer.zero_grad()
    return model, averages


def assert_same_run(run, reference) -> None:
    (model, averages), (reference, expected) = run, reference
    for of_step, of_step_expected in zip(averages, expected):
        assert of_step.keys() == of_step_expected.keys()
        assert all(torch.equal(score, of_step_expected[name]) for name, score in of_step.items())
    pattern = model.base_model.peft_config["default"].rank_pattern
    assert pattern == reference.base_model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 12
    for param, other in zip(model.parameters(), reference.parameters()):
        assert torch.equal(param, other)


# allocations at the steps 4, 8 and 11
@pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    "steps", [(0,), (4,), (LAST_ALLOCATION,), (13,), (0, 1, 2, 3, 4, 5)], ids=["first", "4", "last", "13", "first six"]
)
def test_the_ranks_of_a_loop_with_gradients_that_are_not_finite_are_those_of_the_other_steps(
    steps, value, use_dora_adaptive
):
    config = make_adalora_config(use_dora_adaptive=use_dora_adaptive, lora_dropout=0.0, deltaT=4)
    assert_same_run(run(config, steps, value), run(config, steps, value, is_told=True))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("part", ["lora_magnitude", "modules_to_save"])
def test_a_step_that_is_skipped_for_another_parameter_than_a_factor_does_not_count(part, fused):
    """A fused optimizer leaves the gradients of all parameters scaled then."""
    config = make_adalora_config(modules_to_save=["lm_head"], lora_dropout=0.0, deltaT=4)
    steps = (3, 4, 6)
    assert_same_run(*(run(config, steps, torch.inf, part, fused, is_told) for is_told in (False, True)))


def test_captured_gradients_of_a_skipped_step_do_not_stay_in_the_sums():
    """With DeepSpeed, which takes its step within the backward pass."""
    averages = []
    for steps in ([0], [1, 0]):
        model = get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0))
        tuner = model.base_model
        tuner.rankallocator.capture_gradients(tuner.model)
        callback = AdaLoraCallback()
        callback.tuner = tuner
        for step in steps:
            is_skipped = step == 1
            loss = model(**batch(step)).loss
            (loss * torch.inf if is_skipped else loss).backward()
            optimizer = SimpleNamespace(step_was_skipped=is_skipped)
            callback.on_optimizer_step(
                SimpleNamespace(deepspeed={}), SimpleNamespace(global_step=0), None, optimizer=optimizer
            )
            model.zero_grad()
        averages.append(tuner.rankallocator.state_dict())
    assert averages[0].keys() == averages[1].keys() != set()
    for name, score in averages[0].items():
        assert torch.equal(score, averages[1][name]), name


def test_a_scale_that_overflows_at_the_start_does_not_keep_all_ranks():
    model = get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0))
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer, scaler = torch.optim.AdamW(params, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    skipped = 0
    for step in range(STEPS):
        scale = scaler.get_scale()
        scaler.scale(model(**batch(step)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert 2 < skipped < LAST_ALLOCATION
    assert sum(int(param.count_nonzero()) for name, param in model.named_parameters() if "lora_E" in name) == 12


def test_without_a_finite_step_before_the_last_allocation_the_error_says_so():
    model = get_peft_model(make_llama(), make_adalora_config())
    param = next(param for name, param in model.named_parameters() if "lora_E" in name)
    param.register_hook(lambda grad: grad * torch.nan)
    for step in range(LAST_ALLOCATION):
        model(**batch(step)).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    for step in (LAST_ALLOCATION, LAST_ALLOCATION + 1):
        with pytest.raises(ValueError, match="no call before has seen finite gradients"):
            model.base_model.update_and_allocate(step)


def test_the_loop_of_accelerate_with_steps_that_a_scaler_skips_gives_the_ranks_of_the_steps_that_count():
    """The loop of the training guide, which counts the steps that were taken."""
    results = []
    for init_scale in (64.0, 2.0**127):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        model = get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0))
        params = [param for param in model.parameters() if param.requires_grad]
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(params, lr=1e-2))
        tuner, step, batches = accelerator.unwrap_model(model).base_model, 0, 0
        while step < STEPS:
            accelerator.backward(model(**batch(step)).loss)
            optimizer.step()
            if accelerator.sync_gradients and not optimizer.step_was_skipped:
                tuner.update_and_allocate(step)
                step += 1
            optimizer.zero_grad()
            batches += 1
        results.append((batches, tuner.peft_config["default"].rank_pattern, [param.detach() for param in params]))
    (few, pattern, weights), (many, pattern_of_scaled, weights_of_scaled) = results
    assert few == STEPS < many
    assert pattern == pattern_of_scaled
    for param, other in zip(weights, weights_of_scaled):
        torch.testing.assert_close(param, other)
