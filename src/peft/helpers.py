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

"""PEFT's helpers, with a `DoraCaching` that caches m / n of AdaDoRA too."""

from typing import Any

from . import stock_helpers as stock
from .stock_helpers import *
from .tuners.adalora.cache import Cache, swap_cache


class DoraCaching(stock.DoraCaching):
    __doc__ = stock.DoraCaching.__doc__

    def __enter__(self) -> None:
        super().__enter__()
        # each use has a cache of its own, because weights may be written between two of them
        self.cache_before = swap_cache(Cache(in_training=False) if self.enabled else None)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        swap_cache(self.cache_before)
        self.cache_before = None  # as PEFT: the outermost of several uses of one object ends caching

    def __call__(self, enabled: bool = True) -> None:
        super().__call__(enabled)
        swap_cache(Cache(in_training=False) if enabled else None)


def __getattr__(name: str) -> Any:
    return getattr(stock, name)
