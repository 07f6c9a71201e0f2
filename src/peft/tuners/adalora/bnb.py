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

"""PEFT's AdaLoRA layers for weights that bitsandbytes has quantized, which can also have AdaDoRA adapters."""

from peft.import_utils import is_bnb_4bit_available, is_bnb_available

from . import stock_bnb as stock
from .layer import AdaDoraForward


if is_bnb_available():

    class SVDLinear8bitLt(AdaDoraForward, stock.SVDLinear8bitLt):
        """PEFT's 8-bit linear layer with an AdaLoRA adapter, which can also be an AdaDoRA adapter."""


if is_bnb_4bit_available():

    class SVDLinear4bit(AdaDoraForward, stock.SVDLinear4bit):
        """PEFT's 4-bit linear layer with an AdaLoRA adapter, which can also be an AdaDoRA adapter."""
