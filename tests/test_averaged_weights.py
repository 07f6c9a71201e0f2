"""A second set of weights, of an optimizer or an average: what is pruned stays so, and what is saved predicts."""

import shutil

import pytest
import torch
from helpers import make_mlp, make_peft_mlp, svd_layers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainer_run import RandomTokens, make_trainer

from peft import PeftModel


schedulefree = pytest.importorskip("schedulefree")

OPTIMIZERS = {
    "AdamWScheduleFree": lambda params: schedulefree.AdamWScheduleFree(params, lr=2e-2),
    "AdamWScheduleFree, one by one": lambda params: schedulefree.AdamWScheduleFree(params, lr=2e-2, foreach=False),
    "RAdamScheduleFree": lambda params: schedulefree.RAdamScheduleFree(params, lr=2e-2),
    "SGDScheduleFree": lambda params: schedulefree.SGDScheduleFree(params, lr=0.5),
    "ScheduleFreeWrapper": lambda params: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.5)),
    "AdamWScheduleFreeReference": lambda params: schedulefree.AdamWScheduleFreeReference(params, lr=2e-2),
}
X, TARGET = (torch.randn(32, size, generator=torch.Generator().manual_seed(size)) for size in (10, 4))


def largest_pruned(model: nn.Module) -> float:
    """The largest of the singular values that the rank pattern does not keep."""
    rank_pattern = model.peft_config["default"].rank_pattern
    pruned = [torch.zeros(1)]
    for name, layer in svd_layers(model).items():
        key = f"{name.removeprefix('base_model.model.')}.lora_E"
        kept = rank_pattern.get(key, rank_pattern.get(f"{key}.default"))
        pruned.append(layer.lora_E["default"].detach().view(-1)[~torch.tensor(kept)])
    return torch.cat(pruned).abs().max().item()


def train(model, optimizer, give_optimizer=True, after_step=lambda: None):
    for step in range(20):
        nn.functional.mse_loss(model(X), TARGET).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, *([optimizer] if give_optimizer else []))
        optimizer.zero_grad()
        after_step()


@pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_pruned_triplet_stays_pruned_in_the_averaged_weights(make_optimizer, use_dora_adaptive, tmp_path):
    model = make_peft_mlp(use_dora_adaptive=use_dora_adaptive)
    optimizer = make_optimizer([param for param in model.parameters() if param.requires_grad])
    optimizer.train()
    train(model, optimizer)
    assert largest_pruned(model) == 0
    with torch.no_grad():
        trained = model(X)
    optimizer.eval()
    assert largest_pruned(model) == 0
    with torch.no_grad():
        averaged = model.eval()(X)
    assert not torch.equal(averaged, trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
    assert sum(len(layer.lora_E["default"]) for layer in svd_layers(loaded).values()) == 6
    torch.testing.assert_close(loaded(X), averaged, rtol=1e-5, atol=1e-6)


def test_what_is_saved_predicts_although_the_optimizer_was_not_given(tmp_path):
    model = make_peft_mlp()
    optimizer = schedulefree.AdamWScheduleFree([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    optimizer.train()
    train(model, optimizer, give_optimizer=False)
    optimizer.eval()
    assert largest_pruned(model) > 1e-3
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(make_mlp(), tmp_path)(X), model.eval()(X))


def test_the_optimizers_that_keep_no_other_weights_are_left_alone():
    models = [make_peft_mlp(), make_peft_mlp()]
    for model, give_optimizer in zip(models, (True, False)):
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
        train(model, optimizer, give_optimizer)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_radam"])
def test_the_trainer_prunes_the_averaged_weights_too_and_resumes_bit_by_bit(optim, tmp_path):
    def make(folder):
        options = {"optim": optim, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 3}
        return make_trainer(folder, eval_dataset=RandomTokens(), **options)

    trainer = make(tmp_path / "run")
    trainer.train()
    trainer.evaluate()
    assert largest_pruned(trainer.model) == 0
    shutil.copytree(tmp_path / "run" / "checkpoint-9", tmp_path / "resumed" / "checkpoint-9")
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    resumed.evaluate()
    for one, other in zip(trainer.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, other)


class Swapping(torch.optim.AdamW):
    """Evaluates with weights that it keeps where nobody finds them."""

    def train(self):
        pass

    def eval(self):
        pass


@pytest.mark.parametrize("kind", [Swapping, torch.optim.AdamW])
def test_an_optimizer_whose_other_weights_are_not_found_is_named_once(kind, tmp_path, recwarn):
    trainer = make_trainer(tmp_path)
    trainer.optimizer = kind([param for param in trainer.model.parameters() if param.requires_grad], lr=1e-2)
    trainer.train()
    messages = [str(warning.message) for warning in recwarn if "evaluates with other weights" in str(warning.message)]
    assert len(messages) == (kind is Swapping)
    assert all("Swapping" in message for message in messages)


def test_an_averaged_model_is_masked_as_the_guide_says(tmp_path):
    model = make_peft_mlp()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    train(model, optimizer, after_step=lambda: averaged.update_parameters(model))
    ema = averaged.module
    ema.peft_config["default"].rank_pattern = model.peft_config["default"].rank_pattern
    assert largest_pruned(ema) > 0
    ema.base_model.rankallocator.mask_using_rank_pattern(ema.base_model.model, ema.peft_config["default"].rank_pattern)
    assert largest_pruned(ema) == 0
    ema.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
    assert sum(len(layer.lora_E["default"]) for layer in svd_layers(loaded).values()) == 6
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), ema.eval()(X))
