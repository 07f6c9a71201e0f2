"""An adapter is its tensors: what must not be remembered beside them, and what must follow from them alone."""

import copy
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Optional

import pytest
import torch
from helpers import (
    MLP,
    TARGETS,
    make_config,
    make_layer,
    make_mlp,
    make_peft_mlp,
    parameter_bytes,
    svd_layers,
    train,
    train_by_hand,
)
from reference import Reference, relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import DoraCaching
from peft.tuners.adalora import SVDLinear
from peft.tuners.tuners_utils import BaseTunerLayer


X = torch.randn(9, 10, generator=torch.Generator().manual_seed(5))
PARTS = ("lora_A", "lora_B", "lora_E", "lora_magnitude")
DIM_OF_RANK = {"lora_A": 0, "lora_E": 0, "lora_B": 1}

# the steps that have been taken; the schedule of `make_config` prunes from step 2 to step 15 and ends after step 19
PHASES = {"warm-up": 2, "budget phase": 8, "final phase": 17}
in_phases = pytest.mark.parametrize("steps", PHASES.values(), ids=PHASES)


class Run:
    """A training loop by hand that can be stopped after each step. It allocates after the step of the optimizer."""

    def __init__(self, model: nn.Module, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(32, 10, generator=generator)
        self.target = torch.randn(32, 4, generator=generator)
        self.model, self.step = model, 0
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)

    def optimize(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(self.x), self.target).backward()
        self.optimizer.step()

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            self.optimize()
            self.model.base_model.update_and_allocate(self.step)
            self.step += 1
        return self


@functools.cache
def cached_run(steps: int, seed: int, **config_kwargs) -> Run:
    return Run(make_peft_mlp(**config_kwargs), seed).train(steps)


def run_of(steps: int, seed: int = 0, **config_kwargs) -> Run:
    """A run that has taken some steps, of its own."""
    return copy.deepcopy(cached_run(steps, seed, **config_kwargs))


def budget(step: int) -> int:
    """The triplets of all three layers that the schedule of `make_config` leaves after the allocation at a step."""
    remaining = min(1.0, max(0.0, 1 - (step - 2) / 13))
    return int(12 * remaining**3 + 6)


@torch.no_grad()
def output_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(X)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same but for the order of sums, which depends on the rank."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def live_ranks(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    return {
        name.removeprefix("base_model.model."): int((layer.lora_E[adapter_name] != 0).sum())
        for name, layer in svd_layers(model).items()
        if adapter_name in layer.lora_E
    }


