"""`AdaLoraCallback`: what it does in a Trainer, and that a run that was killed ends as one that was not."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
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
    """All numbers of a checkpoint: weights, ranks, averages, optimizer, schedule, and the losses so far."""
    log_history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {
        "adapter": load_file(checkpoint / "adapter_model.safetensors"),
        "unpruned": load_file(checkpoint / "adalora_state.safetensors"),
        "ranks": json.loads((checkpoint / "adapter_config.json").read_text())["rank_pattern"],
        "optimizer": torch.load(checkpoint / "optimizer.pt")["state"],
        "scheduler": torch.load(checkpoint / "scheduler.pt"),
        "logs": [logs for logs in log_history if "loss" in logs],
    }


def assert_same(actual, expected, where: str = "") -> None:
    """Equal bit by bit, through dicts and lists."""
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

    def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step(self, tmp_path):
        steps = []
        trainer = make_trainer(
            tmp_path,
            make_adalora_config(total_step=1000, tinit=100, tfinal=100),
            (AtEachStep(lambda step, model: steps.append(step)),),
        )
        with pytest.raises(ValueError, match="don't allow for a budgeting phase"):
            trainer.train()
        assert not steps
        assert trainer.model.peft_config["default"].total_step == 1000

    def test_a_model_without_adalora_is_refused(self, tmp_path):
        trainer = Trainer(
            make_llama(), make_arguments(tmp_path), train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()]
        )
        with pytest.raises(ValueError, match="needs a model with an AdaLoRA adapter to train"):
            trainer.train()

    def test_training_a_pruned_adapter_on_is_refused(self, run, tmp_path):
        model = PeftModel.from_pretrained(make_llama(), run / f"checkpoint-{STEPS}", is_trainable=True)
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
        pattern = config.rank_pattern
        assert sum(sum(kept) for kept in pattern.values()) == 12
        if inject == "inject_adapter_in_model":
            return
        model.eval()
        tokens = RandomTokens()[3]["input_ids"][None]
        expected = model(tokens).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
        torch.testing.assert_close(loaded(tokens).logits, expected)


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
    """Killed with SIGKILL and resumed, a run ends bit by bit as one that was never killed."""

    def test_the_run_learns_and_prunes(self, uninterrupted):
        end = everything_in(uninterrupted / f"checkpoint-{STEPS}")
        assert end["logs"][-1]["loss"] < end["logs"][0]["loss"]
        assert end["logs"][-1]["adalora_pruned"] == 0.5

    @pytest.mark.parametrize(
        "kill_at",
        [
            ("on_step_begin", 4),  # checkpoint from before the budgeting phase
            ("on_optimizer_step", 8),
            pytest.param(("on_step_end", 9), marks=pytest.mark.overlay),  # a checkpoint has just been begun
            ("on_pre_optimizer_step", 14),  # after the last allocation
        ],
        ids=lambda kill_at: f"{kill_at[0]}-{kill_at[1]}",
    )
    def test_ends_the_same(self, kill_at, settings, uninterrupted, tmp_path):
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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder).train()
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
    def test_a_folder_with_other_files_is_left_alone(self, copy):
        folder = copy / "checkpoint-12"
        folder.mkdir()
        (folder / "notes.txt").write_text("not ours")
        make_trainer(copy)
        assert (folder / "notes.txt").exists()

    def test_the_adapter_in_it_is_pruned_and_loads(self, run):
        model = PeftModel.from_pretrained(make_llama(), run / f"checkpoint-{STEPS}")
        ranks = [len(param) for name, param in model.named_parameters() if "lora_E" in name]
        assert sum(ranks) == 12

    def test_without_the_state_it_resumes_with_a_warning(self, copy):
        (copy / "checkpoint-9" / "adalora_state.safetensors").unlink()
        trainer = make_trainer(copy)
        with pytest.warns(UserWarning, match="resumes only approximately: pruned triplets start afresh"):
            trainer.train(resume_from_checkpoint=True)
        assert sum(sum(kept) for kept in trainer.model.peft_config["default"].rank_pattern.values()) == 12

    def test_an_explicit_path_is_found(self, copy, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        checkpoint = str(copy / "checkpoint-9")
        trainer = make_trainer(other, resume_from_checkpoint=checkpoint)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            trainer.train(resume_from_checkpoint=checkpoint)
        make_trainer(copy).train(resume_from_checkpoint=True)
        ends = [everything_in(folder / f"checkpoint-{STEPS}") for folder in (other, copy)]
        assert_same(*ends)

    @pytest.mark.parametrize("kind", ["bit", "truncated", "other weights", "other key"])
    def test_a_broken_state_is_refused(self, kind, copy):
        path = copy / "checkpoint-9" / "adalora_state.safetensors"
        content = bytearray(path.read_bytes())
        if kind == "bit":
            content[-5] ^= 4
            path.write_bytes(content)
        elif kind == "truncated":
            path.write_bytes(content[:-100])
        elif kind == "other weights":
            weights_path = copy / "checkpoint-9" / "adapter_model.safetensors"
            weights = load_file(weights_path)
            key = next(key for key in weights if "lora_B" in key)
            weights[key] = weights[key] * 1.001
            save_file(weights, weights_path, metadata={"format": "pt"})
        else:
            state = load_file(path)
            state["exp_avg_ipt.nothing"] = torch.zeros(1)
            save_file(state, path)
        with pytest.raises(ValueError, match="broken"):
            make_trainer(copy).train(resume_from_checkpoint=True)

    def test_load_best_model_at_end(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            eval_strategy="steps",
            eval_steps=3,
            load_best_model_at_end=True,
            metric_for_best_model="worst",
            greater_is_better=True,
            eval_dataset=RandomTokens(),
        )
        # the best step is 9, when other ranks were kept than at the end
        evaluate, tokens, live = trainer.evaluate, RandomTokens()[3]["input_ids"][None], {}

        def evaluate_and_note(*args, **kwargs):
            metrics = evaluate(*args, **kwargs)
            live[trainer.state.global_step] = trainer.model.eval()(tokens).logits.detach()
            return {**metrics, "eval_worst": -abs(trainer.state.global_step - 9)}

        trainer.evaluate = evaluate_and_note
        trainer.train()
        expected = PeftModel.from_pretrained(make_llama(), tmp_path / "checkpoint-9").eval()
        torch.testing.assert_close(expected(tokens).logits, live[9])
        torch.testing.assert_close(trainer.model.eval()(tokens).logits, expected(tokens).logits)
        trainer.save_model(tmp_path / "best")
        again = PeftModel.from_pretrained(make_llama(), tmp_path / "best").eval()
        torch.testing.assert_close(again(tokens).logits, expected(tokens).logits)

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
