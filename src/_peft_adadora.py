"""Put AdaDoRA's modules in front of the installed PEFT's.

`peft_adadora.pth` imports this module when Python starts, so it imports only modules that Python has already loaded.
Its finder returns our module for each name in `OVERLAID`. A package also gets our folder before the installed one on
its `__path__`. Our modules win over installed ones of the same name. All others come from the installed package.

On a PEFT of an untested version, this happens only if its files under our modules equal those of a tested version.

`stock_<module>`, in the same package, is the installed version of a module that we override. Our classes subclass it.
The package itself is `stock___init__`. The relative imports of a stock module find our modules.
"""

import os
import sys


OVERLAID = (  # modules and packages of PEFT
    "peft.helpers",
    "peft.optimizers.lorafa",
    "peft.tuners.adalora",
    "peft.tuners.mixed.model",
)
TESTED_PEFT = ">=0.21.0,<0.22"


def is_tested(version: str) -> bool:
    """Whether the PEFT version, such as `"0.21.2"` or `"0.21.3.dev0"`, lies in `TESTED_PEFT`."""
    return version.split(".")[:2] == ["0", "21"]


def why_off(version: str, file: str | None) -> str | None:
    """Return why AdaDoRA is off for a PEFT, given its version and its `__init__.py`, or `None` if it is on."""
    if is_tested(version):
        return None
    from _peft_adadora_newer import file_difference

    return file_difference(os.path.dirname(file or ""))


def overlay_path(name: str) -> str:
    """Return the path of our version of a module of PEFT, without `.py`. For a package this is a folder."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "peft_adadora")  # an editable install has `peft` beside this file
    root = installed if os.path.isdir(os.path.join(installed, "peft")) else here
    return os.path.join(root, *name.split("."))


class OverlayFinder:
    """Find the modules in `OVERLAID` and their `stock_` versions. Leave all others to other finders."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        package, is_stock, module = name.rpartition(".stock_")
        if not {name, package, f"{package}.{module}"}.intersection(OVERLAID):
            return None
        import warnings
        from importlib.machinery import PathFinder
        from importlib.util import spec_from_file_location

        if is_stock:
            file = os.path.join(list(path)[-1], module + ".py")
            return spec_from_file_location(name, file, submodule_search_locations=None)  # `__init__.py` as a module
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        peft = sys.modules.get("peft")
        version = getattr(peft, "__version__", "unknown")
        reason = why_off(version, getattr(peft, "__file__", None))
        if name == "peft.tuners.adalora" and not is_tested(version):  # one warning is enough
            outcome = "its AdaLoRA files equal the tested ones, so AdaDoRA is on and checks its first adapter."
            if reason is not None:
                outcome = (
                    f"{reason}, so AdaDoRA is off and PEFT runs unchanged: it will refuse use_dora_adaptive as an "
                    "unknown argument. Install a tested peft, or uninstall peft-adadora."
                )
            installed = f"peft-adadora is tested with peft {TESTED_PEFT} but peft {version} is installed"
            warnings.warn(f"{installed} and {outcome}")
        if reason is not None:
            return spec
        ours = overlay_path(name)
        if spec.submodule_search_locations is None:
            return spec_from_file_location(name, ours + ".py")
        folders = [ours, *spec.submodule_search_locations]
        return spec_from_file_location(name, os.path.join(ours, "__init__.py"), submodule_search_locations=folders)


sys.meta_path.insert(0, OverlayFinder)
