"""`AdaLoraCallback`: what it does in a Trainer, and that a run that was killed ends as one that was not."""

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from trainer_run import (
    STEPS,
    RandomTokens,
    make_adalora_config,
    make_arguments,
    make_llama,
    make_trainer,
    run_in_process,
    train,
)
from transformers import Trainer, TrainerCallback

from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.adalora import AdaLoraCallback, AdaLoraLayer


def everything_in(checkpoint: Path) -> dict[str, object]:
    """All numbers of a checkpoint: weights, averages, optimizer, schedule, and the losses so far."""
    log_history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {
        "adapter": load_file(checkpoint / "adapter_model.safetensors"),
        "averages": load_file(checkpoint / "adalora_state.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt")["state"],
        "scheduler": torch.load(checkpoint / "scheduler.pt"),
        "logs": [logs for logs in log_history if "loss" in logs],
    }


def ends_of_runs(folder: Path, resumed_at: int, **config_kwargs) -> list[dict[str, object]]:
    """The last checkpoints of a run that resumes at a step, and of the whole run that it resumes from."""
    make_trainer(folder / "run", make_adalora_config(**config_kwargs), save_steps=resumed_at).train()
    trainer = make_trainer(folder / "resumed", make_adalora_config(**config_kwargs))
    trainer.train(resume_from_checkpoint=folder / "run" / f"checkpoint-{resumed_at}")
    return [everything_in(folder / name / f"checkpoint-{STEPS}") for name in ("resumed", "run")]


