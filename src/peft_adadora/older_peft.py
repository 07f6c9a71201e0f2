"""`peft.utils.save_and_load` as PEFT 0.19 and 0.20 see it: their own, but AdaLoRA's model class is asked, as in 0.21.

In PEFT 0.21 the functions that save and load an adapter ask the class of its model what to save and how to load it.
Those of PEFT 0.19 and 0.20 do all of it themselves. The finder puts this module in their place, so that everything
that imports them gets ours, which ask AdaLoRA's class and leave the rest, and adapters of all other methods, to
PEFT's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Optional

import torch
from torch import nn

from . import stock_save_and_load as stock
from .stock_save_and_load import *


def __getattr__(name: str) -> Any:
    """What PEFT's own module has besides, such as names that start with an underscore."""
    return getattr(stock, name)


@cache
def adalora_model() -> type:
    """Our class of AdaLoRA models, on top of classes that have what its `super()` has in PEFT 0.21."""
    from peft.tuners.adalora import stock_model
    from peft.tuners.adalora.model import AdaLoraModel
    from peft.tuners.tuners_utils import BaseTuner

    class Tuner(BaseTuner):
        @classmethod
        def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
            return state_dict

        @classmethod
        def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
            return with_adapter_name(state_dict, adapter_name)

        @classmethod
        def _remove_adapter_name_from_key(cls, key, adapter_name):
            return without_adapter_name(key, adapter_name)

    class Resizing(stock_model.AdaLoraModel):
        @classmethod
        def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
            if config.rank_pattern is None:
                return state_dict
            config.rank_pattern = {
                without_adapter_name(name, adapter_name): kept for name, kept in config.rank_pattern.items()
            }
            return model.resize_state_dict_by_rank_pattern(config.rank_pattern, state_dict, adapter_name)

        @classmethod
        def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
            if config.rank_pattern is not None:
                model.resize_modules_by_rank_pattern(config.rank_pattern, adapter_name)
            return with_adapter_name(state_dict, adapter_name)

    class Model(AdaLoraModel, Resizing, Tuner):
        pass

    return Model


def with_adapter_name(state_dict: dict[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    """Adapter weights by their names in the model."""
    return {
        f"{key}.{adapter_name}" if key.rpartition(".")[2].startswith("lora_") else key: value
        for key, value in state_dict.items()
    }


def without_adapter_name(key: str, adapter_name: str) -> str:
    """The name of an adapter weight in a file."""
    return key.removesuffix(f".{adapter_name}")


def is_adalora(model: nn.Module, adapter_name: str) -> bool:
    return model.peft_config[adapter_name].peft_type == "ADALORA"


@contextmanager
def hidden_rank_pattern(config: Any) -> Iterator[None]:
    """Hides the rank pattern from PEFT's function, which would resize what our class resizes."""
    rank_pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = rank_pattern


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Optional[dict[str, torch.Tensor]] = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    **kwargs: Any,
) -> dict[str, torch.Tensor]:
    """PEFT's function of that name."""
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    if not is_adalora(model, adapter_name):
        return stock.get_peft_model_state_dict(model, state_dict, adapter_name, **kwargs)
    config = model.peft_config[adapter_name]
    with hidden_rank_pattern(config):
        saved = stock.get_peft_model_state_dict(model, state_dict, adapter_name, **kwargs)
    saved = with_adapter_name(saved, adapter_name)
    saved = adalora_model()._get_adapter_state_dict(model, config, adapter_name, saved, [])
    return {without_adapter_name(key, adapter_name): value for key, value in saved.items()}


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: dict[str, torch.Tensor], adapter_name: str = "default", **kwargs: Any
) -> Any:
    """PEFT's function of that name."""
    if not is_adalora(model, adapter_name):
        return stock.set_peft_model_state_dict(model, peft_model_state_dict, adapter_name, **kwargs)
    config = model.peft_config[adapter_name]
    loaded = adalora_model()._remap_adapter_state_dict_for_load(model, config, adapter_name, peft_model_state_dict)
    loaded = {without_adapter_name(key, adapter_name): value for key, value in loaded.items()}
    with hidden_rank_pattern(config):
        result = stock.set_peft_model_state_dict(model, loaded, adapter_name, **kwargs)
    fill_initial_ranks(model, config, adapter_name)
    return result


def fill_initial_ranks(model: nn.Module, config: Any, adapter_name: str) -> None:
    """Gives `ranknum`, which is not in a file, its value where PEFT 0.19 has left it on the meta device."""
    for module in model.modules():
        ranks = getattr(module, "ranknum", {})
        if adapter_name in ranks and ranks[adapter_name].is_meta:
            rank = torch.tensor([float(config.init_r)], device=module.lora_E[adapter_name].device)
            ranks[adapter_name] = nn.Parameter(rank, requires_grad=False)
