"""AdaDoRA for PEFT. `AdaLoraConfig(..., use_dora_adaptive=True)` works without importing this package.

`AdaLoraCallback` trains in the Trainer of transformers. `read_report` and `figures` show what a run learned. `doctor`
tells whether AdaDoRA is active.

Where Python reads no start-up files, as with `python -S`, import this package before `peft`. The import raises
`ImportError` if PEFT is missing, if its version is untested and its files differ from the tested ones, or if
`peft.tuners.adalora` was imported without AdaDoRA.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import _peft_adadora as _overlay


__version__ = version("peft-adadora")

try:
    _peft_version = getattr(sys.modules.get("peft"), "__version__", None) or version("peft")
except PackageNotFoundError:
    _peft_version = ""
_needs = f'peft-adadora needs: pip install "peft{_overlay.TESTED_PEFT}"'
if not _peft_version:
    raise ImportError(f"PEFT is not installed, but {_needs}")
_reason = _overlay.why_off(_peft_version, getattr(find_spec("peft"), "origin", None))
if _reason is not None:
    raise ImportError(f"peft {_peft_version} is installed and {_reason}, but {_needs}")

_adalora = sys.modules.get("peft.tuners.adalora")
if _adalora is not None and _overlay.overlay_path(_adalora.__name__) not in _adalora.__path__:
    raise ImportError("PEFT was imported without AdaDoRA; restart Python and import peft_adadora before peft.")

# these modules import torch or matplotlib, so they are imported on first use
_PLACES = {
    "AdaLoraCallback": "peft.tuners.adalora",
    "doctor": "_peft_adadora_command",
    "read_report": "peft_adadora.report",
    "figures": "peft_adadora.pictures",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
