"""Saved adapters and checkpoints that were damaged: refused with one clear sentence, or loaded as they were saved."""

import copy
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers import make_mlp, make_peft_mlp
from safetensors.torch import load_file, save_file
from torch import nn

from peft import PeftModel


X = torch.linspace(-1, 1, 30).view(3, 10)
CASES = 600


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
    path = folder / "adapter_model.safetensors"
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


def assert_refused(folder, match: str) -> None:
    base = make_mlp()
    before = parameter_bytes(base)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base, folder)
    assert parameter_bytes(base) == before

    served = make_peft_mlp(seed=0)
    before, expected = parameter_bytes(served), served(X)
    with pytest.raises(ValueError, match=match):
        served.load_adapter(folder, "second")
    assert parameter_bytes(served) == before
    assert torch.equal(served(X), expected)


KEY = "base_model.model.middle.lora_magnitude"
WHERE = r"adapter_model\.safetensors"


class TestRefused:
    def test_a_missing_magnitude(self, folder):
        rewrite_weights(folder, lambda tensors: tensors.pop(KEY))
        assert_refused(folder, f"'{KEY}' is missing from .*{WHERE}")

    def test_a_missing_layer(self, folder):
        rewrite_weights(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".last." in key])
        assert_refused(folder, f"last.* is missing from .*{WHERE}")

    @pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude"])
    def test_a_wrong_shape(self, part, folder):
        key = f"base_model.model.middle.{part}"
        rewrite_weights(folder, lambda tensors: tensors.update({key: torch.ones(5, 5)}))
        assert_refused(folder, rf"'{key}' in .*{WHERE}' has the shape \(5, 5\)")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("part", ["lora_A", "lora_magnitude"])
    def test_a_value_that_is_not_finite(self, value, part, folder):
        key = f"base_model.model.middle.{part}"
        rewrite_weights(folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
        assert_refused(folder, f"'{key}' in .*{WHERE}' is not finite")

    def test_a_truncated_file(self, folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-20])
        assert_refused(folder, f"{WHERE}' is broken")

    def test_a_rank_pattern_that_does_not_fit_the_weights(self, folder):
        rewrite_config(folder, lambda config: config["rank_pattern"].update({"middle.lora_E": [True] * 6}))
        assert_refused(folder, f"middle.* in .*{WHERE}' has the shape .* but the model and the config need")

    def test_a_rank_pattern_of_another_model(self, folder):
        rewrite_config(folder, lambda config: config["rank_pattern"].update({"other.lora_E": [True] * 6}))
        assert_refused(folder, f"The rank pattern of 'other' in the config of .*{WHERE}' does not fit the model")

    def test_an_adapter_trained_on_another_base_shape(self, folder):
        other = make_peft_mlp()
        other.save_pretrained(folder)
        base = nn.Sequential()
        base.first, base.middle, base.last = nn.Linear(10, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        before = parameter_bytes(base)
        with pytest.raises(ValueError, match=f"first.lora_magnitude' in .*{WHERE}' has the shape"):
            PeftModel.from_pretrained(base, folder)
        assert parameter_bytes(base) == before

    def test_a_config_without_the_flag(self, folder):
        def drop_flag(config):
            config.update(use_dora_adaptive=False, use_dora=False)

        rewrite_config(folder, drop_flag)
        assert_refused(folder, f"{WHERE}' has .*lora_magnitude' but its config does not say `use_dora_adaptive=True`")

    def test_a_config_of_which_only_our_flag_was_dropped(self, folder):
        rewrite_config(folder, lambda config: config.pop("use_dora_adaptive"))
        assert_refused(folder, "does not support DoRA through `use_dora=True`; set `use_dora_adaptive=True`")

    def test_a_weight_from_the_future(self, folder):
        rewrite_weights(folder, lambda tensors: tensors.update({"base_model.model.middle.lora_phase": torch.ones(1)}))
        assert_refused(folder, f"{WHERE}' has 'base_model.model.middle.lora_phase', for which the model has no place")

    def test_swapped_tensors(self, folder):
        def swap(tensors):
            keys = "base_model.model.first.lora_magnitude", KEY
            tensors[keys[0]], tensors[keys[1]] = tensors[keys[1]], tensors[keys[0]]

        rewrite_weights(folder, swap)
        assert_refused(folder, f"{WHERE}' are not those that were saved with its config")

    def test_a_changed_value(self, folder):
        rewrite_weights(folder, lambda tensors: tensors[KEY].mul_(1.01))
        assert_refused(folder, f"{WHERE}' are not those that were saved with its config")


def test_edited_weights_load_without_the_checksum(folder):
    rewrite_weights(folder, lambda tensors: tensors[KEY].mul_(1.01))
    rewrite_config(folder, lambda config: config.pop("weights_sha256"))
    model = PeftModel.from_pretrained(make_mlp(), folder)
    assert torch.equal(model.state_dict()[KEY + ".default"], load_file(folder / "adapter_model.safetensors")[KEY])


def test_a_key_from_the_future_in_the_config_is_ignored_with_a_warning(adapter, folder):
    rewrite_config(folder, lambda config: config.update(use_phase=True))
    with pytest.warns(UserWarning, match="use_phase"):
        model = PeftModel.from_pretrained(make_mlp(), folder)
    assert torch.equal(model(X), PeftModel.from_pretrained(make_mlp(), adapter)(X))


def flip_bit(content: bytearray, chance: random.Random) -> None:
    position = chance.randrange(len(content))
    content[position] ^= 1 << chance.randrange(8)


def flip_bit_of_header(content: bytearray, chance: random.Random) -> None:
    position = chance.randrange(8 + struct.unpack("<Q", content[:8])[0])
    content[position] ^= 1 << chance.randrange(8)


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def drop_tensor(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    del tensors[chance.choice(sorted(tensors))]


def swap_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    first, second = chance.sample(sorted(tensors), 2)
    tensors[first], tensors[second] = tensors[second], tensors[first]


MANGLES = [flip_bit, flip_bit_of_header, truncate, drop_tensor, swap_tensors]


def mangle(folder: Path, chance: random.Random) -> str:
    how = chance.choice(MANGLES)
    path = folder / "adapter_model.safetensors"
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
    untouched = parameter_bytes(base)
    refused = 0
    for case in range(CASES):
        folder = Path(shutil.copytree(adapter, tmp_path / str(case)))
        how = mangle(folder, chance)
        model = copy.deepcopy(base)
        try:
            loaded = PeftModel.from_pretrained(model, folder)
        except ValueError as error:
            refused += 1
            assert "adapter_model.safetensors" in str(error), f"case {case}: {how}"
            assert parameter_bytes(model) == untouched, f"case {case}: {how}"
        else:
            # what was changed does not matter: a bit of the header's blanks, or two tensors without an entry
            assert torch.equal(loaded(X), expected), f"case {case}: {how}"
        shutil.rmtree(folder)
    assert refused > 0.9 * CASES