def ranks_of(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """The ranks of a saved adapter, which its three factors agree about."""
    ranks = {}
    for key, value in weights.items():
        layer_name, _, part = key.removeprefix("base_model.model.").rpartition(".")
        if part in DIM_OF_RANK:
            ranks.setdefault(layer_name, set()).add(value.shape[DIM_OF_RANK[part]])
    assert all(len(rank) == 1 for rank in ranks.values()), ranks
    return {layer_name: rank.pop() for layer_name, rank in ranks.items()}


def shapes_of(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    return {
        name.removeprefix("base_model.model."): len(layer.lora_E[adapter_name])
        for name, layer in svd_layers(model).items()
    }


def identities(model: nn.Module) -> dict[str, tuple]:
    return {name: (id(param), param.shape, param.requires_grad) for name, param in model.named_parameters()}


def weights_of(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """A copy of the weights that are saved."""
    return {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items()}


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


WRITES = {
    "data[-4:] = …": lambda weight: weight.data[-4:].copy_(torch.randn_like(weight.data[-4:])),
    "data.mul_": lambda weight: weight.data.mul_(1.5),
    "a slice of data with another step": lambda weight: weight.data[::3].neg_().mul_(2),
    "a view from before": lambda weight: weight.data.view(-1)[5:60].mul_(1.6),
    "numpy": lambda weight: weight.detach().numpy().__imul__(0.3),
    "data = a tensor": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    "the bytes of the storage": lambda weight: weight.untyped_storage().copy_(
        torch.randn_like(weight).untyped_storage()
    ),
    "swap of two halves": lambda weight: weight.data.copy_(weight.data.roll(3, 0)),
}


REPLACEMENTS = {
    "data = other": lambda layer: setattr(layer.get_base_layer().weight, "data", torch.zeros(16, 20)),
    "another parameter": lambda layer: setattr(
        layer.get_base_layer(), "weight", nn.Parameter(torch.zeros(16, 20), requires_grad=False)
    ),
    "another dtype": lambda layer: layer.get_base_layer().double(),
    "none": lambda layer: setattr(layer.get_base_layer().weight, "data", torch.empty(0)),
}


class TestNothingIsKeptOfTheBaseWeight:
    X = torch.randn(9, 20, generator=torch.Generator().manual_seed(6))

    def layer(self, kind: str = "Linear", **kwargs) -> nn.Module:
        if kind == "Linear":
            return make_layer(16, 20, 4, **kwargs)
        torch.manual_seed(0)
        layer = SVDLinear(Conv1D(16, 20), "default", make_config(fan_in_fan_out=True), r=4, lora_alpha=12)
        train_by_hand(layer)
        return layer

    def assert_right(self, layer: nn.Module) -> None:
        weight = layer.get_base_layer().weight
        weight = weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight
        expected = Reference.of(layer, weight=weight).forward(self.X.double())
        assert relative_error(layer(self.X), expected) < 1e-5
        with torch.no_grad():
            assert relative_error(layer(self.X), expected) < 1e-5

    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
    @pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
    def test_a_weight_that_was_trained_and_frozen_again_is_followed(self, optimizer_class, options, mode):
        layer = self.layer().train(mode == "train")
        weight = layer.get_base_layer().weight.requires_grad_(False)
        self.assert_right(layer)
        before = weight.clone()
        optimizer = optimizer_class([weight], lr=0.1, **options)
        for _ in range(3):
            weight.requires_grad_(True)
            layer(self.X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            weight.requires_grad_(False)
            self.assert_right(layer)
        assert relative_error(weight, before) > 1e-2

    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    def test_a_write_past_the_counter_of_writes_is_followed(self, write, kind, mode):
        layer = self.layer(kind).train(mode == "train").requires_grad_(True)
        weight = layer.get_base_layer().weight.requires_grad_(False)
        for _ in range(2):
            self.assert_right(layer)
            layer(self.X).square().mean().backward()
            before = weight.clone()
            write(weight)
            assert relative_error(weight, before) > 1e-2
            self.assert_right(layer)

    def uses(self) -> dict[str, Callable]:
        def training(layer):
            for _ in range(2):
                layer.train()(self.X).sum().backward()

        def evaluation(layer):
            with torch.no_grad():
                for _ in range(2):
                    layer.eval()(self.X)

        def caching(layer):
            with DoraCaching(), torch.no_grad():
                for _ in range(2):
                    layer.eval()(self.X)

        return {
            "no forward pass": lambda layer: None,
            "training": training,
            "evaluation": evaluation,
            "DoraCaching": caching,
            "training, evaluation and DoraCaching": lambda layer: (training(layer), evaluation(layer), caching(layer)),
        }

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["AdaDoRA", "AdaLoRA"])
    @pytest.mark.parametrize(
        "use", ["no forward pass", "training", "evaluation", "DoraCaching", "training, evaluation and DoraCaching"]
    )
    @pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
    def test_the_memory_of_a_replaced_weight_is_free_at_once(self, replace, use, use_dora_adaptive):
        layer = self.layer(use_dora_adaptive=use_dora_adaptive)
        layer.get_base_layer().weight.requires_grad_(False)
        self.uses()[use](layer)
        storage = StorageWeakRef(layer.get_base_layer().weight.untyped_storage())
        assert not storage.expired()
        replace(layer)
        assert storage.expired()

    def test_the_memory_of_a_deleted_layer_is_free_at_once(self):
        layer = self.layer()
        for use in self.uses().values():
            use(layer)
        layer.zero_grad()
        storages = [StorageWeakRef(param.untyped_storage()) for param in layer.parameters()]
        del layer
        assert all(storage.expired() for storage in storages)

    @staticmethod
    def tensor(layer: nn.Module, part: str) -> torch.Tensor:
        return layer.get_base_layer().weight if part == "weight" else getattr(layer, part)["default"]

    @pytest.mark.parametrize("part", ["weight", *PARTS])
    def test_a_write_between_two_uses_of_caching_is_followed(self, part):
        layer = self.layer().eval()
        for factor in (1.0, 1.5, 0.6):
            self.tensor(layer, part).data[:3].mul_(factor)
            with DoraCaching():
                self.assert_right(layer)
            # and not the first time alone
            self.tensor(layer, part).data[1:].mul_(factor)
            self.assert_right(layer)

    @pytest.mark.parametrize("part", ["weight", *PARTS])
    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("ends", ["well", "with an error"])
    def test_a_write_between_two_generations_is_followed(self, ends, mode, part):
        class Generator(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(10, 10)

            def forward(self, x):
                return self.layer(x)

            def generate(self, x, fails=False):
                for _ in range(3):
                    x = self(x)
                if fails:
                    raise KeyboardInterrupt
                return x

        torch.manual_seed(0)
        model = get_peft_model(Generator(), make_config(target_modules=["layer"])).train(mode == "train")
        (layer,) = svd_layers(model).values()
        train_by_hand(layer)

        def expected(times: int) -> torch.Tensor:
            reference, x = Reference.of(layer), X.double()
            for _ in range(times):
                x = reference.forward(x)
            return x

        with torch.no_grad():
            for factor in (1.0, 1.5, 0.6):
                self.tensor(layer, part).data[:3].mul_(factor)
                assert relative_error(model.generate(X), expected(3)) < 1e-5
                if ends == "with an error":
                    with pytest.raises(KeyboardInterrupt):
                        model.generate(X, fails=True)
                self.tensor(layer, part).data[1:].mul_(factor)
                assert relative_error(model(X), expected(1)) < 1e-5


class TestBackwardInAnotherThread:
    @pytest.mark.parametrize("caching", [False, True], ids=["", "DoraCaching"])
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("frozen", [False, True], ids=["", "a frozen adapter"])
    def test_gives_the_gradients_of_the_formula(self, frozen, mode, use_reentrant, caching):
        layers = nn.ModuleList(make_layer(10, 10, 3, seed=seed) for seed in range(3)).train(mode == "train")
        for layer in layers:
            layer.get_base_layer().requires_grad_(False)
            for part in PARTS:
                getattr(layer, part)["default"].requires_grad_(not frozen)
        for factor in (1.0, 1.7):
            references = []
            for layer in layers:
                layer.get_base_layer().weight.data[2:].mul_(factor)  # seen by no counter
                references.append(Reference.of(layer))
            x, expected_x = X.clone().requires_grad_(), X.double().requires_grad_()
            output, expected = x, expected_x
            with DoraCaching(enabled=caching):
                for layer, reference in zip(layers, references):
                    output = checkpoint(layer, output, use_reentrant=use_reentrant)
                    expected = reference.forward(expected)
                expected.square().sum().backward()
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(output.square().sum().backward).result()
            assert relative_error(output, expected) < 1e-5
            assert relative_error(x.grad, expected_x.grad) < 1e-4
            for layer, reference in zip(layers, references) if not frozen else ():
                for part, factor_of_reference in reference.factors().items():
                    param = getattr(layer, part)["default"]
                    assert relative_error(param.grad, factor_of_reference.grad) < 1e-4
                    param.grad = None


class Unsupported(MLP):
    """Its last layer cannot have magnitudes."""

    def __init__(self):
        super().__init__()
        weight_norm(self.last)


def add_to(model: PeftModel, name: str, config: AdaLoraConfig, **changes) -> None:
    """Add an adapter with a config, or with a copy of it that differs in some fields."""
    if changes:
        config = copy.copy(config)
        for field, value in changes.items():
            setattr(config, field, value)
    model.add_adapter(name, config)


def train_and_save(model: nn.Module) -> None:
    Run(model, seed=7).train(20)
    weights_of(model)


def refused(error: type[Exception], use: Callable) -> Callable:
    def attempt(model, config):
        with pytest.raises(error):
            use(model, config)

    return attempt


OTHER_USES = {
    "get_peft_model": lambda model, config: get_peft_model(make_mlp(1), config),
    "get_peft_model, trained": lambda model, config: train_and_save(get_peft_model(make_mlp(1), config)),
    "get_peft_model, saved": lambda model, config: weights_of(get_peft_model(make_mlp(1), config)),
    "get_peft_model, mixed": lambda model, config: get_peft_model(make_mlp(1), config, mixed=True),
    "PeftModel": lambda model, config: PeftModel(make_mlp(1), config),
    "inject_adapter_in_model": lambda model, config: inject_adapter_in_model(config, make_mlp(1)),
    "add_adapter to predict": lambda model, config: add_to(model, "ref", config, inference_mode=True),
    "a layer": lambda model, config: SVDLinear(nn.Linear(3, 4), "default", config, r=2, lora_alpha=1),
    "get_peft_model, unsupported": refused(
        NotImplementedError, lambda model, config: get_peft_model(Unsupported(), config)
    ),
    "get_peft_model, no target": refused(
        ValueError, lambda model, config: get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    ),
    "get_peft_model, bad name": refused(
        ValueError, lambda model, config: get_peft_model(make_mlp(1), config, adapter_name="items")
    ),
    "inject_adapter_in_model, unsupported": refused(
        NotImplementedError, lambda model, config: inject_adapter_in_model(config, Unsupported())
    ),
    "add_adapter, a frozen copy": lambda model, config: add_to(model, "ref", model.peft_config["default"]),
    "add_adapter, a second in training": refused(
        ValueError, lambda model, config: add_to(model, "ref", copy.copy(config))
    ),
    "add_adapter, bad name": refused(ValueError, lambda model, config: add_to(model, "items", config)),
}


@functools.cache
def run_with_config(steps: int) -> tuple[AdaLoraConfig, Run]:
    """The config that a user has made, and a run of it."""
    config = make_config(target_modules=list(TARGETS))
    return config, Run(get_peft_model(make_mlp(), config)).train(steps)


WAYS = {
    "get_peft_model": lambda config: get_peft_model(make_mlp(), config),
    "PeftModel": lambda config: PeftModel(make_mlp(), config),
    "add_adapter": lambda config: add_as_second(config),
    "inject_adapter_in_model": lambda config: inject_adapter_in_model(config, make_mlp()),
}


SAVES = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "get_peft_model_state_dict": lambda model, folder: get_peft_model_state_dict(model),
    "with a state dict": lambda model, folder: model.save_pretrained(folder, state_dict=model.state_dict()),
}


class TestConfigs:
    @pytest.mark.parametrize("use", OTHER_USES.values(), ids=OTHER_USES)
    @pytest.mark.parametrize("whose, steps", [("the user's", 8), ("the model's", 8), ("the model's", 17)])
    def test_another_use_of_a_config_changes_nothing_of_a_run(self, whose, steps, use):
        alone = cached_run(20, 0)
        config, run = copy.deepcopy(run_with_config(steps))
        ranks = ranks_of(weights_of(run.model))
        use(run.model, config if whose == "the user's" else run.model.peft_config["default"])
        assert ranks_of(weights_of(run.model)) == ranks
        run.train(20 - steps)
        expected = parameter_bytes(alone.model)
        actual = parameter_bytes(run.model)
        assert {name: actual[name] for name in expected} == expected
        assert_same_weights(weights_of(run.model), weights_of(alone.model))
        assert sum(ranks_of(weights_of(run.model)).values()) == 6

    def test_two_models_with_one_config_train_as_if_alone(self):
        config = make_config(target_modules=list(TARGETS))
        runs = [Run(get_peft_model(make_mlp(seed), config), seed) for seed in (1, 2)]
        runs[0].train(3)  # so that they are never in the same phase of pruning
        for _ in range(17):
            for run in runs:
                run.train(1)
                weights_of(run.model)
        runs[1].train(3)
        for seed, run in zip((1, 2), runs):
            alone = Run(make_peft_mlp(seed), seed).train(20)
            assert run.step == alone.step
            assert parameter_bytes(run.model) == parameter_bytes(alone.model)
            assert_same_weights(weights_of(run.model), weights_of(alone.model))
            assert ranks_of(weights_of(run.model)) == live_ranks(alone.model)
        assert ranks_of(weights_of(runs[0].model)) != ranks_of(weights_of(runs[1].model))

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_nothing_is_written_to_the_config_of_the_user_but_what_peft_writes(self, way, tmp_path):
        def changed(config: AdaLoraConfig, use: Callable) -> dict:
            before = copy.deepcopy(vars(config))
            use(way(config))
            return {name: value for name, value in vars(config).items() if before.get(name, "missing") != value}

        def live(model):
            if isinstance(model, PeftModel):
                train(model)
                model.save_pretrained(tmp_path)
                set_peft_model_state_dict(model, weights_of(model, model.active_adapter), model.active_adapter)
                model.merge_adapter()

        plain = changed(make_config(target_modules=TARGETS, use_dora_adaptive=False), lambda model: None)
        ours = changed(make_config(target_modules=TARGETS), live)
        assert ours == plain

    @pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
    @pytest.mark.parametrize("steps", [3, 10])
    def test_saving_an_adapter_to_predict_writes_nothing_to_its_config(self, steps, save, tmp_path):
        config = make_config(target_modules=TARGETS, inference_mode=True)
        model = get_peft_model(make_mlp(), config)
        set_peft_model_state_dict(model, weights_of(run_of(steps).model))
        with torch.no_grad():
            for layer in svd_layers(model).values():
                layer.lora_E["default"][:1] = 0
        save(model, tmp_path)
        assert config.rank_pattern is None

    @pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
    @pytest.mark.parametrize("steps", [3, 10])
    def test_a_config_tells_the_ranks_of_the_last_allocation_and_not_of_a_save(self, steps, save, tmp_path):
        run = run_of(steps)
        save(run.model, tmp_path)
        at_save = sum(live_ranks(run.model).values())
        for _ in range(20 - steps):
            run.train(1)
            pattern = run.model.peft_config["default"].to_dict()["rank_pattern"]
            told = {key.partition(".lora_E")[0]: sum(kept) for key, kept in pattern.items()}
            assert told == live_ranks(run.model)
        assert sum(told.values()) == 6 < at_save

    @pytest.mark.parametrize("deltaT", [1, 3])
    def test_the_config_that_is_saved_tells_the_ranks_of_the_weights_beside_it(self, deltaT, tmp_path):
        run, told = run_of(0, deltaT=deltaT), []
        for step in range(20):
            run.optimize()
            for folder in ("before", "after"):
                if step % 3:
                    run.model.base_model.update_and_allocate(step) if folder == "before" else None
                    continue
                run.model.save_pretrained(tmp_path / folder)
                weights = load_file(tmp_path / folder / "adapter_model.safetensors")
                pattern = json.loads((tmp_path / folder / "adapter_config.json").read_text())["rank_pattern"]
                if pattern is None:
                    assert set(ranks_of(weights).values()) == {6}
                else:
                    told.append({key.partition(".lora_E")[0]: sum(kept) for key, kept in pattern.items()})
                    assert told[-1] == ranks_of(weights)
                if folder == "before":
                    run.model.base_model.update_and_allocate(step)
        assert sum(told[-1].values()) == 6


def add_as_second(config: AdaLoraConfig) -> PeftModel:
    """A model whose adapter in training is its second one."""
    model = make_peft_mlp(inference_mode=True, use_dora_adaptive=config.use_dora_adaptive)
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


def broken(kind: str, weights: dict[str, torch.Tensor], prefix: str) -> tuple[dict[str, torch.Tensor], str]:
    """Weights that are not those of the adapter in one way, and the key that is to blame."""
    weights = {key: value.clone() for key, value in weights.items()}
    what, _, part = kind.partition(" ")
    key = f"{prefix}middle.{part}"
    if what == "missing":
        del weights[key]
    elif what == "extra":
        weights[key] = torch.ones(2, 2)
    elif what == "elsewhere":
        key = f"{prefix}middle_2.{part}"
        weights[key] = weights[f"{prefix}middle.{part}"].clone()
    elif what == "wide":
        dim = 0 if part == "lora_magnitude" else 1 - DIM_OF_RANK[part]
        weights[key] = torch.cat([weights[key], weights[key].narrow(dim, 0, 1)], dim)
    elif what == "flat":
        weights[key] = weights[key].flatten()
    elif what == "rank":
        weights[key] = torch.cat([weights[key], weights[key].narrow(DIM_OF_RANK[part], 0, 1)], DIM_OF_RANK[part])
        key = f"{prefix}middle.lora_"  # any of the three may be the one that is wrong
    else:
        weights[key][-1, -1] = float(what)
    return weights, key


BREAKS = [
    "missing lora_E",
    "missing lora_magnitude",
    "extra lora_C",
    "elsewhere lora_A",
    "wide lora_B",
    "wide lora_magnitude",
    "flat lora_magnitude",
    "rank lora_E",
    "nan lora_A",
    "-inf lora_magnitude",
]


def fresh_model(folder) -> PeftModel:
    return make_peft_mlp()


def trained_model(folder) -> PeftModel:
    return run_of(8).model


def frozen_model(folder) -> PeftModel:
    model = run_of(20).model
    for name, param in model.named_parameters():
        param.requires_grad_(False)
    return model


def loaded_model(folder) -> PeftModel:
    run_of(20, seed=4).model.save_pretrained(folder)
    return PeftModel.from_pretrained(make_mlp(), folder)


def injected_model(folder, inference_mode: bool = False, **kwargs) -> nn.Module:
    config = make_config(target_modules=list(TARGETS), inference_mode=inference_mode)
    return inject_adapter_in_model(config, make_mlp(), **kwargs)


def model_with_config_from_file(folder) -> PeftModel:
    make_peft_mlp().save_pretrained(folder)
    return get_peft_model(make_mlp(), AdaLoraConfig.from_pretrained(folder))


PLACES = {
    "fresh": fresh_model,
    "trained": trained_model,
    "frozen": frozen_model,
    "loaded": loaded_model,
    "fresh, to predict": lambda folder: make_peft_mlp(inference_mode=True),
    "fresh, with a config from a file": model_with_config_from_file,
    "injected": injected_model,
    "injected, to predict": lambda folder: injected_model(folder, inference_mode=True),
    "injected, on the meta device": lambda folder: injected_model(folder, low_cpu_mem_usage=True),
}


@pytest.fixture(scope="module")
def source() -> PeftModel:
    """A model that has been trained and pruned elsewhere."""
    return run_of(20, seed=3).model


class TestRefusedLoads:
    @pytest.mark.parametrize(
        "place, kind",
        [(place, kind) for place in PLACES for kind in BREAKS[len(place) % 3 :: 1 if place == "trained" else 3]],
    )
    def test_nothing_changes_and_the_right_weights_load(self, place, kind, source, tmp_path):
        model = PLACES[place](tmp_path)
        options = {"low_cpu_mem_usage": True} if "meta" in place else {}
        weights = weights_of(source)
        if "injected" in place:
            weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
        wrong, key = broken(kind, weights, "" if "injected" in place else "base_model.model.")
        given = dict(wrong)
        before = parameter_bytes(model), identities(model), copy.deepcopy(vars(model.peft_config["default"]))
        output = None if "meta" in place else output_of(model)
        with pytest.raises(ValueError, match=key) as error:
            set_peft_model_state_dict(model, wrong, **options)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
        assert (parameter_bytes(model), identities(model), vars(model.peft_config["default"])) == before
        assert wrong.keys() == given.keys() and all(wrong[key] is given[key] for key in given)
        if output is not None:
            assert torch.equal(output_of(model), output)
        set_peft_model_state_dict(model, weights, **options)
        assert_near(output_of(model), output_of(source))

    @pytest.mark.parametrize("kind", ["missing lora_B", "nan lora_E"])
    @in_phases
    def test_a_run_goes_on_as_if_nothing_had_been_loaded(self, steps, kind, source):
        run = run_of(steps)
        with pytest.raises(ValueError):
            set_peft_model_state_dict(run.model, broken(kind, weights_of(source), "base_model.model.")[0])
        run.train(20 - steps)
        assert parameter_bytes(run.model) == parameter_bytes(cached_run(20, 0).model)

    @pytest.fixture
    def folders(self, source, tmp_path):
        """A function that saves the adapter with its weights, right and broken."""
        source.save_pretrained(tmp_path / "right")

        def save(kind):
            source.save_pretrained(tmp_path / "wrong")
            weights, key = broken(kind, weights_of(source), "base_model.model.")
            save_file(weights, tmp_path / "wrong" / "adapter_model.safetensors", metadata={"format": "pt"})
            return tmp_path / "right", tmp_path / "wrong", key

        return save

    @pytest.mark.parametrize(
        "name, low_cpu_mem_usage, kind",
        [
            *(("second", False, kind) for kind in BREAKS[1::2]),
            *(("second", True, kind) for kind in BREAKS[::4]),
            *(("default", False, kind) for kind in BREAKS[1::4]),
        ],
    )
    def test_load_adapter(self, name, low_cpu_mem_usage, kind, source, folders):
        right, wrong, key = folders(kind)
        run = run_of(8)
        model = run.model
        before, output = parameter_bytes(model), output_of(model)
        before_identities = identities(model)
        with pytest.raises(ValueError, match=key):
            model.load_adapter(wrong, name, low_cpu_mem_usage=low_cpu_mem_usage)
        after, after_identities = parameter_bytes(model), identities(model)
        assert {key: after[key] for key in before} == before
        assert {key: after_identities[key] for key in before_identities} == before_identities
        model.set_adapter("default")
        assert torch.equal(output_of(model), output)
        model.load_adapter(right, name, low_cpu_mem_usage=low_cpu_mem_usage)
        model.set_adapter(name)
        assert_near(output_of(model), output_of(source))
        if name == "second":
            model.set_adapter("default")
            run.train(12)
            alone = parameter_bytes(cached_run(20, 0).model)
            after = parameter_bytes(model)
            assert {key: after[key] for key in alone} == alone

    @pytest.mark.parametrize("kind", BREAKS[::3])
    @pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
    def test_from_pretrained(self, options, kind, folders):
        _, wrong, key = folders(kind)
        with pytest.raises(ValueError, match=key):
            PeftModel.from_pretrained(make_mlp(), wrong, **options)


def assert_loaded_first(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """The loaded triplets come first, and the singular values of the rest are 0."""
    for name, layer in svd_layers(model).items():
        rank = len(weights[f"{name}.lora_E"])
        for part, dim in DIM_OF_RANK.items():
            param = getattr(layer, part)["default"].detach()
            assert torch.equal(param.narrow(dim, 0, rank), weights[f"{name}.{part}"]), (name, part)
        assert torch.equal(layer.lora_magnitude["default"], weights[f"{name}.lora_magnitude"])
        assert not layer.lora_E["default"][rank:].any()


class TestLoadingIntoAnAdapterInTraining:
    def assert_trains_on(self, run: Run, weights: dict[str, torch.Tensor]) -> None:
        """Training goes on to its end. Each forward pass has the ranks of the budget, or those that were loaded."""
        params = {id(param) for group in run.optimizer.param_groups for param in group["params"]}
        assert params == {id(param) for param in run.model.parameters() if param.requires_grad}
        seen = []
        handle = run.model.register_forward_pre_hook(lambda *_: seen.append(sum(live_ranks(run.model).values())))
        expected = [sum(ranks_of(weights).values())]
        while run.step < 20:
            before = {name: param.clone() for name, param in run.model.named_parameters() if param.requires_grad}
            run.train(1)
            moved = [
                name for name, param in run.model.named_parameters() if not torch.equal(param, before.get(name, param))
            ]
            assert {name for name in before if ".lora_E." not in name} <= set(moved)
            assert any(".lora_E." in name for name in moved)
            if run.step <= 16:
                expected.append(budget(run.step - 1))
            else:
                expected.append(expected[-1])  # no ranks are decided any more
        handle.remove()
        assert seen == expected[:-1]
        assert sum(live_ranks(run.model).values()) == expected[-1]
        assert sum(ranks_of(weights_of(run.model)).values()) == sum(live_ranks(run.model).values())

    @pytest.mark.parametrize(
        "way, taken, loaded",
        [
            (way, taken, loaded)
            for way in ("restore-best", "another model")
            for taken in PHASES
            for loaded in PHASES
            if way == "another model" or PHASES[taken] <= PHASES[loaded]
        ],
    )
    def test_parameters_stay_and_allocation_goes_on(self, way, taken, loaded):
        if way == "restore-best":
            run = run_of(PHASES[taken])
            weights, output = weights_of(run.model), output_of(run.model)
            run.train(PHASES[loaded] - PHASES[taken])
        else:
            other = run_of(PHASES[taken], seed=7).model
            weights, output = weights_of(other), output_of(other)
            run = run_of(PHASES[loaded])
        before = identities(run.model)
        set_peft_model_state_dict(run.model, weights)
        assert identities(run.model) == before
        assert_loaded_first(run.model, weights)
        assert_near(output_of(run.model), output)
        assert_same_weights(weights_of(run.model), weights)
        self.assert_trains_on(run, weights)

    @in_phases
    def test_what_has_just_been_saved_loads_without_a_change(self, steps):
        run = run_of(steps)
        before, output = parameter_bytes(run.model), output_of(run.model)
        weights = weights_of(run.model)
        set_peft_model_state_dict(run.model, weights)
        if steps == PHASES["warm-up"]:
            assert parameter_bytes(run.model) == before
        assert_near(output_of(run.model), output)
        self.assert_trains_on(run, weights)

    @pytest.mark.parametrize("every", [2, 3, 5])
    def test_restoring_the_best_again_and_again(self, every):
        run = run_of(0).train(1)
        before = identities(run.model)
        best, output = weights_of(run.model), output_of(run.model)
        while run.step + every <= 20:
            run.train(every)
            if run.step % 2 == 0:
                best, output = weights_of(run.model), output_of(run.model)
            set_peft_model_state_dict(run.model, best)
            assert_near(output_of(run.model), output)
            assert ranks_of(weights_of(run.model)) == ranks_of(best)
        assert identities(run.model) == before

    @pytest.mark.parametrize("steps", range(13, 17))
    def test_what_is_loaded_just_before_the_last_allocation_is_pruned_by_it(self, steps):
        run = run_of(steps)
        weights = weights_of(run_of(8).model)
        set_peft_model_state_dict(run.model, weights)
        run.train(1)
        expected = budget(steps) if steps <= 15 else sum(ranks_of(weights).values())
        assert sum(live_ranks(run.model).values()) == expected

    @in_phases
    @pytest.mark.parametrize("meanwhile", ["disabled", "another one active"])
    def test_it_keeps_its_parameters_while_it_is_not_in_use(self, meanwhile, steps):
        run = run_of(steps)
        run.model.add_adapter("reference", run.model.peft_config["default"])
        weights, output, before = weights_of(run.model), output_of(run.model), identities(run.model)
        if meanwhile == "disabled":
            with run.model.disable_adapter():
                set_peft_model_state_dict(run.model, weights)
        else:
            run.model.set_adapter("reference")
            set_peft_model_state_dict(run.model, weights)
            run.model.set_adapter("default")
        assert identities(run.model) == before
        assert_near(output_of(run.model), output)
        self.assert_trains_on(run, weights)

    @pytest.mark.parametrize("steps", [2, 8, 16])
    def test_federated_averaging(self, steps):
        clients = [run_of(steps, seed=seed) for seed in (0, 1)]
        before = [identities(client.model) for client in clients]
        start = weights_of(clients[0].model)
        for client in clients:
            set_peft_model_state_dict(client.model, start)
        assert_near(output_of(clients[1].model), output_of(clients[0].model))
        for _ in range(3):
            for client in clients:
                client.train(1)
            states = [weights_of(client.model) for client in clients]
            # a server that knows nothing of ranks fills those that one of them has less with zeros
            mean = {key: mean_of([state[key] for state in states], key) for key in start}
            for client in clients:
                set_peft_model_state_dict(client.model, mean)
            assert torch.equal(output_of(clients[0].model), output_of(clients[1].model))
            server = make_peft_mlp()
            set_peft_model_state_dict(server, mean)
            assert_near(output_of(server), output_of(clients[0].model))
        for client, identity in zip(clients, before):
            client.train(20 - client.step)
            assert identities(client.model) == identity
            assert ranks_of(weights_of(client.model)) == live_ranks(client.model)

    def test_weights_of_more_ranks_than_it_has_are_refused(self, source, tmp_path):
        source.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=True)
        before = parameter_bytes(model), identities(model)
        with pytest.raises(ValueError, match="rank"):
            set_peft_model_state_dict(model, weights_of(run_of(3).model))
        assert (parameter_bytes(model), identities(model)) == before
        assert_near(output_of(model), output_of(source))


def mean_of(tensors: list[torch.Tensor], key: str) -> torch.Tensor:
    dim = DIM_OF_RANK.get(key.rpartition(".")[2])
    if dim is not None:
        rank = max(tensor.shape[dim] for tensor in tensors)
        tensors = [
            torch.cat(
                [tensor, tensor.new_zeros([rank - n if i == dim else n for i, n in enumerate(tensor.shape)])], dim
            )
            for tensor in tensors
        ]
    return torch.stack(tensors).mean(dim=0)


SOURCES = {
    "of all ranks": lambda: run_of(2, seed=3).model,
    "half pruned": lambda: run_of(8, seed=3).model,
    "pruned": lambda: run_of(20, seed=3).model,
    "pruned otherwise": lambda: run_of(20, seed=5).model,
    "of a higher initial rank": lambda: run_of(2, init_r=9, lora_alpha=18).model,
}


class TestLoadingIntoAnAdapterThatIsNotInTraining:
    @pytest.mark.parametrize("what", SOURCES)
    @pytest.mark.parametrize("place", [place for place in PLACES if place != "trained"])
    def test_it_gets_the_ranks_of_the_weights(self, place, what, tmp_path):
        source = SOURCES[what]()
        weights = weights_of(source)
        model = PLACES[place](tmp_path)
        before = {name: values[0] for name, values in identities(model).items()}
        options = {"low_cpu_mem_usage": True} if "meta" in place else {}
        for _ in range(2):
            set_peft_model_state_dict(model, weights, **options)
            assert shapes_of(model) == ranks_of(weights)
            assert {layer.r["default"] for layer in svd_layers(model).values()} == set(ranks_of(weights).values())
            assert_near(output_of(model), output_of(source))
        if "meta" not in place:
            assert {name: values[0] for name, values in identities(model).items()} == before

    def test_one_after_the_other(self, tmp_path):
        model = loaded_model(tmp_path)
        for what in (*SOURCES, *reversed(SOURCES)):
            source = SOURCES[what]()
            set_peft_model_state_dict(model, weights_of(source))
            assert shapes_of(model) == ranks_of(weights_of(source))
            assert_near(output_of(model), output_of(source))

    @pytest.mark.parametrize("what", SOURCES)
    def test_an_optimizer_that_was_made_before_trains_what_was_loaded(self, what):
        source = SOURCES[what]()
        run = run_of(0)
        set_peft_model_state_dict(run.model, weights_of(source))
        assert shapes_of(run.model) == ranks_of(weights_of(source))
        assert_near(output_of(run.model), output_of(source))
        twin = copy.deepcopy(run.model)
        run.optimize()
        other = Run(twin)
        other.optimize()
        for (name, param), expected in zip(run.model.named_parameters(), twin.parameters()):
            assert torch.equal(param, expected), name
        assert relative_error(output_of(run.model), output_of(source)) > 1e-3

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("what", SOURCES)
    def test_from_pretrained_to_train_on(self, what, low_cpu_mem_usage, tmp_path):
        source = SOURCES[what]()
        source.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        assert shapes_of(model) == ranks_of(weights_of(source)) == live_ranks(model)
        assert_near(output_of(model), output_of(source))
        run = Run(model)
        assert len(run.optimizer.param_groups[0]["params"]) == 12
        before = {
            name: param.clone() for name, param in model.named_parameters() if param.requires_grad and param.numel()
        }
        run.optimize()
        assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


NONSENSE = {
    "None": lambda pattern: None,
    "all": lambda pattern: {key: [True] * len(kept) for key, kept in pattern.items()},
    "nothing": lambda pattern: {key: [False] * len(kept) for key, kept in pattern.items()},
    "the opposite": lambda pattern: {key: [not entry for entry in kept] for key, kept in pattern.items()},
    "another order": lambda pattern: {key: kept[::-1] for key, kept in pattern.items()},
    "a smaller length": lambda pattern: {key: [True, False] for key in pattern},
    "a greater length": lambda pattern: {key: [*kept, True] for key, kept in pattern.items()},
    "one layer": lambda pattern: dict([next(iter(pattern.items()))]),
    "other layers": lambda pattern: {f"model.{key}": kept for key, kept in pattern.items()},
}
in_nonsense = pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)


def via_file(model: PeftModel, folder) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(make_mlp(), folder)


def via_load_adapter(model: PeftModel, folder) -> PeftModel:
    model.save_pretrained(folder)
    other = make_peft_mlp()
    other.load_adapter(folder, "saved")
    other.set_adapter("saved")
    return other


def via_injection(model: PeftModel, folder) -> nn.Module:
    other = injected_model(folder)
    set_peft_model_state_dict(other, weights_of(model))
    return other


RELOADS = {"from_pretrained": via_file, "load_adapter": via_load_adapter, "inject_adapter_in_model": via_injection}
in_reloads = pytest.mark.parametrize("reloaded", RELOADS.values(), ids=RELOADS)


class TestWhatIsSavedPredicts:
    @pytest.mark.parametrize("deltaT, reloaded", [(1, via_file), (4, via_file), (4, via_injection)])
    def test_at_every_step_and_between_two_allocations(self, deltaT, reloaded, tmp_path):
        run, between = run_of(0, deltaT=deltaT), 0
        for step in range(20):
            run.optimize()
            for moment in ("before the allocation", "after the allocation"):
                if step in (0, 2, 3, 6, 9, 15, 16, 18):
                    assert_near(output_of(reloaded(run.model, tmp_path)), output_of(run.model))
                if step >= 3:
                    assert ranks_of(weights_of(run.model)) == live_ranks(run.model)
                    between += sum(live_ranks(run.model).values()) > budget(step)
                if moment == "before the allocation":
                    run.model.base_model.update_and_allocate(step)
        assert between and sum(live_ranks(run.model).values()) == 6

    @in_reloads
    def test_in_the_warm_up_of_a_second_run(self, reloaded, tmp_path):
        run = run_of(20)
        for _ in range(2):
            assert sum(live_ranks(run.model).values()) == 6
            run.step = 0
            for _ in range(2):
                run.train(1)
                assert_near(output_of(reloaded(run.model, tmp_path)), output_of(run.model))
                assert ranks_of(weights_of(run.model)) == live_ranks(run.model)
            assert sum(live_ranks(run.model).values()) > 6
            run.train(18)

    @in_reloads
    def test_a_layer_of_rank_0(self, reloaded, tmp_path):
        model = run_of(20).model
        layers = svd_layers(model)
        for number, layer in enumerate(layers.values()):
            train_by_hand(layer)
            with torch.no_grad():
                layer.lora_E["default"][3 * number :] = 0  # ranks 0, 3 and 6
        other = reloaded(model, tmp_path)
        assert_near(output_of(other), output_of(model))
        assert sorted(ranks_of(weights_of(model)).values()) == [0, 3, 6]
        assert sorted(len(layer.lora_E[other_name(other)]) for layer in svd_layers(other).values()) == [0, 3, 6]

    @in_nonsense
    @pytest.mark.parametrize(
        "steps, reloaded", [(8, via_file), (20, via_file), (20, via_load_adapter), (8, via_injection)]
    )
    def test_whatever_a_config_says_of_the_ranks(self, steps, reloaded, nonsense, tmp_path):
        model = run_of(steps, seed=7).model
        config = model.peft_config["default"]
        output = output_of(model)
        config.rank_pattern = nonsense({key: list(kept) for key, kept in config.rank_pattern.items()})
        assert ranks_of(weights_of(model)) == live_ranks(model)
        assert sum(live_ranks(model).values()) == budget(steps - 1)
        assert_near(output_of(reloaded(model, tmp_path)), output)

    @in_nonsense
    @pytest.mark.parametrize("is_trainable, low_cpu_mem_usage", [(False, False), (True, False), (False, True)])
    def test_whatever_the_config_beside_the_weights_says_of_the_ranks(
        self, is_trainable, low_cpu_mem_usage, nonsense, source, tmp_path
    ):
        source.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["rank_pattern"] = nonsense(config["rank_pattern"])
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        model = PeftModel.from_pretrained(
            make_mlp(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert shapes_of(model) == ranks_of(weights_of(source))
        assert_near(output_of(model), output_of(source))

    @in_reloads
    @pytest.mark.parametrize("how", ["without a rank pattern", "from a state dict"])
    def test_layers_that_are_pruned_whole_or_not_at_all(self, how, reloaded, tmp_path):
        trained = run_of(20).model
        assert sorted(live_ranks(trained).values()) == [0, 0, 6]
        model = trained if how == "without a rank pattern" else make_peft_mlp()
        model.load_state_dict(trained.state_dict())
        model.peft_config["default"].rank_pattern = None
        other = reloaded(model, tmp_path)
        assert_near(output_of(other), output_of(trained))
        assert live_ranks(other, other_name(other)) == live_ranks(trained)

    def test_a_fresh_adapter_is_saved_with_all_its_ranks(self, tmp_path):
        model = make_peft_mlp()
        assert set(ranks_of(weights_of(model)).values()) == {6}
        assert_near(output_of(via_file(model, tmp_path)), output_of(model))

    def test_saving_leaves_the_model_and_its_parameters_as_they_are(self, tmp_path):
        run = run_of(8)
        before = parameter_bytes(run.model), identities(run.model)
        run.model.save_pretrained(tmp_path)
        weights_of(run.model)
        assert (parameter_bytes(run.model), identities(run.model)) == before


def other_name(model: nn.Module) -> str:
    return "saved" if "saved" in model.peft_config else "default"


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


OTHER_METHODS = {
    "LoRA": lambda targets: LoraConfig(r=4, target_modules=targets),
    "DoRA": lambda targets: LoraConfig(r=4, target_modules=targets, use_dora=True),
    "LoHa": lambda targets: LoHaConfig(r=4, target_modules=targets),
    "AdaLoRA": lambda targets: make_config(target_modules=targets, use_dora_adaptive=False),
    "AdaDoRA": lambda targets: make_config(target_modules=targets),
}
in_methods = pytest.mark.parametrize("method", OTHER_METHODS)


def make_mixed(method: str, ours: list[str], others: list[str], order: str = "AdaDoRA first") -> PeftMixedModel:
    """A model with the AdaDoRA adapter "ours" and the adapter "other" of another method, both as if trained."""
    configs = {"ours": make_config(target_modules=ours), "other": OTHER_METHODS[method](others)}
    first, second = configs if order == "AdaDoRA first" else reversed(configs)
    model = get_peft_model(make_mlp(), configs[first], adapter_name=first, mixed=True)
    model.add_adapter(second, configs[second])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if {"ours", "other"} & set(name.split(".")):
                param.add_(0.3 * torch.randn_like(param))
    model.set_adapter("ours")
    return model.eval()


def weight_by_itself(layer: BaseTunerLayer) -> torch.Tensor:
    """The weight that a layer with its only adapter stands for, in float64."""
    for name in ("ours", "other"):
        if name in getattr(layer, "lora_magnitude", ()):
            return Reference.of(layer, name).merged_weight().detach()
    weight = layer.get_base_layer().weight.detach().double()
    updated = weight + layer.get_delta_weight("other").detach().double()
    if len(vectors := getattr(layer, "lora_magnitude_vector", ())):
        updated *= vectors["other"].weight.detach().double()[:, None] / updated.norm(dim=1, keepdim=True)
    return updated


def expected_output(model: PeftMixedModel, active: set[str]) -> torch.Tensor:
    """That of a float64 model with the weights of the layers one by one, of which each has one adapter at most."""
    expected = make_mlp().double()
    for name, layer in tuner_layers(model.base_model.model).items():
        names = set(layer._get_available_adapters())
        if names & active:
            expected.get_submodule(name).weight = nn.Parameter(weight_by_itself(layer))
    return expected(X.double()).detach()


class TestMixedModels:
    @in_methods
    @pytest.mark.parametrize("order", ["AdaDoRA first", "AdaDoRA second"])
    @pytest.mark.parametrize("ours, others", [(["first", "last"], ["middle"]), (["middle"], ["first", "last"])])
    def test_adapters_of_different_layers_are_active_together(self, ours, others, order, method):
        model = make_mixed(method, ours, others, order)
        outputs = []
        for active in ("ours", ["ours", "other"], "other", ["other", "ours"], "ours"):
            model.set_adapter(active)
            names = {active} if isinstance(active, str) else set(active)
            outputs.append(output_of(model))
            assert relative_error(outputs[-1], expected_output(model, names)) < 1e-5
            for layer in tuner_layers(model).values():
                assert set(layer.active_adapters) == names
        assert relative_error(outputs[0], outputs[1]) > 1e-3 and relative_error(outputs[2], outputs[1]) > 1e-3
        assert torch.equal(outputs[1], outputs[3])

    @in_methods
    @pytest.mark.parametrize(
        "merge",
        [
            lambda model: model.merge_and_unload(),
            lambda model: model.merge_adapter(safe_merge=True) or model,
        ],
        ids=["merge_and_unload", "safe merge_adapter"],
    )
    def test_both_are_merged(self, merge, method):
        model = make_mixed(method, ["first", "last"], ["middle"])
        model.set_adapter(["ours", "other"])
        expected = expected_output(model, {"ours", "other"})
        assert relative_error(output_of(merge(model)), expected) < 1e-5

    @in_methods
    @pytest.mark.parametrize("order", ["AdaDoRA first", "AdaDoRA second"])
    @pytest.mark.parametrize("others", [["last"], TARGETS], ids=str)
    def test_both_on_one_layer_are_refused_before_any_layer_has_switched(self, others, order, method):
        model = make_mixed(method, ["middle", "last"], others, order)
        for active in ("ours", "other"):
            model.set_adapter(active)
            layers = tuner_layers(model)
            before = {name: list(layer.active_adapters) for name, layer in layers.items()}
            state, output = identities(model), output_of(model)
            for names in (["ours", "other"], ["other", "ours"]):
                with pytest.raises(NotImplementedError, match="ours"):
                    model.set_adapter(names)
                assert {name: list(layer.active_adapters) for name, layer in layers.items()} == before
                assert identities(model) == state
                assert model.active_adapter in (active, [active])
                assert torch.equal(output_of(model), output)

    @pytest.mark.parametrize("method", ["LoRA", "LoHa", "AdaDoRA"])
    @pytest.mark.parametrize("where", ["ours", "other"])
    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_a_safe_merge_that_finds_a_nan_leaves_no_layer_merged(self, merge, where, method):
        ours, others = (["first", "last"], ["middle"]) if where == "ours" else (["first", "middle"], ["last"])
        model = make_mixed(method, ours, others)
        model.set_adapter(["ours", "other"])
        *_, last = tuner_layers(model).values()
        with torch.no_grad():
            next(param for name, param in last.named_parameters() if where in name).view(-1)[0] = float("nan")
        before = parameter_bytes(model)
        with pytest.raises(ValueError):
            getattr(model, merge)(safe_merge=True)
        assert parameter_bytes(model) == before
        layers = tuner_layers(model)
        assert len(layers) == 3 and not any(layer.merged for layer in layers.values())
        # and the layers that are right merge afterwards
        model.set_adapter("other" if where == "ours" else "ours")
        expected = output_of(model)
        model.merge_adapter(safe_merge=True)
        assert relative_error(output_of(model), expected) < 1e-5


class WithLoss(MLP):
    """Returns a loss if it is given labels."""

    def forward(self, x: torch.Tensor, labels: Optional[torch.Tensor] = None) -> SimpleNamespace:
        output = super().forward(x)
        loss = None if labels is None else nn.functional.mse_loss(output, labels)
        return SimpleNamespace(loss=loss, output=output)


def train_in_model(model: PeftModel, steps: int) -> None:
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    for step in range(steps):
        model.train().base_model(X, labels=torch.ones(9, 4)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


class TestAfterTheAdapterInTrainingWasDeleted:
    def model_after(self, how: str, folder) -> PeftModel:
        torch.manual_seed(0)
        config = make_config(target_modules=list(TARGETS))
        model = get_peft_model(WithLoss(), config, adapter_name="gone" if how == "loaded" else "stays")
        if how == "loaded":
            run_of(20).model.save_pretrained(folder)
            model.load_adapter(folder, "stays")
            model.delete_adapter("gone")
            model.set_adapter("stays")
            return model
        for layer in svd_layers(model).values():
            train_by_hand(layer, "stays")
        model.peft_config["stays"].inference_mode = True
        model.add_adapter("gone", make_config(target_modules=list(TARGETS)))
        model.set_adapter("gone")
        model.delete_adapter("gone")
        model.set_adapter("stays")
        return model

    @pytest.mark.parametrize("labels", [None, torch.zeros(9, 4)], ids=["without labels", "with labels"])
    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("how", ["loaded", "added"])
    def test_the_other_one_trains(self, how, mode, labels, tmp_path):
        model = self.model_after(how, tmp_path).train(mode == "train")
        params = [param for param in model.parameters() if param.requires_grad]
        assert len(params) == 12
        optimizer = torch.optim.SGD(params, lr=0.05)
        losses = []
        for _ in range(5):
            outputs = model.base_model(X, labels=labels)  # as a PeftModel with a task type does
            loss = outputs.output.square().mean() if labels is None else outputs.loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        assert_near(model.base_model(X).output, as_reference(model, "stays"))

    @pytest.mark.parametrize("how", ["loaded", "added"])
    @pytest.mark.parametrize("step", [0, 8, 15, 18])
    def test_an_allocation_is_refused_in_a_sentence(self, step, how, tmp_path):
        model = self.model_after(how, tmp_path)
        model.base_model(X, labels=torch.zeros(9, 4)).loss.backward()
        before = parameter_bytes(model)
        with pytest.raises(ValueError, match="no adapter in training") as error:
            model.base_model.update_and_allocate(step)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
        assert parameter_bytes(model) == before

    def test_one_of_the_same_name_that_was_loaded_to_predict_is_not_trained(self, tmp_path):
        run_of(20).model.save_pretrained(tmp_path)
        model = get_peft_model(WithLoss(), make_config(target_modules=list(TARGETS)))
        train_in_model(model, steps=8)
        model.add_adapter("other", make_config(target_modules=list(TARGETS), inference_mode=True))
        model.set_adapter("other")
        model.delete_adapter("default")
        model.load_adapter(tmp_path, "default")
        model.set_adapter("default")
        before = parameter_bytes(model)
        outputs = model.train().base_model(X, labels=torch.zeros(9, 4))
        assert_near(outputs.loss, outputs.output.square().mean())
        outputs.loss.backward()
        for step in (0, 8, 15, 18):
            with pytest.raises(ValueError, match="no adapter in training"):
                model.base_model.update_and_allocate(step)
        assert parameter_bytes(model) == before

    def test_an_allocation_of_a_model_that_was_loaded_to_predict_is_refused_in_a_sentence(self, tmp_path):
        run_of(20).model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_mlp(), tmp_path)
        with pytest.raises(ValueError, match="no adapter in training.*is_trainable=True"):
            model.base_model.update_and_allocate(0)

    @pytest.mark.parametrize("how", ["loaded", "added"])
    def test_a_new_adapter_is_trained_and_pruned(self, how, tmp_path):
        model = self.model_after(how, tmp_path)
        model.add_adapter("new", make_config(target_modules=list(TARGETS)))
        model.set_adapter("new")
        train_in_model(model, steps=20)
        assert sum(live_ranks(model, "new").values()) == 6
        assert ranks_of(weights_of(model, "new")) == live_ranks(model, "new")


def as_reference(model: PeftModel, adapter_name: str) -> torch.Tensor:
    hidden = X.double()
    for name, layer in svd_layers(model).items():
        hidden = Reference.of(layer, adapter_name).forward(hidden)
        hidden = hidden if name.endswith("last") else torch.tanh(hidden)
    return hidden.detach().float()


def load_whole(model, state):
    model.load_state_dict(state)


def load_assign(model, state):
    model.load_state_dict(state, assign=True)


def load_adapter_alone(model, state):
    model.load_state_dict({key: value for key, value in state.items() if "lora_" in key}, strict=False)


def load_trainable_alone(model, state):
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    model.load_state_dict({key: value for key, value in state.items() if key in names}, strict=False)


def load_tuner(model, state):
    model.base_model.load_state_dict({key.removeprefix("base_model."): value for key, value in state.items()})


def load_model_inside(model, state):
    prefix = "base_model.model."
    model.get_base_model().load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})


LOADS = {
    "whole, before the allocator": (load_whole, "model first"),
    "whole, after the allocator": (load_whole, "allocator first"),
    "assign=True": (load_assign, "model first"),
    "adapter alone": (load_adapter_alone, "allocator first"),
    "trainable parameters alone": (load_trainable_alone, "model first"),
    "of base_model": (load_tuner, "allocator first"),
    "of the model inside": (load_model_inside, "model first"),
}


class TestResumeByHand:
    def checkpoint(self, run: Run, file) -> dict:
        state = {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "allocator": run.model.base_model.rankallocator.state_dict(),
            "step": run.step,
        }
        torch.save(state, file)
        return torch.load(file, weights_only=True)

    def resumed(self, state: dict, load: Callable, order: str, **config_kwargs) -> Run:
        model = make_peft_mlp(**config_kwargs)
        if order == "model first":
            load(model, state["model"])
            model.base_model.rankallocator.load_state_dict(state["allocator"])
        else:
            model.base_model.rankallocator.load_state_dict(state["allocator"])
            load(model, state["model"])
        run = Run(model)
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = state["step"]
        return run

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["AdaDoRA", "AdaLoRA"])
    @pytest.mark.parametrize("load, order", LOADS.values(), ids=LOADS)
    @pytest.mark.parametrize("steps", [1, 8, 16])
    def test_it_goes_on_bit_for_bit(self, steps, load, order, use_dora_adaptive, tmp_path):
        options = {"use_dora_adaptive": use_dora_adaptive, "deltaT": 2}
        run = run_of(steps, **options)
        other = self.resumed(self.checkpoint(run, tmp_path / "state.pt"), load, order, **options)
        assert parameter_bytes(other.model) == parameter_bytes(run.model)
        for _ in range(20 - steps):
            run.train(1)
            other.train(1)
            assert live_ranks(other.model) == live_ranks(run.model)
        assert parameter_bytes(other.model) == parameter_bytes(run.model)
        assert sum(live_ranks(run.model).values()) == 6
        assert_same_weights(weights_of(other.model), weights_of(run.model))
        pattern = run.model.peft_config["default"].to_dict()["rank_pattern"]
        told = other.model.peft_config["default"].to_dict()["rank_pattern"]
        assert {k.removesuffix(".default"): v for k, v in told.items()} == {
            k.removesuffix(".default"): v for k, v in pattern.items()
        }

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["AdaDoRA", "AdaLoRA"])
    def test_the_final_phase_masks_the_same_triplets_although_adam_has_moved_them(self, use_dora_adaptive, tmp_path):
        run = run_of(17, use_dora_adaptive=use_dora_adaptive)
        other = self.resumed(
            self.checkpoint(run, tmp_path / "state.pt"), load_whole, "model first", use_dora_adaptive=use_dora_adaptive
        )
        kept = {name: layer.lora_E["default"] != 0 for name, layer in svd_layers(run.model).items()}
        for _ in range(2):
            for one in (run, other):
                one.optimize()
                assert sum(live_ranks(one.model).values()) > 6
                one.model.base_model.update_and_allocate(one.step)
                one.step += 1
                for name, layer in svd_layers(one.model).items():
                    assert torch.equal(layer.lora_E["default"] != 0, kept[name])

    @pytest.mark.parametrize("steps", [8, 17])
    def test_a_deep_copy_goes_on_bit_for_bit(self, steps):
        run = run_of(steps)
        other = Run(copy.deepcopy(run.model))
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        other.step = run.step
        run.train(20 - steps)
        other.train(20 - steps)
        assert parameter_bytes(other.model) == parameter_bytes(run.model)

    def test_a_model_goes_back_to_an_earlier_state_of_its_own(self, tmp_path):
        run = run_of(8)
        state = self.checkpoint(run, tmp_path / "state.pt")
        run.train(12)
        expected = parameter_bytes(run.model)
        run.model.load_state_dict(state["model"])
        run.model.base_model.rankallocator.load_state_dict(state["allocator"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = 8
        run.train(12)
        assert parameter_bytes(run.model) == expected


class TestNoRanksHaveBeenDecided:
    @pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without gradients"])
    @pytest.mark.parametrize(
        "kind, step",
        [
            ("fresh", 15),
            ("fresh", 16),
            ("fresh", 100),
            ("trained without allocations", 15),
            ("trained without allocations", 16),
            ("allocated in the warm-up alone", 16),
            ("allocated in the warm-up alone", 100),
            ("with the averages of a warm-up", 16),
            ("loaded of all ranks", 15),
            ("loaded of all ranks", 16),
        ],
    )
    def test_an_allocation_after_the_last_one_is_refused_in_a_sentence(self, kind, step, gradients, tmp_path):
        model = make_peft_mlp()
        if kind == "trained without allocations":
            run = Run(model)
            for _ in range(3):
                run.optimize()
        elif kind == "allocated in the warm-up alone":
            model = run_of(2).model
        elif kind == "with the averages of a warm-up":
            model.base_model.rankallocator.load_state_dict(run_of(2).model.base_model.rankallocator.state_dict())
        elif kind == "loaded of all ranks":
            model.save_pretrained(tmp_path)
            model = PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=True)
        model.zero_grad()
        if gradients:
            model(X).square().mean().backward()
        before = parameter_bytes(model)
        for _ in range(2):
            with pytest.raises(ValueError, match="finds no ranks to keep"):
                model.base_model.update_and_allocate(step)
        assert parameter_bytes(model) == before
        assert set(ranks_of(weights_of(model)).values()) == {6}


class TestVmapWithDropout:
    """With a single input, dropout leaves a layer two outputs: with its update times 1 / (1 - p), and without."""

    def layer(self, kind: str) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        base = {
            "Linear": lambda: nn.Linear(1, 5),
            "Conv1D": lambda: Conv1D(5, 1),
            "Conv2d": lambda: nn.Conv2d(1, 5, 1),
        }
        config = make_config(target_modules=["0"], lora_dropout=0.5, fan_in_fan_out=kind == "Conv1D")
        model = get_peft_model(nn.Sequential(base[kind]()), config).train()
        layer = model.base_model.model[0]
        train_by_hand(layer)
        return layer, torch.full((1, 1, 1) if kind == "Conv2d" else (1,), 1.3)

    def outcomes(self, layer: nn.Module) -> list[torch.Tensor]:
        base = layer.get_base_layer()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight.flatten(1)
        reference = Reference.of(layer, weight=weight)
        scale = (reference.magnitude / reference.row_norm()).detach()
        update = reference.adapted_weight().detach() - reference.weight
        return [(1.3 * scale * (reference.weight + kept * update)).view(-1) + reference.bias for kept in (0, 2)]

    @pytest.mark.parametrize("transform", ["output", "gradients"])
    @pytest.mark.parametrize("randomness", ["different", "same"])
    @pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
    @pytest.mark.parametrize("inputs", ["one input", "an input each"])
    def test_each_sample_has_dropout_of_its_own(self, inputs, kind, randomness, transform):
        layer, x = self.layer(kind)
        samples = x.expand(64, *x.shape)
        if transform == "output":
            function = layer if inputs == "an input each" else lambda _: layer(x)
            outputs = torch.vmap(function, randomness=randomness)(samples).detach()
        else:

            def loss(sample):
                output = layer(sample if inputs == "an input each" else x)
                return output.square().sum() / 2, output

            _, outputs = torch.vmap(torch.func.grad(loss, has_aux=True), randomness=randomness)(samples)
        errors = torch.stack([(outputs.view(64, -1) - outcome).abs().amax(dim=1) for outcome in self.outcomes(layer)])
        assert (errors.amin(dim=0) < 1e-5).all()
        assert {int(index) for index in errors.argmin(dim=0)} == {0, 1} or randomness == "same"
        if randomness == "same":
            assert (outputs == outputs[0]).all()
