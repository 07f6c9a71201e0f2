"""What AdaDoRA refuses: one clear error, and nothing has changed."""

import functools

import pytest
import torch
from helpers import TARGETS, make_config, make_layer, make_mlp, make_peft_mlp, parameter_bytes, svd_layers, train
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import SVDConv2d, SVDLinear


X = torch.randn(13, 10, generator=torch.Generator().manual_seed(7))


def state(model) -> tuple:
    """All that a refused call could have changed: parameters, trainability, active and merged adapters, modules."""
    layers = {
        name: (layer.active_adapters[:], layer.merged_adapters[:], layer.disable_adapters)
        for name, layer in svd_layers(model).items()
    }
    modules = [(name, type(module)) for name, module in model.named_modules()]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return parameter_bytes(model), trainable, layers, modules, getattr(model, "active_adapters", None)


@pytest.fixture
def two_adapters(tmp_path):
    """A model with a trained AdaDoRA adapter "default", a frozen one "second" and a frozen plain one "plain"."""
    model = make_peft_mlp()
    train(model)
    model.save_pretrained(tmp_path / "adadora")
    plain = make_peft_mlp(use_dora_adaptive=False)
    train(plain)
    plain.save_pretrained(tmp_path / "plain")
    model.load_adapter(tmp_path / "adadora", "second")
    model.load_adapter(tmp_path / "plain", "plain")
    return model


class TestSeveralActiveAdapters:
    @pytest.mark.parametrize("names", [["default", "second"], ["plain", "default"]])
    def test_setting_two_active_adapters_on_the_model_is_refused(self, two_adapters, names):
        before = state(two_adapters)
        with pytest.raises(NotImplementedError, match="AdaDoRA adapter '(default|second)'"):
            two_adapters.base_model.set_adapter(names)
        assert state(two_adapters) == before

    def test_setting_two_active_adapters_on_different_layers_is_refused(self, tmp_path):
        other = make_peft_mlp(target_modules=["last"])
        other.save_pretrained(tmp_path)
        model = make_peft_mlp(target_modules=["first"])
        model.load_adapter(tmp_path, "other")
        before = state(model)
        with pytest.raises(NotImplementedError, match="only active adapter"):
            model.base_model.set_adapter(["default", "other"])
        assert state(model) == before

    @pytest.mark.parametrize("names", [["default", "second"], ["plain", "default"]])
    def test_setting_two_active_adapters_on_a_layer_is_refused(self, two_adapters, names):
        layer = two_adapters.base_model.model.first
        before = state(layer)
        with pytest.raises(NotImplementedError, match="AdaDoRA adapter"):
            layer.set_adapter(names)
        assert state(layer) == before

    def test_a_forward_pass_with_two_active_adapters_is_refused(self):
        layer = make_layer(8, 5, 4)
        layer.update_layer("other", 4, lora_alpha=12, config=make_config())
        layer._active_adapter = ["default", "other"]
        with pytest.raises(NotImplementedError, match="AdaDoRA adapter 'default'"):
            layer(torch.randn(2, 5))

    def test_two_active_plain_adapters_stay_allowed(self):
        layer = make_layer(8, 5, 4, use_dora_adaptive=False, trained=False)
        layer.update_layer("other", 4, lora_alpha=12, config=make_config(use_dora_adaptive=False))
        layer.set_adapter(["default", "other"])
        assert layer(torch.randn(2, 5)).shape == (2, 8)


class TestUnmerge:
    @pytest.mark.parametrize(
        "call",
        [
            lambda model: model.unmerge_adapter(),
            lambda model: model.base_model.model.middle.unmerge(),
            lambda model: model.set_adapter("default"),
            lambda model: model.add_adapter("new", make_config(target_modules=list(TARGETS), inference_mode=True)),
        ],
        ids=["unmerge_adapter", "unmerge", "set_adapter", "add_adapter"],
    )
    def test_unmerging_is_refused_and_the_model_stays_merged_and_usable(self, call):
        model = make_peft_mlp()
        train(model)
        model.merge_adapter()
        expected, before = model(X), state(model)
        with pytest.raises(NotImplementedError, match="cannot be unmerged.*reload the base model"):
            call(model)
        assert state(model) == before
        assert list(model.peft_config) == ["default"]
        assert torch.equal(model(X), expected)

    def test_running_a_merged_model_with_its_adapter_disabled_is_refused(self):
        model = make_peft_mlp()
        train(model)
        model.merge_adapter()
        expected, before = model(X), parameter_bytes(model)
        with model.disable_adapter(), pytest.raises(NotImplementedError, match="cannot be unmerged"):
            model(X)
        assert parameter_bytes(model) == before
        assert torch.equal(model(X), expected)

    def test_a_plain_adapter_can_still_be_unmerged(self):
        model = make_peft_mlp(use_dora_adaptive=False)
        train(model)
        expected = model(X)
        model.merge_adapter()
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), expected)