def assert_same(actual, expected, where: str = "") -> None:
    """Equal bit for bit, through dicts and lists."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, (one, other) in enumerate(zip(actual, expected)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert actual == expected, where


def ranks_of(model: torch.nn.Module) -> int:
    """The ranks that the parameters have, in total."""
    return sum(len(param) for name, param in model.named_parameters() if "lora_E" in name)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(RandomTokens()[3]["input_ids"][None]).logits
    model.train(was_training)
    return logits


class At(TrainerCallback):
    """Calls a function with the model and the control in an event of a step."""

    def __init__(self, event, step, function):
        def handle(args, state, control, model, **kwargs):
            if state.global_step == step:
                function(model, control)

        setattr(self, event, handle)


class AtEachStep(TrainerCallback):
    """Calls a function with the model after each optimizer step; the callbacks before it have had their turn."""

    def __init__(self, function):
        self.function = function

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.function(state.global_step, model)


@pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
class TestAllocation:
    def test_weights_and_ranks_are_those_of_a_loop_by_hand(self, use_dora_adaptive, tmp_path):
        config_kwargs = {"use_dora_adaptive": use_dora_adaptive, "lora_dropout": 0.0}
        trainer = make_trainer(
            tmp_path,
            make_adalora_config(**config_kwargs),
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
        )
        # with the number of tokens that the Trainer divides by, which its versions count in different ways
        inputs = []
        trainer.model.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True)
        trainer.train()

        model = get_peft_model(make_llama(), make_adalora_config(**config_kwargs))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
        for step in range(STEPS):
            for micro_batch in inputs[2 * step : 2 * step + 2]:
                model(**micro_batch).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        assert trainer.model.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
        for (name, param), other in zip(trainer.model.named_parameters(), model.parameters()):
            torch.testing.assert_close(param, other, msg=name)

    def test_pruned_entries_are_zero_at_every_forward_after_the_last_allocation(self, use_dora_adaptive, tmp_path):
        kept = {}

        def check(step, model):
            if step < STEPS - 5:
                return
            pattern = model.peft_config["default"].rank_pattern
            for name, param in model.named_parameters():
                if "lora_E" in name:
                    mask = torch.tensor(pattern[name.removeprefix("base_model.model.")])
                    assert (param[~mask] == 0).all()
                    kept[name] = int(mask.sum())

        make_trainer(
            tmp_path,
            make_adalora_config(use_dora_adaptive=use_dora_adaptive),
            (AtEachStep(check),),
            save_steps=STEPS + 1,
        ).train()
        assert len(kept) == 6
        assert sum(kept.values()) == 2 * 6


def stop(model, control) -> None:
    control.should_training_stop = True


class TestSchedule:
    def test_the_run_decides_the_number_of_steps(self, tmp_path):
        trainer = make_trainer(tmp_path, make_adalora_config(total_step=1000))
        with pytest.warns(UserWarning, match="total_step=1000 but this run takes 16 optimizer steps"):
            trainer.train()
        assert trainer.model.peft_config["default"].total_step == STEPS
        assert sum(sum(kept) for kept in trainer.model.peft_config["default"].rank_pattern.values()) == 12

    def test_no_warning_if_the_config_is_right(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            make_trainer(tmp_path, max_steps=STEPS, save_strategy="no").train()

    @pytest.mark.parametrize("freeze", [False, True])
    def test_a_warning_says_that_plain_adalora_trains_what_is_not_saved(self, freeze, tmp_path):
        model = get_peft_model(make_llama().bfloat16(), make_adalora_config(use_dora_adaptive=False))
        trained = [param for name, param in model.named_parameters() if ".ranknum." in name and param.requires_grad]
        if not trained:
            pytest.skip("this PEFT does not train it")
        for param in trained:
            param.requires_grad_(not freeze)
        arguments = make_arguments(tmp_path, save_strategy="no")
        trainer = Trainer(model, arguments, train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert any("trains `ranknum`" in str(warning.message) for warning in caught) is not freeze

    @pytest.mark.parametrize(
        ("steps", "schedule", "scaled"),
        [
            (15, (1000, 100, 500), (1, 8)),
            (16, (1000, 3, 5), (0, 1)),
            (7, (10, 5, 4), (3, 3)),
            (2, (1000, 100, 500), (0, 1)),
            (1, (1000, 100, 500), (0, 0)),
            (16, (8, 1, 2), (2, 4)),
        ],
    )
    def test_a_run_of_another_length_scales_the_schedule(self, steps, schedule, scaled, tmp_path):
        total_step, tinit, tfinal = schedule
        trainer = make_trainer(
            tmp_path,
            make_adalora_config(total_step=total_step, tinit=tinit, tfinal=tfinal, deltaT=1),
            max_steps=steps,
            save_strategy="no",
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        message = (
            f"total_step={total_step} but this run takes {steps} optimizer steps, so its schedule is scaled to "
            f"tinit={scaled[0]} and tfinal={scaled[1]} (from {tinit} and {tfinal})"
        )
        assert sum(message in str(warning.message) for warning in caught) == 1
        config = trainer.model.peft_config["default"]
        assert (config.total_step, config.tinit, config.tfinal) == (steps, *scaled)
        if steps > 1:
            assert sum(map(sum, config.rank_pattern.values())) == 2 * 6

    def test_a_resumed_run_of_another_length_has_the_same_schedule(self, tmp_path):
        config = make_adalora_config(total_step=100, tinit=20, tfinal=40)
        make_trainer(tmp_path / "whole", config).train()
        trainer = make_trainer(tmp_path / "killed", config, (At("on_step_end", 9, stop),))
        trainer.train()
        resumed = make_trainer(tmp_path / "killed", config)
        resumed.train(resume_from_checkpoint=True)
        assert (resumed.model.peft_config["default"].tinit, resumed.model.peft_config["default"].tfinal) == (3, 7)
        weights = [
            load_file(tmp_path / name / "checkpoint-15" / "adapter_model.safetensors") for name in ("whole", "killed")
        ]
        assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())

    @pytest.mark.parametrize("first", [1, 3, STEPS, 100])
    def test_runs_of_one_model_each_scale_the_schedule_of_the_user(self, first, tmp_path):
        schedules = {}
        model = get_peft_model(make_llama(), make_adalora_config(total_step=100, tinit=20, tfinal=40, deltaT=1))
        for steps in (first, STEPS):
            arguments = make_arguments(tmp_path, max_steps=steps, save_strategy="no")
            Trainer(model, arguments, train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()]).train()
            config = model.peft_config["default"]
            schedules[steps] = config.total_step, config.tinit, config.tfinal
        assert schedules[STEPS] == (STEPS, 3, 7)
        config.total_step, config.tinit, config.tfinal = 10, 5, 2  # a new schedule of the user
        Trainer(model, arguments, train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()]).train()
        config = model.peft_config["default"]
        assert (config.total_step, config.tinit, config.tfinal) == (STEPS, 8, 4)

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_a_run_starts_from_the_weights_alone_after_one_that_was_stopped(self, use_dora_adaptive, tmp_path):
        def stop(model, control):
            control.should_training_stop = True

        def trained(model, *callbacks):
            arguments = make_arguments(tmp_path, save_strategy="no")
            Trainer(model, arguments, train_dataset=RandomTokens(), callbacks=[AdaLoraCallback(), *callbacks]).train()
            return {name: value.clone() for name, value in model.state_dict().items()}

        config = make_adalora_config(use_dora_adaptive=use_dora_adaptive, beta1=0.99, beta2=0.99)  # a long memory
        stopped, other = (get_peft_model(make_llama(), copy.deepcopy(config)) for _ in range(2))
        other.load_state_dict(trained(stopped, At("on_step_end", 10, stop)))
        assert_same(trained(stopped), trained(other))

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_the_config_of_the_user_stays_as_it_is(self, use_dora_adaptive, tmp_path):
        config = make_adalora_config(use_dora_adaptive=use_dora_adaptive, total_step=1000)
        waiting, before = get_peft_model(make_llama(), config), dict(vars(config))
        trainer = make_trainer(tmp_path, config)
        trainer.train()
        assert trainer.model.peft_config["default"].total_step == STEPS
        assert vars(config) == before
        assert waiting.peft_config["default"].total_step == 1000
        assert waiting.peft_config["default"].rank_pattern is None

    def test_a_model_without_adalora_is_refused(self, tmp_path):
        trainer = Trainer(
            make_llama(), make_arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()]
        )
        with pytest.raises(ValueError, match="needs a model with an AdaLoRA adapter to train"):
            trainer.train()

    def test_a_model_whose_adapter_in_training_was_deleted_is_refused(self, tmp_path):
        model = get_peft_model(make_llama(), make_adalora_config())
        model.add_adapter("reference", model.peft_config["default"])
        model.delete_adapter("default")
        trainer = Trainer(model, make_arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()])
        with pytest.raises(ValueError, match="needs a model with an AdaLoRA adapter to train"):
            trainer.train()

    def test_training_a_pruned_adapter_on_is_refused(self, run, tmp_path):
        model = PeftModel.from_pretrained(make_llama(), run / "adapter", is_trainable=True)
        trainer = Trainer(model, make_arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()])
        with pytest.raises(ValueError, match="instead of init_r=4, because the adapter was loaded pruned"):
            trainer.train()


def test_without_the_callback_a_warning_says_that_no_rank_is_pruned():
    model = get_peft_model(make_llama(), make_adalora_config())
    tokens = RandomTokens()[0]["input_ids"][None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(250):
            model(input_ids=tokens, labels=tokens)
    assert len([warning for warning in caught if "no rank will be pruned" in str(warning.message)]) == 1


@pytest.mark.parametrize("skipped_step", [6, 11], ids=["an allocation", "the last allocation"])
def test_a_step_that_a_gradient_scaler_skipped_does_not_count(skipped_step, tmp_path, monkeypatch):
    """Only the last allocation still takes place at its step."""
    masks, averages = {}, {}

    def step(self, closure=None):
        if trainer.state.global_step != skipped_step:
            return self.optimizer.step(closure)
        for param in trainer.model.parameters():
            if param.grad is not None:
                param.grad.fill_(torch.inf)

    def note(step, model):
        allocator = model.base_model.rankallocator
        masks[step] = {name: (param != 0).tolist() for name, param in model.named_parameters() if "lora_E" in name}
        averages[step] = {name: score.clone() for name, score in allocator.state_dict().items()}

    # allocated in steps 4, 6, 8 and 10, or 4 and 8, and in step 11
    config = make_adalora_config(deltaT=2 if skipped_step == 6 else 4)
    trainer = make_trainer(tmp_path, config, (AtEachStep(note),), save_strategy="no")
    is_skipped = property(lambda _: trainer.state.global_step == skipped_step)
    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", is_skipped)
    trainer.train()
    is_last = skipped_step == 11
    assert (masks[skipped_step] == masks[skipped_step - 1]) is not is_last
    assert sum(sum(map(sum, mask)) for mask in masks[STEPS - 1].values()) == 12
    if not is_last:
        assert_same(averages[skipped_step], averages[skipped_step - 1])
        assert all(score.isfinite().all() for score in averages[skipped_step + 1].values())


class TestLogs:
    def test_what_is_logged(self, tmp_path):
        seen = []

        class Reporter(TrainerCallback):
            def on_log(self, args, state, control, logs, **kwargs):
                seen.append(dict(logs))

        trainer = make_trainer(tmp_path, callbacks=(Reporter(),))
        trainer.train()
        history = [logs for logs in trainer.state.log_history if "loss" in logs]
        assert len(history) == STEPS
        assert [logs["adalora_budget"] for logs in history[:4]] == [24] * 4
        assert history[-1]["adalora_budget"] == 12
        assert history[-1]["adalora_mean_rank"] == 2
        assert history[-1]["adalora_pruned"] == 0.5
        drifts = [logs["adalora_magnitude_drift"] for logs in history]
        assert 0 < drifts[0] < drifts[-1]
        assert [logs["adalora_mean_rank"] for logs in seen if "loss" in logs] == [
            logs["adalora_mean_rank"] for logs in history
        ]

    def test_the_drift_is_the_mean_relative_change(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        changes = []
        for layer in trainer.model.modules():
            if isinstance(layer, AdaLoraLayer):
                norm = layer.get_base_layer().weight.double().norm(dim=1, keepdim=True)
                changes.append(((layer.lora_magnitude["default"].double() - norm).abs() / norm).flatten())
        logs = [logs for logs in trainer.state.log_history if "loss" in logs][-1]
        assert logs["adalora_magnitude_drift"] == pytest.approx(torch.cat(changes).mean().item(), rel=1e-5)

    def test_plain_adalora_has_no_drift(self, tmp_path):
        trainer = make_trainer(tmp_path, make_adalora_config(use_dora_adaptive=False), max_steps=STEPS)
        trainer.train()
        assert not any("adalora_magnitude_drift" in logs for logs in trainer.state.log_history)


class TestRegularization:
    """AdaLoRA's regularization reaches the loss of the Trainer, or one warning says that it does not."""

    def train(self, folder, model=None, **kwargs) -> int:
        arguments = {name: kwargs.pop(name) for name in ("label_smoothing_factor",) if name in kwargs}
        trainer = Trainer(
            model or get_peft_model(make_llama(), make_adalora_config()),
            make_arguments(folder, save_strategy="no", max_steps=10, **arguments),
            train_dataset=RandomTokens(),
            callbacks=[AdaLoraCallback()],
            **kwargs,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        return len([warning for warning in caught if "regularization has not reached" in str(warning.message)])

    def test_it_reaches_that_of_the_model(self, tmp_path):
        assert self.train(tmp_path) == 0

    def test_not_that_of_the_label_smoother(self, tmp_path):
        assert self.train(tmp_path, label_smoothing_factor=0.1) == 1

    def test_not_that_of_a_function(self, tmp_path):
        def compute_loss(outputs, labels, num_items_in_batch=None):
            return torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

        assert self.train(tmp_path, compute_loss_func=compute_loss) == 1

    def test_not_that_of_a_model_with_an_injected_adapter(self, tmp_path):
        assert self.train(tmp_path, inject_adapter_in_model(make_adalora_config(), make_llama())) == 1


class TestInjected:
    @pytest.mark.parametrize("inject", ["add_adapter", "inject_adapter_in_model"])
    def test_training_saving_and_loading(self, inject, tmp_path):
        model = make_llama()
        config = make_adalora_config(lora_dropout=0.0)
        if inject == "add_adapter":
            try:
                model.add_adapter(config)
            except ValueError as error:
                if "The version of PEFT you are using is not compatible" not in str(error):
                    raise
                pytest.skip(f"transformers: {error}")  # 5.24 asks for a PEFT that is not released
        else:
            model = inject_adapter_in_model(config, model)
        trainer = Trainer(
            model,
            make_arguments(tmp_path, save_strategy="no"),
            train_dataset=RandomTokens(),
            callbacks=[AdaLoraCallback()],
        )
        trainer.train()
        pattern = model.peft_config["default"].rank_pattern
        assert sum(sum(kept) for kept in pattern.values()) == 12
        if inject == "inject_adapter_in_model":
            return
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
        torch.testing.assert_close(logits_of(loaded), logits_of(model))

    @pytest.mark.parametrize("step", [6, 12], ids=["during", "after"])
    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_a_model_with_an_injected_adapter_resumes_exactly(self, use_dora_adaptive, step, tmp_path):
        def train(folder, checkpoint=None):
            config = make_adalora_config(use_dora_adaptive=use_dora_adaptive)
            model = inject_adapter_in_model(config, make_llama())
            arguments = make_arguments(folder)
            trainer = Trainer(model, arguments, train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()])
            trainer.train(resume_from_checkpoint=checkpoint)
            return {name: param for name, param in model.named_parameters() if "lora_" in name}

        expected = train(tmp_path / "run")
        assert_same(train(tmp_path / "resumed", tmp_path / "run" / f"checkpoint-{step}"), expected)


