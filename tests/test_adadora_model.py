"""AdaDoRA through PEFT's front door: configs, training, pruning, saving, loading, merging, adapters, dtypes."""

import copy
import json
import warnings

import pytest
import torch
from helpers import TARGETS, make_config, make_layer, make_mlp, make_peft_mlp, svd_layers, train, train_by_hand
from reference import Reference, relative_error
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import (
    AdaLoraConfig,
    PeftConfig,
    PeftModel,
    cast_mixed_precision_params,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)


X = torch.randn(13, 10, generator=torch.Generator().manual_seed(7))


def make_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
    )
    return LlamaForCausalLM(config).to(dtype)


def prune_to_rank_zero(model, names: list[str]) -> None:
    """Set the rank pattern that the allocator would set if it pruned every triplet of these layers."""
    pattern = model.peft_config["default"].rank_pattern or {
        f"{name.removeprefix('base_model.model.')}.lora_E.default": [True] * layer.r["default"]
        for name, layer in svd_layers(model).items()
    }
    for name in names:
        pattern[f"{name}.lora_E.default"] = [False] * len(pattern[f"{name}.lora_E.default"])
    model.peft_config["default"].rank_pattern = pattern
    model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)


class TestConfig:
    def test_the_flag_is_off_by_default(self):
        assert AdaLoraConfig(total_step=10).use_dora_adaptive is False

    @pytest.mark.parametrize("flag", [True, False])
    def test_the_flag_is_saved_and_loaded(self, tmp_path, flag):
        make_config(use_dora_adaptive=flag).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora_adaptive"] is flag
        assert PeftConfig.from_pretrained(tmp_path).use_dora_adaptive is flag

    def test_a_config_saved_without_the_flag_loads_with_the_flag_off(self, tmp_path):
        make_config(use_dora_adaptive=False).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        saved = json.loads(path.read_text())
        del saved["use_dora_adaptive"]
        path.write_text(json.dumps(saved))
        assert PeftConfig.from_pretrained(tmp_path).use_dora_adaptive is False

    def test_use_dora_is_refused_and_the_message_names_the_flag(self):
        with pytest.raises(ValueError, match="ADALORA does not support DoRA.*use_dora_adaptive"):
            AdaLoraConfig(total_step=10, use_dora=True)

    @pytest.mark.parametrize(
        "of_config, given, expected", [(True, None, True), (False, None, False), (False, True, True)]
    )
    def test_a_layer_takes_the_flag_of_the_config_unless_told_otherwise(self, of_config, given, expected):
        from peft.tuners.adalora import SVDLinear

        config = make_config(use_dora_adaptive=of_config)
        layer = SVDLinear(nn.Linear(3, 4), "default", config, r=2, lora_alpha=1, use_dora_adaptive=given)
        assert layer.use_dora_adaptive is expected
        assert list(layer.lora_magnitude) == (["default"] if expected else [])
        assert config.use_dora_adaptive is of_config


