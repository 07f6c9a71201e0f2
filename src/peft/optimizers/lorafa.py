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

"""PEFT's LoRA-FA optimizer, which refuses AdaDoRA adapters before it changes the model."""

from typing import Any

from torch.optim import Optimizer

from ..peft_model import PeftModel
from . import stock_lorafa as stock
from .stock_lorafa import *


def create_lorafa_optimizer(model: PeftModel, *args: Any, **kwargs: Any) -> Optimizer:
    """PEFT's function. Raises a `NotImplementedError` if an AdaDoRA adapter is active."""
    for adapter_name in model.active_adapters:
        if getattr(model.peft_config.get(adapter_name), "use_dora_adaptive", False):
            raise NotImplementedError(
                f"LoRA-FA trains B of an update B A, but the update of the AdaDoRA adapter {adapter_name!r} is "
                "B (E ⊙ A) with learned magnitudes; use another optimizer, such as torch.optim.AdamW."
            )
    return stock.create_lorafa_optimizer(model, *args, **kwargs)


def __getattr__(name: str) -> Any:
    return getattr(stock, name)