@pytest.fixture(
    scope="module",
    params=[(flag, dtype) for dtype in (torch.float32, torch.bfloat16) for flag in (True, False)],
    ids=["adadora", "adalora", "adadora-bfloat16", "adalora-bfloat16"],
)
def settings(request):
    use_dora_adaptive, dtype = request.param
    return {"config_kwargs": {"use_dora_adaptive": use_dora_adaptive}, "dtype": dtype}


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_in_process(train, folder, **settings) == 0
    return folder


class TestResume:
    """Killed with SIGKILL and resumed, a run ends bit for bit as one that was never killed."""

    def test_the_run_learns_and_prunes(self, uninterrupted):
        end = everything_in(uninterrupted / f"checkpoint-{STEPS}")
        assert end["logs"][-1]["loss"] < end["logs"][0]["loss"]
        assert end["logs"][-1]["adalora_pruned"] == 0.5

    def test_ends_the_same_after_a_kill_in_each_phase(self, settings, uninterrupted, tmp_path):
        # before the budgeting phase, in it, and after the last allocation; the end holds the losses of all steps
        for kill_at in (("on_step_begin", 4), ("on_optimizer_step", 8), ("on_pre_optimizer_step", 14)):
            assert run_in_process(train, tmp_path, kill_at=kill_at, **settings) == -9
        assert run_in_process(train, tmp_path, **settings) == 0
        assert_same(
            everything_in(tmp_path / f"checkpoint-{STEPS}"), everything_in(uninterrupted / f"checkpoint-{STEPS}")
        )

    @pytest.mark.overlay
    def test_a_kill_while_saving_leaves_the_checkpoint_before(self, settings, uninterrupted, tmp_path):
        kill_at = ("on_step_end", 9)
        assert run_in_process(train, tmp_path, kill_at=kill_at, **settings, save_total_limit=1) == -9
        assert (tmp_path / "checkpoint-6").exists()
        assert run_in_process(train, tmp_path, **settings, save_total_limit=1) == 0
        assert (tmp_path / "unfinished-checkpoint-9").exists()
        assert_same(
            everything_in(tmp_path / f"checkpoint-{STEPS}"), everything_in(uninterrupted / f"checkpoint-{STEPS}")
        )


