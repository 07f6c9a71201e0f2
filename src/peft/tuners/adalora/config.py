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
from pathlib import Path
from typing import Any, Optional

from . import stock_config as stock


CARD_SECTION = """## AdaDoRA

This adapter needs PEFT with AdaDoRA (the package `peft-adadora`). To use it elsewhere, merge it first:

```python
model = PeftModel.from_pretrained(base_model, "path/or/name/of/this/adapter").merge_and_unload()
model.save_pretrained("merged")
```"""


@dataclass
class AdaLoraConfig(stock.AdaLoraConfig):
    """
    PEFT's configuration of an [`AdaLoraModel`], with AdaDoRA. All arguments but the one below are those of the
    installed PEFT's `AdaLoraConfig`.

    Args:
        use_dora_adaptive (`bool`):
            Use AdaDoRA: besides the prunable update, which decides the direction of each row of the adapted weight,
            learn the length of the row (its magnitude), as DoRA does (https://huggingface.co/papers/2402.09353).
            Pruning never touches the magnitudes. Such an adapter has to be the only active one, and once merged it
            cannot be unmerged. Defaults to `False`, which is plain AdaLoRA.
        orth_reg_decoupled (`bool`):
            Decouple AdaLoRA's orthogonality regularization from the loss, as AdamW decouples weight decay: after each
            optimizer step `update_and_allocate(step, optimizer)` moves A and B towards orthogonality, by their
            learning rate times `orth_reg_weight` (10 is a good weight; the formula is in `regularization.py`). The
            loss is then the model's own. Defaults to `False`, which adds the term to the loss.

    Raises:
        `ValueError`: If `use_dora=True` without `use_dora_adaptive=True`, or if a decoupled regularization has a
            negative weight; the rest as in the installed PEFT.
    """

    # No fields, so not saved. `AdaLoraCallback` sets this while the Trainer may write a checkpoint, which has pruned
    # triplets too, as zeros.
    saves_all_ranks = False

    use_dora_adaptive: bool = field(
        default=False,
        metadata={
            "help": "Use AdaDoRA: learn the length of each row of the adapted weight, as DoRA does, besides AdaLoRA's "
            "prunable update. Such an adapter has to be the only active one, and cannot be unmerged once merged.",
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

    # adapters of the first release have it; it is neither read nor saved again
    weights_sha256: InitVar[Optional[str]] = None

    def __post_init__(self, weights_sha256: Optional[str]):
        if self.use_dora_adaptive:
            self.use_dora = False  # see `to_dict`
        if self.use_dora:
            raise ValueError(
                "ADALORA does not support DoRA through `use_dora=True`; set `use_dora_adaptive=True` instead."
            )
        if self.orth_reg_decoupled and self.orth_reg_weight < 0:
            raise ValueError(f"`orth_reg_weight={self.orth_reg_weight}` is negative; set it to 0 or more.")
        super().__post_init__()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's method. PEFT's model card in the folder gets a section on how to use an AdaDoRA adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        if self.use_dora_adaptive and card.is_file():
            text = card.read_text(encoding="utf-8")
            if "library_name: peft" in text and CARD_SECTION not in text:
                card.write_text(f"{text.rstrip()}\n\n{CARD_SECTION}\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """
        The configuration as a dictionary, as it is saved.

        AdaDoRA's also says `use_dora`, so that programs without AdaDoRA refuse the adapter instead of using it without
        its magnitudes.
        """
        rank_pattern = None if self.saves_all_ranks else self.rank_pattern
        use_dora = self.use_dora or self.use_dora_adaptive
        return {**super().to_dict(), "use_dora": use_dora, "rank_pattern": rank_pattern}
