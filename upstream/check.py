"""Applies the patches to PEFT's source distribution, and runs PEFT's tests and this project's with each of them.

    python upstream/check.py FOLDER                   everything
    python upstream/check.py FOLDER --only method     one patch
    python upstream/check.py FOLDER --only-ours       without PEFT's own tests

In FOLDER it unpacks the pinned source distribution of PEFT, makes an environment without `peft-adadora`, and builds a
tree for each patch (see `series.py`). In each tree PEFT's own tests must have the outcomes that they have without any
patch, and the linters of PEFT must be clean. A patch of AdaDoRA comes after all patches before it, and the tests that
it adds to PEFT's must pass. With the whole series this project's behavioural tests must pass inside of PEFT. The tests
of a fix, and of `decoupled`, must fail without it and pass with it. Tests of PEFT that fail without a patch, for want
of a network, are left out with it.

It prints a table, and exits with 1 if anything differs or fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import series


HERE = Path(__file__).parent
ROOT = HERE.parent
WITHOUT_OVERLAY = "not overlay and not soak and not engines and not types and not project"
# PEFT's tests for what the change could touch: AdaLoRA wherever it is tested, and these files as a whole
FILES_OF_PEFT = ["test_mixed.py", "test_config.py", "test_lora_variants.py"]
# where PEFT's tests of DoRA are
FILES_OF_DORA = [
    *("test_lora_variants.py", "test_helpers.py", "test_custom_models.py", "test_initialization.py"),
    *("test_decoder_models.py", "test_quantization.py"),
]
# where the series adds tests of AdaDoRA that need no GPU
FILES_OF_ADADORA = ["test_custom_models.py", "test_lora_variants.py", "test_config.py", "test_initialization.py"]
SELECTION = "adalora or AdaLora or AdaLoRA"
# PEFT's tests leave the offline mode, and the client of the hub waits half a minute before it gives up
NO_WAITING = """
import time, types
import huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
"""


def fetch(folder: Path, *requirement: str) -> Path:
    """Download a source distribution of PEFT and unpack it. Returns its root."""
    downloads = folder / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    result = subprocess.run([*command, "--dest", downloads, *requirement], capture_output=True, text=True, check=False)
    archives = list(downloads.glob("peft-*.tar.gz"))
    if not archives:
        raise SystemExit(result.stderr)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / archives[0].name.removesuffix(".tar.gz")


def make_environment(folder: Path) -> None:
    """Make a fresh environment with everything but PEFT that the tests need."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    extras = " ".join(re.findall(r"^(?:demo|peft-tests) = (.*)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
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


def prepare(folder: Path) -> tuple[Path, Path]:
    """PEFT as it is, and an environment with everything that the tests need, made in a folder if they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    stock = fetch(folder, "--require-hashes", "-r", str(HERE / "requirements.txt"))
    python, installed = folder / "venv" / "bin" / "python", folder / "venv" / "installed"
    if not installed.exists():
        make_environment(folder / "venv")
        # for what asks for the version that is installed; its modules come from the trees
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", stock], check=True)
        installed.touch()
    return stock, python


def run_tests(python: Path, tree: Path, folder: Path, arguments: list[str], pattern: str = "") -> dict[str, str]:
    """
    Run tests offline from a folder, with the PEFT of a tree. Returns the outcome of each: passed, skipped, failure or
    error.
    """
    report = tree.parent / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-n", str(os.cpu_count()), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (tree / "src", tree)))
    command = [python, "-m", "pytest", *options, *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=folder, env=environment, check=False, **quiet)
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("skipped", "failure", "error")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return outcomes


def options_of_peft(tree: Path) -> list[str]:
    """Arguments of pytest for PEFT's tests in a tree, which gets what they need."""
    (tree / "tests" / "__init__.py").touch()  # the source distribution lacks it
    (tree / "no_waiting.py").write_text(NO_WAITING)
    return ["-p", "no_waiting", "-o", "addopts="]


def run_tests_of_peft(python: Path, tree: Path, left_out: Path | None = None) -> dict[str, str]:
    """Run PEFT's tests for what the series could touch, without those that a file of arguments leaves out."""
    options = [*options_of_peft(tree), "--continue-on-collection-errors"]
    options += [f"@{left_out}"] if left_out else []
    outcomes = run_tests(python, tree, tree, [*options, *(f"tests/{name}" for name in FILES_OF_PEFT)])
    others = [f"--ignore=tests/{name}" for name in FILES_OF_PEFT]
    return outcomes | run_tests(python, tree, tree, [*options, "tests", "-k", SELECTION, *others])


