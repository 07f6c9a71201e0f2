"""AdaDoRA with the tools around training: accelerate, mixed precision, checkpointing of activations, model cards."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from helpers import make_tokenizer
from huggingface_hub import ModelCard
from trainer_run import STEPS, RandomTokens, make_adalora_config, make_arguments, make_llama, make_trainer
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer

from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.adalora import AdaLoraCallback


TOKENS = RandomTokens()[7]["input_ids"][None]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


class AccelerateLoop:
    """A loop that saves and loads its state as accelerate's guide says."""

    def __init__(self, use_dora_adaptive):
        set_seed(0)
        self.accelerator = Accelerator(cpu=True)
        model = get_peft_model(make_llama(), make_adalora_config(use_dora_adaptive=use_dora_adaptive))
        optimizer = torch.optim.AdamW((param for param in model.parameters() if param.requires_grad), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.tuner = self.model.base_model
        self.accelerator.register_for_checkpointing(self.tuner.rankallocator)

    def run(self, start, stop):
        self.model.train()
        for step in range(start, stop):
            tokens = torch.stack([RandomTokens()[4 * step + index]["input_ids"] for index in range(4)])
            self.accelerator.backward(self.model(input_ids=tokens, labels=tokens).loss)
            self.optimizer.step()
            self.tuner.update_and_allocate(step)
            self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
@pytest.mark.parametrize("stop", [2, 7, 13], ids=["before", "during", "after"])
def test_a_loop_with_accelerate_resumes_bit_by_bit(stop, use_dora_adaptive, tmp_path):
    expected = AccelerateLoop(use_dora_adaptive).run(0, STEPS)
    AccelerateLoop(use_dora_adaptive).run(0, stop).accelerator.save_state(tmp_path)

    resumed = AccelerateLoop(use_dora_adaptive)
    resumed.accelerator.load_state(tmp_path)
    resumed.run(stop, STEPS)
    for (name, param), other in zip(resumed.model.named_parameters(), expected.model.parameters()):
        assert torch.equal(param, other), name
    patterns = [loop.model.peft_config["default"].rank_pattern for loop in (resumed, expected)]
    assert patterns[0] == patterns[1] is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["bf16", "checkpointing", "reentrant checkpointing"],
)
def test_the_trainer_learns_and_prunes(arguments, tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no", **arguments)
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["adalora_pruned"] == 0.5


def test_gradient_checkpointing_does_not_change_the_run(tmp_path):
    models = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, save_strategy="no", gradient_checkpointing=checkpointing)
        trainer.train()
        models.append(trainer.model)
    for (name, param), other in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(param, other), name


def test_after_prepare_model_for_kbit_training():
    model = get_peft_model(prepare_model_for_kbit_training(make_llama()), make_adalora_config())
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert any(grad.abs().max() > 0 for name, grad in grads.items() if "lora_magnitude" in name)


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        make_adalora_config(lora_dropout=0.0),
        LoraConfig(use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["adadora", "dora"],
)


class KeepsMagnitudes(Trainer):
    """As the docs have it."""

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "lora_magnitude" not in name]


def move_magnitudes(optimizer, model):
    """As the docs have it."""
    magnitudes = {param for name, param in model.named_parameters() if "lora_magnitude" in name}
    base, *_, last = optimizer.param_groups
    last["params"] += [param for param in base["params"] if param in magnitudes]
    base["params"] = [param for param in base["params"] if param not in magnitudes]


def trained_by(model):
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def after_a_step(model, folder, trainer_class=Trainer, optimizer=None):
    arguments = make_arguments(
        folder, max_steps=1, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.0, save_strategy="no"
    )
    trainer = trainer_class(model, arguments, train_dataset=RandomTokens(), optimizers=(optimizer, None))
    trainer.train()
    return {name: param.detach().clone() for name, param in trained_by(model).items()}


