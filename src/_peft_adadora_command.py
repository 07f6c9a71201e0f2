"""The command `peft-adadora`, and what it says about an environment.

It lies beside `peft_adadora` and not in it, because that package refuses to be imported where AdaDoRA cannot be
active, and to say why is what the command is for.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Optional


PACKAGES = ("peft-adadora", "peft", "torch", "transformers", "accelerate", "safetensors", "matplotlib")
START_UP_FILE = "peft_adadora.pth"

# in an interpreter of its own, which nothing has been imported into that a user's would not have
PROBE = """
import json, sys, warnings
found = {"start_up": "_peft_adadora" in sys.modules, "hooks": list(map(repr, sys.meta_path)), "peft": None,
         "adalora": None, "active": False, "error": None}
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        found["peft"] = getattr(peft, "__version__", None), str(getattr(peft, "__file__", None))
        import peft.tuners.adalora as adalora
    found["adalora"] = adalora.__file__
    found["active"] = "use_dora_adaptive" in peft.AdaLoraConfig.__dataclass_fields__
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""


@dataclass
class Diagnosis:
    """
    Whether AdaDoRA is active in an environment. `str(diagnosis)` is what `peft-adadora doctor` prints.

    Args:
        active (`bool`):
            Whether `peft.AdaLoraConfig` has `use_dora_adaptive` in a new interpreter.
        versions (`dict[str, str]`):
            Versions of Python and of the packages that are installed, by their names.
        places (`dict[str, str]`):
            Where Python, PEFT and its AdaLoRA are, as far as is known.
        problem (`str`, *optional*):
            Why it is not active.
        fix (`str`, *optional*):
            What to do about it.
    """

    active: bool
    versions: dict[str, str]
    places: dict[str, str]
    problem: Optional[str] = None
    fix: Optional[str] = None

    def __str__(self) -> str:
        lines = [f"{name:<16}{text}" for name, text in (*self.versions.items(), *self.places.items())]
        lines += ["", f"AdaDoRA is {'active' if self.active else 'not active'} in this environment."]
        if not self.active:
            lines += [f"Why: {self.problem}", f"Fix: {self.fix}"]
        return "\n".join(lines)


def doctor() -> Diagnosis:
    """Find out, in a new interpreter like this one, whether AdaDoRA is active, and if not, why not and what to do."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    found = _probe()
    places = {"interpreter": sys.executable}
    if found["peft"]:
        places["peft from"] = os.path.dirname(found["peft"][1])
    if found["adalora"]:
        places["AdaLoRA from"] = os.path.dirname(found["adalora"])
    problem, fix = (None, None) if found["active"] else _explain(found, versions)
    return Diagnosis(found["active"], versions, places, problem, fix)


def _probe() -> dict[str, Any]:
    flags = [flag for flag, is_set in (("-S", sys.flags.no_site), ("-s", sys.flags.no_user_site)) if is_set]
    done = subprocess.run([sys.executable, *flags, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"start_up": True, "peft": None, "adalora": None, "active": False, "error": error}


def _explain(found: dict[str, Any], versions: dict[str, str]) -> tuple[str, str]:
    """Why AdaDoRA is not active, and what to do about it."""
    import _peft_adadora as overlay

    install_peft = f'pip install "peft{overlay.SUPPORTED_PEFT}"'
    if found["peft"] is None and versions["peft"] == "not installed" and found["error"]:
        return "PEFT is not installed.", install_peft
    if found["peft"] is None:
        return f"PEFT cannot be imported ({found['error']}).", "Repair or install what the error names."
    peft_version, peft_file = found["peft"]
    if peft_version is None:
        return (
            f"What is imported as `peft` is not PEFT but {peft_file}.",
            "Rename that folder or file, or take it off the path, so that the installed PEFT is found.",
        )
    if not overlay.is_supported(peft_version):
        return f"peft {peft_version} is not supported, only peft {overlay.SUPPORTED_PEFT} is.", install_peft
    if found["error"]:
        return f"PEFT's AdaLoRA cannot be imported ({found['error']}).", "pip install --force-reinstall peft-adadora"
    if found["start_up"]:
        return (
            (
                f"Another import hook brought PEFT's AdaLoRA from {found['adalora']}; the hooks are "
                f"{', '.join(found['hooks'])}."
            ),
            "Remove the hook in front of OverlayFinder.",
        )
    first = "import `peft_adadora` before `peft`"
    if sys.flags.no_site:
        return "Python was started with -S and reads no start-up files.", f"Start it without -S, or {first}."
    here = os.path.dirname(os.path.abspath(overlay.__file__))
    if os.path.isfile(os.path.join(here, START_UP_FILE)):
        return (
            f"{here} is no site folder, as after `pip install --target`, so Python reads no {START_UP_FILE} in it.",
            f"Install with pip into an environment, or {first}.",
        )
    return (
        f"The start-up file {START_UP_FILE} is missing, so nothing lays AdaDoRA over PEFT.",
        f"pip install --force-reinstall --no-deps peft-adadora, or {first}.",
    )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command. Returns its exit code: 1 if there is no report to make, or AdaDoRA is not active."""
    parser = argparse.ArgumentParser(
        prog="peft-adadora", description="See what AdaDoRA learned, and whether it is active."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="ranks, magnitudes and budget of an adapter or a training run")
    report.add_argument("path", help="a saved adapter, a checkpoint, or the output folder of a Trainer")
    report.add_argument("--output", metavar="FOLDER", help="also write a page and pictures here")
    report.add_argument(
        "--base-model",
        metavar="PATH_OR_NAME",
        help="where the base weights are, to tell the drift of the magnitudes (default: those that the adapter names, "
        "if they are on this machine)",
    )
    commands.add_parser("doctor", help="versions, and whether AdaDoRA is active; if not, why not and what to do")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        diagnosis = doctor()
        print(diagnosis)
        return 0 if diagnosis.active else 1
    try:
        _report(options.path, options.output, options.base_model)
    except (ImportError, OSError, ValueError) as error:
        print(f"peft-adadora: {error}", file=sys.stderr)
        return 1
    return 0


def _report(path: str, output: Optional[str], base_model: Optional[str]) -> None:
    from peft_adadora.report import read_report

    report = read_report(path, base_model)
    print(report)
    if output is None:
        return
    try:
        from peft_adadora.pictures import write
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError('there are no pictures without matplotlib: pip install "peft-adadora[plot]"') from error
    print(f"\nWritten: {write(report, output)}")


if __name__ == "__main__":
    raise SystemExit(main())