class TestMerge:
    @pytest.mark.parametrize("names", [["default", "second"], ["plain", "default"]])
    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    def test_merging_several_adapters_into_a_layer_is_refused(self, two_adapters, names, method):
        before = state(two_adapters)
        with pytest.raises(NotImplementedError, match="AdaDoRA adapter"):
            getattr(two_adapters, method)(adapter_names=names)
        assert state(two_adapters) == before

    @pytest.mark.parametrize("first, then", [("default", "plain"), ("plain", "default"), ("default", "second")])
    def test_merging_an_adapter_on_top_of_a_merged_one_is_refused(self, two_adapters, first, then):
        two_adapters.merge_adapter(adapter_names=[first])
        before = state(two_adapters)
        with pytest.raises(NotImplementedError, match="AdaDoRA adapter"):
            two_adapters.merge_adapter(adapter_names=[then])
        assert state(two_adapters) == before

    @pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("part", ["lora_magnitude", "lora_B"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_safe_merge_that_is_not_finite_leaves_no_layer_merged(self, method, part, value):
        model = make_peft_mlp()
        train(model)
        with torch.no_grad():
            getattr(model.base_model.model.last, part)["default"][1] = value
        before = state(model)
        with pytest.raises(ValueError, match="merged weight of adapter 'default' is not finite"):
            getattr(model, method)(safe_merge=True)
        assert state(model) == before

    def test_a_safe_merge_of_a_layer_that_is_not_finite_changes_nothing(self):
        layer = make_layer(8, 5, 4)
        with torch.no_grad():
            layer.lora_magnitude["default"][3] = float("nan")
        before = state(layer)
        with pytest.raises(ValueError, match="not finite"):
            layer.merge(safe_merge=True)
        assert state(layer) == before

    def test_adapter_names_given_as_a_string_are_refused_as_in_peft(self):
        layer = make_layer(8, 5, 4)
        with pytest.raises(TypeError, match="should be a list of strings"):
            layer.merge(adapter_names="default")

    def test_a_merged_adapter_cannot_be_deleted(self):
        model = make_peft_mlp()
        model.merge_adapter()
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")


class Mixture(nn.Module):
    """A supported layer in front of one that is not."""

    def __init__(self, unsupported: nn.Module):
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.block = nn.ModuleDict({"unsupported": unsupported})


class TestTargets:
    @pytest.mark.parametrize(
        "module", [nn.Conv3d(3, 4, 3), nn.Bilinear(4, 10, 3), nn.Embedding(5, 6), nn.Conv1d(3, 4, 3), nn.LayerNorm(4)]
    )
    def test_an_unsupported_module_is_refused_with_its_path_and_type_before_the_model_is_touched(self, module):
        model = Mixture(module)
        before = state(model)
        with pytest.raises(NotImplementedError, match=rf"'block\.unsupported'.*{type(module).__name__}"):
            get_peft_model(model, make_config(target_modules=["linear", "unsupported"]))
        assert state(model) == before

    def test_a_weight_of_an_integer_dtype_is_refused(self):
        module = nn.Linear(4, 4)
        module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        with pytest.raises(NotImplementedError, match="'block.unsupported'.*torch.int8"):
            get_peft_model(Mixture(module), make_config(target_modules=["unsupported"]))

    def test_an_unsupported_module_of_a_further_adapter_is_refused_before_the_model_is_touched(self):
        model = get_peft_model(Mixture(nn.Conv1d(3, 4, 3)), make_config(target_modules=["linear"]))
        before = state(model)
        config = make_config(target_modules=["linear", "unsupported"], inference_mode=True)
        with pytest.raises(NotImplementedError, match="'block.unsupported'.*Conv1d"):
            model.add_adapter("second", config)
        assert state(model) == before
        assert list(model.peft_config) == ["default"]

    def test_an_unsupported_module_can_still_have_a_plain_adapter(self):
        projection = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)
        config = make_config(target_modules=["linear", "unsupported"], use_dora_adaptive=False)
        model = get_peft_model(Mixture(projection), config)
        assert isinstance(model.base_model.model.block["unsupported"], SVDLinear)

    def test_an_unsupported_module_outside_of_the_targets_is_no_obstacle(self):
        model = get_peft_model(Mixture(nn.Conv2d(3, 4, 3)), make_config(target_modules=["linear"]))
        assert list(svd_layers(model)) == ["base_model.model.linear"]

    def test_an_unsupported_module_given_to_a_layer_directly_is_refused(self):
        with pytest.raises(NotImplementedError, match="Conv3d"):
            SVDConv2d(nn.Conv3d(3, 4, 3), "default", make_config(), r=2)

    def test_fan_in_fan_out_on_a_linear_layer_is_refused(self):
        base = nn.Linear(5, 8)
        before = state(base)
        with pytest.raises(NotImplementedError, match="fan_in_fan_out=True.*not stored transposed"):
            SVDLinear(base, "default", make_config(fan_in_fan_out=True), r=4, lora_alpha=12)
        assert state(base) == before

    def test_fan_in_fan_out_on_a_linear_layer_of_a_model_is_corrected_with_a_warning_as_in_peft(self):
        with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
            model = make_peft_mlp(fan_in_fan_out=True)
        assert svd_layers(model)["base_model.model.first"].use_dora_adaptive


class TestCheckpoints:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        model.save_pretrained(tmp_path)
        return tmp_path

    @staticmethod
    def rewrite(checkpoint, change) -> None:
        path = checkpoint / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def load_into_trained_model(self, checkpoint, match: str) -> None:
        model = make_peft_mlp(seed=1)
        train(model, steps=3, seed=1)
        before = state(model)
        with pytest.raises(ValueError, match=match):
            model.load_adapter(checkpoint, "default")
        assert state(model) == before

    KEY = "base_model.model.middle.lora_magnitude"

    def test_a_missing_magnitude_is_refused_by_its_key(self, checkpoint):
        self.rewrite(checkpoint, lambda tensors: tensors.pop(self.KEY))
        self.load_into_trained_model(checkpoint, match=f"{self.KEY}.* is missing")

    @pytest.mark.parametrize("shape", [(16,), (15, 1), (1, 16)])
    def test_a_magnitude_of_the_wrong_shape_is_refused_by_its_key(self, checkpoint, shape):
        self.rewrite(checkpoint, lambda tensors: tensors.update({self.KEY: torch.ones(shape)}))
        self.load_into_trained_model(checkpoint, match=self.KEY)

    def test_a_magnitude_that_the_adapter_has_no_place_for_is_refused(self, checkpoint):
        model = make_peft_mlp(use_dora_adaptive=False)
        before = state(model)
        with pytest.raises(ValueError, match="lora_magnitude.*use_dora_adaptive=True"):
            model.load_adapter(checkpoint, "default")
        assert state(model) == before

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_loading_a_fresh_model_is_refused_too(self, checkpoint, low_cpu_mem_usage):
        self.rewrite(checkpoint, lambda tensors: tensors.pop(self.KEY))
        base = make_mlp()
        with pytest.raises(ValueError, match=self.KEY):
            PeftModel.from_pretrained(base, checkpoint, low_cpu_mem_usage=low_cpu_mem_usage)
        for name, param in make_mlp().named_parameters():
            layer_name, _, part = name.rpartition(".")
            assert torch.equal(getattr(base.get_submodule(f"{layer_name}.base_layer"), part), param)


def test_a_lora_config_is_none_of_our_business():
    model = get_peft_model(make_mlp(), LoraConfig(r=2, use_dora=True, target_modules=list(TARGETS)))
    torch.testing.assert_close(model(X), make_mlp()(X))


@pytest.mark.parametrize("keywords", [False, True])
def test_a_forward_pass_that_is_a_partial_function_is_refused_with_its_path(keywords):
    base = make_mlp()
    arguments = {"weight": base.middle.weight} if keywords else {}
    base.middle.forward = functools.partial(nn.functional.linear if keywords else base.middle.forward, **arguments)
    with pytest.raises(NotImplementedError, match="forward pass of module 'middle'"):
        get_peft_model(base, make_config(target_modules=TARGETS))
    assert type(base.first) is nn.Linear


def test_merging_replicated_layers_says_what_is_possible():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model = get_peft_model(base, make_config(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]))
    with pytest.raises(NotImplementedError, match="with `layer_replication`, use the adapter unmerged"):
        model.merge_adapter()
    assert not any(layer.merged for layer in svd_layers(model).values())
