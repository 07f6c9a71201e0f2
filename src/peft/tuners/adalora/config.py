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

"""PEFT's AdaLoRA configuration with AdaDoRA's flag."""

from dataclasses import InitVar, dataclass, field
from typing import Any, Optional

from . import stock_config as stock
from .model_card import add_card_section


@dataclass
class AdaLoraConfig(stock.AdaLoraConfig):
    """
    PEFT's configuration of an [`AdaLoraModel`], with AdaDoRA. All arguments but the one below are those of the
    installed PEFT's `AdaLoraConfig`.

    Args:
        use_dora_adaptive (`bool`):
            Use AdaDoRA: also learn the length of each row of the adapted weight (its magnitude), as DoRA does
            (https://huggingface.co/papers/2402.09353). Pruning never touches the magnitudes. Such an adapter has to be
            the only active one, and once merged it cannot be unmerged. Defaults to `False`, which is plain AdaLoRA.

    Raises:
        `ValueError`: If `use_dora=True` without `use_dora_adaptive=True`; the rest as in the installed PEFT.
    """

    # No fields, so not saved. `AdaLoraCallback` sets this while the Trainer may write a checkpoint, which has pruned
    # triplets too, as zeros.
    saves_all_ranks = False

    use_dora_adaptive: bool = field(
        default=False,
        metadata={
            "help": "Use AdaDoRA: besides AdaLoRA's update, learn the length of each row of the weight, as DoRA does.",
            "is_lora_variant": True,
        },
    )

    # adapters of the first release have it; it is neither read nor saved again
    weights_sha256: InitVar[Optional[str]] = None

    def __post_init__(self, weights_sha256: Optional[str]):
        if self.use_dora_adaptive:
            self.use_dora = False  # see `to_dict`
        if self.use_dora:
            raise ValueError(
                "ADALORA does not support DoRA through `use_dora=True`; set `use_dora_adaptive=True` instead."
            )
        super().__post_init__()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's method. PEFT's model card in the folder gets a section on how to use an AdaDoRA adapter."""
        super().save_pretrained(save_directory, **kwargs)
        if self.use_dora_adaptive:
            add_card_section(save_directory)

    def to_dict(self) -> dict[str, Any]:
        """
        The configuration as a dictionary, as it is saved.

        AdaDoRA's also says `use_dora`, so that programs without AdaDoRA refuse the adapter instead of using it without
        its magnitudes.
        """
        rank_pattern = None if self.saves_all_ranks else self.rank_pattern
        use_dora = self.use_dora or self.use_dora_adaptive
        return {**super().to_dict(), "use_dora": use_dora, "rank_pattern": rank_pattern}
