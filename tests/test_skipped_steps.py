"""A step that a gradient scaler skips, because a gradient has overflowed, has no influence on the ranks."""

import pytest
import torch
from helpers import parameter_bytes
from trainer_run import STEPS, make_adalora_config, make_llama, make_trainer
from transformers import TrainerCallback

from peft import get_peft_model


LAST_ALLOCATION = STEPS - 5


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