class TestTraining:
    def test_the_budget_is_met_and_pruned_entries_are_exactly_zero(self):
        model = make_peft_mlp()
        train(model)
        pattern = model.peft_config["default"].rank_pattern
        assert sum(map(sum, pattern.values())) == 2 * len(TARGETS)
        for name, kept in pattern.items():
            lora_E = model.base_model.model.get_parameter(name).flatten()
            assert torch.equal(lora_E != 0, torch.tensor(kept))

    def test_pruned_entries_are_zero_at_every_forward_after_an_allocation(self):
        model = make_peft_mlp()
        nonzero = []

        def count(module, args):
            nonzero.append(int((module.lora_E["default"] != 0).sum()))

        for layer in svd_layers(model).values():
            layer.register_forward_pre_hook(count)
        train(model)
        budgets = [sum(nonzero[i : i + 3]) for i in range(0, len(nonzero), 3)]
        allocator = model.base_model.rankallocator
        for step in range(3, 15):  # the forward at `step` follows the allocation at `step - 1`
            assert budgets[step] == allocator.budget_schedule(step - 1)[0]
        assert budgets[16:] == [6] * 4

    def test_the_loss_goes_down_and_every_magnitude_moves(self):
        model = make_peft_mlp()
        before = {name: layer.lora_magnitude["default"].clone() for name, layer in svd_layers(model).items()}
        losses = train(model)
        assert losses[-1] < 0.9 * losses[0]
        for name, layer in svd_layers(model).items():
            assert (layer.lora_magnitude["default"] != before[name]).all()

    def test_magnitudes_take_no_part_in_importance(self):
        model = make_peft_mlp()
        train(model, steps=10)
        scored = {name.split(".")[-2] for name in model.base_model.rankallocator.ipt}
        assert scored == {"lora_A", "lora_B", "lora_E"}

    def test_the_allocator_works_while_the_magnitudes_are_frozen(self):
        model = make_peft_mlp()
        for layer in svd_layers(model).values():
            layer.lora_magnitude["default"].requires_grad_(False)
        train(model)
        assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 6
        for layer in svd_layers(model).values():
            assert torch.equal(
                layer.lora_magnitude["default"], layer.get_base_layer().weight.norm(dim=1, keepdim=True)
            )

    def test_allocating_never_changes_a_magnitude(self):
        model = make_peft_mlp()
        model(X).sum().backward()
        for layer in svd_layers(model).values():
            train_by_hand(layer)
        before = [layer.lora_magnitude["default"].clone() for layer in svd_layers(model).values()]
        for step in range(20):
            model.base_model.update_and_allocate(step)
        after = [layer.lora_magnitude["default"] for layer in svd_layers(model).values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after))

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        input_ids = torch.arange(24).view(2, 12)
        gradients = []
        for checkpointing in (False, True):
            model = get_peft_model(make_llama(), make_config(task_type="CAUSAL_LM", target_modules="all-linear"))
            for layer in svd_layers(model).values():
                train_by_hand(layer)
            if checkpointing:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            model.train()
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert any("lora_magnitude" in name for name in gradients[0])
        for name, gradient in gradients[0].items():
            assert relative_error(gradients[1][name], gradient) < 1e-6

    def test_all_linear_layers_of_a_llama_are_adapted(self):
        model = get_peft_model(make_llama(), make_config(task_type="CAUSAL_LM", target_modules="all-linear"))
        layers = svd_layers(model)
        assert len(layers) == 3 * 7
        assert all(layer.use_dora_adaptive for layer in layers.values())


