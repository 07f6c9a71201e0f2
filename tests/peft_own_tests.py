"""Runs PEFT's own tests for AdaLoRA, from its source distribution, with and without us, and compares each outcome.

    python tests/peft_own_tests.py FOLDER

FOLDER is where the source distribution is unpacked and the two JUnit reports are written. Tests that need a hub fail
or are skipped both times. Exits with 1 if the outcome of any test differs.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path


SELECTION = "adalora or AdaLora or AdaLoRA"

# pytest plugins. PEFT's tests leave the offline mode, and the hub's client waits half a minute before it gives up.
PLUGINS = {
    "no_waiting": """
import time, types
import huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
""",
    "without_us": """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") != "_peft_adadora"]
""",
}


def unpack_source_distribution(folder: Path) -> Path:
    """Fetch and unpack the source distribution of the installed PEFT. Returns its root folder."""
    name = f"peft-{version('peft')}"
    root = folder / name
    if not root.exists():
        command = [
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "peft",
            "--dest",
            folder,
            name.replace("-", "=="),
        ]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    (root / "tests" / "__init__.py").touch()
    return root


def run(root: Path, report: Path, with_us: bool) -> dict[str, str]:
    """Run the tests offline. Returns the outcome of each: passed, skipped, failed or error."""
    for name, code in PLUGINS.items():
        (root / f"{name}.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "tests", "-k", SELECTION, "-n", str(os.cpu_count()), "-q"]
    command += ["--continue-on-collection-errors", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
    for name in ["no_waiting"] if with_us else ["no_waiting", "without_us"]:
        command += ["-p", name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, check=False)
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("skipped", "failure", "error")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    root = unpack_source_distribution(folder)
    outcomes = {}
    for label, with_us in (("without us", False), ("with us", True)):
        outcomes[label] = run(root, folder / f"{label.replace(' ', '-')}.xml", with_us)
        print(f"{label}: {dict(sorted(Counter(outcomes[label].values()).items()))}", flush=True)
    without, with_ = outcomes["without us"], outcomes["with us"]
    different = sorted(test for test in without.keys() | with_.keys() if without.get(test) != with_.get(test))
    for test in different:
        print(f"differs: {test}: {without.get(test)} without us, {with_.get(test)} with us")
    if "passed" not in without.values():
        print("no test passed without us: nothing was compared")
        return 1
    print(f"{len(different)} outcomes differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