@CONFIGS
def test_weight_decay_of_the_trainer_shrinks_magnitudes_unless_their_names_are_left_out(config, tmp_path):
    before = {name: param.detach().clone() for name, param in trained_by(get_peft_model(make_llama(), config)).items()}
    decayed, kept = (
        after_a_step(get_peft_model(make_llama(), config), tmp_path, trainer_class)
        for trainer_class in (Trainer, KeepsMagnitudes)
    )
    assert any("lora_magnitude" in name for name in before)
    for name, start in before.items():
        shrunk_by = 1e-2 * 0.1 * start if "lora_magnitude" in name else torch.zeros_like(start)
        torch.testing.assert_close(kept[name] - decayed[name], shrunk_by, rtol=1e-3, atol=1e-7)
        if "lora_A" in name:
            assert not torch.equal(start, kept[name])


def rates_and_decays(optimizer, model, part):
    names = {id(param): name for name, param in trained_by(model).items()}
    return {
        (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for param in group["params"]
        if part in names[id(param)]
    }


def make_loraplus(model):
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )


@CONFIGS
def test_loraplus_gives_the_magnitude_the_base_rate_where_it_gives_that_of_dora_the_rate_of_b(config):
    model = get_peft_model(make_llama(), config)
    optimizer = make_loraplus(model)
    assert rates_and_decays(optimizer, model, "lora_A") == {(1e-3, 0.1)}
    assert rates_and_decays(optimizer, model, "lora_B") == {(1.6e-2, 0.1)}
    rate = 1.6e-2 if config.peft_type == "LORA" else 1e-3
    assert rates_and_decays(optimizer, model, "lora_magnitude") == {(rate, 0.1)}


def test_magnitudes_that_are_moved_learn_at_the_rate_of_b_and_do_not_decay(tmp_path):
    model = get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0))
    optimizer = make_loraplus(model)
    move_magnitudes(optimizer, model)
    grouped = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert sorted(grouped) == sorted(map(id, trained_by(model).values()))
    for part, expected in (
        ("lora_A", (1e-3, 0.1)),
        ("lora_E", (1e-3, 0.1)),
        ("lora_B", (1.6e-2, 0.1)),
        ("lora_magnitude", (1.6e-2, 0.0)),
    ):
        assert rates_and_decays(optimizer, model, part) == {expected}

    before = {name: param.detach().clone() for name, param in trained_by(model).items()}
    after = after_a_step(model, tmp_path, optimizer=optimizer)
    # the first step of Adam is the learning rate
    steps = torch.cat([(after[name] - before[name]).abs() for name in before if "lora_magnitude" in name])
    torch.testing.assert_close(steps.median(), torch.tensor(1.6e-2), rtol=1e-3, atol=0)


def test_magnitudes_learn_in_trl_which_casts_adapters_of_quantized_models_to_bfloat16(tmp_path):
    trl = pytest.importorskip("trl")
    bnb = pytest.importorskip("bitsandbytes")
    from datasets import Dataset

    make_llama().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu"),
        args=trl.SFTConfig(
            str(tmp_path / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(
            [{"input_ids": RandomTokens()[index]["input_ids"].tolist()} for index in range(64)]
        ),
        processing_class=make_tokenizer(),
        peft_config=make_adalora_config(lora_dropout=0.0),
        callbacks=[AdaLoraCallback()],
    )
    params = {name: param for name, param in trainer.model.named_parameters() if param.requires_grad}
    assert {param.dtype for name, param in params.items() if "lora_A" in name} == {torch.bfloat16}
    before = {name: param.clone() for name, param in params.items() if "lora_magnitude" in name}
    layer = trainer.model.base_model.model.model.layers[0].mlp.down_proj
    weight = layer.get_base_layer().weight
    norm = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.lora_magnitude["default"].detach(), norm)
    trainer.train()
    for name, param in params.items():
        if "lora_magnitude" in name:
            assert param.dtype == torch.float32
            # 16 steps of Adam, each of about the learning rate that falls to 0
            assert (param != before[name]).float().mean() > 0.9, name


