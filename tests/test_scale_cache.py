"""Nothing is kept between forward passes but m / n, inside of `generate` and `DoraCaching`."""

import copy
import io
import pickle

import pytest
import torch
from helpers import make_config, make_layer, make_mlp, make_peft_mlp, svd_layers, train, train_by_hand
from reference import Reference, relative_error
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from peft import PeftModel
from peft.helpers import DoraCaching, rescale_adapter_scale
from peft.tuners.adalora import SVDLinear


X = torch.randn(9, 20, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def output_of(layer: SVDLinear) -> torch.Tensor:
    return layer(X.to(layer.get_base_layer().weight.dtype))


@pytest.fixture(autouse=True, params=[False, True], ids=["", "DoraCaching"])
def caching(request):
    with DoraCaching(enabled=request.param):
        yield request.param


def warm_layer(**kwargs) -> SVDLinear:
    """A layer in eval mode that has computed an output, and so keeps what it can."""
    layer = make_layer(16, 20, 4, **kwargs).eval()
    output_of(layer)
    output_of(layer)
    return layer


def assert_right(layer: SVDLinear, tolerance: float = 1e-5) -> None:
    reference = Reference.of(layer, layer.active_adapters[0])
    assert relative_error(output_of(layer), reference.forward(X.double())) < tolerance


def optimizer_step(layer, optimizer_class=torch.optim.AdamW, **kwargs) -> None:
    layer(X).square().sum().backward()
    optimizer_class([p for p in layer.parameters() if p.requires_grad], lr=0.1, **kwargs).step()


def load_state_dict(layer, assign: bool) -> None:
    state_dict = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state_dict, assign=assign)


def add_and_activate(layer) -> None:
    layer.update_layer("other", 3, lora_alpha=7, config=make_config())
    train_by_hand(layer, "other")
    layer.set_adapter("other")


def prune(layer) -> None:
    with torch.no_grad():
        layer.lora_E["default"].masked_fill_(torch.tensor([[True], [False], [True], [False]]), 0.0)


def drop_ranks(layer) -> None:
    for params, dim in ((layer.lora_A, 0), (layer.lora_E, 0), (layer.lora_B, 1)):
        params["default"] = nn.Parameter(params["default"].detach().index_select(dim, torch.tensor([1, 3])))
    layer.r["default"] = 2


def merge_and_unmerge_a_plain_adapter(layer) -> None:
    layer.update_layer("plain", 3, lora_alpha=7, config=make_config(use_dora_adaptive=False))
    train_by_hand(layer, "plain")
    layer.merge(adapter_names=["plain"])
    output_of(layer)
    layer.unmerge()


def merge_another_adapter_for_good(layer) -> None:
    add_and_activate(layer)
    output_of(layer)
    layer.merge(adapter_names=["other"])
    layer.merged_adapters.clear()  # the merged weight is the base weight from here on
    layer.set_adapter("default")


def replace_base_weight(layer) -> None:
    layer.get_base_layer().weight = nn.Parameter(torch.randn(16, 20), requires_grad=False)


def write_in_place(part: str):
    def write(layer):
        with torch.no_grad():
            (layer.get_base_layer().weight if part == "weight" else getattr(layer, part)["default"]).mul_(1.5)

    return write


