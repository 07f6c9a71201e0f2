"""The command `peft-adadora`, and its diagnosis of an environment."""

# outside the package `peft_adadora`, whose import fails where AdaDoRA cannot be active

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any, Optional

import _peft_adadora as overlay


PACKAGES = ("peft-adadora", "peft", "torch", "transformers", "accelerate", "safetensors", "matplotlib")
MISSING = "not installed"

# runs in a new interpreter, where only start-up files have imported modules
PROBE = """
import json, sys, warnings
warnings.simplefilter("ignore")
found = {"start_up": "_peft_adadora" in sys.modules, "hooks": str(sys.meta_path), "facts": {}}
try:
    import peft
    found["facts"]["peft from"], found["version"] = str(peft.__file__), getattr(peft, "__version__", None)
    import peft.tuners.adalora as adalora
    found["facts"]["AdaLoRA from"], fields = adalora.__file__, peft.AdaLoraConfig.__dataclass_fields__
    found["active"] = "use_dora_adaptive" in fields
    if found["active"] and "_peft_adadora_newer" in sys.modules:
        sys.modules["_peft_adadora_newer"].check_values()
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""


@dataclass
class Diagnosis:
    """Whether AdaDoRA is active in an environment. `print(diagnosis)` prints the text of `peft-adadora doctor`."""

    facts: dict[str, str]  # versions, and files of Python, PEFT and its AdaLoRA
    problem: Optional[str] = None  # the reason why AdaDoRA is not active
    fix: Optional[str] = None  # what to do about it

    @property
    def active(self) -> bool:
        """Whether `peft.AdaLoraConfig` has `use_dora_adaptive` in a new interpreter."""
        return self.problem is None

    def __str__(self) -> str:
        lines = [f"{name:<16}{text}" for name, text in self.facts.items()]
        lines += ["", f"AdaDoRA is {'active' if self.active else 'not active'} in this environment."]
        return "\n".join(lines if self.active else [*lines, f"Why: {self.problem}", f"Fix: {self.fix}"])


def doctor() -> Diagnosis:
    """Find out in a new interpreter whether AdaDoRA is active. If not, say why and how to fix it."""
    flags = ["-S"] * sys.flags.no_site + ["-s"] * sys.flags.no_user_site
    done = subprocess.run([sys.executable, *flags, "-c", PROBE], capture_output=True, text=True, check=False)
    crash = {"facts": {}, "error": (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]}
    found = crash if done.returncode else json.loads(done.stdout.splitlines()[-1])
    facts = {"python": sys.version.split()[0], **{package: _version(package) for package in PACKAGES}}
    facts |= {"interpreter": sys.executable, **found["facts"]}
    active = found.get("active") and "error" not in found
    if active:
        facts["tested with"] = f"peft {overlay.TESTED_PEFT}"
        if not overlay.is_tested(found["version"]):
            facts["tested with"] += (
                f", not {found['version']}, but the files that AdaDoRA overrides are the same, and the check of its "
                "values passes"
            )
    return Diagnosis(facts, *(() if active else _explain(found)))


def _version(package: str) -> str:
    return next((found.version for found in distributions(name=package)), MISSING)


def _explain(found: dict[str, Any]) -> tuple[str, str]:
    install = f'pip install "peft{overlay.TESTED_PEFT}"'
    reinstall = "Install peft-adadora again, with `pip install --force-reinstall --no-deps .` in its clone"
    first = "or import `peft_adadora` before `peft`."
    here = os.path.dirname(os.path.abspath(overlay.__file__))
    if "version" not in found and _version("peft") == MISSING:
        return "PEFT is not installed.", install
    if "version" not in found:
        return f"PEFT cannot be imported ({found['error']}).", "Repair or install what the error names."
    if found["version"] is None:
        return f"`peft` is not PEFT but {found['facts']['peft from']}.", "Rename that file, or take it off the path."
    reason = overlay.why_off(found["version"], found["facts"]["peft from"])
    if reason is not None:
        return f"peft {found['version']} is not tested, only peft {overlay.TESTED_PEFT} is, and {reason}.", install
    if found.get("active"):
        return found["error"].partition(": ")[2], install  # the check of its values fails
    if "error" in found:
        return f"PEFT's AdaLoRA cannot be imported ({found['error']}).", f"{reinstall}."
    if found["start_up"]:
        return f"Another import hook comes first: {found['hooks']}.", "Remove the hook in front of OverlayFinder."
    if sys.flags.no_site:
        return "Python was started with -S and reads no start-up files.", f"Start it without -S, {first}"
    if os.path.isfile(os.path.join(here, "peft_adadora.pth")):
        return f"{here} is no site folder, so Python ignores start-up files there.", f"Install with pip, {first}"
    return "The start-up file peft_adadora.pth is missing.", f"{reinstall}, {first}"


def main(arguments: Optional[list[str]] = None) -> int:
    """Run the command. Returns its exit code: 1 after an error, or if AdaDoRA is not active."""
    parser = argparse.ArgumentParser("peft-adadora", description="See what AdaDoRA learned, or whether it is active.")
    parser.add_argument("--version", action="version", version=f"peft-adadora {_version('peft-adadora')}")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="ranks, magnitudes and budget of an adapter or a training run")
    report.add_argument("path", help="a saved adapter, a checkpoint, or the output folder of a Trainer")
    report.add_argument("--output", metavar="FOLDER", help="also write a page and pictures to this folder")
    report.add_argument("--base-model", metavar="PATH_OR_NAME", help="base weights (default: those the adapter names)")
    commands.add_parser("doctor", help="versions, and whether AdaDoRA is active; if not, why and how to fix it")
    options = parser.parse_args(arguments)
    try:
        if options.command == "doctor":
            diagnosis = doctor()
            print(diagnosis, flush=True)
            return int(not diagnosis.active)
        if options.output and os.path.isfile(options.output):
            raise ValueError(f"{options.output} is a file; name a folder for --output.")
        from peft_adadora.report import read_report

        result = read_report(options.path, options.base_model)
        print(result, flush=True)
        if options.output:
            from peft_adadora.page import write

            print(f"\nWritten: {write(result, options.output)}", flush=True)
        return 0
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):  # so that the flush at exit does not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"peft-adadora: {error}", file=sys.stderr)
        return 1