class TestResumeInTheSameProcess:
    """A notebook goes on after an error, with the models and trainers of the run that it has ended."""

    @pytest.mark.parametrize("same_trainer", [True, False])
    def test_after_an_error_in_the_evaluation_of_a_step_that_saves(self, same_trainer, tmp_path):
        def fail(prediction):
            raise ZeroDivisionError

        options = {"eval_dataset": RandomTokens(), "eval_strategy": "steps", "eval_steps": 9}
        make_trainer(tmp_path / "whole", **options).train()
        trainer = make_trainer(tmp_path / "failed", **options)
        trainer.compute_metrics = fail
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        if not same_trainer:
            trainer = make_trainer(tmp_path / "failed", **options)
        trainer.compute_metrics = None
        trainer.train(resume_from_checkpoint=True)
        ends = [everything_in(tmp_path / name / f"checkpoint-{STEPS}") for name in ("failed", "whole")]
        assert_same(*ends)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.train()
    trainer.save_model(folder / "adapter")
    return folder


class TestCheckpoint:
    @pytest.fixture
    def copy(self, run, tmp_path):
        shutil.copytree(run / "checkpoint-9", tmp_path / "checkpoint-9")
        return tmp_path

    @pytest.mark.overlay
    @pytest.mark.parametrize("left", [None, ".tmp6E2p93", "adalora_state.safetensors.tmp"])
    def test_a_folder_with_nothing_but_what_a_kill_left_is_set_aside(self, copy, left):
        folder = copy / "checkpoint-12"
        folder.mkdir()
        if left is not None:
            (folder / left).write_bytes(b"half")
        with pytest.warns(UserWarning, match="checkpoint-12 is unfinished"):
            trainer = make_trainer(copy)
        assert not folder.exists() and (copy / "unfinished-checkpoint-12").is_dir()
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == STEPS

    @pytest.mark.overlay
    def test_a_checkpoint_whose_save_failed_is_set_aside_by_the_next_trainer_of_the_process(self, copy, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("No space left on device")

        trainer = make_trainer(copy)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
            with pytest.raises(OSError, match="No space left"):
                trainer.train(resume_from_checkpoint=True)
        with pytest.warns(UserWarning, match="checkpoint-12 is unfinished"):
            trainer = make_trainer(copy)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == STEPS

    @pytest.mark.overlay
    def test_a_folder_with_other_files_is_left_alone(self, copy):
        folder = copy / "checkpoint-12"
        folder.mkdir()
        (folder / "notes.txt").write_text("not ours")
        make_trainer(copy)
        assert (folder / "notes.txt").exists()

    def test_the_adapter_in_it_has_all_ranks_and_predicts_as_the_pruned_one(self, run):
        checkpoint, pruned = (
            PeftModel.from_pretrained(make_llama(), run / name).eval() for name in (f"checkpoint-{STEPS}", "adapter")
        )
        assert ranks_of(checkpoint) == 24 and ranks_of(pruned) == 12
        values_of_E = [param.view(-1) for name, param in checkpoint.named_parameters() if "lora_E" in name]
        assert torch.cat(values_of_E).count_nonzero() == 12
        tokens = RandomTokens()[3]["input_ids"][None]
        torch.testing.assert_close(checkpoint(tokens).logits, pruned(tokens).logits)

    def test_without_the_state_it_resumes_with_a_warning(self, copy):
        (copy / "checkpoint-9" / "adalora_state.safetensors").unlink()
        trainer = make_trainer(copy)
        with pytest.warns(UserWarning, match="resumes only approximately: averages start from zero"):
            trainer.train(resume_from_checkpoint=True)
        assert sum(sum(kept) for kept in trainer.model.peft_config["default"].rank_pattern.values()) == 12

    def test_without_the_state_it_resumes_exactly_after_the_last_allocation(self, run, tmp_path):
        shutil.copytree(run / "checkpoint-12", tmp_path / "checkpoint-12")
        (tmp_path / "checkpoint-12" / "adalora_state.safetensors").unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            make_trainer(tmp_path).train(resume_from_checkpoint=True)
        assert_same(*[everything_in(folder / f"checkpoint-{STEPS}") for folder in (tmp_path, run)])

    @pytest.mark.parametrize("kind", ["where it is", "a copy", "beside one of another run"])
    def test_it_resumes_exactly_in_another_output_folder(self, kind, run, tmp_path):
        checkpoint, output = run / "checkpoint-9", tmp_path / "output"
        if kind == "a copy":
            checkpoint = shutil.copytree(checkpoint, tmp_path / "moved")
        elif kind == "beside one of another run":
            make_trainer(output, learning_rate=3e-2, max_steps=9).train()
            assert (output / "checkpoint-9" / "adalora_state.safetensors").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            make_trainer(output).train(resume_from_checkpoint=str(checkpoint))
        assert_same(*[everything_in(folder / f"checkpoint-{STEPS}") for folder in (output, run)])

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_it_resumes_exactly_between_two_allocations(self, use_dora_adaptive, tmp_path):
        """When Adam has moved pruned singular values off zero again."""
        ends = ends_of_runs(tmp_path, resumed_at=7, use_dora_adaptive=use_dora_adaptive, deltaT=4)
        assert ends[1]["logs"][6]["adalora_pruned"] > 0
        assert_same(*ends)

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_it_resumes_exactly_after_all_triplets_were_pruned(self, use_dora_adaptive, tmp_path):
        ends = ends_of_runs(tmp_path, resumed_at=13, use_dora_adaptive=use_dora_adaptive, target_r=0)
        assert [logs["adalora_mean_rank"] for logs in ends[0]["logs"][-3:]] == [0, 0, 0]
        assert_same(*ends)

    def test_it_resumes_exactly_if_a_callback_behind_it_has_asked_for_the_checkpoint(self, run, tmp_path):
        def ask(model, control):
            control.should_save = True

        callback = At("on_step_end", 8, ask)
        make_trainer(tmp_path / "begun", callbacks=(callback,), save_steps=STEPS).train()
        trainer = make_trainer(tmp_path / "ended")
        trainer.train(resume_from_checkpoint=tmp_path / "begun" / "checkpoint-8")
        assert_same(*[everything_in(folder / f"checkpoint-{STEPS}") for folder in (tmp_path / "ended", run)])

    def test_it_resumes_exactly_if_it_is_the_best(self, tmp_path):
        def train(folder, checkpoint=None):
            options = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
            trainer = make_trainer(folder, eval_dataset=RandomTokens(), save_strategy="best", **options)
            trainer.train(resume_from_checkpoint=checkpoint)
            return {name: param.detach() for name, param in trainer.model.named_parameters() if "lora_" in name}

        expected = train(tmp_path / "run")
        checkpoint = tmp_path / "run" / "checkpoint-8"
        assert_same(train(tmp_path / "resumed", checkpoint), expected)

    def test_one_of_an_earlier_version_is_refused(self, copy):
        path = copy / "checkpoint-9" / "adalora_state.safetensors"
        state = load_file(path)
        del state["sha256"]
        save_file({**state, "param.a.lora_E.default": torch.zeros(4, 1)}, path, metadata={"sha256": "0"})
        with pytest.raises(ValueError, match="is from an earlier version of AdaLoraCallback"):
            make_trainer(copy).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("kind", ["bit", "truncated", "other key"])
    def test_a_broken_state_is_refused(self, kind, copy):
        path = copy / "checkpoint-9" / "adalora_state.safetensors"
        content = bytearray(path.read_bytes())
        if kind == "bit":
            content[-5] ^= 4
            path.write_bytes(content)
        elif kind == "truncated":
            path.write_bytes(content[:-100])
        else:
            state = load_file(path)
            state["exp_avg_ipt.nothing"] = torch.zeros(1)
            save_file(state, path)
        with pytest.raises(ValueError, match="broken"):
            make_trainer(copy).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("save_only_model", [False, True])
    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_load_best_model_at_end(self, use_dora_adaptive, save_only_model, tmp_path):
        trainer = make_trainer(
            tmp_path,
            make_adalora_config(use_dora_adaptive=use_dora_adaptive),
            eval_strategy="steps",
            eval_steps=3,
            load_best_model_at_end=True,
            save_only_model=save_only_model,
            metric_for_best_model="worst",
            greater_is_better=True,
            eval_dataset=RandomTokens(),
        )
        # the best step is 9, when other ranks were kept than at the end
        evaluate, live = trainer.evaluate, {}

        def evaluate_and_note(*args, **kwargs):
            metrics = evaluate(*args, **kwargs)
            live[trainer.state.global_step] = logits_of(trainer.model)
            return {**metrics, "eval_worst": -abs(trainer.state.global_step - 9)}

        trainer.evaluate = evaluate_and_note
        trainer.train()
        expected = PeftModel.from_pretrained(make_llama(), tmp_path / "checkpoint-9")
        torch.testing.assert_close(logits_of(expected), live[9])
        torch.testing.assert_close(logits_of(trainer.model), live[9])
        trainer.save_model(tmp_path / "best")
        again = PeftModel.from_pretrained(make_llama(), tmp_path / "best")
        assert ranks_of(again) == 12
        torch.testing.assert_close(logits_of(again), live[9])

    @pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "on_save"])
    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_what_a_callback_saves_meanwhile_is_pruned_and_predicts(self, event, use_dora_adaptive, tmp_path):
        live = []

        def save(model, control):
            live.append(logits_of(model))
            model.save_pretrained(tmp_path / "adapter")

        trainer = make_trainer(
            tmp_path,
            make_adalora_config(use_dora_adaptive=use_dora_adaptive),
            (At(event, 9, save),),
            eval_strategy="steps",
            eval_steps=3,
            eval_dataset=RandomTokens(),
        )
        trainer.train()
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
        assert ranks_of(loaded) == 12
        for expected in live:
            torch.testing.assert_close(logits_of(loaded), expected)
        assert ranks_of(PeftModel.from_pretrained(make_llama(), tmp_path / "checkpoint-9")) == 24

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    def test_what_the_trainer_saves_afterwards_is_pruned_and_predicts(self, use_dora_adaptive, tmp_path):
        trainer = make_trainer(tmp_path, make_adalora_config(use_dora_adaptive=use_dora_adaptive))
        trainer.train()
        trainer.save_model(tmp_path / "adapter")
        config = json.loads((tmp_path / f"checkpoint-{STEPS}" / "adapter_config.json").read_text())
        assert config["rank_pattern"] is None and config["total_step"] == STEPS
        for folder, ranks in (("adapter", 12), (f"checkpoint-{STEPS}", 24)):
            loaded = PeftModel.from_pretrained(make_llama(), tmp_path / folder)
            assert ranks_of(loaded) == ranks
            torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model))

    def test_the_adapter_in_it_is_pruned_if_nothing_resumes_from_it(self, tmp_path):
        make_trainer(tmp_path, save_only_model=True).train()
        assert ranks_of(PeftModel.from_pretrained(make_llama(), tmp_path / f"checkpoint-{STEPS}")) == 12
        assert not (tmp_path / f"checkpoint-{STEPS}" / "adalora_state.safetensors").exists()

    def test_the_whole_model_can_be_pickled_afterwards(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="no")
        trainer.train()
        tokens = RandomTokens()[3]["input_ids"][None]
        twin = pickle.loads(pickle.dumps(trainer.model))
        assert torch.equal(twin.eval()(tokens).logits, trainer.model.eval()(tokens).logits)

    @pytest.mark.parametrize("target_modules", [["q_proj"], ["q_proj", "o_proj"]], ids=["fewer", "other"])
    def test_a_pruned_adapter_of_other_modules_can_be_loaded_meanwhile(self, target_modules, tmp_path):
        other = make_trainer(tmp_path, make_adalora_config(target_modules=target_modules), save_strategy="no")
        other.train()
        other.save_model(tmp_path / "other")
        tokens = RandomTokens()[3]["input_ids"][None]
        expected = PeftModel.from_pretrained(make_llama(), tmp_path / "other").eval()(tokens).logits
        model = make_trainer(tmp_path, save_strategy="no").model
        model.load_adapter(tmp_path / "other", "other")
        model.set_adapter("other")
        torch.testing.assert_close(model.eval()(tokens).logits, expected)
