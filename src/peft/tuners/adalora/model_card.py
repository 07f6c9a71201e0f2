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

"""The section of PEFT's model card that says how to use an AdaDoRA adapter."""

from pathlib import Path


CARD_SECTION = """## AdaDoRA

This adapter needs PEFT with AdaDoRA (the package `peft-adadora`). To use it elsewhere, merge it first:

```python
model = PeftModel.from_pretrained(base_model, "path/or/name/of/this/adapter").merge_and_unload()
model.save_pretrained("merged")
```"""


def add_card_section(folder: str) -> None:
    """Add the section to the card in a folder, if PEFT has written one there."""
    card = Path(folder, "README.md")
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if "library_name: peft" in text and CARD_SECTION not in text:
        card.write_text(f"{text.rstrip()}\n\n{CARD_SECTION}\n", encoding="utf-8")
