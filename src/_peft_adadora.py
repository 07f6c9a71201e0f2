"""Lay AdaDoRA's modules over the installed PEFT, like a transparent sheet.

`peft_adadora.pth` imports this module when Python starts, so at first it imports only what Python has loaded already.
Its finder gives each name in `OVERLAID` our module. A package also gets our folder in front of the installed one on
its `__path__`: our modules win over installed ones of the same name, and all others come from the installed package.

`stock_<module>`, in the same package, is the installed version of a module that we override, for our classes to
subclass. The package itself is `stock___init__`. The relative imports of a stock module get our modules.
"""

import os
import sys


OVERLAID = ("peft.helpers", "peft.tuners.adalora", "peft.tuners.mixed.model")  # modules and packages of PEFT
SUPPORTED_PEFT = ">=0.21.0,<0.22"


def is_supported(version: str) -> bool:
    """Whether the PEFT version, such as `"0.21.2"` or `"0.21.3.dev0"`, lies in `SUPPORTED_PEFT`."""
    return version.split(".")[:2] == ["0", "21"]


def overlay_path(name: str) -> str:
    """Return the path of our version of a module of PEFT, without `.py`. For a package this is a folder."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "peft_adadora")  # an editable install has `peft` beside this file
    root = installed if os.path.isdir(os.path.join(installed, "peft")) else here
    return os.path.join(root, *name.split("."))


class OverlayFinder:
    """Find the modules in `OVERLAID` and their `stock_` versions. Other finders find everything else."""

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
        version = getattr(sys.modules.get("peft"), "__version__", "unknown")
        if spec is None or not is_supported(version):
            if name == "peft.tuners.adalora":  # one warning is enough
                warnings.warn(
                    f"peft-adadora supports peft {SUPPORTED_PEFT} but peft {version} is installed, so AdaDoRA is off "
                    "and PEFT runs as it is: it will refuse use_dora_adaptive as an unknown argument. Install a "
                    "supported peft, or uninstall peft-adadora."
                )
            return spec
        ours = overlay_path(name)
        if spec.submodule_search_locations is None:
            return spec_from_file_location(name, ours + ".py")
        folders = [ours, *spec.submodule_search_locations]
        return spec_from_file_location(name, os.path.join(ours, "__init__.py"), submodule_search_locations=folders)


sys.meta_path.insert(0, OverlayFinder)
