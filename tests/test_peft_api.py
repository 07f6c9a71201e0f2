"""What else PEFT offers, with an AdaDoRA adapter: right, or refused with one clear sentence."""

import warnings

import pytest
import torch
from helpers import TARGETS, make_config, make_mlp, make_peft_mlp, parameter_bytes, svd_layers, train_by_hand
from safetensors.torch import load_file
from trainer_run import make_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft import (
    AutoPeftModelForCausalLM,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter


# of TARGETS: 3 · (out + in + 1) · rank 6 of A, B and E, and a magnitude for each row
SHAPES = [(16, 10), (16, 16), (4, 16)]
ADAPTER_SIZE = sum(6 * (rows + columns + 1) + rows for rows, columns in SHAPES)


def trained_mlp(**kwargs):
    model = make_peft_mlp(**kwargs).eval()
    for layer in svd_layers(model).values():
        train_by_hand(layer)
    return model


def test_the_status_of_model_and_layers_counts_the_magnitudes():
    model = make_peft_mlp()
    base_size = sum(param.numel() for param in make_mlp().parameters())
    status = model.get_model_status()
    assert status.trainable_params == ADAPTER_SIZE
    # the ranknum of each layer is a parameter, too
    assert status.total_params == base_size + ADAPTER_SIZE + len(SHAPES)
    assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
    assert model.get_nb_trainable_parameters() == (status.trainable_params, status.total_params)
    assert [layer.module_type for layer in model.get_layer_status()] == ["adalora.SVDLinear"] * len(SHAPES)

    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    for layer in svd_layers(model).values():
        layer.lora_magnitude.requires_grad_(False)
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_the_printed_number_of_trainable_parameters_counts_the_magnitudes(capsys):
    make_peft_mlp().print_trainable_parameters()
    assert f"trainable params: {ADAPTER_SIZE:,} " in capsys.readouterr().out


def test_a_weighted_sum_of_adapters_is_refused():
    model = trained_mlp()
    before = parameter_bytes(model)
    with pytest.raises(TypeError, match="AdaLoraModel does not support add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert parameter_bytes(model) == before and list(model.peft_config) == ["default"]


def test_different_adapters_within_a_batch_are_refused():
    model = trained_mlp()
    x = torch.randn(2, 10)
    expected = model(x)
    with pytest.raises(NotImplementedError, match="`adapter_names`.*call `set_adapter`"):
        model(x, adapter_names=["default", "__base__"])
    assert torch.equal(model(x), expected)


def test_the_scale_of_an_adapter_can_be_changed_for_a_while():
    model = trained_mlp()
    x = torch.randn(2, 10)
    expected = model(x)
    with rescale_adapter_scale(model, 0.0):
        for name, layer in svd_layers(model).items():
            rows = layer.lora_magnitude["default"] / layer.get_base_layer().weight.norm(dim=1, keepdim=True)
            inputs = torch.randn(3, layer.in_features)
            bias = 0 if layer.get_base_layer().bias is None else layer.get_base_layer().bias
            torch.testing.assert_close(
                layer(inputs), (layer.get_base_layer()(inputs) - bias) * rows.T + bias, msg=name
            )
    assert torch.equal(model(x), expected)


def test_hot_swapping_is_refused(tmp_path):
    trained_mlp().save_pretrained(tmp_path)
    model = make_peft_mlp()
    before = parameter_bytes(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert parameter_bytes(model) == before


def test_generating_with_a_cache_of_keys_and_values_gives_the_same_tokens_and_scores():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
    )
    model = get_peft_model(LlamaForCausalLM(config), make_config(target_modules="all-linear")).eval()
    for layer in svd_layers(model).values():
        train_by_hand(layer)
        layer.lora_E["default"].data.mul_(0.2)
    prompt = torch.randint(3, 64, (2, 7))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(input_ids=prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        unadapted = model.generate(input_ids=prompt, **options)
    assert not torch.allclose(torch.stack(unadapted.logits), torch.stack(plain.logits), atol=1e-2)
    merged = model.merge_and_unload().generate(input_ids=prompt, **options)
    torch.testing.assert_close(torch.stack(merged.logits), torch.stack(plain.logits), rtol=1e-3, atol=1e-3)


def load_into_transformers_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.load_adapter(str(folder / "adapter"))
    return model


def load_by_injection(folder):
    config = PeftConfig.from_pretrained(folder / "adapter")
    model = inject_adapter_in_model(config, AutoModelForCausalLM.from_pretrained(folder / "base"))
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {key.removeprefix("base_model.model."): w for key, w in weights.items()})
    return model


TOKENS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"),
        lambda folder: AutoModelForCausalLM.from_pretrained(folder / "adapter"),
        load_into_transformers_model,
        load_by_injection,
    ],
    ids=["AutoPeftModel", "AutoModel", "load_adapter", "inject_adapter_in_model"],
)
@pytest.mark.parametrize(
    "saved", ["by the model", "by one to train that loaded it", "by one to predict that loaded it"]
)
def test_a_pruned_adapter_can_be_loaded_in_each_way_that_there_is(load, saved, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, make_config(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).eval()
    for number, layer in enumerate(svd_layers(model).values()):
        train_by_hand(layer)
        with torch.no_grad():
            layer.lora_E["default"][: number + 3] = 0  # the last of the four layers to rank 0
    model.peft_config["default"].rank_pattern = {
        name.removeprefix("base_model.model."): (param != 0).view(-1).tolist()
        for name, param in model.named_parameters()
        if ".lora_E." in name
    }
    saving = model
    if saved != "at once":
        config = make_config(
            target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", inference_mode="predict" in saved
        )
        saving = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        set_peft_model_state_dict(saving, get_peft_model_state_dict(model))
    saving.save_pretrained(tmp_path / "adapter")
    tokens = torch.randint(3, 64, (2, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # such as PEFT's, that it ignores the ranks
        loaded = load(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert sorted(layer.r["default"] for layer in svd_layers(loaded).values()) == [0, 1, 2, 3]


TASKS = {
    "TOKEN_CLS": (BertForTokenClassification, "classifier", {"labels": TOKENS % 2}),
    "QUESTION_ANS": (
        BertForQuestionAnswering,
        "qa_outputs",
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
    ),
    "SEQ_CLS": (BertForSequenceClassification, "classifier", {"labels": torch.tensor([0, 1])}),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_a_task_is_trained_saved_and_loaded(task, tmp_path):
    model_class, head, labels = TASKS[task]
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}

    def make_base():
        torch.manual_seed(0)
        return model_class(BertConfig(**sizes, num_attention_heads=2))

    config = make_config(target_modules=["query", "value"], task_type=task)
    model = get_peft_model(make_base(), config)
    expected = get_peft_model(make_base(), LoraConfig(target_modules=["query", "value"], task_type=task))
    assert model.modules_to_save == expected.modules_to_save
    assert config.modules_to_save == expected.peft_config["default"].modules_to_save
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    for step in range(20):
        model(input_ids=TOKENS, **labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    output = model.eval()(input_ids=TOKENS)[0]
    trained = getattr(model.base_model.model, head).modules_to_save["default"].weight
    assert not torch.equal(trained, getattr(make_base(), head).weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=TOKENS)[0], output)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    torch.testing.assert_close(loaded(input_ids=TOKENS)[0], output)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=TOKENS)[0], output)


class TestBesideLoraInAModelOfTransformers:
    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["AdaDoRA", "AdaLoRA"])
    @pytest.mark.parametrize("names", [["ours", "lora"], ["lora", "ours"]], ids=" first, then ".join)
    def test_each_predicts_as_if_alone(self, names, use_dora_adaptive, tmp_path):
        configs = {
            "ours": make_config(target_modules=["q_proj"], use_dora_adaptive=use_dora_adaptive),
            "lora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        }
        model, expected = make_llama().eval(), {}
        for name in names:
            alone = get_peft_model(make_llama(), configs[name]).eval()
            for layer in svd_layers(alone).values():
                train_by_hand(layer)
            expected[name] = alone(TOKENS).logits
            alone.save_pretrained(tmp_path / name)
            model.load_adapter(str(tmp_path / name), name)
        for name in [*names, *names]:
            model.set_adapter(name)
            torch.testing.assert_close(model(TOKENS).logits, expected[name])
        model.disable_adapters()
        torch.testing.assert_close(model(TOKENS).logits, make_llama().eval()(TOKENS).logits)


@pytest.mark.parametrize("names", [["other", "default"], ["default", "default"]], ids=" over ".join)
def test_a_forward_pass_with_an_active_adapter_of_another_method_inside_is_refused(names):
    model, x = make_mlp(), torch.randn(3, 10)
    lora = LoraConfig(target_modules=TARGETS, init_lora_weights=False, inference_mode=True)
    inject_adapter_in_model(lora, model, names[1])
    expected = model(x)
    inject_adapter_in_model(make_config(target_modules=TARGETS), model, names[0])
    for layer in svd_layers(model).values():
        layer.base_layer.set_adapter(names[1])
    with pytest.raises(NotImplementedError, match=f"'{names[0]}' has to be the only active adapter"):
        model(x)
    for layer in svd_layers(model).values():
        layer.base_layer.enable_adapters(False)
    torch.testing.assert_close(model(x), make_mlp()(x))  # it is fresh
    for layer in svd_layers(model).values():
        layer.base_layer.enable_adapters(True)
        layer.enable_adapters(False)
    assert torch.equal(model(x), expected)


class TestMixedModel:
    @pytest.fixture
    def model(self) -> PeftMixedModel:
        model = get_peft_model(make_mlp(), make_config(target_modules=TARGETS), mixed=True).eval()
        for layer in svd_layers(model).values():
            train_by_hand(layer)
        return model

    def test_it_predicts_and_merges_as_a_model_with_adadora_alone(self, model):
        x = torch.randn(3, 10)
        expected = trained_mlp()
        expected.base_model.model.load_state_dict(model.base_model.model.state_dict())
        assert torch.equal(model(x), expected(x))
        output = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), output)

    @pytest.mark.parametrize("config_class", [LoHaConfig, LoraConfig])
    def test_an_adapter_of_another_method_can_take_turns_but_not_be_active_together(self, model, config_class):
        x = torch.randn(3, 10)
        output = model(x)
        model.add_adapter("other", config_class(r=4, target_modules=TARGETS))
        with pytest.raises(NotImplementedError, match="only active adapter"):
            model.set_adapter(["default", "other"])
        assert torch.equal(model(x), output)
        model.set_adapter("other")
        torch.testing.assert_close(model(x), make_mlp()(x))  # it is fresh
        model.set_adapter("default")
        assert torch.equal(model(x), output)
