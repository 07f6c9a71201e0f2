# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""PEFT's mixed model, which checks what AdaDoRA refuses for the whole model before any layer changes."""

from collections import defaultdict
from typing import Any, Optional

import torch
from torch import nn

from peft.tuners.tuners_utils import BaseTunerLayer

from ..adalora.layer import AdaLoraLayer
from ..adalora.merging import check_merge
from ..adalora.supported_layers import avoid_fast_path
from ..adalora.variants import check_sole_adapter
from . import stock_model as stock
from .stock_model import *


class MixedModel(stock.MixedModel):
    __doc__ = stock.MixedModel.__doc__

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        if any(getattr(module, "use_dora_adaptive", False) for module in model.modules()):
            avoid_fast_path(model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_active(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge(kwargs.get("adapter_names"), kwargs.get("safe_merge", False))
        return super()._unload_and_optionally_merge(merge=merge, **kwargs)

    def _check_merge(self, adapter_names: Optional[list[str]], safe_merge: bool) -> None:
        names = adapter_names or self.active_adapters
        self._check_active(names)
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        ours = [layer for layer in layers if isinstance(layer, AdaLoraLayer)]
        check_merge(self.model, ours, adapter_names, safe_merge)
        if not safe_merge or not any(layer.use_dora_adaptive for layer in ours):
            return
        # a merged AdaDoRA adapter stays merged, so no other method may fail after it
        for layer in (layer for layer in layers if layer not in ours):
            for name in set(names) & layer._get_available_adapters():
                if not torch.isfinite(layer.get_delta_weight(name)).all():
                    raise ValueError(f"The update of adapter {name!r} is not finite; nothing was merged.")

    def _check_active(self, adapter_names: str | list[str]) -> None:
        """Raise a `NotImplementedError` if an AdaDoRA adapter shares its base layer with another active adapter."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        active, adadora = defaultdict(list), set()
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):  # which may be the base layer of another
                active[module.get_base_layer()] += [name for name in names if name in module._get_available_adapters()]
                adadora.update(getattr(module, "lora_magnitude", ()))
        for sharing in active.values():
            check_sole_adapter(sharing, adadora)


def __getattr__(name: str) -> Any:
    return getattr(stock, name)