def outcomes_without_a_patch(python: Path, stock: Path) -> tuple[dict[str, str], Path]:
    """PEFT's tests without a patch, run once for a folder, and the arguments that leave out those that fail."""
    path, left_out = stock.parent / "peft-outcomes.json", stock.parent / "left-out.txt"
    if not path.exists():
        path.write_text(json.dumps(run_tests_of_peft(python, stock)))
    outcomes = json.loads(path.read_text())
    failing = [test for test, outcome in outcomes.items() if outcome in ("failure", "error")]
    left_out.write_text("".join(f"--deselect={node_id(test, stock)}\n" for test in failing))
    return outcomes, left_out


def numberless(outcomes: dict[str, str]) -> dict[str, str]:
    """Outcomes by names that do not change when a patch adds a row to a table of cases."""
    return {re.sub(r"kwargs\d+", "kwargs", test): outcome for test, outcome in outcomes.items()}


def node_id(test: str, tree: Path) -> str:
    """What pytest calls a test of a report, whose class names are paths with dots."""
    module, _, name = test.partition("::")
    parts = module.split(".")
    size = next((n for n in range(len(parts), 0, -1) if tree.joinpath(*parts[:n]).with_suffix(".py").exists()), 0)
    return "::".join(["/".join(parts[:size]) + ".py", *parts[size:], name])


def has_style_of_peft(python: Path, tree: Path) -> bool:
    """Check what the series touches with what PEFT's `make quality` runs: ruff, in PEFT's version, and doc-builder."""
    touched = ["src/peft/helpers.py", "src/peft/tuners/adalora", "src/peft/tuners/mixed"]
    touched += ["src/peft/tuners/lora/dora.py", "tests/test_lora_variants.py", "src/peft/tuners/tuners_utils.py"]
    touched += ["tests/test_config.py", "tests/test_custom_models.py", "tests/test_initialization.py"]
    touched += ["tests/test_common_gpu.py"]
    commands = [
        [python, "-m", "ruff", "check", "--quiet", *touched],
        [python, "-m", "ruff", "format", "--check", "--quiet", *touched],
        [python.with_name("doc-builder"), "style", *touched, "--max_len", "119", "--check_only"],
    ]
    return not any(subprocess.run(command, cwd=tree, check=False).returncode for command in commands)


def install_linters(python: Path, stock: Path) -> None:
    version = re.search(r'^required-version = "(.*)"', (stock / "pyproject.toml").read_text(), re.MULTILINE)[1]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"ruff{version}"], check=True)
    # doc-builder imports the two others, but does not depend on them
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", "hf-doc-builder", "black", "requests"], check=True)


def summary(outcomes: dict[str, str]) -> str:
    return ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(Counter(outcomes.values()).items()))


