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

"""PEFT's AdaLoRA with AdaDoRA."""

import sys
from typing import Any

from . import stock___init__ as stock
from .stock___init__ import *


__all__ = stock.__all__

if "_peft_adadora_newer" in sys.modules:  # the version of PEFT is untested
    from . import layer, supported_layers

    sys.modules["_peft_adadora_newer"].check_before_first_adapter(layer, supported_layers)


def __getattr__(name: str) -> Any:
    if name == "AdaLoraCallback":
        # not with the rest, because the Trainer of transformers imports peft
        from .callback import AdaLoraCallback

        return AdaLoraCallback
    return stock.__getattr__(name)
