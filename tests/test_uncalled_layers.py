"""Layers whose weight a model reads without calling them, where an adapter has no effect."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import make_config, svd_layers, train_by_hand
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel

from peft import get_peft_model


WARNING = "got no gradient before the first allocation"


class ReadsWeight(nn.Module):
    """A layer of which the model reads the weight, one that it calls, and experts of which some see no token."""

    def __init__(self, call_all: bool = False):
        super().__init__()
        self.read, self.called = nn.Linear(10, 10), nn.Linear(10, 4)
        self.experts = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.call_all = call_all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.read(x) if self.call_all else nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.called(torch.tanh(self.experts[1](x)))


def adapt(base: nn.Module, **kwargs):
    torch.manual_seed(0)
    return get_peft_model(base, make_config(target_modules=["read", "called", "0", "1", "2"], **kwargs))


def train(model, steps: int, lr: float = 1e-2, forward=None) -> list[str]:
    """Train, and return what the warnings about layers without a gradient name."""
    forward = forward or (lambda: model(torch.randn(8, 10)))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            forward().square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    return [str(warning.message).split(WARNING)[0] for warning in caught if WARNING in str(warning.message)]


@pytest.mark.parametrize("use_dora_adaptive", [True, False])
@pytest.mark.parametrize("tinit", [0, 2])
def test_one_warning_names_a_layer_that_is_never_called(tinit, use_dora_adaptive):
    model = adapt(ReadsWeight(), tinit=tinit, use_dora_adaptive=use_dora_adaptive)
    assert train(model, steps=20) == ["'read' "]


def test_no_warning_if_all_layers_are_called_but_some_experts():
    assert not train(adapt(ReadsWeight(call_all=True)), steps=20)


class Block(nn.Module):
    """Two layers with digits in their names, of which the second may be read instead of called."""

    def __init__(self, reads_second: bool):
        super().__init__()
        self.fc1, self.fc2, self.reads_second = nn.Linear(10, 10), nn.Linear(10, 10), reads_second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc1(x))
        return nn.functional.linear(x, self.fc2.weight) if self.reads_second else self.fc2(x)


@pytest.mark.parametrize(
    ("reads_second", "called", "expected"),
    [
        (False, (0, 1, 2), []),
        (True, (0, 1, 2), ["'0.fc2', '1.fc2', '2.fc2' "]),
        (False, (0, 2), ["'1.fc1', '1.fc2' "]),
    ],
)
def test_each_layer_that_no_block_calls_is_named(reads_second, called, expected):
    blocks = nn.ModuleList(Block(reads_second) for _ in range(3))
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(*blocks), make_config(target_modules=["fc1", "fc2"]))

    def forward() -> torch.Tensor:
        x = torch.randn(8, 10)
        for index in called:
            x = blocks[index](x)
        return x

    assert train(model, steps=20, forward=forward) == expected


def test_no_warning_at_a_learning_rate_of_zero():
    """Nothing has any importance then, though there are gradients."""
    assert not train(adapt(ReadsWeight(call_all=True), tinit=0), steps=20, lr=0.0)


def test_no_warning_about_a_layer_that_the_user_has_frozen():
    model = adapt(ReadsWeight())
    for name, param in model.named_parameters():
        if ".read." in name:
            param.requires_grad_(False)
    assert not train(model, steps=20)


class ReadsInALoss(ReadsWeight):
    """The same with a loss, to which AdaLoRA's regularization is added, so that all A and B have gradients."""

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=super().forward(x).square().mean())


@pytest.mark.parametrize("use_dora_adaptive", [True, False])
def test_one_warning_names_a_layer_that_has_gradients_from_the_regularization_alone(use_dora_adaptive):
    model = adapt(ReadsInALoss(), use_dora_adaptive=use_dora_adaptive)
    assert train(model, steps=20, forward=lambda: model.base_model(torch.randn(8, 10)).loss) == ["'read' "]


def test_one_warning_names_all_layers_if_the_regularization_alone_reaches_any():
    torch.manual_seed(0)
    model = get_peft_model(ReadsInALoss(), make_config(target_modules=["read"]))
    assert train(model, steps=20, forward=lambda: model.base_model(torch.randn(8, 10)).loss) == ["'read' "]


