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

import os
from typing import Any, Optional


class AdaDoraConfigMixin:
    """
    How a config with `use_dora_adaptive` is saved and loaded. It goes in front of the config's other base classes.
    """

    # the folder that it was loaded from
    loaded_from: Optional[str] = None

    def to_dict(self) -> dict[str, Any]:
        """
        The configuration as a dictionary, as it is saved.

        That of AdaDoRA says `use_dora`, too, so that a PEFT without AdaDoRA refuses to load the adapter, as do
        programs that know no DoRA, instead of using it without its magnitudes.
        """
        config = {**super().to_dict(), "use_dora": self.use_dora or self.use_dora_adaptive}
        if self.weights_sha256 is None:
            del config["weights_sha256"]
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any
    ) -> "AdaDoraConfigMixin":
        """PEFT's `from_pretrained`, which also notes the folder, so that the weights in there can be checked."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.loaded_from = os.path.join(pretrained_model_name_or_path, subfolder or "")
        return config