DOORS = {
    "AdamW": optimizer_step,
    "SGD with foreach": lambda layer: optimizer_step(layer, torch.optim.SGD, foreach=True),
    "fused Adam": lambda layer: optimizer_step(layer, torch.optim.Adam, fused=True),
    "load_state_dict": lambda layer: load_state_dict(layer, assign=False),
    "load_state_dict(assign=True)": lambda layer: load_state_dict(layer, assign=True),
    "set_adapter": add_and_activate,
    "set_adapter and back": lambda layer: (add_and_activate(layer), output_of(layer), layer.set_adapter("default")),
    "set_scale": lambda layer: layer.set_scale("default", 3.0),
    "scale_layer": lambda layer: layer.scale_layer(0.5),
    "pruning": prune,
    "dropping ranks": drop_ranks,
    "update_layer": lambda layer: layer.update_layer("default", 2, lora_alpha=5, config=make_config()),
    "reset_lora_parameters": lambda layer: layer.reset_lora_parameters("default"),
    "double()": lambda layer: layer.double(),
    "double().float()": lambda layer: layer.double().float(),
    "to(dtype)": lambda layer: layer.to(torch.float64),
    "merging and unmerging a plain adapter": merge_and_unmerge_a_plain_adapter,
    "merging another AdaDoRA adapter": merge_another_adapter_for_good,
    "another base weight": replace_base_weight,
    **{
        f"a write to {part}": write_in_place(part)
        for part in ("weight", "lora_A", "lora_E", "lora_B", "lora_magnitude")
    },
    "a write through .data while training": lambda layer: (
        layer.train(),
        layer.lora_magnitude["default"].data.mul_(2),
        layer.eval(),
    ),
}


# these change what the output is computed from, but not the output
OUTPUT_STAYS = {
    "set_adapter and back",
    "double()",
    "double().float()",
    "to(dtype)",
    "merging and unmerging a plain adapter",
}


@pytest.mark.parametrize("door", DOORS)
def test_the_output_is_right_after(door):
    layer = warm_layer()
    before = output_of(layer)
    DOORS[door](layer)
    assert_right(layer)
    if door not in OUTPUT_STAYS:
        assert relative_error(output_of(layer), before) > 1e-3


def test_half_precision_weights_are_followed_too():
    layer = warm_layer()
    assert_right(layer.half(), tolerance=2e-2)


def test_rescaling_and_restoring_the_adapter_scale():
    model = make_peft_mlp()
    train(model)
    x = torch.randn(5, 10)
    with torch.no_grad():
        before = model(x)
        with rescale_adapter_scale(model, multiplier=0.3):
            inside = model(x)
        after = model(x)
    assert relative_error(inside, before) > 1e-3
    assert torch.equal(after, before)