class Mixture(nn.Module):
    """Two blocks of two experts each, of which one sees all tokens, and a last block that is not used."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "experts": nn.ModuleDict(
                        {
                            f"expert_{index}": nn.ModuleDict({"w1": nn.Linear(10, 10), "w2": nn.Linear(10, 10)})
                            for index in range(2)
                        }
                    )
                }
            )
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks[:-1]):
            expert = block["experts"][f"expert_{index}"]
            x = x + nn.functional.linear(expert["w2"](torch.tanh(x)), expert["w1"].weight)
        return x


def test_experts_are_named_only_if_none_of_their_block_gets_a_gradient():
    """Names that end in numbers are no experts: w1 is never called, and w2 is."""
    torch.manual_seed(0)
    model = get_peft_model(Mixture(), make_config(target_modules=["w1", "w2"]))
    (named,) = train(model, steps=20)
    experts = [f"experts.expert_{index}" for index in range(2)]
    never_called = [f"blocks.{block}.{expert}.w1" for block in range(3) for expert in experts]
    unused = [f"blocks.2.{expert}.w2" for expert in experts]
    assert sorted(named.rstrip().split(", ")) == sorted(map(repr, never_called + unused))


def test_a_block_that_the_model_does_not_use_is_named():
    """As the last layer of an encoder of which the one before it is read."""
    torch.manual_seed(0)
    model = get_peft_model(Stack(), make_config(target_modules=["fc1", "fc2"]))
    assert train(model, steps=20) == ["'blocks.2.fc1', 'blocks.2.fc2' "]


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        block = {"fc1": nn.Linear(10, 10), "fc2": nn.Linear(10, 10)}
        self.blocks = nn.ModuleList(copy.deepcopy(nn.ModuleDict(block)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:-1]:
            x = x + block["fc2"](torch.tanh(block["fc1"](x)))
        return x


def test_the_warning_comes_after_a_resume_too():
    """All singular values are trained then, so no triplet counts as pruned."""
    torch.manual_seed(0)
    model = adapt(ReadsWeight())
    for layer in svd_layers(model).values():
        train_by_hand(layer)
    model.base_model.rankallocator.read_kept(model.base_model.model)
    assert train(model, steps=20) == ["'read' "]


def test_without_any_gradient_the_error_names_the_cause():
    model = adapt(ReadsWeight())
    with pytest.raises(ValueError, match="adapt layers that the model calls"):
        model.base_model.update_and_allocate(0)


def test_mamba_names_its_dt_proj():
    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=2))
    model = get_peft_model(base, make_config(target_modules=["in_proj", "dt_proj"], tinit=1))
    tokens = torch.arange(10).view(1, -1)
    (named,) = train(model, steps=3, forward=lambda: model(tokens, labels=tokens).loss)
    assert named.count("dt_proj") == 2
    assert "in_proj" not in named


def test_wavlm_names_the_projections_of_its_attention():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 4}
    base = WavLMModel(WavLMConfig(**sizes, **convolutions, num_conv_pos_embedding_groups=2, mask_time_prob=0.0))
    model = get_peft_model(base, make_config(target_modules=["q_proj", "v_proj", "intermediate_dense"], tinit=1))
    (named,) = train(model, steps=3, forward=lambda: model(torch.randn(1, 200)).last_hidden_state)
    assert "q_proj" in named
    assert "v_proj" in named
    assert "intermediate_dense" not in named


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear2"], ["1.linear1"]], ids=["both", "one", "last"])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_encoder_of_torch_predicts_with_the_adapter_in_eval_mode(mixed, targets, is_masked, norm_first):
    torch.manual_seed(0)
    model = get_peft_model(Encoder(norm_first), make_config(target_modules=targets), mixed=mixed)
    for layer in svd_layers(model).values():
        train_by_hand(layer)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False, False, False, True, True]])
    arguments = (x, mask) if is_masked else (x,)
    trained = model(*arguments).detach()  # torch's fast path is for eval mode alone
    model.eval()
    with torch.no_grad():
        predicted = model(*arguments)
        with model.disable_adapter():
            base = model(*arguments)
        merged = model.merge_and_unload()(*arguments)
    seen = ~mask if is_masked else torch.ones_like(mask)
    assert (trained - base)[seen].abs().max() > 0.1
    assert torch.allclose(predicted[seen], trained[seen], rtol=1e-5, atol=1e-5)
    assert torch.allclose(merged[seen], trained[seen], rtol=1e-5, atol=1e-5)
