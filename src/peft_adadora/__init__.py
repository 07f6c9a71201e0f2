"""AdaDoRA for PEFT: `AdaLoraConfig(..., use_dora_adaptive=True)`, for which nothing here has to be imported.

What there is: `AdaLoraCallback` for the Trainer of transformers (also in `peft.tuners.adalora`), `read_report` and
`figures` to see what a run has learned, and `doctor` to see whether AdaDoRA is active. Where start-up files are not
read (`python -S`, or `pip install --target` with `PYTHONPATH`), import this package before `peft`.

Raises `ImportError` when PEFT is not installed or outside the supported range, and when `peft.tuners.adalora` was
already imported without AdaDoRA.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import _peft_adadora as _overlay


__version__ = version("peft-adadora")

try:
    _peft_version = getattr(sys.modules.get("peft"), "__version__", None) or version("peft")
except PackageNotFoundError:
    _peft_version = ""
if not _overlay.is_supported(_peft_version):
    raise ImportError(
        f"peft-adadora {__version__} supports peft {_overlay.SUPPORTED_PEFT} but "
        f"{f'peft {_peft_version}' if _peft_version else 'no peft'} is installed; install a supported peft."
    )

_adalora = sys.modules.get(_overlay.PACKAGE)
if _adalora is not None and _overlay.overlay_folder() not in _adalora.__path__:
    raise ImportError(
        f"{_overlay.PACKAGE} was imported before peft_adadora could add AdaDoRA to it; restart Python and import "
        "peft_adadora before peft."
    )


# imported when they are asked for, because some import torch and others matplotlib
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