def print_row(cells: Iterable[object]) -> None:
    """Print a row of a table when it is ready."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


class Check:
    """What all patches need: PEFT as it is, the environment, and the outcomes of PEFT's tests without a patch."""

    def __init__(self, folder: Path, only_ours: bool) -> None:
        self.stock, self.python = prepare(folder)
        install_linters(self.python, self.stock)
        self.folder, self.problems = folder, []
        self.without, self.left_out = ({}, None) if only_ours else outcomes_without_a_patch(self.python, self.stock)
        if not only_ours:
            print(f"PEFT's tests without a patch: {summary(self.without)}", flush=True)
        print("| patch | PEFT's tests | added to PEFT's | ours | linters |\n|---|---|---|---|---|", flush=True)

    def tests_of_peft(self, name: str, tree: Path) -> str:
        if self.left_out is None:
            return "not run"
        outcomes = numberless(run_tests_of_peft(self.python, tree, self.left_out))
        without = numberless(self.without)
        expected = {test: outcome for test, outcome in without.items() if outcome in ("passed", "skipped")}
        network = without.keys() - expected.keys()
        # a patch may add tests, which must not fail
        added = {test for test, outcome in outcomes.items() if outcome in ("passed", "skipped")} - without.keys()
        tests = (outcomes.keys() | expected.keys()) - network - added
        different = sorted(test for test in tests if outcomes.get(test) != expected.get(test))
        self.problems += [
            f"{name}: {test}: {expected.get(test)} without it, {outcomes.get(test)} with it" for test in different
        ]
        return "same" if not different else f"{len(different)} differ"

    def must_pass(self, name: str, outcomes: dict[str, str]) -> str:
        failed = sorted(test for test, outcome in outcomes.items() if outcome in ("failure", "error"))
        self.problems += [f"{name}: failed: {test}" for test in failed]
        if "passed" not in outcomes.values():
            self.problems.append(f"{name}: no test has passed")
        return summary(outcomes)

    def style(self, name: str, tree: Path) -> str:
        if has_style_of_peft(self.python, tree):
            return "clean"
        self.problems.append(f"{name}: the linters of PEFT are not content")
        return "not clean"

    def alone(self, folder: Path) -> None:
        """Check a patch that stands alone: the tests that it adds must fail without it, and pass with it."""
        name, tree = folder.name, self.folder / folder.name
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(self.stock, tree)
        tests = folder / "tests.patch"
        series.apply(tree, tests)
        added = " or ".join(re.findall(r"^\+    def (test_\w+)", tests.read_text(), re.MULTILINE))
        of_this = [*options_of_peft(tree), *series.edited_files(tests), "-k", added]
        without = run_tests(self.python, tree, tree, of_this)
        self.problems += [
            f"{name}: {test} passes without it" for test, outcome in without.items() if outcome == "passed"
        ]
        series.apply(tree, folder / "peft.patch")
        passed = self.must_pass(name, run_tests(self.python, tree, tree, of_this))
        print_row([name, self.tests_of_peft(name, tree), passed, "", self.style(name, tree)])

    def dora_norm(self, folder: Path) -> None:
        """Check the patch of LoRA's DoRA: with it, PEFT's tests of DoRA and those that it adds must pass."""
        name, tree = folder.name, self.folder / folder.name
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(self.stock, tree)
        for patch in series.patch_files(folder, tree):
            series.apply(tree, patch)
        options = [*options_of_peft(tree), *(f"tests/{file}" for file in FILES_OF_DORA), "-k", "dora or DoRA or Dora"]
        options += [f"--deselect={test}" for test in self.failing_without(options)]
        passed = self.must_pass(name, run_tests(self.python, tree, tree, options))
        print_row([name, "", passed, "", self.style(name, tree)])

    def failing_without(self, options: list[str]) -> list[str]:
        """The tests that fail without a patch, for want of a network."""
        options_of_peft(self.stock)
        outcomes = run_tests(self.python, self.stock, self.stock, options)
        failing = [test for test, outcome in outcomes.items() if outcome in ("failure", "error")]
        return [node_id(test, self.stock) for test in failing]

    def in_series(self, folder: Path) -> None:
        """Check a patch of AdaDoRA after all patches before it. With the last, this project's tests must pass, too."""
        name, tree, patches = folder.name, self.folder / folder.name, series.patches()
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(self.stock, tree, ignore=shutil.ignore_patterns("__pycache__"))
        series.add_patches(tree, patches[: patches.index(folder) + 1])
        options = [*options_of_peft(tree), *(f"tests/{file}" for file in FILES_OF_ADADORA), "-k", "adadora or AdaDoRA"]
        row = [name, self.tests_of_peft(name, tree)]
        row.append(self.must_pass(name, run_tests(self.python, tree, tree, options)))
        if folder == patches[-1]:
            ours = self.must_pass(name, run_tests(self.python, tree, ROOT, ["-m", WITHOUT_OVERLAY, "tests"]))
        else:
            ours = ""
        print_row([*row, ours, self.style(name, tree)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", metavar="PATCH", help="check one patch alone")
    parser.add_argument("--only-ours", action="store_true", help="leave out PEFT's own tests")
    options = parser.parse_args()
    patches = {folder.name: folder for folder in series.patches()}
    if options.only and options.only not in patches:
        raise SystemExit(f"there is no patch {options.only!r} among {', '.join(patches)}")
    check = Check(options.folder.resolve(), options.only_ours)
    for name, folder in patches.items():
        if options.only in (None, name):
            if folder == series.DORA_NORM:
                check.dora_norm(folder)
            else:
                (check.alone if folder in (*series.fixes(), series.DECOUPLED) else check.in_series)(folder)
    print(*check.problems, sep="\n")
    return 1 if check.problems else 0


if __name__ == "__main__":
    sys.exit(main())
