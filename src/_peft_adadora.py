"""Lays AdaDoRA's modules over the installed PEFT, like a transparent sheet.

The start-up file `peft_adadora.pth` imports this module in every interpreter of the environment, so it imports nothing
that is not loaded anyway, until PEFT's AdaLoRA is imported. It puts a finder on `sys.meta_path`:

- `peft.tuners.adalora` gets our `__init__.py`, and our folder in front of the installed one on its `__path__`. A
  module that we have wins over the installed one of the same name, and any other comes from the installed package.
- `peft.tuners.adalora.stock_<module>` is the installed version of a module that we override (`stock___init__` that of
  the package itself). Ours subclass what is in there. Because it lives in the same package, its relative imports reach
  our classes.
"""

import os
import sys


PACKAGE = "peft.tuners.adalora"
MODULES = ("peft.helpers", "peft.tuners.mixed.model")
SUPPORTED_PEFT = ">=0.21.0,<0.22"


def is_supported(version: str) -> bool:
    """Whether the PEFT version, such as `"0.21.2"` or `"0.21.3.dev0"`, lies in `SUPPORTED_PEFT`."""
    return version.split(".")[:2] == ["0", "21"]


def overlay_folder(package: str = PACKAGE) -> str:
    """The folder of our modules of a package: inside `peft_adadora` when installed, in `src/` when editable."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "peft_adadora", "peft")
    root = installed if os.path.isdir(installed) else os.path.join(here, "peft")
    return os.path.join(root, *package.split(".")[1:])


class OverlayFinder:
    """Import finder for `PACKAGE` and its `stock_` modules; every other name is left to the finders behind it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        package, is_stock, module = name.rpartition(".stock_")
        if PACKAGE not in (name, package) and name not in MODULES and f"{package}.{module}" not in MODULES:
            return None
        import warnings
        from importlib.machinery import PathFinder
        from importlib.util import spec_from_file_location

        if is_stock:
            spec = spec_from_file_location(name, os.path.join(list(path)[-1], module + ".py"))
            spec.submodule_search_locations = None  # a module, even if it comes from an `__init__.py`
            return spec
        spec = PathFinder.find_spec(name, path)
        version = getattr(sys.modules.get("peft"), "__version__", "unknown")
        if spec is None or not is_supported(version):
            warnings.warn(
                f"peft-adadora supports peft {SUPPORTED_PEFT} but peft {version} is installed, so AdaDoRA is off and "
                "PEFT runs as it is: it will refuse use_dora_adaptive as an unknown argument. Install a supported "
                "peft, or uninstall peft-adadora."
            )
            return spec
        if name in MODULES:
            return spec_from_file_location(name, overlay_folder(name) + ".py")
        folders = [overlay_folder(), *spec.submodule_search_locations]
        file = os.path.join(folders[0], "__init__.py")
        return spec_from_file_location(name, file, submodule_search_locations=folders)


sys.meta_path.insert(0, OverlayFinder)