def test_loading_an_adapter_into_a_warm_model(tmp_path):
    outputs = []
    x = torch.randn(5, 10)
    for seed in (1, 2):
        model = make_peft_mlp()
        train(model, seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        with torch.no_grad():
            outputs.append(model(x))
    model = PeftModel.from_pretrained(make_mlp(), tmp_path / "1")
    with torch.no_grad():
        assert relative_error(model(x), outputs[0]) < 1e-6
        model.load_adapter(tmp_path / "2", "two")
        assert relative_error(model(x), outputs[0]) < 1e-6
        model.set_adapter("two")
        assert relative_error(model(x), outputs[1]) < 1e-6


def count_norms(monkeypatch) -> list:
    """Record each time that a layer computes the norm of its adapted weight."""
    from peft.tuners.adalora import variants

    calls = []
    compute = variants.squared_adapted_row_norm
    monkeypatch.setattr(variants, "squared_adapted_row_norm", lambda *args: (calls.append(1), compute(*args))[1])
    return calls


def test_eval_mode_computes_the_norm_every_time_but_with_caching(monkeypatch, caching):
    calls = count_norms(monkeypatch)
    layer = make_layer(16, 20, 4).eval()
    for _ in range(5):
        output_of(layer)
    assert len(calls) == (1 if caching else 5)


def test_a_frozen_adapter_keeps_the_scale_without_no_grad_too(monkeypatch, caching):
    calls = count_norms(monkeypatch)
    layer = make_layer(16, 20, 4).eval().requires_grad_(False)
    for _ in range(5):
        layer(X)
    assert len(calls) == (1 if caching else 5)


def test_training_mode_computes_the_norm_every_time(monkeypatch):
    calls = count_norms(monkeypatch)
    layer = make_layer(16, 20, 4)
    for _ in range(3):
        output_of(layer)
        layer(X)
    assert len(calls) == 6


def test_gradients_need_the_norm_every_time(monkeypatch):
    calls = count_norms(monkeypatch)
    layer = make_layer(16, 20, 4).eval()
    for _ in range(3):
        layer(X).sum().backward()
    assert len(calls) == 3
    assert layer.lora_magnitude["default"].grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_base_weight_that_a_fused_optimizer_has_trained_is_followed(optimizer_class):
    layer = warm_layer()
    layer(X)
    weight = layer.get_base_layer().weight
    weight.requires_grad_()
    optimizer = optimizer_class([weight], lr=0.1, fused=True)
    for _ in range(2):
        layer(X).square().sum().backward()
        optimizer.step()
    weight.requires_grad_(False)
    assert_right(layer)
    assert_right(layer.train())


def test_a_base_weight_written_through_data_is_followed(caching):
    layer = warm_layer()
    layer.get_base_layer().weight.data[-4:] = torch.randn(4, 20)
    if caching:
        layer.train().eval()  # inside of one use of DoraCaching
    assert_right(layer)


def test_a_weight_at_the_address_of_the_old_one_is_another_weight():
    layer = warm_layer()
    for _ in range(20):
        layer.get_base_layer().weight.data = torch.randn(16, 20)
        assert_right(layer)
        layer.get_base_layer().weight = nn.Parameter(torch.randn(16, 20), requires_grad=False)
        assert_right(layer)


@pytest.mark.parametrize("part", ["weight", "lora_A", "lora_B", "lora_magnitude"])
def test_a_replaced_weight_is_freed_at_once(part):
    layer = warm_layer()
    param = layer.get_base_layer().weight if part == "weight" else getattr(layer, part)["default"]
    storage = StorageWeakRef(param.untyped_storage())
    param.data = param.data.clone()
    assert storage.expired()


def test_no_caching_outlasts_the_context_it_was_made_in():
    layer = make_layer(16, 20, 4).eval()
    for factor in (1.0, 1.5, 0.7):
        for part in ("lora_A", "lora_E", "lora_B", "lora_magnitude"):
            getattr(layer, part)["default"].data.mul_(factor)
        with DoraCaching():
            assert_right(layer)


def test_caching_ends_with_the_outermost_of_two_uses_of_one_object():
    with DoraCaching(enabled=False):
        layer, caching = make_layer(16, 20, 4).eval(), DoraCaching()
        with caching, torch.no_grad(), caching:
            layer(X)
        output_of(layer)
        layer.lora_magnitude["default"].data.mul_(3)
        assert_right(layer)


def test_what_is_kept_in_inference_mode_can_be_trained_with_afterwards():
    layer = make_layer(16, 20, 4).eval()
    with torch.inference_mode():
        layer(X)
    layer.train()(X).sum().backward()
    optimizer_step(layer)
    assert_right(layer.eval())


def test_weights_made_in_inference_mode_are_never_relied_on():
    with torch.inference_mode():
        layer = make_layer(16, 20, 4).eval()
        output_of(layer)
        layer.lora_magnitude["default"].mul_(2)
        expected = Reference.of(layer).forward(X.double())
        assert relative_error(layer(X), expected) < 1e-5


def test_copies_pickles_and_state_dicts_do_not_see_it():
    layer, cold = warm_layer(), make_layer(16, 20, 4).eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_right(twin)
    assert layer.state_dict().keys() == cold.state_dict().keys()
    sizes = []
    for model in (layer, cold):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        sizes.append(buffer.tell())
    assert sizes[0] == sizes[1]


def test_a_deep_copy_of_a_warm_model_follows_its_own_weights():
    model = make_peft_mlp()
    train(model)
    x = torch.randn(5, 10)
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model)
        for layer in svd_layers(twin).values():
            layer.lora_magnitude["default"].mul_(2)
        assert relative_error(twin(x), expected) > 1e-2
        assert torch.equal(model(x), expected)
