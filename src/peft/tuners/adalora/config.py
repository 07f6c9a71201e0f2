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

from dataclasses import dataclass, field
from typing import Any

from . import stock_config as stock
from .model_card import add_card_section


@dataclass
class AdaLoraConfig(stock.AdaLoraConfig):
    """
    PEFT's configuration of an [`AdaLoraModel`], with AdaDoRA. It adds two arguments to the `AdaLoraConfig` of the
    installed PEFT.

    Args:
        use_dora_adaptive (`bool`):
            Use AdaDoRA: learn the length of each row of the adapted weight (its magnitude), as DoRA does
            (https://huggingface.co/papers/2402.09353). AdaLoRA's prunable update decides the direction of the row.
            Pruning never changes a magnitude. An AdaDoRA adapter has to be the only active one, and you cannot unmerge
            it. Defaults to `False`, which is plain AdaLoRA.
        orth_reg_decoupled (`bool`):
            Decouple AdaLoRA's orthogonality regularization from the loss, as AdamW decouples weight decay. After each
            optimizer step `update_and_allocate(step, optimizer)` then moves A and B towards orthogonality, by their
            learning rate times `orth_reg_weight`; 10 is a good weight. The loss is the model's own. Works for plain
            AdaLoRA, too. Defaults to `False`, which adds a term to the loss.

    Raises:
        `ValueError`: If `use_dora=True` without `use_dora_adaptive=True`, and in the cases of the installed PEFT.
    """

    # Not a field, so not saved. `AdaLoraCallback` sets it, so that a checkpoint of the Trainer holds all ranks, with
    # zeros for pruned ones.
    saves_all_ranks = False

    # Not a field either. `total_step`, `tinit` and `tfinal` before `AdaLoraCallback` has scaled them to a run.
    unscaled_schedule = None

    use_dora_adaptive: bool = field(
        default=False,
        metadata={
            "help": "Use AdaDoRA: besides AdaLoRA's update, learn the length of each row of the weight, as DoRA does.",
            "is_lora_variant": True,
        },
    )

    orth_reg_decoupled: bool = field(
        default=False,
        metadata={
            "help": "Move A and B towards orthogonality after each optimizer step, by their learning rate times "
            "`orth_reg_weight` (10 is a good one), instead of adding a term to the loss."
        },
    )

    def __post_init__(self):
        if self.use_dora_adaptive:
            self.use_dora = False  # see `to_dict`
        if self.use_dora:
            raise ValueError(
                "ADALORA does not support DoRA through `use_dora=True`; set `use_dora_adaptive=True` instead."
            )
        super().__post_init__()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's method. It also adds a section on AdaDoRA to PEFT's model card in the folder."""
        super().save_pretrained(save_directory, **kwargs)
        if self.use_dora_adaptive:
            add_card_section(save_directory)

    def to_dict(self) -> dict[str, Any]:
        """
        Return the dictionary that `save_pretrained` writes.

        AdaDoRA's dictionary also sets `use_dora`. Programs without AdaDoRA then refuse the adapter instead of using it
        without its magnitudes.
        """
        rank_pattern = None if self.saves_all_ranks else self.rank_pattern
        use_dora = self.use_dora or self.use_dora_adaptive
        return {**super().to_dict(), "use_dora": use_dora, "rank_pattern": rank_pattern}
