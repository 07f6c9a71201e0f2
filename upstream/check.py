"""Applies the change to PEFT's source distribution, and runs PEFT's tests and this project's on the result.

    python upstream/check.py FOLDER

In FOLDER it unpacks the pinned source distribution of PEFT twice and patches one: our modules of `peft.tuners.adalora`
that PEFT does not have are copied, and `adadora.patch` edits those that it has. Both are installed in turn in a fresh
environment without `peft-adadora`. PEFT's own tests must have the same outcomes with the change as without it, and the
behavioural tests of this project, the same files, must pass. Where PEFT has a newer release, it tells which edits no
longer apply to it.

One line of the copied modules changes: PEFT's own `layer`, which the overlay calls `stock_layer`, is `layer` in there.

Exits with 1 if anything differs or fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent
PATCH = HERE / "adadora.patch"
PATCH_OF_TESTS = HERE / "tests.patch"
OURS = ROOT / "src" / "peft" / "tuners" / "adalora"
# PEFT's tests for what the change could touch: AdaLoRA wherever it is tested, and these files as a whole
FILES_OF_PEFT = ["test_mixed.py", "test_config.py", "test_lora_variants.py"]
SELECTION = "adalora or AdaLora or AdaLoRA"
# PEFT's tests leave the offline mode, and the client of the hub waits half a minute before it gives up
NO_WAITING = """
import time, types
import huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
"""


def fetch(folder: Path, *requirement: str) -> Path | None:
    """
    Download a source distribution of PEFT and unpack it. Returns its root, or `None` if there is no such release.
    """
    downloads = folder / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    result = subprocess.run([*command, "--dest", downloads, *requirement], capture_output=True, text=True, check=False)
    archives = list(downloads.glob("peft-*.tar.gz"))
    if not archives:
        if "No matching distribution" in result.stderr:
            return None
        raise SystemExit(result.stderr)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / archives[0].name.removesuffix(".tar.gz")


def apply(tree: Path, patch: Path = PATCH, reject: bool = False) -> subprocess.CompletedProcess:
    """Copy our new modules into PEFT's tree and edit its own files."""
    target = tree / "src" / "peft" / "tuners" / "adalora"
    for module in OURS.glob("*.py"):
        if not (target / module.name).exists():
            code = module.read_text()
            (target / module.name).write_text(code.replace("from . import stock_layer as", "from . import layer as"))
    # outside of any repository, or git takes the paths as those of the repository that FOLDER is in
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = ["git", "apply", "--unidiff-zero", *(["--reject"] if reject else []), str(patch)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def changed_lines() -> str:
    """How many lines of each of PEFT's files the patch adds and removes."""
    counts = {}
    for line in PATCH.read_text().splitlines():
        if line.startswith("+++ "):
            name = line.rpartition("/")[2]
        elif line.startswith(("+", "-")) and not line.startswith("--- "):
            counts.setdefault(name, Counter())[line[0]] += 1
    counts["in all"] = sum(counts.values(), Counter())
    return ", ".join(f"{name} +{count['+']} -{count['-']}" for name, count in counts.items())


def make_environment(folder: Path) -> Path:
    """A fresh environment with everything but PEFT that the tests need. Returns its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    extras = re.search(r"^peft-tests = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    # torch goes first and alone, so that nothing resolves to a build with CUDA packages
    subprocess.run([*pip, "torch"], check=True)
    needed = [
        "accelerate",
        "bitsandbytes",
        "deepspeed",
        "hypothesis",
        "psutil",
        "pytest-xdist",
        "pyyaml",
        "torchao",
        "tqdm",
        "transformers",
        "trl",
    ]
    subprocess.run([*pip, *needed, *re.findall(r'"([^"]+)"', extras)], check=True)
    # what TRL depends on
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "peft", "peft-adadora"], check=True)
    return python


def run_tests(python: Path, folder: Path, report: Path, arguments: list[str]) -> dict[str, str]:
    """Run tests offline from a folder. Returns the outcome of each: passed, skipped, failure or error."""
    command = [
        python,
        "-m",
        "pytest",
        "-n",
        str(os.cpu_count()),
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("skipped", "failure", "error")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return outcomes


def run_tests_of_peft(python: Path, tree: Path, report: Path) -> dict[str, str]:
    (tree / "tests" / "__init__.py").touch()
    (tree / "no_waiting.py").write_text(NO_WAITING)
    options = ["-p", "no_waiting", "--continue-on-collection-errors", "-o", "addopts="]
    outcomes = run_tests(python, tree, report, [*options, *(f"tests/{name}" for name in FILES_OF_PEFT)])
    others = [f"--ignore=tests/{name}" for name in FILES_OF_PEFT]
    return outcomes | run_tests(python, tree, report, [*options, "tests", "-k", SELECTION, *others])


def has_style_of_peft(python: Path, tree: Path) -> bool:
    """Check what the change touches with what PEFT's `make quality` runs: ruff, in PEFT's version, and doc-builder."""
    version = re.search(r'^required-version = "(.*)"', (tree / "pyproject.toml").read_text(), re.MULTILINE)[1]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"ruff{version}"], check=True)
    # doc-builder imports the two others, but does not depend on them
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", "hf-doc-builder", "black", "requests"], check=True)
    touched = ["src/peft/tuners/adalora", "tests/test_custom_models.py", "tests/test_config.py"]
    commands = [
        [python, "-m", "ruff", "check", "--quiet", *touched],
        [python, "-m", "ruff", "format", "--check", "--quiet", *touched],
        [python.with_name("doc-builder"), "style", *touched, "--max_len", "119", "--check_only"],
    ]
    exit_codes = [subprocess.run(command, cwd=tree, check=False).returncode for command in commands]
    return not any(exit_codes)


def run_new_tests_of_peft(python: Path, tree: Path, report: Path) -> dict[str, str]:
    """Add AdaDoRA to the tables of PEFT's tests, and run what they make of it."""
    result = apply(tree, PATCH_OF_TESTS)
    if result.returncode:
        raise SystemExit(f"{PATCH_OF_TESTS.name} does not apply: {result.stderr}")
    options = ["-p", "no_waiting", "-o", "addopts=", "tests/test_custom_models.py", "-k", "AdaDoRA"]
    return run_tests(python, tree, report, options)


def summary(outcomes: dict[str, str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(outcomes.values()).items()))


def report_newer_release(folder: Path, pinned: Path) -> None:
    newer = fetch(folder, f"peft>{pinned.name.removeprefix('peft-')}")
    if newer is None:
        print("there is no newer release of PEFT")
        return
    result = apply(newer, reject=True)
    rejected = sorted(newer.rglob("*.rej"))
    print(f"{newer.name}: " + ("all edits apply" if result.returncode == 0 else "edits that no longer apply:"))
    for path in rejected:
        print(path.relative_to(newer).with_suffix(""), path.read_text(), sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only-ours", action="store_true", help="leave out PEFT's own tests")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pinned = fetch(folder, "--require-hashes", "-r", str(HERE / "requirements.txt"))
    if pinned is None:
        raise SystemExit(f"the release in {HERE / 'requirements.txt'} cannot be had")
    patched = folder / "patched"
    shutil.rmtree(patched, ignore_errors=True)
    shutil.copytree(pinned, patched)
    result = apply(patched)
    if result.returncode:
        raise SystemExit(f"the patch does not apply to {pinned.name}: {result.stderr}")
    print(f"{pinned.name}: lines of its files changed: {changed_lines()}", flush=True)

    python = make_environment(folder / "venv")
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--force-reinstall",
        "--disable-pip-version-check",
    ]
    outcomes = {}
    for name, tree in [] if options.only_ours else [("without the change", pinned), ("with the change", patched)]:
        subprocess.run([*install, tree], check=True)
        outcomes[name] = run_tests_of_peft(python, tree, folder / "peft.xml")
        print(f"PEFT's tests {name}: {summary(outcomes[name])}", flush=True)
    subprocess.run([*install, patched], check=True)
    ours = run_tests(python, ROOT / "tests", folder / "ours.xml", ["-m", "not overlay and not soak", "."])
    print(f"this project's behavioural tests: {summary(ours)}", flush=True)
    (patched / "no_waiting.py").write_text(NO_WAITING)
    new = run_new_tests_of_peft(python, patched, folder / "new.xml")
    print(f"PEFT's tests of custom models, with AdaDoRA in their table: {summary(new)}", flush=True)
    has_style = has_style_of_peft(python, patched)
    print(f"PEFT's linters, ruff and doc-builder: {'clean' if has_style else 'not clean'}", flush=True)

    without, with_ = outcomes.get("without the change", {}), outcomes.get("with the change", {})
    different = sorted(test for test in without.keys() | with_.keys() if without.get(test) != with_.get(test))
    for test in different:
        print(f"differs: {test}: {without.get(test)} without the change, {with_.get(test)} with it")
    failed = sorted(test for test, outcome in (ours | new).items() if outcome in ("failure", "error"))
    for test in failed:
        print(f"failed: {test}")
    report_newer_release(folder, pinned)
    nothing_ran = (
        "passed" not in ours.values()
        or "passed" not in new.values()
        or (not options.only_ours and "passed" not in without.values())
    )
    return 1 if different or failed or nothing_ran or not has_style else 0


if __name__ == "__main__":
    sys.exit(main())
