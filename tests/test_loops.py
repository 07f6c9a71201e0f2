"""The loops of the training guide, as they stand there, give what a plain loop gives, bit for bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers import run_block
from torch.utils.data import DataLoader
from trainer_run import RandomTokens, make_adalora_config, make_llama

from peft import PeftModel, get_peft_model


pytestmark = pytest.mark.overlay
OPTIONS = {"lora_dropout": 0.0, "orth_reg_decoupled": True, "orth_reg_weight": 10.0}


def make_model() -> PeftModel:
    return get_peft_model(make_llama(), make_adalora_config(**OPTIONS)).train()


def plain_loop(accumulate: int, skipped_steps: Sequence[int] = ()) -> PeftModel:
    model = make_model()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    taken = 0
    for index, batch in enumerate(DataLoader(RandomTokens(), batch_size=4 // accumulate)):
        (model(**batch).loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if index // accumulate not in skipped_steps:
                optimizer.step()
                model.base_model.update_and_allocate(taken, optimizer)
                taken += 1
            optimizer.zero_grad()
    return model


def assert_same(model: PeftModel, expected: PeftModel) -> None:
    rank_pattern = expected.peft_config["default"].rank_pattern
    assert not all(map(all, rank_pattern.values()))
    assert model.peft_config["default"].rank_pattern == rank_pattern
    for (name, param), other in zip(model.named_parameters(), expected.parameters()):
        assert torch.equal(param, other), name


ACCELERATOR = "accelerator = Accelerator(gradient_accumulation_steps=2)\n"
ON_CPU = "accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)\naccelerator.scaler = scaler\n"


def run_accelerate_loop(
    folder: Path, resume_from: str | None = None, scaler: torch.amp.GradScaler | None = None
) -> dict[str, Any]:
    return run_block(
        folder,
        "from accelerate import Accelerator",
        {
            "resume_from = None": f"resume_from = {resume_from!r}",
            ACCELERATOR: ON_CPU,
        },
        scaler=scaler,
        torch=torch,
        get_peft_model=get_peft_model,
        base_model=make_llama(),
        config=make_adalora_config(**OPTIONS),
        dataset=RandomTokens(),
        collator=None,
    )


def test_the_loop_with_accelerate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_accelerate_loop(tmp_path)
    assert names["progress"] == {"batches": 32, "steps": 16}
    expected = plain_loop(2)
    assert_same(names["model"], expected)
    # in warm-up, between two allocations, and in the final phase
    for batches in (4, 16, 28):
        resumed = run_accelerate_loop(tmp_path, resume_from=f"state-{batches}")
        assert resumed["progress"] == names["progress"]
        assert_same(resumed["model"], expected)


@pytest.mark.parametrize("skipped_step", [6, 11], ids=["an allocation", "the last allocation"])
def test_the_loop_with_accelerate_does_not_allocate_in_a_step_that_was_skipped(skipped_step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = []

    def step(self, closure=None):
        if self.gradient_state.sync_gradients:
            steps.append(self)
            if len(steps) - 1 != skipped_step:
                self.optimizer.step(closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: len(steps) - 1 == skipped_step))
    assert_same(run_accelerate_loop(tmp_path)["model"], plain_loop(2, [skipped_step]))


def test_the_loop_with_accelerate_leaves_out_the_steps_that_overflow(tmp_path, monkeypatch):
    """At the first scales the loss itself is infinite."""
    monkeypatch.chdir(tmp_path)
    names = run_accelerate_loop(tmp_path, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    skipped = 16 - names["progress"]["steps"]
    assert 0 < skipped < 5
    assert_same(names["model"], plain_loop(2, range(skipped)))


class ResumableLoader(DataLoader):
    """Goes on where it was when its state was saved, which Lightning asks for in the middle of an epoch."""

    start = seen = 0

    def __iter__(self):
        self.seen, self.start = self.start, 0
        for batch in list(super().__iter__())[self.seen :]:
            self.seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["seen"]


def fit_with_lightning(folder: Path, accumulate: int, ckpt_path: Path | None = None) -> PeftModel:
    """Train for 16 steps in all, and keep the checkpoint of each of them."""
    lightning = pytest.importorskip("lightning")
    module = run_block(folder, "import lightning", torch=torch)["AdaLoraModule"](make_model())
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(
        folder / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, ResumableLoader(RandomTokens(), batch_size=4 // accumulate), ckpt_path=ckpt_path)
    return module.model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_module_for_lightning(accumulate, tmp_path):
    expected = plain_loop(accumulate)
    assert_same(fit_with_lightning(tmp_path, accumulate), expected)
    # in warm-up, between two allocations, right after one, and in the final phase
    for step in (2, 8, 9, 14):
        resumed = tmp_path / f"from-{step}"
        resumed.mkdir()
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        assert_same(fit_with_lightning(resumed, accumulate, ckpt_path=path), expected)
