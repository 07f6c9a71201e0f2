"""What people do around an adapter: weights that are shared, computed or elsewhere, names, schedules, options."""

import copy
import functools
import types
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import MLP, TARGETS, make_config, make_mlp, make_peft_mlp, svd_layers, train, train_by_hand
from safetensors.torch import load_file
from test_adadora_guards import X, state
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.adalora import SVDLinear


MERGES = pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(safe_merge=True),
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
    ],
    ids=["merge_adapter", "safe_merge", "merge_and_unload", "safe_merge_and_unload"],
)


def assert_near(actual, expected) -> None:
    """The same but for the order of sums, which depends on the rank."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def assert_refused(base, error, match, **options) -> None:
    """An adapter with these options is refused, and the model is as it was."""
    before = state(base)
    with pytest.raises(error, match=match):
        get_peft_model(base, make_config(**options))
    assert state(base) == before


def trained(model):
    """The model in eval mode, with adapters that look trained."""
    for module in model.modules():
        if hasattr(module, "lora_magnitude"):
            train_by_hand(module)
    return model.eval()


class One(nn.Module):
    """A model of a single layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYOUTS = {
    "transposed": lambda weight: weight.T.contiguous().T,
    "view": lambda weight: torch.cat([torch.randn(3, 10), weight])[3:],
    "strided": lambda weight: torch.stack([weight, weight], dim=-1)[..., 0],
    "expanded": lambda weight: weight[:1].expand(8, 10),
    "unfolded": lambda weight: weight.flatten().unfold(0, 10, 3)[:8],
    "expanded columns": lambda weight: weight[:, :1].expand(8, 10),
}


