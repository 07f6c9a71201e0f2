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

from dataclasses import dataclass, field
from typing import Optional

from . import stock_config as stock
from .adadora_config import AdaDoraConfigMixin


@dataclass
class AdaLoraConfig(AdaDoraConfigMixin, stock.AdaLoraConfig):
    """
    PEFT's configuration of an [`AdaLoraModel`], with AdaDoRA. All arguments but the one below are those of the
    installed PEFT's `AdaLoraConfig`.

    Args:
        use_dora_adaptive (`bool`):
            Use AdaDoRA: besides the prunable update, which decides the direction of each row of the adapted weight,
            learn the length of the row (its magnitude), as DoRA does (https://huggingface.co/papers/2402.09353).
            Pruning never touches the magnitudes. Supported for `nn.Linear`, `Conv1D` and `nn.Conv2d` layers, the 4-bit
            and 8-bit linear layers of bitsandbytes, and weight-only 8-bit quantization of torchao. An AdaDoRA adapter
            has to be the only active adapter, and once merged it cannot be unmerged. Defaults to `False`, which is
            plain AdaLoRA.
        weights_sha256 (`str`, *optional*):
            Checksum of the saved weights of an AdaDoRA adapter, set when it is saved and checked before it is loaded
            from a folder. Remove it from `adapter_config.json` to load weights that were edited.

    Raises:
        `ValueError`: If `use_dora=True` without `use_dora_adaptive=True`; the rest as in the installed PEFT.
    """

    use_dora_adaptive: bool = field(
        default=False,
        metadata={
            "help": (
                "Use AdaDoRA: learn the length of each row of the adapted weight (its magnitude, as in DoRA) besides "
                "AdaLoRA's prunable update. Supported for nn.Linear, Conv1D and nn.Conv2d layers, the 4-bit and 8-bit "
                "linear layers of bitsandbytes, and weight-only 8-bit quantization of torchao. An AdaDoRA adapter has "
                "to be the only active adapter, and once merged it cannot be unmerged."
            )
        },
    )

    weights_sha256: Optional[str] = field(
        default=None, metadata={"help": "Checksum of the saved weights of an AdaDoRA adapter."}
    )

    def __post_init__(self):
        if self.use_dora_adaptive:
            self.use_dora = False  # see `to_dict`
        if self.use_dora:
            raise ValueError(
                "ADALORA does not support DoRA through `use_dora=True`; set `use_dora_adaptive=True` instead."
            )
        super().__post_init__()
