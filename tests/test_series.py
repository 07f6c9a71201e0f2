"""The series of patches for PEFT fits the installed PEFT and the modules of this project as they are."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.overlay

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "upstream"))

import series


FIXES = sorted(series.SERIES.glob("2-fixes/*/peft.patch"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What the patches edit, as the source distribution has it."""
    tree = tmp_path_factory.mktemp("stock")
    installed = Path(importlib.util.find_spec("peft").submodule_search_locations[0], "tuners")
    shutil.copytree(installed / "adalora", tree / series.ADALORA, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(installed / "tuners_utils.py", tree / series.ADALORA.parent)
    return tree


def undefined_names(tree: Path) -> str:
    """What ruff finds of names that are not defined, and of imports that nothing uses."""
    options = [
        "--isolated",
        "--no-cache",
        "--quiet",
        "--select",
        "F401,F821",
        "--per-file-ignores",
        "__init__.py:F401",
    ]
    command = [sys.executable, "-m", "ruff", "check", *options, tree / "src"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("step", [folder.name for folder in series.steps()])
def test_each_step_is_whole(step, stock, tmp_path):
    series.build(stock, tmp_path / "tree", step)
    assert undefined_names(tmp_path / "tree") == ""


def test_the_last_step_has_all_modules(stock, tmp_path):
    series.build(stock, tmp_path / "tree", series.steps()[-1].name)
    ours = {path.name for path in (ROOT / series.ADALORA).glob("*.py")}
    assert ours <= {path.name for path in (tmp_path / "tree" / series.ADALORA).glob("*.py")}


@pytest.mark.parametrize("patch", FIXES, ids=lambda patch: patch.parent.name)
def test_each_bug_can_be_mended_alone(patch, stock, tmp_path):
    shutil.copytree(stock, tmp_path / "tree")
    series.apply(tmp_path / "tree", patch, "--unidiff-zero")
    assert undefined_names(tmp_path / "tree") == ""


def test_the_method_is_no_longer_than_a_maintainer_reads(stock, tmp_path):
    import check

    first = series.steps()[0]
    series.build(stock, tmp_path / "tree", first.name)
    lines = check.changed_lines(first / "peft.patch") + check.new_lines(tmp_path / "tree", stock)
    assert 0 < lines <= 450