class TestMemoryOfTheWeight:
    """A merged weight is where the layer reads it, however its memory is laid out."""

    @MERGES
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_of_a_linear_layer(self, layout, merge):
        torch.manual_seed(0)
        base = One(nn.Linear(10, 8))
        base.layer.weight = nn.Parameter(LAYOUTS[layout](base.layer.weight.detach()))
        model = trained(get_peft_model(base, make_config(target_modules=["layer"])))
        expected = model(X)
        merged = merge(model) or model
        torch.testing.assert_close(merged(X), expected)

    @MERGES
    @pytest.mark.parametrize("layout", ["channels_last", "expanded", "permuted"])
    def test_of_a_convolution(self, layout, merge):
        torch.manual_seed(0)
        base = One(nn.Conv2d(4, 6, 3, padding=1))
        weight = base.layer.weight.detach()
        if layout == "channels_last":
            base = base.to(memory_format=torch.channels_last)
        elif layout == "expanded":
            base.layer.weight = nn.Parameter(weight[:1].expand(6, 4, 3, 3))
        else:
            base.layer.weight = nn.Parameter(weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
        model = trained(get_peft_model(base, make_config(target_modules=["layer"])))
        x = torch.randn(2, 4, 5, 5)
        expected = model(x)
        merged = merge(model) or model
        torch.testing.assert_close(merged(x), expected)

    @MERGES
    def test_the_other_parts_of_a_fused_weight_stay_as_they_are(self, merge):
        torch.manual_seed(0)
        fused = torch.randn(3, 8, 10)
        base = nn.ModuleDict({name: nn.Linear(10, 8) for name in "qkv"})
        for name, weight in zip("qkv", fused):
            base[name].weight = nn.Parameter(weight)
        model = trained(get_peft_model(base, make_config(target_modules=["k"])))
        before, expected = fused.clone(), model.base_model.model["k"](X)
        merged = merge(model)
        merged = model.base_model.model if merged is None else merged
        torch.testing.assert_close(merged["k"](X), expected)
        assert torch.equal(fused, before)  # the merged layer has a weight of its own


class Twice(nn.Module):
    """Two layers of which one may stand for both, or hold the weight of both."""

    def __init__(self, share):
        super().__init__()
        self.one = nn.Linear(10, 10)
        self.two = self.one if share == "module" else nn.Linear(10, 10)
        if share == "parameter":
            self.two.weight = self.one.weight
        elif share == "memory":
            self.two.weight = nn.Parameter(self.one.weight.detach())
        elif share == "rows":
            self.two = nn.Linear(10, 4)
            self.two.weight = nn.Parameter(self.one.weight.detach()[6:])
        elif share == "transposed":
            self.two.weight = nn.Parameter(self.one.weight.detach().T)
        elif share == "embedding":
            self.two = nn.Embedding(10, 10)
            self.two.weight = self.one.weight
        elif share == "buffer":
            self.register_buffer("copy", self.one.weight.detach())

    def forward(self, x):
        return self.one(x)


class TestSharedWeights:
    @MERGES
    @pytest.mark.parametrize("share", ["module", "parameter", "memory", "rows", "transposed", "embedding", "buffer"])
    @pytest.mark.parametrize("targets", [["one"], ["one", "two"]], ids=["one of them", "both"])
    def test_merging_is_refused_and_nothing_has_changed(self, share, targets, merge):
        torch.manual_seed(0)
        targets = targets if share not in ("embedding", "buffer", "module") else ["one"]
        model = trained(get_peft_model(Twice(share), make_config(target_modules=targets)))
        before, expected = state(model), model(X)
        with pytest.raises(NotImplementedError, match=r"'one'.*its own weight"):
            merge(model)
        assert state(model) == before
        assert torch.equal(model(X), expected)

    @MERGES
    def test_an_output_layer_that_is_tied_to_the_embedding(self, merge):
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, that the layer is tied
            model = trained(get_peft_model(base, make_config(target_modules=["lm_head"])))
        before = state(model)
        with pytest.raises(NotImplementedError, match="'lm_head'.*'model.embed_tokens'"):
            merge(model)
        assert state(model) == before

    @MERGES
    def test_a_block_that_is_used_under_two_names_merges_once(self, merge):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(10, 10))
        base = nn.Sequential(block, nn.Tanh(), block)
        model = trained(get_peft_model(base, make_config(target_modules=r"\d\.0")))
        expected = model(X)
        merged = merge(model) or model
        torch.testing.assert_close(merged(X), expected)

    def test_layers_that_share_nothing_but_a_storage_merge(self):
        torch.manual_seed(0)
        model = Twice(None)
        memory = torch.randn(20, 10)
        model.one.weight, model.two.weight = nn.Parameter(memory[:10]), nn.Parameter(memory[10:])
        model = trained(get_peft_model(model, make_config(target_modules=["one", "two"])))
        expected = model(X), model.base_model.model.two(X)
        model.merge_adapter()
        torch.testing.assert_close((model(X), model.base_model.model.two(X)), expected)


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def parametrized(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


COMPUTED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "prune": functools.partial(prune.l1_unstructured, name="weight", amount=0.5),
    "own parametrization": parametrized,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
class TestComputedWeights:
    @pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv2d(4, 6, 1)], ids=["linear", "conv2d"])
    @pytest.mark.parametrize("how", COMPUTED)
    def test_is_refused_by_its_path_before_the_model_is_touched(self, how, make):
        base = nn.Sequential(nn.Linear(4, 4), COMPUTED[how](make()))
        assert_refused(base, NotImplementedError, "'1'.*computed", target_modules=["0", "1"])

    @pytest.mark.parametrize("how", COMPUTED)
    def test_that_came_to_be_computed_later_is_not_merged_into(self, how):
        torch.manual_seed(0)
        model = trained(get_peft_model(One(nn.Linear(10, 8)), make_config(target_modules=["layer"])))
        COMPUTED[how](model.base_model.model.layer.base_layer)
        expected = model(X)
        before = state(model)
        for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.model.layer.merge):
            with pytest.raises(NotImplementedError, match="computed"):
                merge()
        assert state(model) == before
        torch.testing.assert_close(model(X), expected)


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Renamed(nn.Linear):
    """With nothing of its own that concerns the forward pass."""

    def extra_repr(self):
        return "renamed"


