"""The rank allocator scores and prunes as PEFT's does, bit for bit, step by step."""

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from helpers import make_config, make_peft_mlp, parameter_bytes, svd_layers
from torch import nn

from peft import PeftModel, get_peft_model
from peft.tuners.adalora import RankAllocator


PARTS = ("lora_A", "lora_E", "lora_B")
BOTH = pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
# of the layers whose weights are not float32
DTYPES = {
    "float32": {},
    "bfloat16": {"up": torch.bfloat16, "down": torch.bfloat16, "last": torch.bfloat16},
    "float32 beside bfloat16": {"down": torch.bfloat16},
}


class Restated:
    """
    The allocator of AdaLoRA written once more, one parameter at a time: sensitivity (eq. 8 of the paper), its two
    moving averages (eq. 9 and 10), and the triplets that a budget keeps. Every operation rounds as PEFT's does.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", beta1: float = 0.85, beta2: float = 0.85):
        self.beta1, self.beta2 = beta1, beta2
        endings = tuple(f".{part}.{adapter_name}" for part in PARTS)
        self.params = {name: param for name, param in model.named_parameters() if name.endswith(endings)}
        self.ipt, self.average, self.uncertainty = {}, {}, {}

    @torch.no_grad()
    def update(self) -> None:
        for name, param in self.params.items():
            zero = torch.zeros_like(param)
            ipt = (param * (zero if param.grad is None else param.grad)).abs()
            average = self.beta1 * self.average.get(name, zero) + (1 - self.beta1) * ipt
            deviation = (ipt - average).abs()
            self.uncertainty[name] = self.beta2 * self.uncertainty.get(name, zero) + (1 - self.beta2) * deviation
            self.ipt[name], self.average[name] = ipt, average

    def triplet_scores(self) -> dict[str, torch.Tensor]:
        """The importance of the triplets of each layer, by the name of its E."""
        scores = {}
        for name in self.params:
            if ".lora_E." in name:
                names = [name.replace(".lora_E.", f".{part}.") for part in PARTS]
                score_A, score_E, score_B = (self.average[each] * self.uncertainty[each] for each in names)
                vectors = torch.stack([score_A.mean(dim=1), score_B.mean(dim=0)], dim=1)
                scores[name] = score_E.view(-1) + vectors.sum(dim=1)
        return scores

    def kept(self, budget: int) -> dict[str, list[bool]]:
        """The triplets that score higher than the best one that has to go. Triplets that tie with it go, too."""
        scores = self.triplet_scores()
        together = torch.cat(list(scores.values()))
        pruned = len(together) - budget
        threshold = together.kthvalue(pruned)[0].item() if pruned else -math.inf
        return {name: (~(score <= threshold)).tolist() for name, score in scores.items()}


def make_net(adapter_name: str = "default", dtypes: Iterable[tuple[str, torch.dtype]] = (), **kwargs) -> PeftModel:
    """A model whose three layers have weights of unequal sizes."""
    torch.manual_seed(0)
    layers = {"up": nn.Linear(10, 16), "down": nn.Linear(16, 64, bias=False), "last": nn.Linear(64, 4)}
    config = make_config(target_modules=list(layers), **kwargs)
    model = get_peft_model(nn.ModuleDict(layers), config, adapter_name=adapter_name)
    for name, dtype in dict(dtypes).items():
        model.get_submodule(f"base_model.model.{name}").to(dtype)
    return model


@torch.no_grad()
def take_a_step(model: PeftModel, seed: int) -> None:
    """Move everything that belongs to an adapter, and leave a gradient of it behind."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param += 0.3 * torch.randn(param.shape, generator=generator)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def values_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.base_model.model.named_parameters()}


@torch.no_grad()
def mask(values: dict[str, torch.Tensor], pattern: dict[str, list[bool]]) -> dict[str, torch.Tensor]:
    """The values with zeros for the singular values that a pattern prunes."""
    pruned = {name: ~torch.tensor(kept).view(-1, 1) for name, kept in pattern.items()}
    return {**values, **{name: values[name].masked_fill(each, 0.0) for name, each in pruned.items()}}