@pytest.mark.parametrize("option, dtype", [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_an_evaluation_in_low_precision_leaves_the_learned_magnitudes(option, dtype, tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=RandomTokens(), **{option: True})
    trainer.train()
    learned = {name: param.clone() for name, param in trainer.model.named_parameters() if "lora_magnitude" in name}
    trainer.evaluate()
    assert trainer.model.base_model.model.lm_head.weight.dtype == dtype
    trainer.save_model()
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert all(torch.equal(loaded.get_parameter(name), value) for name, value in learned.items())


def test_the_callback_says_that_a_cast_has_rounded_learned_magnitudes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    make_llama().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu")
    model = get_peft_model(base, make_adalora_config())
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(layer.get_base_layer(), bnb.nn.Linear4bit)
    weights = {key: 1.001 * value for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, weights)
    learned = layer.lora_magnitude["default"].clone()
    for param in model.parameters():  # as TRL does
        if param.requires_grad:
            param.data = param.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="had been trained were cast to torch.bfloat16"):
        Trainer(model, make_arguments(tmp_path / "run"), train_dataset=RandomTokens(), callbacks=[AdaLoraCallback()])
    assert layer.lora_magnitude["default"].dtype == torch.float32
    assert not torch.equal(layer.lora_magnitude["default"], learned)
    set_peft_model_state_dict(model, weights)  # as the warning says
    assert torch.equal(layer.lora_magnitude["default"], learned)


@pytest.mark.parametrize("layers, words", [(1, "for which the model has no place"), (3, "is missing from the")])
def test_an_adapter_of_a_model_with_other_layers_is_refused(layers, words, tmp_path):
    get_peft_model(make_llama(), make_adalora_config()).save_pretrained(tmp_path)
    config = make_llama().config
    config.num_hidden_layers = layers
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(LlamaForCausalLM(config), tmp_path)


def test_a_conversion_to_lora_is_refused(tmp_path):
    model = get_peft_model(make_llama(), make_adalora_config())
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, 4)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        save_as_lora(tmp_path / "lora", model, 4)
    assert not list(tmp_path.glob("lora/*"))


class TestAfterTraining:
    @pytest.fixture(scope="class")
    @staticmethod
    def trained(tmp_path_factory):
        trainer = make_trainer(tmp_path_factory.mktemp("run"), save_strategy="no")
        trainer.train()
        return trainer.model

    @pytest.fixture
    def saved(self, trained, tmp_path):
        trained.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_the_merged_model_is_a_plain_one(self, trained, saved, tmp_path):
        merged = PeftModel.from_pretrained(make_llama(), saved).merge_and_unload(safe_merge=True)
        merged.save_pretrained(tmp_path / "merged")
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert plain.state_dict().keys() == make_llama().state_dict().keys()
        assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
        torch.testing.assert_close(logits_of(plain), logits_of(trained))

    def test_loading_beside_the_adapter_that_serves(self, trained, saved):
        served = get_peft_model(make_llama(), make_adalora_config(), adapter_name="first")
        before = logits_of(served)
        served.load_adapter(saved, "second")
        assert torch.equal(logits_of(served), before)
        served.set_adapter("second")
        torch.testing.assert_close(logits_of(served), logits_of(trained))
        served.set_adapter("first")
        assert torch.equal(logits_of(served), before)

    def test_torch_save_and_load_of_the_state_dict(self, trained, tmp_path):
        torch.save(trained.state_dict(), tmp_path / "state.pt")
        model = get_peft_model(make_llama(), make_adalora_config())
        model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(logits_of(model), logits_of(trained))

    def test_the_model_card_names_the_method_and_says_once_what_it_needs(self, saved, trained, tmp_path):
        card = ModelCard.load(saved / "README.md")
        assert card.data.library_name == "peft"
        assert "adadora" in card.data.tags
        assert card.text.count("needs PEFT with AdaDoRA (the package `peft-adadora`)") == 1
        assert "merge_and_unload()" in card.text
        trained.save_pretrained(tmp_path)
        once = (tmp_path / "README.md").read_text()
        trained.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text().rstrip() == once.rstrip()

    def test_a_readme_that_is_no_model_card_is_left_alone(self, tmp_path):
        (tmp_path / "README.md").write_text("My project\n")
        make_adalora_config().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "My project\n"

    def test_the_model_card_of_plain_adalora_is_pefts(self, tmp_path):
        get_peft_model(make_llama(), make_adalora_config(use_dora_adaptive=False)).save_pretrained(tmp_path)
        assert "AdaDoRA" not in (tmp_path / "README.md").read_text()