def patched(layer: nn.Module) -> nn.Module:
    layer.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight.sign(), self.bias), layer)
    return layer


OWN_FORWARDS = {
    "subclass": lambda: Own(4, 6),
    "convolution": lambda: OwnConvolution(4, 6, 1),
    "patched": lambda: patched(nn.Linear(4, 6)),
    "patched convolution": lambda: patched(nn.Conv2d(4, 6, 1)),
    "weight standardization": lambda: WeightStandardizedConv2d(4, 6, 1),
    "same padding": lambda: Conv2dSamePadding(4, 6, 1),
    "router": lambda: Llama4Router(LlamaConfigWithExperts()),
    "decoupled": lambda: IdeficsDecoupledLinear(4, 6, out_additional_features=2),
}


class LlamaConfigWithExperts:
    hidden_size, num_local_experts, num_experts_per_tok = 4, 6, 1


class TestForwardsOfTheirOwn:
    @pytest.mark.parametrize("kind", OWN_FORWARDS)
    def test_are_refused_by_their_path_before_the_model_is_touched(self, kind):
        base = nn.Sequential(nn.Linear(4, 4), OWN_FORWARDS[kind]())
        assert_refused(base, NotImplementedError, "forward pass of module '1'", target_modules=["0", "1"])

    @pytest.mark.parametrize("kind", OWN_FORWARDS)
    def test_are_left_to_peft_with_the_flag_off(self, kind):
        base = nn.Sequential(nn.Linear(4, 4), OWN_FORWARDS[kind]())
        model = get_peft_model(base, make_config(target_modules=["0", "1"], use_dora_adaptive=False))
        assert set(svd_layers(model)) >= {"base_model.model.0"}

    @MERGES
    @pytest.mark.parametrize("kind", [FalconLinear, Renamed])
    def test_known_equivalents_are_right_merged_and_not(self, kind, merge):
        torch.manual_seed(0)
        layer = kind(10, 8)
        plain = nn.Linear(10, 8)
        plain.load_state_dict(layer.state_dict())
        torch.manual_seed(1)
        model = trained(get_peft_model(One(layer), make_config(target_modules=["layer"])))
        torch.manual_seed(1)
        expected = trained(get_peft_model(One(plain), make_config(target_modules=["layer"])))(X)
        torch.testing.assert_close(model(X), expected)
        merged = merge(model) or model
        torch.testing.assert_close(merged(X), expected)


NAMES = ["lora", "E", "a", "lora_E", "lora_A", "mlp", "model", "layers", "0", "up", "v1-final", "my adapter", "base"]


