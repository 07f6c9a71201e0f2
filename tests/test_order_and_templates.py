"""The order of a training step, saved configs as templates, and the ways of saved weights into a model."""

import copy
import re
import shutil
import warnings
from collections import OrderedDict

import pytest
import torch
from helpers import TARGETS, make_config, make_mlp, make_peft_mlp, svd_layers, train, train_by_hand
from safetensors.torch import load_file, save_file
from test_adadora_guards import X, state
from torch import nn

from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict


WEIGHTS = "adapter_model.safetensors"
ORDER = r"after.*optimizer\.step.*before.*zero_grad"
BOTH = pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of two trained adapters: "whole", saved in the warm-up, and "pruned", and their models."""
    folders, models = {}, {}
    for kind, steps in (("whole", 2), ("pruned", 20)):
        models[kind] = make_peft_mlp()
        train(models[kind], steps=steps)
        folders[kind] = tmp_path_factory.mktemp(kind)
        models[kind].save_pretrained(folders[kind])
    return folders, models


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite_weights(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def backward_and_step(model, x=X) -> None:
    optimizer = torch.optim.SGD((param for param in model.parameters() if param.requires_grad), lr=1e-2)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()


def scores(model) -> dict[str, dict[str, list]]:
    allocator = model.base_model.rankallocator
    return {
        kind: {name: score.tolist() for name, score in getattr(allocator, kind).items()}
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")
    }


def allocation(model) -> tuple:
    """All that an allocation could change."""
    return state(model), scores(model), copy.deepcopy(model.peft_config["default"].rank_pattern)


class TestOrderOfAStep:
    @BOTH
    @pytest.mark.parametrize("step", [0, 2, 3, 14])  # first, last of the warm-up, first and last of the budget phase
    def test_gradients_that_are_gone_before_the_allocation_are_refused_and_nothing_has_changed(
        self, step, use_dora_adaptive
    ):
        model = make_peft_mlp(use_dora_adaptive=use_dora_adaptive)
        train(model, steps=step)
        backward_and_step(model)
        model.zero_grad()
        before = allocation(model)
        with pytest.raises(ValueError, match=ORDER):
            model.base_model.update_and_allocate(step)
        assert allocation(model) == before

    def test_gradients_of_the_magnitudes_alone_are_not_enough(self):
        model = make_peft_mlp()
        train(model, steps=5)
        for name, param in model.named_parameters():
            param.requires_grad_("lora_magnitude" in name)
        backward_and_step(model)
        before = allocation(model)
        with pytest.raises(ValueError, match=ORDER):
            model.base_model.update_and_allocate(5)
        assert allocation(model) == before

    def test_gradients_of_another_adapter_are_not_enough(self, saved):
        # of which the name begins with that of the adapter in training
        model = make_peft_mlp()
        model.load_adapter(saved[0]["whole"], "default_2")
        for name, param in model.named_parameters():
            if "default_2" in name:
                param.grad = torch.ones_like(param)
        before = allocation(model)
        with pytest.raises(ValueError, match=ORDER):
            model.base_model.update_and_allocate(5)
        assert allocation(model) == before

    @BOTH
    def test_gradients_that_are_zero_are_gradients(self, use_dora_adaptive):
        model = make_peft_mlp(use_dora_adaptive=use_dora_adaptive)
        train(model, steps=5)
        backward_and_step(model)
        model.zero_grad(set_to_none=False)
        allocator = model.base_model.rankallocator
        before = {name: score.clone() for name, score in allocator.exp_avg_ipt.items()}
        model.base_model.update_and_allocate(5)
        for name, score in before.items():
            assert torch.equal(allocator.exp_avg_ipt[name], allocator.beta1 * score), name

    @BOTH
    def test_an_expert_without_tokens_counts_as_one_of_gradient_zero(self, use_dora_adaptive):
        def run(fill: bool):
            torch.manual_seed(0)
            experts = nn.ModuleList(nn.Linear(10, 4) for _ in range(2))
            config = make_config(target_modules=["0", "1"], use_dora_adaptive=use_dora_adaptive)
            model = get_peft_model(experts, config)
            optimizer = torch.optim.AdamW((param for param in model.parameters() if param.requires_grad), lr=2e-2)
            for step in range(20):
                experts[step % 3 // 2](X).sub(1).square().mean().backward()  # two steps of three for the first
                optimizer.step()
                for param in model.parameters():
                    if fill and param.grad is None:
                        param.grad = torch.zeros_like(param)
                model.base_model.update_and_allocate(step)
                optimizer.zero_grad()
            return model

        model = run(fill=False)
        assert allocation(model) == allocation(run(fill=True))
        assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4

    @BOTH
    def test_no_gradient_is_needed_after_the_budget_phase(self, use_dora_adaptive):
        model = make_peft_mlp(use_dora_adaptive=use_dora_adaptive)
        train(model, steps=15)
        model.base_model.update_and_allocate(15)
        pattern = copy.deepcopy(model.peft_config["default"].rank_pattern)
        assert sum(map(sum, pattern.values())) == 6
        before = allocation(model)
        for step in range(16, 20):
            model.base_model.update_and_allocate(step)
        assert allocation(model) == before


class Stack(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3):
        super().__init__()
        torch.manual_seed(0)
        sizes = [10] + [width] * (depth - 1) + [4]
        self.layers = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


SIZES = pytest.mark.parametrize(
    "width, depth", [(16, 3), (24, 3), (16, 5), (16, 2)], ids=["same", "wider", "deeper", "less deep"]
)


@pytest.fixture(scope="module", params=[2, 20], ids=["whole", "pruned"])
def template(request, tmp_path_factory):
    model = get_peft_model(Stack(), make_config(target_modules=r"layers\.\d"))
    train(model, steps=request.param)
    folder = tmp_path_factory.mktemp("template")
    model.save_pretrained(folder)
    return folder


class TestTemplates:
    @staticmethod
    def from_template(folder, size, config_class=AdaLoraConfig):
        config = config_class.from_pretrained(folder)
        config.inference_mode = False
        model = get_peft_model(Stack(*size), config)
        assert [layer.lora_E["default"].shape for layer in svd_layers(model).values()] == [(6, 1)] * size[1]
        torch.testing.assert_close(model(X), Stack(*size)(X))  # it is fresh
        return model

    @SIZES
    @pytest.mark.parametrize("config_class", [AdaLoraConfig, PeftConfig])
    def test_an_adapter_made_from_a_saved_config_trains_prunes_saves_and_loads(
        self, config_class, width, depth, template, tmp_path
    ):
        model = self.from_template(template, (width, depth), config_class)
        losses = train(model)
        assert losses[-1] < losses[0]
        pattern = model.peft_config["default"].rank_pattern
        assert len(pattern) == depth and sum(map(sum, pattern.values())) == 2 * depth
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Stack(width, depth), tmp_path)
        torch.testing.assert_close(loaded(X), model(X))
        assert sum(layer.r["default"] for layer in svd_layers(loaded).values()) == 2 * depth

    @SIZES
    @pytest.mark.parametrize("is_fresh", [True, False])
    def test_what_it_saves_before_an_allocation_predicts_as_it_does(self, is_fresh, width, depth, template, tmp_path):
        # the ranks of the template are not those of this adapter
        model = self.from_template(template, (width, depth))
        for layer in () if is_fresh else svd_layers(model).values():
            train_by_hand(layer)
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Stack(width, depth), tmp_path)
        torch.testing.assert_close(loaded(X), model(X))

    @pytest.mark.parametrize("content", [None, b"", b"no weights"])
    def test_the_weights_beside_the_config_are_not_looked_at(self, content, template, tmp_path):
        folder = copied(template, tmp_path)
        (folder / WEIGHTS).unlink()
        if content is not None:
            (folder / WEIGHTS).write_bytes(content)
        train(self.from_template(folder, (16, 3)))


class TestOtherFiles:
    @pytest.mark.parametrize("kind", ["whole", "pruned"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_weights_that_were_converted_to_another_dtype_load(self, low_cpu_mem_usage, dtype, kind, saved, tmp_path):
        folder, model = copied(saved[0][kind], tmp_path), saved[1][kind]
        rewrite_weights(folder, lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
        loaded = PeftModel.from_pretrained(make_mlp(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(X), model(X), rtol=2e-2, atol=2e-2)
        served = make_peft_mlp()
        served.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
        served.set_adapter("second")
        torch.testing.assert_close(served(X), model(X), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("renamed", [{"first": "one"}, {"first": "one", "middle": "two", "last": "three"}])
    @pytest.mark.parametrize("kind, renames_ranks", [("whole", False), ("pruned", False), ("pruned", True)])
    def test_modules_renamed_by_a_key_mapping_load_and_save(self, kind, renames_ranks, renamed, saved, tmp_path):
        folder, expected = saved[0][kind], saved[1][kind](X)

        def rename(name):
            return re.sub(r"^\w+", lambda match: renamed.get(match[0], match[0]), name)

        def make_base():
            mlp = make_mlp()
            layers = [(rename(name), getattr(mlp, name)) for name in TARGETS]
            return nn.Sequential(
                OrderedDict(layers[:1] + [("a", nn.Tanh())] + layers[1:2] + [("b", nn.Tanh())] + layers[2:])
            )

        config = AdaLoraConfig.from_pretrained(folder)
        config.target_modules = [rename(name) for name in TARGETS]
        if renames_ranks:
            config.rank_pattern = {rename(name): kept for name, kept in config.rank_pattern.items()}
        mapping = {rf"^{old}\.": f"{new}." for old, new in renamed.items()}
        loaded = PeftModel.from_pretrained(make_base(), folder, config=config, key_mapping=mapping)
        torch.testing.assert_close(loaded(X), expected)
        # under the new names
        loaded.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(make_base(), tmp_path)(X), expected)


class TestTrainingWithoutAnAllocation:
    PASSES = 450

    def warnings_of(self, model, allocate_every: int = 0) -> list[int]:
        """The numbers of the forward passes that warned."""
        passes = []
        for number in range(self.PASSES):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outputs = model(X)
            passes += [number for w in caught if "trained for a while without an allocation" in str(w.message)]
            if allocate_every and number % allocate_every == allocate_every - 1:
                outputs.square().mean().backward()
                model.base_model.update_and_allocate(number // allocate_every)
                model.zero_grad()
        return passes

    def test_a_model_without_a_task_warns_once_after_about_200_forward_passes(self):
        (number,) = self.warnings_of(make_peft_mlp().train())
        assert 150 <= number <= 250

    @pytest.mark.parametrize("total_step, every", [(600, 1), (600, 50), (20, 1)], ids=["each", "rarely", "to the end"])
    def test_one_that_allocates_does_not_warn(self, total_step, every):
        assert self.warnings_of(make_peft_mlp(total_step=total_step).train(), every) == []

    def test_inference_does_not_warn(self, saved):
        model = make_peft_mlp()
        with torch.no_grad():
            assert self.warnings_of(model.train()) == []
        assert self.warnings_of(model.eval()) == []
        assert self.warnings_of(PeftModel.from_pretrained(make_mlp(), saved[0]["whole"]).train()) == []


KEY = "base_model.model.middle.lora_magnitude"
DAMAGES = {
    "missing": (lambda tensors: tensors.pop(KEY), "is missing"),
    "shape": (lambda tensors: tensors.update({KEY: torch.ones(5, 1)}), "has the shape"),
    "nan": (lambda tensors: tensors[KEY][3].fill_(float("nan")), "is not finite"),
    "unknown": (lambda tensors: tensors.update({KEY + "_2": torch.ones(16, 1)}), "no place"),
}


def trained_model(folder):
    model = make_peft_mlp()
    train(model)
    return model


def trained_on_model(folder):
    # with the ranks of the saved adapter
    model = trained_model(folder)
    for layer in svd_layers(model).values():
        train_by_hand(layer)
    return model


def model_from_template(folder):
    config = AdaLoraConfig.from_pretrained(folder)
    config.inference_mode = False
    model = get_peft_model(make_mlp(), config)
    train(model, steps=2, seed=1)
    return model


# the adapter to load, which saved one it is, and the model
ROADS = {
    "second": ("second", "pruned", trained_model),
    "onto a fresh one": ("default", "whole", lambda folder: make_peft_mlp()),
    "onto a trained one": ("default", "pruned", trained_on_model),
    "onto one from a template": ("default", "whole", model_from_template),
    "onto a loaded one": (
        "default",
        "pruned",
        lambda folder: PeftModel.from_pretrained(make_mlp(), folder, is_trainable=True),
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
class TestRefusedLoads:
    @pytest.fixture
    def broken(self, damage, saved, tmp_path):
        """The two folders of `saved` with damaged weights."""
        folders = {kind: shutil.copytree(folder, tmp_path / kind) for kind, folder in saved[0].items()}
        for folder in folders.values():
            rewrite_weights(folder, damage)
        return folders

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_a_new_adapter_keeps_its_layers_and_takes_the_right_weights(
        self, is_trainable, low_cpu_mem_usage, message, broken, saved
    ):
        options = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
        base = make_mlp()
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, broken["pruned"], **options)
        # PEFT injects an adapter before it reads the weights; its layers stay, as with any method of PEFT
        weights = load_file(saved[0]["pruned"] / "adapter_model.safetensors")
        set_peft_model_state_dict(base, weights, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(base.eval()(X), saved[1]["pruned"](X))

    @pytest.mark.parametrize("adapter_name, kind, make_model", ROADS.values(), ids=ROADS)
    def test_the_other_adapter_and_the_training_go_on(self, adapter_name, kind, make_model, message, broken, saved):
        model = make_model(saved[0][kind]).train()
        before, config, output = state(model), copy.deepcopy(model.peft_config["default"]), model(X)
        allocator = model.base_model.rankallocator
        with pytest.raises(ValueError, match=message):
            model.load_adapter(broken[kind], adapter_name)
        after = {name: value for name, value in state(model)[0].items() if ".second" not in name}
        assert after == before[0]
        assert model.peft_config["default"] == config
        assert model.active_adapter == "default" and model.base_model.rankallocator is allocator
        assert model.training and torch.equal(model(X), output)
        model.load_adapter(saved[0][kind], adapter_name)
        model.set_adapter(adapter_name)
        torch.testing.assert_close(model(X), saved[1][kind](X))