class TestSaveAndLoad:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("zeroed", [[], TARGETS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_pruned_model_predicts_the_same_when_loaded_and_merged(self, tmp_path, low_cpu_mem_usage, zeroed, dtype):
        model = make_peft_mlp(dtype=dtype)
        train(model)
        if zeroed:
            prune_to_rank_zero(model, zeroed)
        expected = model(X.to(dtype))
        model.save_pretrained(tmp_path)

        loaded = PeftModel.from_pretrained(make_mlp(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        assert relative_error(loaded(X.to(dtype)), expected) < tolerance
        for name, layer in svd_layers(model).items():
            pattern = model.peft_config["default"].rank_pattern[f"{name.removeprefix('base_model.model.')}.lora_E"]
            twin = loaded.get_submodule(name)
            assert twin.r["default"] == twin.lora_A["default"].shape[0] == sum(pattern)
            # all that a file does not hold, or that rounding to a low precision weight's dtype would lose
            assert torch.equal(twin.lora_magnitude["default"], layer.lora_magnitude["default"])
            assert torch.equal(twin.ranknum["default"], layer.ranknum["default"])

        merged = loaded.merge_and_unload()
        assert type(merged.first) is nn.Linear
        assert relative_error(merged(X.to(dtype)), expected) < tolerance

    def test_a_trained_model_is_saved_under_the_documented_names(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        parts = ["lora_A", "lora_B", "lora_E", "lora_magnitude"]
        assert sorted(saved) == sorted(f"base_model.model.{name}.{part}" for name in TARGETS for part in parts)
        assert saved["base_model.model.first.lora_magnitude"].shape == (16, 1)

    def test_an_adapter_saved_before_pruning_loads(self, tmp_path):
        model = make_peft_mlp()
        train(model, steps=2)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
        assert relative_error(loaded(X), model(X)) < 1e-6

    def test_resizing_keeps_learned_magnitudes_and_the_output(self):
        model = make_peft_mlp()
        train(model)
        expected = model(X)
        before = {name: layer.lora_magnitude["default"] for name, layer in svd_layers(model).items()}
        model.base_model.resize_modules_by_rank_pattern(model.peft_config["default"].rank_pattern, "default")
        assert relative_error(model(X), expected) < 1e-6
        for name, layer in svd_layers(model).items():
            assert layer.lora_magnitude["default"] is before[name]
            assert layer.lora_A["default"].shape[0] == layer.r["default"]
            assert layer.lora_A["default"].requires_grad
        assert sum(layer.r["default"] for layer in svd_layers(model).values()) == 2 * len(TARGETS)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_updating_a_layer_again_keeps_a_learned_magnitude(self, dtype):
        layer = make_layer(8, 5, 4, dtype=dtype)
        layer.lora_magnitude["default"] = nn.Parameter(layer.lora_magnitude["default"].float() + 0.001)
        learned = layer.lora_magnitude["default"].clone()
        layer.update_layer("default", 2, lora_alpha=12, config=make_config())
        assert layer.lora_A["default"].shape[0] == 2
        assert torch.equal(layer.lora_magnitude["default"], learned)
        assert not layer.ranknum["default"].requires_grad

    def test_an_update_that_is_refused_keeps_a_learned_magnitude(self):
        layer = make_layer(8, 5, 4)
        learned = layer.lora_magnitude["default"]
        with pytest.raises(ValueError, match="`r` should be a positive integer or 0"):
            layer.update_layer("default", -1, lora_alpha=12, config=make_config())
        assert layer.lora_magnitude["default"] is learned

    def test_resetting_the_adapter_resets_its_magnitude(self):
        layer = make_layer(8, 5, 4)
        layer.reset_lora_parameters("default")
        x = torch.randn(3, 5)
        assert relative_error(layer(x), layer.get_base_layer()(x)) < 1e-6

    def test_modules_to_save_are_trained_saved_and_loaded(self, tmp_path):
        model = make_peft_mlp(target_modules=["first", "middle"], modules_to_save=["last"])
        train(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_mlp(), tmp_path)
        assert not torch.equal(loaded.base_model.model.last.weight, make_mlp().last.weight)
        assert relative_error(loaded(X), model(X)) < 1e-6

    def test_a_loaded_adapter_can_be_trained_on(self, tmp_path):
        model = make_peft_mlp()
        train(model, steps=2)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=True)
        train(loaded)
        assert sum(map(sum, loaded.peft_config["default"].rank_pattern.values())) == 6

    def test_a_model_loaded_for_inference_computes_a_loss(self, tmp_path):
        model = get_peft_model(make_llama(), make_config(task_type="CAUSAL_LM", target_modules="all-linear"))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
        input_ids = torch.arange(20).view(2, 10)
        base_loss = make_llama().eval()(input_ids=input_ids, labels=input_ids).loss
        assert relative_error(loaded(input_ids=input_ids, labels=input_ids).loss, base_loss) < 1e-5


class TestMerge:
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merging_keeps_the_output(self, safe_merge):
        model = make_peft_mlp()
        train(model)
        expected = model(X)
        model.merge_adapter(safe_merge=safe_merge)
        assert all(layer.merged for layer in svd_layers(model).values())
        assert relative_error(model(X), expected) < 1e-5

    def test_merging_twice_is_the_same_as_merging_once(self):
        model = make_peft_mlp()
        train(model)
        model.merge_adapter()
        expected = model(X)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(model(X), expected)

    def test_merging_another_adapter_than_the_active_one(self):
        layer = make_layer(8, 5, 4)
        layer.update_layer("other", 3, lora_alpha=12, config=make_config())
        train_by_hand(layer, "other")
        expected = Reference.of(layer, "other").merged_weight()
        layer.merge(adapter_names=["other"])
        assert layer.merged_adapters == ["other"]
        assert relative_error(layer.get_base_layer().weight, expected) < 1e-5

    def test_unloading_without_merging_gives_the_base_model_back(self):
        model = make_peft_mlp()
        train(model)
        assert torch.equal(model.unload()(X), make_mlp()(X))

    def test_a_magnitude_that_is_added_while_a_plain_adapter_is_merged_starts_from_the_unmerged_weight(self):
        layer = make_layer(8, 5, 4, use_dora_adaptive=False)
        expected = layer.get_base_layer().weight.norm(dim=1, keepdim=True)
        layer.merge()
        layer.update_layer("new", 4, lora_alpha=12, config=make_config())
        assert relative_error(layer.lora_magnitude["new"], expected) < 1e-6


class TestAdapters:
    def test_the_magnitude_is_an_adapter_weight(self):
        layer = make_layer(8, 5, 4)
        assert isinstance(layer.lora_magnitude, nn.ParameterDict)
        assert "lora_magnitude" in type(layer).adapter_layer_names
        assert "lora_magnitude.default" in dict(layer.named_parameters())

    def test_only_the_adapter_and_not_the_base_weight_is_trainable(self):
        model = make_peft_mlp()
        trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {"lora_A", "lora_B", "lora_E", "lora_magnitude"}

    def test_the_active_one_of_several_adapters_decides_the_output(self, tmp_path):
        outputs = {}
        for name, seed in (("one", 1), ("two", 2)):
            model = make_peft_mlp()
            train(model, seed=seed)
            model.save_pretrained(tmp_path / name)
            outputs[name] = model(X)
        plain = make_peft_mlp(use_dora_adaptive=False)
        train(plain, seed=3)
        plain.save_pretrained(tmp_path / "plain")
        outputs["plain"] = plain(X)

        model = PeftModel.from_pretrained(make_mlp(), tmp_path / "one", adapter_name="one")
        model.load_adapter(tmp_path / "two", "two")
        model.load_adapter(tmp_path / "plain", "plain")
        for name in ("one", "two", "plain", "one"):
            model.set_adapter(name, inference_mode=True)
            assert relative_error(model(X), outputs[name]) < 1e-6
            trainable = [p for p in model.parameters() if p.requires_grad]
            assert trainable == []

    def test_set_adapter_moves_trainability_to_the_magnitudes_of_the_new_adapter(self):
        layer = make_layer(8, 5, 4)
        layer.update_layer("other", 4, lora_alpha=12, config=make_config())
        assert not layer.lora_magnitude["other"].requires_grad
        layer.set_adapter("other")
        assert layer.lora_magnitude["other"].requires_grad
        assert not layer.lora_magnitude["default"].requires_grad

    def test_deleting_an_adapter_deletes_its_magnitude_alone(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        model.save_pretrained(tmp_path)
        expected = model(X)
        model.load_adapter(tmp_path, "second")
        model.delete_adapter("second")
        for layer in svd_layers(model).values():
            assert list(layer.lora_magnitude) == ["default"]
        assert torch.equal(model(X), expected)

    def test_a_layer_whose_only_magnitude_is_deleted_is_not_adadora_any_more(self):
        layer = make_layer(8, 5, 4)
        layer.update_layer("plain", 4, lora_alpha=12, config=make_config(use_dora_adaptive=False))
        layer.set_adapter("plain")
        layer.delete_adapter("default")
        assert layer.use_dora_adaptive is False

    def test_disabling_the_adapter_gives_the_base_model(self):
        model = make_peft_mlp()
        train(model)
        expected = model(X)
        with model.disable_adapter():
            assert torch.equal(model(X), make_mlp()(X))
        assert torch.equal(model(X), expected)

    def test_layers_to_transform_and_exclude_modules_choose_the_layers(self):
        config = make_config(target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2], task_type="CAUSAL_LM")
        model = get_peft_model(make_llama(), config)
        assert {name.split(".")[4] for name in svd_layers(model)} == {"1", "2"}
        config = make_config(target_modules=["q_proj", "down_proj"], exclude_modules=["down_proj"])
        model = get_peft_model(make_llama(), config)
        assert {name.split(".")[-1] for name in svd_layers(model)} == {"q_proj"}

    def test_an_adapter_can_be_injected_into_a_plain_model(self):
        model = inject_adapter_in_model(make_config(target_modules=TARGETS), make_mlp())
        assert relative_error(model(X), make_mlp()(X)) < 1e-6
        assert model.first.use_dora_adaptive

    def test_a_deep_copy_is_independent(self):
        model = make_peft_mlp()
        train(model)
        expected = model(X)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(X), expected)
        for layer in svd_layers(twin).values():
            train_by_hand(layer)
        assert not torch.allclose(twin(X), expected)
        assert torch.equal(model(X), expected)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_adapter_weights_have_the_dtype_that_peft_gives_them(self, dtype, autocast_adapter_dtype):
        model = get_peft_model(
            make_mlp(dtype=dtype), make_config(target_modules=TARGETS), autocast_adapter_dtype=autocast_adapter_dtype
        )
        expected = torch.float32 if autocast_adapter_dtype else dtype
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
        assert model(X.to(dtype)).dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_nothing_but_adapter_weights_is_trained(self, dtype, autocast_adapter_dtype):
        model = get_peft_model(
            make_mlp(dtype=dtype), make_config(target_modules=TARGETS), autocast_adapter_dtype=autocast_adapter_dtype
        )
        trained = {name.split(".")[-2] for name, param in model.named_parameters() if param.requires_grad}
        assert trained == {"lora_A", "lora_B", "lora_E", "lora_magnitude"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_nothing_is_trained_of_an_adapter_that_was_loaded_to_predict(self, tmp_path, dtype, low_cpu_mem_usage):
        make_peft_mlp(dtype=dtype).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_mlp(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not any(param.requires_grad for param in model.parameters())
        assert not model(X.to(dtype)).requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_fresh_float32_magnitude_of_a_low_precision_weight_is_not_rounded(self, dtype):
        model = make_peft_mlp(dtype=dtype)
        for layer in svd_layers(model).values():
            expected = layer.get_base_layer().weight.double().norm(dim=1, keepdim=True)
            assert relative_error(layer.lora_magnitude["default"], expected) < 1e-6
        assert torch.equal(model(X.to(dtype)), make_mlp(dtype=dtype)(X.to(dtype)))

    def test_casting_the_adapters_leaves_learned_magnitudes_alone(self):
        model = make_peft_mlp(dtype=torch.bfloat16)
        for layer in svd_layers(model).values():
            train_by_hand(layer)
        before = [layer.lora_magnitude["default"].clone() for layer in svd_layers(model).values()]
        model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True)
        after = [layer.lora_magnitude["default"] for layer in svd_layers(model).values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast_the_norm_keeps_its_precision(self, dtype):
        layer = make_layer(48, 64, 4)
        x = torch.randn(9, 64)
        with torch.no_grad():
            # an update that all but cancels the weight shows any loss of precision in the norm
            layer.lora_A["default"].mul_(5)
        expected = Reference.of(layer).forward(x.double())
        with torch.autocast("cpu", dtype=dtype):
            output = layer(x)
            output.sum().backward()
        assert output.dtype == dtype
        assert relative_error(output, expected) < 1e-2

    @pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double()])
    def test_a_converted_model_computes_in_its_new_dtype(self, convert):
        model = make_peft_mlp()
        train(model)
        expected = model(X)
        model = convert(model)
        dtype = model.base_model.model.first.get_base_layer().weight.dtype
        assert {p.dtype for name, p in model.named_parameters() if "lora_magnitude" not in name} == {dtype}
        assert relative_error(model(X.to(dtype)), expected) < (1e-6 if dtype == torch.float64 else 2e-2)

    def test_an_adapter_of_a_model_on_the_meta_device_is_on_the_meta_device(self):
        with torch.device("meta"):
            model = make_peft_mlp()
        assert all(p.is_meta for name, p in model.named_parameters() if "lora_" in name)

    def test_a_learned_magnitude_follows_its_adapter_to_the_device_of_the_base_layer(self):
        # meta stands for another device
        layer = make_layer(24, 40, 4)
        layer.update_layer("other", 3, lora_alpha=7, config=make_config())
        layer.get_base_layer().to("meta")
        layer.update_layer("default", 4, lora_alpha=12, config=make_config())
        parts = (layer.lora_A, layer.lora_E, layer.lora_B, layer.lora_magnitude)
        assert all(part["default"].is_meta for part in parts)
        assert layer.lora_magnitude["default"].requires_grad
        # an adapter stays where it is if another one moves
        assert not any(part["other"].is_meta for part in parts)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_magnitude_that_is_loaded_follows_its_adapter_to_the_device_of_the_base_layer(
        self, tmp_path, low_cpu_mem_usage
    ):
        make_peft_mlp().save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_mlp().to("meta"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert {p.device.type for name, p in model.named_parameters() if "lora_" in name} == {"meta"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_added_with_the_config_in_training_is_a_frozen_copy(low_cpu_mem_usage):
    model = make_peft_mlp()
    train(model, steps=8)
    x = torch.randn(5, 10)
    expected = model(x)
    model.add_adapter("ref", model.peft_config["default"], low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(param.requires_grad for name, param in model.named_parameters() if name.endswith(".ref"))
    train(model)
    assert not torch.equal(model(x), expected)
    model.set_adapter("ref")
    assert torch.equal(model(x), expected)


def cast_each_module(model: PeftModel) -> PeftModel:
    """As loops that cast all modules but norms do; the dictionaries of parameters are modules, too."""
    for module in model.modules():
        module.to(torch.bfloat16)
    return model


def cast_by_swapping(model: PeftModel) -> PeftModel:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class TestCastsOfTheModel:
    """A cast of the model is a cast of what it computes with; learned magnitudes keep their values."""

    @pytest.mark.parametrize(
        "cast",
        [
            lambda model: model.half(),
            lambda model: model.bfloat16(),
            lambda model: model.to(torch.bfloat16),
            lambda model: model.to("cpu", torch.float16),
            lambda model: model.bfloat16().float(),
            lambda model: model.half().to(torch.bfloat16).double(),
            lambda model: copy.deepcopy(model).bfloat16(),
            cast_each_module,
            cast_by_swapping,
        ],
    )
    def test_magnitudes_keep_their_values(self, cast):
        model = make_peft_mlp()
        train(model)
        before = {name: layer.lora_magnitude["default"].detach().clone() for name, layer in svd_layers(model).items()}
        params = list(model.parameters())
        cast_model = cast(model)
        if cast_model is model:
            assert all(one is other for one, other in zip(params, model.parameters()))
        for name, layer in svd_layers(cast_model).items():
            magnitude = layer.lora_magnitude["default"]
            assert magnitude.dtype in (torch.float32, torch.float64)
            assert torch.equal(magnitude.double(), before[name].double())
            assert magnitude.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_gradient_that_is_there_at_a_cast_serves_the_next_step(self, dtype):
        model = make_peft_mlp()
        optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
        model(torch.randn(4, 10)).sum().backward()
        layers = svd_layers(model).values()
        before = [layer.lora_magnitude["default"].detach().clone() for layer in layers]
        model.to(dtype)
        assert all(layer.lora_magnitude["default"].grad.dtype == torch.float32 for layer in layers)
        optimizer.step()
        for layer, start in zip(layers, before):
            moved = (layer.lora_magnitude["default"] - start).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=0.05, atol=0)

    def test_a_cast_model_saves_what_was_learned(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        expected = {key: value for key, value in get_peft_model_state_dict(model).items() if "magnitude" in key}
        model.bfloat16().save_pretrained(tmp_path)
        weights = load_file(tmp_path / "adapter_model.safetensors")
        assert expected
        for key, value in expected.items():
            assert torch.equal(weights[key], value)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_cast_model_computes_predicts_and_merges_in_its_dtype(self, dtype):
        model = make_peft_mlp()
        train(model)
        expected = model(X)
        model.to(dtype)
        output = model(X.to(dtype))
        merged = model.merge_and_unload()
        assert output.dtype == merged.first.weight.dtype == dtype
        assert relative_error(output, expected) < 2e-2
        assert relative_error(merged(X.to(dtype)), expected) < 2e-2

    def test_saving_magnitudes_that_were_rounded_through_data_warns(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        cast_mixed_precision_params(model, torch.bfloat16)  # what is trained becomes float32
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The magnitudes of the adapter")
            model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_mlp(), tmp_path)
        cast_mixed_precision_params(model, torch.bfloat16)  # a loaded adapter is not trained
        with pytest.warns(UserWarning, match="magnitudes of the adapter 'default' have been cast to torch.bfloat16"):
            model.save_pretrained(tmp_path)

    def test_magnitudes_that_the_user_wants_in_low_precision_stay_so(self):
        base = make_mlp(dtype=torch.bfloat16)
        model = get_peft_model(base, make_config(target_modules=TARGETS), autocast_adapter_dtype=False)
        assert all(layer.lora_magnitude["default"].dtype == torch.bfloat16 for layer in svd_layers(model).values())
        assert all(m.lora_magnitude["default"].dtype == torch.float16 for m in svd_layers(model.half()).values())

    def test_a_move_to_the_meta_device_moves_the_magnitudes(self):
        model = make_peft_mlp().to("meta", torch.bfloat16)
        assert all(param.is_meta for param in model.parameters())
        model.to_empty(device="cpu")
        assert not any(param.is_meta for param in model.parameters())
