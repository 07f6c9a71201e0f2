"""Saved adapters and checkpoints that were damaged: refused with one clear sentence, or loaded as they were saved."""

import copy
import itertools
import json
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers import make_mlp, make_peft_mlp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peft import PeftModel


X = torch.linspace(-1, 1, 30).view(3, 10)
CASES = 600
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A trained and pruned adapter of which two layers have factors of the same shapes."""
    model = make_peft_mlp()
    optimizer = torch.optim.AdamW((param for param in model.parameters() if param.requires_grad), lr=1e-2)
    for step in range(20):
        model(X).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(adapter, tmp_path):
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def rewrite_weights(folder, change) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_config(folder, change) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def parameter_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    """The values of the base model, whether it has adapters or not."""
    values = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items() if "lora_" not in name}
    return {name.replace("base_layer.", ""): value for name, value in values.items() if "ranknum" not in name}


def assert_refused(folder, match: str) -> None:
    base = make_mlp()
    before, expected = base_bytes(base), base(X)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base, folder)
    assert base_bytes(base) == before
    torch.testing.assert_close(base(X), expected)

    served = make_peft_mlp(seed=0)
    before, expected = parameter_bytes(served), served(X)
    with pytest.raises(ValueError, match=match):
        served.load_adapter(folder, "second")
    assert {name: value for name, value in parameter_bytes(served).items() if ".second" not in name} == before
    assert torch.equal(served(X), expected)


KEY = "base_model.model.middle.lora_magnitude"
WHERE = "the weights of the adapter"


class TestRefused:
    def test_a_missing_magnitude(self, folder):
        rewrite_weights(folder, lambda tensors: tensors.pop(KEY))
        assert_refused(folder, f"^'{KEY}' is missing from {WHERE}\\.$")

    def test_a_missing_layer(self, folder):
        rewrite_weights(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".last." in key])
        assert_refused(folder, rf"^'base_model\.model\.last\.lora_\w+' is missing from {WHERE}\.$")

    @pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_E", "lora_magnitude"])
    def test_a_wrong_shape(self, part, folder):
        key = f"base_model.model.middle.{part}"
        needed = load_file(folder / WEIGHTS)[key].shape
        rewrite_weights(folder, lambda tensors: tensors.update({key: torch.ones(5, 5)}))
        message = f"'{key}' in {WHERE} has the shape (5, 5), but the model needs {tuple(needed)}."
        assert_refused(folder, f"^{re.escape(message)}$")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("part", ["lora_A", "lora_magnitude"])
    def test_a_value_that_is_not_finite(self, value, part, folder):
        key = f"base_model.model.middle.{part}"
        rewrite_weights(folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
        assert_refused(folder, f"^'{key}' in {WHERE} is not finite\\.$")

    def test_an_adapter_trained_on_another_base_shape(self, folder):
        other = make_peft_mlp()
        other.save_pretrained(folder)
        base = nn.Sequential()
        base.first, base.middle, base.last = nn.Linear(10, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        before = base_bytes(base)
        with pytest.raises(ValueError, match=f"'base_model.model.first.* in {WHERE} has the shape"):
            PeftModel.from_pretrained(base, folder)
        assert base_bytes(base) == before

    def test_a_config_without_the_flag(self, folder):
        def drop_flag(config):
            config.update(use_dora_adaptive=False, use_dora=False)

        rewrite_config(folder, drop_flag)
        assert_refused(
            folder,
            r"^[Tt]he weights of the adapter have 'base_model\.model\.\w+\.lora_magnitude' but its config does not "
            r"say `use_dora_adaptive=True`, so it would be used without its magnitudes\.$",
        )

    def test_a_config_of_which_only_our_flag_was_dropped(self, folder):
        rewrite_config(folder, lambda config: config.pop("use_dora_adaptive"))
        assert_refused(folder, "does not support DoRA through `use_dora=True`; set `use_dora_adaptive=True`")

    def test_a_weight_from_the_future(self, folder):
        key = "base_model.model.middle.lora_phase"
        rewrite_weights(folder, lambda tensors: tensors.update({key: torch.ones(1)}))
        assert_refused(folder, f"^[Tt]he weights of the adapter have '{key}', for which the model has no place\\.$")

    @pytest.mark.parametrize("size", [0, 5, 200, -20])
    def test_a_truncated_file(self, size, folder):
        # by safetensors, when PEFT reads it; the adapter has been injected by then
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises((ValueError, SafetensorError)):
            PeftModel.from_pretrained(make_mlp(), folder)


@pytest.mark.parametrize(
    "pattern", [None, {}, {"middle.lora_E": [True] * 6}, {"other.lora_E": [True] * 6}, {"middle.lora_E": []}], ids=repr
)
def test_a_rank_pattern_in_the_config_decides_nothing(pattern, adapter, folder):
    rewrite_config(folder, lambda config: config.update(rank_pattern=pattern))
    expected = PeftModel.from_pretrained(make_mlp(), adapter)(X)
    assert torch.equal(PeftModel.from_pretrained(make_mlp(), folder)(X), expected)


def test_edited_weights_load(folder):
    rewrite_weights(folder, lambda tensors: tensors[KEY].mul_(1.01))
    model = PeftModel.from_pretrained(make_mlp(), folder)
    assert torch.equal(model.state_dict()[KEY + ".default"], load_file(folder / WEIGHTS)[KEY])


def test_a_key_from_the_future_in_the_config_is_ignored_with_a_warning(adapter, folder):
    rewrite_config(folder, lambda config: config.update(use_phase=True))
    with pytest.warns(UserWarning, match="use_phase"):
        model = PeftModel.from_pretrained(make_mlp(), folder)
    assert torch.equal(model(X), PeftModel.from_pretrained(make_mlp(), adapter)(X))


def flip_bit_of_header(content: bytearray, chance: random.Random) -> None:
    position = chance.randrange(8 + struct.unpack("<Q", content[:8])[0])
    content[position] ^= 1 << chance.randrange(8)


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def drop_tensor(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    del tensors[chance.choice(sorted(tensors))]


def swap_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    # of different shapes, because nothing tells two of the same shape
    first, second = chance.choice(
        [pair for pair in itertools.combinations(sorted(tensors), 2) if len({tensors[key].shape for key in pair}) == 2]
    )
    tensors[first], tensors[second] = tensors[second], tensors[first]


MANGLES = [flip_bit_of_header, truncate, drop_tensor, swap_tensors]


def mangle(folder: Path, chance: random.Random) -> str:
    how = chance.choice(MANGLES)
    path = folder / WEIGHTS
    if how in (drop_tensor, swap_tensors):
        rewrite_weights(folder, lambda tensors: how(tensors, chance))
    else:
        content = bytearray(path.read_bytes())
        how(content, chance)
        path.write_bytes(content)
    return how.__name__


def test_no_mangled_adapter_is_loaded_wrong(adapter, tmp_path):
    chance = random.Random(0)
    expected = PeftModel.from_pretrained(make_mlp(), adapter)(X)
    base = make_mlp()
    untouched = base_bytes(base)
    refused = 0
    for case in range(CASES):
        folder = Path(shutil.copytree(adapter, tmp_path / str(case)))
        how = mangle(folder, chance)
        model = copy.deepcopy(base)
        try:
            loaded = PeftModel.from_pretrained(model, folder)
        except SafetensorError:
            refused += 1
        except ValueError as error:
            refused += 1
            assert WHERE in str(error).lower(), f"case {case}: {how}"
            assert base_bytes(model) == untouched, f"case {case}: {how}"
        else:
            # what was changed does not matter: a bit of the header's blanks or of its metadata
            assert torch.equal(loaded(X), expected), f"case {case}: {how}"
        shutil.rmtree(folder)
    assert refused > 0.9 * CASES