def assert_same(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.allclose(value, expected[name], rtol=0, atol=0, equal_nan=True), name


def assert_scores(allocator: RankAllocator, restated: Restated) -> None:
    assert_same(allocator.ipt, restated.ipt)
    assert_same(allocator.exp_avg_ipt, restated.average)
    assert_same(allocator.exp_avg_unc, restated.uncertainty)


def assert_every_budget(model: PeftModel, allocator: RankAllocator, restated: Restated) -> None:
    """Each budget, from all triplets to one, masks what PEFT would mask, and nothing else of the model changes."""
    inner, before = model.base_model.model, values_of(model)
    singular_values = {name: param for name, param in inner.named_parameters() if "lora_E" in name}

    def check(expected):
        assert_same(values_of(model), expected)
        for name, param in singular_values.items():
            param.data.copy_(before[name])

    assert allocator.init_bgt == sum(map(len, restated.triplet_scores().values()))
    for budget in range(allocator.init_bgt, 0, -1):
        pattern = restated.kept(budget)
        assert allocator.mask_to_budget(inner, budget) == pattern
        check(mask(before, pattern))
        # the adapter's name may be missing, as in a saved config, and the values may be tensors
        ending = "" if budget % 3 else f".{allocator.adapter_name}"
        convert = torch.tensor if budget % 2 else list
        saved = {name.removesuffix(ending): convert(kept) for name, kept in pattern.items()}
        allocator.mask_using_rank_pattern(inner, saved)
        check(mask(before, pattern))


@BOTH
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_scores_and_masks_are_those_of_peft_at_each_step(use_dora_adaptive, dtypes):
    model = make_net(dtypes=dtypes, use_dora_adaptive=use_dora_adaptive, beta1=0.85, beta2=0.7)
    allocator, restated = model.base_model.rankallocator, Restated(model.base_model.model, beta1=0.85, beta2=0.7)
    for step in range(4):
        take_a_step(model, seed=step)
        if step == 2:
            restated.params["down.lora_B.default"].grad = None
        allocator.update_ipt(model.base_model.model)
        restated.update()
        assert_scores(allocator, restated)
        assert_every_budget(model, allocator, restated)
        allocator.mask_to_budget(model.base_model.model, 18 - 4 * step)


@BOTH
def test_scores_of_unequal_dtypes_are_compared_as_peft_compares_them(use_dora_adaptive):
    # PEFT sums and compares the scores of a layer in the dtype of the layer
    model = make_net(dtypes=DTYPES["float32 beside bfloat16"], use_dora_adaptive=use_dora_adaptive)
    allocator, restated = model.base_model.rankallocator, Restated(model.base_model.model)
    for seed in range(40):
        allocator.reset_ipt()
        restated.average, restated.uncertainty = {}, {}
        take_a_step(model, seed)
        allocator.update_ipt(model.base_model.model)
        restated.update()
        for budget in range(1, 18):
            assert allocator.mask_to_budget(model.base_model.model, budget) == restated.kept(budget)


@BOTH
def test_triplets_of_equal_scores_are_kept_or_pruned_together(use_dora_adaptive):
    model = make_net(use_dora_adaptive=use_dora_adaptive)
    allocator, restated = model.base_model.rankallocator, Restated(model.base_model.model)
    for step in range(3):
        take_a_step(model, seed=step)
        for layer in svd_layers(model).values():
            for part in PARTS:
                param = getattr(layer, part)["default"]
                for tensor in (param.data, param.grad):
                    triplets = tensor if part != "lora_B" else tensor.T
                    triplets[3] = triplets[1]
        for part in PARTS:  # six triplets that score zero
            restated.params[f"last.{part}.default"].grad.zero_()
        allocator.update_ipt(model.base_model.model)
        restated.update()
    for name, score in restated.triplet_scores().items():
        assert score[1] == score[3] and score.any() == (name != "last.lora_E.default")
    # two triplets of one of the other two layers tie at the threshold
    assert any(sum(map(sum, restated.kept(budget).values())) == budget - 1 for budget in range(1, 12))
    assert_every_budget(model, allocator, restated)


@BOTH
@pytest.mark.parametrize("count", [1, 4, 18])
def test_triplets_whose_scores_are_nan_count_as_the_most_important(use_dora_adaptive, count):
    model = make_net(use_dora_adaptive=use_dora_adaptive)
    allocator, restated = model.base_model.rankallocator, Restated(model.base_model.model)
    take_a_step(model, seed=0)
    allocator.update_ipt(model.base_model.model)
    restated.update()
    for index in range(count):
        layer, triplet = ("down", "up", "last")[index % 3], index // 3
        for averages in (allocator.exp_avg_ipt, restated.average):
            averages[f"{layer}.lora_A.default"][triplet, 2] = torch.nan
    assert sum(int(score.isnan().sum()) for score in restated.triplet_scores().values()) == count
    assert_every_budget(model, allocator, restated)


@BOTH
@pytest.mark.parametrize("adapter_name", ["sft", "sft2", "2", "up"])
def test_an_adapter_is_pruned_alone_whose_name_is_part_of_others(use_dora_adaptive, adapter_name):
    model = make_net("sft", use_dora_adaptive=use_dora_adaptive)
    for rank, name in enumerate(("sft2", "2", "up"), start=3):
        config = make_config(
            target_modules=["up", "last"], init_r=rank, use_dora_adaptive=use_dora_adaptive, inference_mode=True
        )
        model.add_adapter(name, config)
    allocator = RankAllocator(model.base_model.model, model.peft_config[adapter_name], adapter_name)
    restated = Restated(model.base_model.model, adapter_name)
    for step in range(2):
        take_a_step(model, seed=step)
        allocator.update_ipt(model.base_model.model)
        restated.update()
        assert_scores(allocator, restated)
        assert_every_budget(model, allocator, restated)


@BOTH
def test_a_run_prunes_what_the_schedule_and_the_scores_say_at_each_step(use_dora_adaptive):
    # warm-up up to step 2, the last allocation at step 15, an allocation at each third step in between
    model = make_net(use_dora_adaptive=use_dora_adaptive, tinit=2, tfinal=5, deltaT=3, total_step=20)
    restated, pattern, budgets = Restated(model.base_model.model), None, []
    for step in range(20):
        take_a_step(model, seed=step)
        expected = values_of(model)
        if step < 15:
            restated.update()
        if step in (3, 6, 9, 12, 15):
            budget = int((18 - 6) * (1 - (step - 2) / (15 - 2)) ** 3 + 6)
            pattern = restated.kept(budget)
            budgets.append(budget)
        if step in (3, 6, 9, 12) or step >= 15:
            expected = mask(expected, pattern)
        model.base_model.update_and_allocate(step)
        assert_same(values_of(model), expected)
        if step < 15:
            assert_scores(model.base_model.rankallocator, restated)
    assert budgets == [15, 9, 7, 6, 6]


@BOTH
def test_a_second_call_at_the_last_allocation_changes_nothing(use_dora_adaptive):
    """Although the gradients of A and B, as of a strong regularization, would prefer triplets that are pruned."""
    model = make_net(use_dora_adaptive=use_dora_adaptive, tinit=2, tfinal=5, deltaT=3, total_step=20)
    for step in range(16):
        take_a_step(model, seed=step)
        model.base_model.update_and_allocate(step)
    before, pattern = parameter_bytes(model), model.peft_config["default"].rank_pattern
    for name, layer in svd_layers(model.base_model.model).items():
        layer.lora_A["default"].grad[~torch.tensor(pattern[f"{name}.lora_E.default"])] = 1e4
    model.base_model.update_and_allocate(15)
    assert parameter_bytes(model) == before
    assert model.peft_config["default"].rank_pattern == pattern


@pytest.mark.overlay
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_what_is_restated_here_is_the_allocator_of_peft(dtypes):
    stock = pytest.importorskip("peft.tuners.adalora.stock_layer")
    model = make_net(dtypes=dtypes, use_dora_adaptive=False)
    inner, restated = model.base_model.model, Restated(model.base_model.model)
    allocator = stock.RankAllocator(inner, model.peft_config["default"], "default")
    for step in range(10):
        take_a_step(model, seed=step)
        allocator.update_ipt(inner)
        restated.update()
        assert_scores(allocator, restated)
        for budget in range(17, 0, -1):  # PEFT's raises if all are kept
            before = values_of(model)
            pattern = restated.kept(budget)
            assert allocator.mask_to_budget(inner, budget) == pattern
            assert_same(values_of(model), mask(before, pattern))


def test_a_parameter_without_a_gradient_counts_as_one_of_gradient_zero():
    model = make_peft_mlp()
    allocator = model.base_model.rankallocator
    model(torch.randn(8, 10)).square().sum().backward()
    twin = copy.deepcopy(allocator)
    first = svd_layers(model)["base_model.model.first"]
    for param in first.parameters():
        param.grad = None
    allocator.update_ipt(model.base_model.model)
    assert not allocator.ipt["first.lora_A.default"].any()
    for param in first.parameters():
        param.grad = torch.zeros_like(param)
    twin.update_ipt(model.base_model.model)
    for name, score in twin.exp_avg_unc.items():
        assert torch.equal(score, allocator.exp_avg_unc[name])


def test_an_update_leaves_parameters_and_gradients_alone():
    model = make_peft_mlp()
    model(torch.randn(8, 10)).square().sum().backward()
    params = [p for p in model.parameters() if p.grad is not None]
    before = [(p.detach().clone(), p.grad.clone()) for p in params]
    model.base_model.rankallocator.update_ipt(model.base_model.model)
    for param, (value, gradient) in zip(params, before):
        assert torch.equal(param, value)
        assert torch.equal(param.grad, gradient)


def test_plain_adalora_that_was_saved_pruned_loses_as_many_triplets_as_in_peft(tmp_path):
    """PEFT subtracts the budget from the ranks that the config starts from, not from those that were loaded."""
    model = make_net(use_dora_adaptive=False)
    take_a_step(model, seed=1)
    inner, allocator = model.base_model.model, model.base_model.rankallocator
    allocator.update_ipt(inner)
    model.peft_config["default"].rank_pattern = allocator.mask_to_budget(inner, 12)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_net().unload(), tmp_path, is_trainable=True)
    inner, allocator = loaded.base_model.model, loaded.base_model.rankallocator
    restated = Restated(inner)
    take_a_step(loaded, seed=2)
    allocator.update_ipt(inner)
    restated.update()
    assert allocator.mask_to_budget(inner, 15) == restated.kept(12 - (18 - 15))
