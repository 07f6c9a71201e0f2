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

import _peft_adadora as overlay


PACKAGES = ("peft-adadora", "peft", "torch", "transformers", "accelerate", "safetensors", "matplotlib")
START_UP_FILE = "peft_adadora.pth"

# in an interpreter of its own, which nothing has been imported into that a user's would not have
PROBE = """
import json, sys, warnings
warnings.simplefilter("ignore")
found = {"start_up": "_peft_adadora" in sys.modules, "hooks": ", ".join(map(repr, sys.meta_path)), "files": {}}
try:
    import peft
    found["files"]["peft"] = str(getattr(peft, "__file__", None))
    found["version"] = getattr(peft, "__version__", None)
    import peft.tuners.adalora as adalora
    found["files"]["AdaLoRA"] = adalora.__file__
    found["active"] = "use_dora_adaptive" in peft.AdaLoraConfig.__dataclass_fields__
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""


@dataclass
class Diagnosis:
    """Whether AdaDoRA is active in an environment. `str(diagnosis)` is what `peft-adadora doctor` prints."""

    facts: dict[str, str]  # versions of Python and the packages, and where Python, PEFT and its AdaLoRA are
    problem: Optional[str] = None  # why it is not active
    fix: Optional[str] = None  # what to do about it

    @property
    def active(self) -> bool:
        """Whether `peft.AdaLoraConfig` has `use_dora_adaptive` in a new interpreter."""
        return self.problem is None

    def __str__(self) -> str:
        lines = [f"{name:<16}{text}" for name, text in self.facts.items()]
        lines += ["", f"AdaDoRA is {'active' if self.active else 'not active'} in this environment."]
        if not self.active:
            lines += [f"Why: {self.problem}", f"Fix: {self.fix}"]
        return "\n".join(lines)


def doctor() -> Diagnosis:
    """Find out, in a new interpreter like this one, whether AdaDoRA is active, and if not, why not and what to do."""
    facts = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    found = _probe()
    facts["interpreter"] = sys.executable
    facts |= {f"{name} from": os.path.dirname(file) for name, file in found["files"].items()}
    problem, fix = (None, None) if found.get("active") else _explain(found, facts["peft"] != "not installed")
    return Diagnosis(facts, problem, fix)


def _probe() -> dict[str, Any]:
    flags = [flag for flag, is_set in (("-S", sys.flags.no_site), ("-s", sys.flags.no_user_site)) if is_set]
    done = subprocess.run([sys.executable, *flags, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"files": {}, "error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def _explain(found: dict[str, Any], is_peft_installed: bool) -> tuple[str, str]:
    """Why AdaDoRA is not active, and what to do about it."""
    install_peft = f'pip install "peft{overlay.SUPPORTED_PEFT}"'
    if "version" not in found and not is_peft_installed:
        return "PEFT is not installed.", install_peft
    if "version" not in found:
        return f"PEFT cannot be imported ({found['error']}).", "Repair or install what the error names."
    if found["version"] is None:
        why = f"What is imported as `peft` is not PEFT but {found['files']['peft']}."
        return why, "Rename that, or take it off the path, so that the installed PEFT is found."
    if not overlay.is_supported(found["version"]):
        return f"peft {found['version']} is not supported, only peft {overlay.SUPPORTED_PEFT} is.", install_peft
    if "error" in found:
        return f"PEFT's AdaLoRA cannot be imported ({found['error']}).", "pip install --force-reinstall peft-adadora"
    if found["start_up"]:
        why = f"Another import hook brought PEFT's AdaLoRA from {found['files']['AdaLoRA']}; the hooks are "
        return f"{why}{found['hooks']}.", "Remove the hook in front of OverlayFinder."
    first = "import `peft_adadora` before `peft`"
    if sys.flags.no_site:
        return "Python was started with -S and reads no start-up files.", f"Start it without -S, or {first}."
    here = os.path.dirname(os.path.abspath(overlay.__file__))
    if os.path.isfile(os.path.join(here, START_UP_FILE)):
        why = f"{here} is no site folder, as after `pip install --target`, so Python reads no {START_UP_FILE} in it."
        return why, f"Install with pip into an environment, or {first}."
    why = f"The start-up file {START_UP_FILE} is missing, so nothing lays AdaDoRA over PEFT."
    return why, f"pip install --force-reinstall --no-deps peft-adadora, or {first}."


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command. Returns its exit code: 1 if there is no report to make, or AdaDoRA is not active."""
    parser = argparse.ArgumentParser("peft-adadora", description="See what AdaDoRA learned, and whether it is active.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="ranks, magnitudes and budget of an adapter or a training run")
    report.add_argument("path", help="a saved adapter, a checkpoint, or the output folder of a Trainer")
    report.add_argument("--output", metavar="FOLDER", help="also write a page and pictures here")
    report.add_argument("--base-model", metavar="PATH_OR_NAME", help="base weights, if not those the adapter names")
    commands.add_parser("doctor", help="versions, and whether AdaDoRA is active; if not, why not and what to do")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        diagnosis = doctor()
        print(diagnosis)
        return 0 if diagnosis.active else 1
    try:
        from peft_adadora.report import read_report

        result = read_report(options.path, options.base_model)
        print(result)
        if options.output is not None:
            from peft_adadora.pictures import write

            print(f"\nWritten: {write(result, options.output)}")
    except (ImportError, OSError, ValueError) as error:
        print(f"peft-adadora: {error}", file=sys.stderr)
        return 1
    return 0
