"""On a PEFT of an untested version, compare its files, and check AdaDoRA's values once."""

import hashlib
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType
from typing import Any, Optional

from _peft_adadora import TESTED_PEFT


# SHA-256 of each file of PEFT that we override, except LoRA-FA's, to which we only add a refusal. They are the same in
# peft 0.21.0, 0.21.1 and 0.21.2.
TESTED_FILES = {
    "helpers.py": "b8d66e60246cc547122dd798fdf7c814ba1c48c2837e68c751164a54d87ac9dc",
    "tuners/adalora/__init__.py": "c493f7dbda463eaea6cd1abd093af6b19ee7e3e66bd0ac62995262e5c5e1fa82",
    "tuners/adalora/bnb.py": "751d7d922489126c6d71b0c099a94b17127e584e5093114f1dbdf2dfa6e3f028",
    "tuners/adalora/config.py": "f1b2eea2e36c7c69c5ab3a91cde4b851e6ddf40a4a806726c2ee89af23dcdc88",
    "tuners/adalora/gptq.py": "32df2dcfb8fce050436c96c7d310f54aced1e5162b6c84633df8b9d8d307d97e",
    "tuners/adalora/layer.py": "fea21a311da946eceb85d7d72e9bf36cf71dc090a1b2a452cae5002d8d7c8701",
    "tuners/adalora/model.py": "39d950eeacef3e37c30b62363edebd05408940205cff78d948f470e9b43c5c49",
    "tuners/mixed/model.py": "805f60436d35e4a319b495898788319104d7f07e5acd752c471ddfb3a0429dd7",
}
THREAD = "peft-adadora"  # starts the name of the thread that checks the values

_lock = threading.Lock()
_passed = False


@lru_cache
def file_difference(folder: str) -> Optional[str]:
    """Return how the files of the PEFT in a folder differ from `TESTED_FILES`, or `None` if they are the same."""
    try:
        for name, digest in TESTED_FILES.items():
            with open(os.path.join(folder, *name.split("/")), "rb") as file:
                content = file.read().replace(b"\r\n", b"\n")  # git may check files out with \r\n on Windows
            if hashlib.sha256(content).hexdigest() != digest:
                return f"its {name} differs from the tested one"
        # our folder comes first, so it could hide a new module of PEFT of the same name
        for entry in sorted(os.listdir(os.path.join(folder, "tuners", "adalora"))):
            if not entry.startswith((".", "__pycache__")) and f"tuners/adalora/{entry}" not in TESTED_FILES:
                return f"its tuners/adalora/{entry} is new"
    except OSError as error:
        return f"its files cannot be compared ({type(error).__name__}: {error})"
    return None


def check_before_first_adapter(*modules: ModuleType) -> None:
    """Make `check_magnitude_support` of the modules, which every new AdaDoRA adapter calls, run `check_values` too."""
    original = modules[0].check_magnitude_support

    def check_magnitude_support(*args: Any, **kwargs: Any) -> None:
        check_values()
        original(*args, **kwargs)

    for module in modules:
        module.check_magnitude_support = check_magnitude_support


def check_values() -> None:
    """Raise a `RuntimeError` if a small AdaDoRA adapter does not follow the formula. Runs once per process."""
    global _passed
    if _passed or threading.current_thread().name.startswith(THREAD):  # the check itself makes adapters
        return
    # a new thread ignores the caller's device, autocast, inference mode and tracers
    with _lock, ThreadPoolExecutor(1, THREAD) as executor:
        try:
            _passed = _passed or executor.submit(follows_formula).result()
        except Exception as error:
            raise RuntimeError(
                f"AdaDoRA does not work with peft {sys.modules['peft'].__version__}, which was not tested: {error}. "
                f'Install a tested version: pip install "peft{TESTED_PEFT}"'
            ) from error


def follows_formula() -> bool:
    """
    Make an AdaDoRA adapter for a layer of 4×4, train it by hand, save, load and merge it, and compare its values.

    Returns `False` where nothing can be computed, so that the next adapter tries again. Raises a `ValueError` that
    names the first difference.
    """
    import torch
    from torch import nn

    from peft import AdaLoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    def values(start: int, *shape: int) -> torch.Tensor:
        return torch.arange(start, start + math.prod(shape), dtype=torch.float64).sin().view(shape)

    def adapted_model() -> nn.Module:
        base_layer = nn.Linear(4, 4, dtype=torch.float64)
        base_layer.weight.copy_(weight)
        base_layer.bias.copy_(bias)
        return get_peft_model(nn.Sequential(base_layer), config).eval()

    def expect(what: str, value: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.allclose(value, expected, rtol=1e-9, atol=1e-9):
            raise ValueError(f"{what} differs from the formula")

    config = AdaLoraConfig(
        init_r=2, target_r=1, lora_alpha=3, total_step=10, target_modules=["0"], use_dora_adaptive=True
    )
    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        weight, bias, x = values(0, 4, 4), values(16, 4), values(20, 3, 4)
        A, E, B, magnitude = values(32, 2, 4), values(40, 2, 1), values(42, 4, 2), values(50, 4, 1)
        adapted = weight + 3 / (2 + 1e-5) * B @ (E * A)
        merged = magnitude / adapted.norm(dim=1, keepdim=True) * adapted
        output = x @ merged.T + bias

        model, other = adapted_model(), adapted_model()
        # contexts of accelerate and DeepSpeed change how modules are made in the whole process
        if any(param.is_meta or hasattr(param, "ds_id") for param in (*model.parameters(), *other.parameters())):
            return False
        layer = model.base_model.model[0]
        expect("the magnitude of a new adapter", layer.lora_magnitude["default"], weight.norm(dim=1, keepdim=True))
        expect("the output of a new adapter", model(x), x @ weight.T + bias)
        parts = layer.lora_A, layer.lora_E, layer.lora_B, layer.lora_magnitude
        for part, trained in zip(parts, (A, E, B, magnitude)):
            part["default"].copy_(trained)
        expect("the output", model(x), output)
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
        expect("the output of a loaded adapter", other(x), output)
        expect("the merged weight", model.merge_and_unload()[0].weight, merged)
    return True