class Nested(nn.Module):
    """A model whose modules are called as people call adapters."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList()})
        for _ in range(2):
            layers = nn.ModuleDict({"up": nn.Linear(10, 12), "down": nn.Linear(12, 10)})
            self.model["layers"].append(nn.ModuleDict({"mlp": layers}))
        self.last = nn.Linear(10, 4)

    def forward(self, x):
        for layer in self.model["layers"]:
            x = torch.tanh(layer["mlp"]["down"](torch.tanh(layer["mlp"]["up"](x))))
        return self.last(x)


def nested() -> Nested:
    torch.manual_seed(0)
    return Nested()


NESTED_TARGETS = ["up", "down", "last"]


def saved_and_loaded(model, folder, adapter_name, load_as="default"):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.save_pretrained(folder, selected_adapters=[adapter_name])
    where = folder if adapter_name == "default" else folder / adapter_name
    return PeftModel.from_pretrained(nested(), where, adapter_name=load_as).eval()


def ranks(model, adapter_name: str) -> dict[str, list[bool]]:
    pattern = model.peft_config[adapter_name].rank_pattern
    return {key.removesuffix(f".{adapter_name}"): kept for key, kept in pattern.items()}


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory):
    """A model with one adapter, "sft", after training, and the folder that the adapter was saved in before."""
    model = get_peft_model(nested(), make_config(target_modules=NESTED_TARGETS), adapter_name="sft")
    torch.manual_seed(1)
    train_by_hand_all(model, "sft")
    folder = tmp_path_factory.mktemp("start")
    model.save_pretrained(folder, selected_adapters=["sft"])
    train(model)
    return model, folder / "sft"


class TestNamesOfAdapters:
    @pytest.mark.parametrize("name", NAMES)
    def test_any_name_trains_prunes_saves_and_loads(self, name, tmp_path):
        model = get_peft_model(nested(), make_config(target_modules=NESTED_TARGETS), adapter_name=name)
        train(model)
        assert sum(map(sum, model.peft_config[name].rank_pattern.values())) == 2 * 5
        expected = model(X)
        assert_near(saved_and_loaded(model, tmp_path, name)(X), expected)
        assert_near(saved_and_loaded(model, tmp_path, name, load_as="layers")(X), expected)
        assert_near(saved_and_loaded(model, tmp_path, name, load_as=name)(X), expected)

    @pytest.mark.parametrize("frozen", [*NAMES, "sft_ref", "sf", "t"])
    def test_a_frozen_adapter_beside_it_changes_nothing_and_stays_as_it_is(self, frozen, trained_alone, tmp_path):
        alone, start = trained_alone
        model = PeftModel.from_pretrained(nested(), start, adapter_name="sft", is_trainable=True)
        model.load_adapter(start, frozen)
        before = {name: p.clone() for name, p in model.named_parameters() if name.endswith(f".{frozen}")}
        train(model)
        assert ranks(model, "sft") == ranks(alone, "sft")
        for name, param in model.named_parameters():
            if name.endswith(f".{frozen}"):
                assert torch.equal(param, before[name]), name
        expected = model(X)
        assert torch.equal(expected, alone(X))
        assert_near(saved_and_loaded(model, tmp_path / "end", "sft")(X), expected)
        weights = get_peft_model_state_dict(model, adapter_name="sft")
        assert set(weights) == set(get_peft_model_state_dict(alone, adapter_name="sft"))

    @pytest.mark.parametrize("name", ["", "a.b", ".", "keys", "forward", "training", "items"])
    def test_a_name_that_torch_forbids_is_refused_in_a_sentence(self, name):
        base = nested()
        before = state(base)
        with pytest.raises(ValueError, match="adapter cannot be called"):
            get_peft_model(base, make_config(target_modules=NESTED_TARGETS), adapter_name=name)
        assert state(base) == before
        model = get_peft_model(base, make_config(target_modules=NESTED_TARGETS))
        before = state(model)
        with pytest.raises(ValueError, match="adapter cannot be called"):
            model.add_adapter(name, make_config(target_modules=NESTED_TARGETS))
        assert state(model) == before
        assert list(model.peft_config) == ["default"]


def train_by_hand_all(model, adapter_name: str) -> None:
    for layer in svd_layers(model).values():
        train_by_hand(layer, adapter_name)


def live_ranks(model, adapter_name: str = "default") -> int:
    return sum(int((layer.lora_E[adapter_name] != 0).sum()) for layer in svd_layers(model).values())


def reloaded(model, folder):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(make_mlp(), folder).eval()


class TestSavedIsLive:
    @pytest.mark.parametrize("order", ["allocation after the step", "allocation before the step"])
    @pytest.mark.parametrize("deltaT", [1, 2, 3, 7])
    def test_at_every_step_also_right_after_the_optimizer(self, deltaT, order, tmp_path):
        model = make_peft_mlp(deltaT=deltaT)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        differed = 0
        for step in range(20):
            model.train()
            model(X).square().mean().backward()
            actions = [optimizer.step, lambda step=step: model.base_model.update_and_allocate(step)]
            for action in actions if order == "allocation after the step" else actions[::-1]:
                action()
                if step not in (1, 3, 5, 8, 14, 15, 17):
                    continue
                model.eval()
                other = reloaded(model, tmp_path / f"{step}")
                assert_near(other(X), model(X))
                pattern = model.base_model.rankallocator.kept
                allocated = sum(map(sum, pattern.values())) if pattern else 18
                differed += live_ranks(model) > allocated
                assert live_ranks(other) == live_ranks(model)
            optimizer.zero_grad()
        assert differed or (deltaT == 1 and order == "allocation after the step")

    def test_saving_changes_nothing_of_the_run(self, tmp_path):
        def run(save):
            model = make_peft_mlp(deltaT=3)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
            for step in range(20):
                model(X).square().mean().backward()
                optimizer.step()
                if save:
                    model.save_pretrained(tmp_path)
                model.base_model.update_and_allocate(step)
                if save:
                    model.save_pretrained(tmp_path)
                optimizer.zero_grad()
            return state(model)[0], list(model.peft_config["default"].rank_pattern.values())

        assert run(save=True) == run(save=False)

    def test_in_the_warm_up_of_a_second_run(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        assert live_ranks(model) == 6
        for steps in (1, 2):
            train(model, steps=steps)
            other = reloaded(model, tmp_path / f"{steps}")
            assert_near(other(X), model(X))
            assert live_ranks(other) > 6

    @pytest.mark.parametrize("source", ["object", "file"])
    def test_in_a_run_that_starts_from_the_config_of_a_finished_adapter(self, source, tmp_path):
        finished = make_peft_mlp()
        train(finished)
        finished.save_pretrained(tmp_path / "finished")
        config = finished.peft_config["default"]
        if source == "file":
            config = type(config).from_pretrained(tmp_path / "finished")
            config.inference_mode = False
        model = get_peft_model(make_mlp(), config)
        train(model, steps=2)
        other = reloaded(model, tmp_path / "new")
        assert_near(other(X), model(X))
        assert live_ranks(other) == live_ranks(model) == 18

    def test_values_that_are_written_by_hand(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        train_by_hand_all(model, "default")
        assert_near(reloaded(model, tmp_path)(X), model(X))

    def test_without_pruning_the_target_may_be_the_initial_rank(self, tmp_path):
        model = make_peft_mlp(target_r=6)
        train(model)
        assert live_ranks(model) == 18
        assert_near(reloaded(model, tmp_path)(X), model(X))


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
    "partly": lambda model, folder: dispatch_model(
        model, {"first": "disk", "middle": "cpu", "last": "disk"}, main_device="cpu", offload_dir=folder
    ),
}


def make_offloadable() -> MLP:
    base = make_mlp()
    base._no_split_modules = []
    return base


@pytest.mark.parametrize("where", OFFLOADS)
class TestOffloadedWeights:
    """A base model of which accelerate keeps weights in CPU memory or on disk gives what it gives without."""

    def test_a_fresh_adapter_starts_as_the_base_model_and_trains_like_any(self, where, tmp_path):
        model = get_peft_model(OFFLOADS[where](make_offloadable(), tmp_path), make_config(target_modules=TARGETS))
        assert torch.equal(model(X), make_mlp()(X))
        here = make_peft_mlp()
        assert train(model) == pytest.approx(train(here), rel=1e-5)
        torch.testing.assert_close(model(X), here(X))

    @MERGES
    def test_a_saved_adapter_loads_and_merges(self, where, merge, tmp_path):
        here = make_peft_mlp()
        train(here)
        here.save_pretrained(tmp_path / "adapter")
        expected = here(X)
        base = OFFLOADS[where](make_offloadable(), tmp_path / "weights")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(model(X), expected)
        merged = merge(model) or model
        torch.testing.assert_close(merged(X), expected)
        torch.testing.assert_close(merged(X), expected)

    def test_no_weight_stays_in_memory(self, where, tmp_path):
        model = get_peft_model(OFFLOADS[where](make_offloadable(), tmp_path), make_config(target_modules=TARGETS))
        model.eval()(X)
        for layer in svd_layers(model).values():
            if hasattr(layer.base_layer._hf_hook, "offload") and layer.base_layer._hf_hook.offload:
                assert layer.base_layer.weight.is_meta


class TestSchedules:
    @pytest.mark.parametrize("target_r", [7, 60])
    def test_a_target_above_the_initial_rank_is_refused(self, target_r):
        match = f"`target_r={target_r}` is more than `init_r=6`"
        assert_refused(make_mlp(), ValueError, match, target_modules=TARGETS, target_r=target_r)

    @pytest.mark.parametrize("step", [15, 16, 19, 100])
    def test_a_first_allocation_after_the_budget_phase_is_refused(self, step):
        model = make_peft_mlp()
        model(X).sum().backward()
        before = state(model)
        with pytest.raises(ValueError, match=rf"update_and_allocate\({step}\).*no call before"):
            model.base_model.update_and_allocate(step)
        assert state(model) == before

    def test_a_pruned_adapter_under_its_old_schedule_is_refused(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=True)
        model(X).sum().backward()
        before = state(model)
        with pytest.raises(ValueError, match="loaded pruned"):
            model.base_model.update_and_allocate(0)
        assert state(model) == before

    def test_a_pruned_adapter_trains_on_without_allocations(self, tmp_path):
        model = make_peft_mlp()
        train(model)
        model.save_pretrained(tmp_path / "pruned")
        model = PeftModel.from_pretrained(make_mlp(), tmp_path / "pruned", is_trainable=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(3):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(reloaded(model, tmp_path / "on")(X), model(X))


UNREAD = {
    "use_rslora": True,
    "alpha_pattern": {"first": 3},
    "lora_bias": True,
    "init_lora_weights": "pissa",
    "rank_pattern": {"first": 3},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
}


WRAP = {"checkpointing": checkpoint_wrapper, "compile": functools.partial(torch.compile, backend="eager")}


class TestWrappedModules:
    """Activation checkpointing and torch.compile put a name of theirs into those of what they wrap."""

    def wrap(self, model, how, what):
        for name in ("first", "last") if what == "some" else TARGETS:
            setattr(model, name, WRAP[how](getattr(model, name)))

    @pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
    @pytest.mark.parametrize("what", ["some", "all"])
    @pytest.mark.parametrize("how", WRAP)
    def test_are_trained_saved_and_loaded(self, how, what, use_dora_adaptive, tmp_path):
        twin, model = (make_peft_mlp(use_dora_adaptive=use_dora_adaptive) for _ in range(2))
        self.wrap(model.base_model.model, how, what)
        for each in (twin, model):
            train(each)
        assert model.peft_config["default"].rank_pattern == twin.peft_config["default"].rank_pattern
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = twin(X)
            torch.testing.assert_close(model(X), expected)
            torch.testing.assert_close(reloaded(model, tmp_path)(X), expected)
            if use_dora_adaptive:  # plain AdaLoRA takes no weights of other ranks
                target = make_peft_mlp()
                self.wrap(target.base_model.model, how, what)
                set_peft_model_state_dict(target, get_peft_model_state_dict(model))
                torch.testing.assert_close(target.eval()(X), expected)


class TestOptions:
    @pytest.mark.parametrize("option", UNREAD)
    def test_one_that_is_not_read_is_named_once(self, option, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own about some of them
            config = make_config(target_modules=TARGETS, **{option: copy.copy(UNREAD[option])})
        with pytest.warns(UserWarning, match=rf"does not read `{option}`") as caught:
            model = get_peft_model(make_mlp(), config)
        assert len([warning for warning in caught if "does not read" in str(warning.message)]) == 1
        train(model)
        assert torch.equal(reloaded(model, tmp_path)(X), model(X))

    @pytest.mark.parametrize("target_modules", [["first"], []])
    def test_target_parameters_are_refused_before_the_model_is_touched(self, target_modules):
        options = {"target_modules": target_modules, "target_parameters": ["middle.weight"]}
        assert_refused(make_mlp(), ValueError, "target_parameters", **options)

    def test_several_are_named_together(self):
        config = make_config(target_modules=TARGETS, use_rslora=True, alpha_pattern={"first": 3})
        with pytest.warns(UserWarning, match="does not read `alpha_pattern`, `use_rslora`"):
            get_peft_model(make_mlp(), config)

    @pytest.mark.parametrize("tfinal, delta_t, warns", [(0, 4, True), (0, 1, False), (1, 4, False)])
    def test_a_schedule_that_may_end_with_all_ranks_is_named(self, tfinal, delta_t, warns, tmp_path):
        config = make_config(target_modules=TARGETS, tfinal=tfinal, deltaT=delta_t)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = get_peft_model(make_mlp(), config)
        assert sum("off zero" in str(warning.message) for warning in caught) == warns
        train(model)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        ranks = sum(len(weight) for key, weight in saved.items() if key.endswith("lora_E"))
        assert ranks == (6 if warns else 2) * len(TARGETS)

    @pytest.mark.parametrize("load", [True, False], ids=["load", "train"])
    def test_those_of_a_plain_config_give_no_warning(self, load, tmp_path):
        model = make_peft_mlp()
        train(model)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if load:
                PeftModel.from_pretrained(make_mlp(), tmp_path)
            else:
                get_peft_model(make_mlp(), make_config(target_modules=TARGETS))
                get_peft_model(make_mlp(), model.peft_config["default"])


class TestRegularization:
    WARNING = "regularization has not reached the gradients"

    def llama(self, **kwargs):
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        return get_peft_model(base, make_config(target_modules=["q_proj", "v_proj"], **kwargs))

    @pytest.mark.parametrize("rank", [6, 3, 0])
    def test_its_value_and_gradient_are_those_of_the_formula(self, rank):
        tokens = torch.arange(10).view(1, -1)
        losses, gradients = [], []
        for weight in (0.0, 20.0):
            model = self.llama(task_type="CAUSAL_LM", orth_reg_weight=weight)
            pattern = {"model.layers.0.self_attn.v_proj.lora_E": [True] * rank + [False] * (6 - rank)}
            model.base_model.resize_modules_by_rank_pattern(pattern, "default")
            layers = svd_layers(model).values()
            for layer in layers:
                train_by_hand(layer)
            matrices = [part["default"] for layer in layers for part in (layer.lora_A, layer.lora_B)]
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.item())
            gradients.append([matrix.grad for matrix in matrices])

        exact = [matrix.detach().double().requires_grad_() for matrix in matrices]
        products = [part for A, B in zip(exact[::2], exact[1::2]) for part in (A @ A.T, B.T @ B)]
        norms = [(product - torch.eye(len(product))).square().sum().sqrt() for product in products]
        term = 20 * sum(norms) / len(norms)
        term.backward()
        assert losses[1] - losses[0] == pytest.approx(term.item(), rel=1e-6)
        for without, with_term, matrix in zip(*gradients, exact):
            expected = without + matrix.grad
            assert torch.allclose(with_term.double(), expected, rtol=0, atol=1e-6 * float(expected.norm()))

    def step(self, model, with_labels=True):
        tokens = torch.arange(10).view(1, -1)
        outputs = model(input_ids=tokens, labels=tokens if with_labels else None)
        loss = outputs.loss if with_labels else outputs.logits.square().mean()
        loss.backward()
        model.base_model.update_and_allocate(0)

    @pytest.mark.parametrize("state", ["disabled", "another adapter is active"])
    def test_the_loss_of_a_model_without_the_adapter_in_training_has_no_term(self, state):
        tokens = torch.arange(10).view(1, -1)
        model = self.llama(task_type="CAUSAL_LM", orth_reg_weight=20.0)
        reference = model.get_base_model()
        if state == "disabled":
            with model.disable_adapter():
                loss = model(input_ids=tokens, labels=tokens).loss
                expected = reference(input_ids=tokens, labels=tokens).loss
        else:
            config = make_config(target_modules=["q_proj"], task_type="CAUSAL_LM", inference_mode=True)
            model.add_adapter("other", config)
            model.set_adapter("other")
            loss = model(input_ids=tokens, labels=tokens).loss
            expected = reference(input_ids=tokens, labels=tokens).loss
            model.set_adapter("default")
        assert torch.equal(loss, expected)
        assert model(input_ids=tokens, labels=tokens).loss > expected + 1

    def test_a_loss_computed_from_logits_beside_the_labels_is_told(self):
        """As TRL's trainers do, which ignore the loss of the model."""
        model, tokens = self.llama(task_type="CAUSAL_LM"), torch.arange(10).view(1, -1)
        model(input_ids=tokens, labels=tokens).logits.square().mean().backward()
        with pytest.warns(UserWarning, match=self.WARNING):
            model.base_model.update_and_allocate(0)

    def test_a_loss_that_is_only_evaluated_is_told(self):
        model, tokens = self.llama(task_type="CAUSAL_LM"), torch.arange(10).view(1, -1)
        with torch.no_grad():
            model(input_ids=tokens, labels=tokens)
        model(input_ids=tokens).logits.square().mean().backward()
        with pytest.warns(UserWarning, match=self.WARNING):
            model.base_model.update_and_allocate(0)

    @pytest.mark.parametrize("way", ["scaled", "accumulated", "functional", "compiled"])
    def test_nothing_is_told_if_the_loss_is_part_of_another(self, way):
        model, tokens = self.llama(task_type="CAUSAL_LM"), torch.arange(10).view(1, -1)
        forward = torch.compile(model, backend="eager") if way == "compiled" else model
        if way == "functional":
            params = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}

            def loss_of(params):
                return torch.func.functional_call(model, params, kwargs={"input_ids": tokens, "labels": tokens}).loss

            for name, gradient in torch.func.grad(loss_of)(params).items():
                model.get_parameter(name).grad = gradient
        else:
            for _ in range(2 if way == "accumulated" else 1):
                (0.5 * forward(input_ids=tokens, labels=tokens).loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.base_model.update_and_allocate(0)

    @pytest.mark.parametrize("way", ["without task type", "without labels"])
    def test_that_cannot_reach_the_loss_is_told_once(self, way):
        model = self.llama(task_type=None if way == "without task type" else "CAUSAL_LM")
        with pytest.warns(UserWarning, match=self.WARNING):
            self.step(model, with_labels=way == "without task type")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.base_model.update_and_allocate(1)

    def test_it_is_told_once_if_the_first_steps_do_not_count(self):
        model, tokens = self.llama(task_type=None), torch.arange(10).view(1, -1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                (torch.inf * model(tokens).logits.square().mean()).backward()
                model.base_model.update_and_allocate(step)
                model.zero_grad()
        assert sum(self.WARNING in str(warning.message) for warning in caught) == 1

    @pytest.mark.parametrize("reason", ["it does", "weight of zero", "flag off"])
    def test_nothing_is_told_if_it_does_or_need_not(self, reason):
        model = self.llama(
            task_type="CAUSAL_LM" if reason == "it does" else None,
            orth_reg_weight=0.0 if reason == "weight of zero" else 0.5,
            use_dora_adaptive=reason != "flag off",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.step(model)


def test_a_layer_by_itself_is_checked_as_one_in_a_model():
    for layer in (Own(4, 6), weight_norm(nn.Linear(4, 6))):
        with pytest.raises(NotImplementedError, match=r"the given module"):
            SVDLinear(layer, "default", make_config(), r=2)
