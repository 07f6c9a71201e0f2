"""The patches for PEFT fit the installed PEFT and the modules of this project as they are, and nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = [pytest.mark.overlay, pytest.mark.project]

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "upstream"))

import mutants
import series


PATCHES = [folder / "peft.patch" for folder in series.patches()]
LAST = PATCHES[-2:]  # are made of the overrides in src
IN_SERIES = PATCHES[-5:]  # AdaDoRA, in patches that need those before them
# the lines of our modules that a later patch of the series may change
DIFFERING_LINES = 60


def files_of(patch: Path) -> list[str]:
    """The files that a patch changes."""
    return re.findall(r"^\+\+\+ b/(.*)", patch.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The source tree of the installed PEFT."""
    tree = tmp_path_factory.mktemp("stock") / "tree"
    series.installed(tree)
    return tree


@pytest.fixture(scope="module")
def trees(stock, tmp_path_factory):
    """The source tree of PEFT before each of the patches of `IN_SERIES`."""
    folder = tmp_path_factory.mktemp("trees")
    for number in range(-len(IN_SERIES), 0):
        shutil.copytree(stock, folder / PATCHES[number].parent.name)
        series.add_patches(folder / PATCHES[number].parent.name, series.patches()[:number])
    return {patch: folder / patch.parent.name for patch in IN_SERIES}


@pytest.fixture(scope="module")
def whole(stock, tmp_path_factory):
    """The source tree of PEFT with AdaDoRA inside."""
    tree = tmp_path_factory.mktemp("whole") / "tree"
    series.build(stock, tree)
    return tree


@pytest.fixture(params=PATCHES, ids=lambda patch: patch.parent.name)
def patch(request):
    return request.param


@pytest.fixture
def before(patch, stock, trees):
    """What a patch is made for: AdaDoRA's for the patches before it, and any other for the installed PEFT."""
    return trees.get(patch, stock)


@pytest.fixture
def tree(patch, before, tmp_path):
    """The files of PEFT that a patch changes."""
    for name in files_of(patch):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(before / name, tmp_path / name)
    return tmp_path


def undefined_names(paths: list[Path]) -> str:
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
    command = [sys.executable, "-m", "ruff", "check", *options, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_the_whole_has_all_modules_and_no_undefined_names(stock, whole):
    ours = series.our_modules()
    # an override is in a patch, and any other module comes whole
    overrides = set(ours) - set(series.new_modules())
    assert sorted(map(str, overrides)) == sorted(name for patch in LAST for name in files_of(patch))
    assert undefined_names([whole / path for path in ours]) == ""


def test_a_module_of_ours_has_the_form_that_it_has_here(stock, whole):
    for path in series.new_modules():
        here, there = ((tree / path).read_text().splitlines() for tree in (ROOT, whole))
        changed = [line for line in here if line not in there]
        assert len(here) == len(there) and changed in ([], ["from . import stock_layer as stock"])


def test_few_lines_of_our_modules_have_an_earlier_form(trees):
    changed = [
        line
        for patch in (ROOT / "upstream" / "series").glob("*/earlier.patch")
        for line in re.findall(r"^[-+](?![-+]{2} ).*", patch.read_text(), re.MULTILINE)
    ]
    assert 0 < len(changed) <= DIFFERING_LINES
    # the package brings them up to the form that they have here
    for path in {path for folder in series.patches()[-5:-2] for path in series.modules(folder)}:
        differs = (trees[series.PACKAGE / "peft.patch"] / path).read_text() != (ROOT / path).read_text()
        assert differs == (path.name in ("variants.py", "quantized.py"))


def test_the_method_is_small_and_does_not_name_the_package(trees):
    changed = 0
    for path in series.our_modules():
        before, after = (trees[folder / "peft.patch"] / path for folder in (series.METHOD, series.CONV2D))
        if after.exists():
            files = [before if before.exists() else os.devnull, after]
            command = ["git", "diff", "--no-index", "--numstat", *files]
            counts = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()[:2]
            changed += sum(map(int, counts))
            assert "peft-adadora" not in after.read_text()
    docs = (series.METHOD / "repository.patch").read_text().partition("diff --git a/tests")[0]
    changed += len(re.findall(r"^[-+](?![-+]{2} )", docs, re.MULTILINE))
    assert 300 < changed <= 400


def tree_with(folder: Path, trees: dict[Path, Path], whole: Path) -> Path:
    """The source tree of PEFT with the patches up to one of the series."""
    patches = series.patches()
    return whole if folder == patches[-1] else trees[patches[patches.index(folder) + 1] / "peft.patch"]


@pytest.mark.parametrize("folder", series.patches()[-5:], ids=lambda folder: folder.name)
def test_each_tree_of_the_series_has_what_it_imports(folder, trees, whole):
    adalora = tree_with(folder, trees, whole) / series.PEFT / "tuners" / "adalora"
    assert undefined_names([adalora]) == ""
    for path in adalora.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                assert (adalora / f"{node.module}.py").exists(), (path.name, node.module)


def functions_of(path: Path) -> dict[str, str]:
    """The code of the functions of a module without comments, of methods by `Class.method`."""
    code = {}
    for node in ast.parse(path.read_text()).body:
        for child in [node, *node.body] if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(child, ast.FunctionDef):
                code[child.name if child is node else f"{node.name}.{child.name}"] = ast.unparse(child)
    return code


def test_the_classes_of_peft_have_the_methods_that_ours_add(trees, whole):
    # PEFT's layers have a `forward` each; module attributes are passed on by the overlay alone
    left_out = {"AdaDoraForward.forward", "__getattr__"}
    for name in (name for patch in LAST for name in files_of(patch)):
        ours, before, after = (functions_of(tree / name) for tree in (ROOT, trees[IN_SERIES[0]], whole))
        added = ours.keys() - before.keys() - left_out
        assert {name: after.get(name) for name in added} == {name: ours[name] for name in added}


@pytest.mark.parametrize("folder", series.patches()[-5:], ids=lambda folder: folder.name)
def test_each_tree_of_the_series_computes_with_a_magnitude(folder, trees, whole):
    tree = tree_with(folder, trees, whole)
    code = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "Overlay" not in getattr(finder, "__name__", "")]
sys.path.insert(0, sys.argv[1])

import torch
from torch import nn
import peft
from peft import AdaLoraConfig, get_peft_model
assert not hasattr(peft.tuners.adalora, "stock")  # no overlay
config = AdaLoraConfig(target_modules=["0"], total_step=10, use_dora_adaptive=True)
base = nn.Sequential(nn.Linear(3, 2, bias=False))
x, expected = torch.eye(3), 2 * base(torch.eye(3))
model = get_peft_model(base, config)
model.base_model.model[0].lora_magnitude["default"].data *= 2
torch.testing.assert_close(model(x), expected)

# PEFT's layers derive from nn.Module before AdaLoraLayer
from peft.tuners.adalora import AdaLoraLayer, SVDConv2d, SVDLinear
if "train" not in vars(AdaLoraLayer):
    sys.exit()  # it comes with the package
ours = {name for name in vars(AdaLoraLayer).keys() & vars(nn.Module).keys() if not name.startswith("__")} - {"forward"}
assert "train" in ours
for layer in (SVDLinear, SVDConv2d):
    assert all(getattr(layer, name) is getattr(AdaLoraLayer, name) for name in ours)
"""
    command = [sys.executable, "-c", code, str(tree / "src")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tree)
    assert result.returncode == 0, result.stderr


def change(path: Path, number: int) -> None:
    """Add a comment to a line."""
    lines = path.read_text().splitlines()
    lines[number - 1] += "  # changed"
    path.write_text("\n".join(lines) + "\n")


def test_a_patch_applies_to_what_it_is_made_for_and_leaves_no_undefined_names(patch, tree, before):
    series.apply(tree, patch)
    for name in files_of(patch):
        assert (tree / name).read_text() != (before / name).read_text()
    assert undefined_names([tree / name for name in files_of(patch)]) == ""


def test_a_patch_is_refused_where_one_line_of_a_file_differs(patch, tree, before):
    for name in files_of(patch):
        change(tree / name, 1)
        unchanged = {path: path.read_text() for path in tree.rglob("*.py")}
        with pytest.raises(SystemExit, match=re.escape(name)):
            series.apply(tree, patch)
        assert {path: path.read_text() for path in tree.rglob("*.py")} == unchanged
        shutil.copy(before / name, tree / name)


def test_git_alone_refuses_a_patch_where_a_line_beside_an_edit_differs(patch, tree, before):
    hunks = re.findall(r"^\+\+\+ b/(.*)\n@@ -(\d+)", patch.read_text(), re.MULTILINE)
    for name, number in hunks:
        change(tree / name, int(number) + 2)
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
        result = subprocess.run(
            ["git", "apply", str(patch)], cwd=tree, env=environment, capture_output=True, check=False
        )
        assert result.returncode == 1 and b"patch does not apply" in result.stderr
        shutil.copy(before / name, tree / name)


def test_each_mutant_has_code_to_break_in_both_forms(whole):
    for mutant in mutants.MUTANTS:
        for module, old, new in mutant.edits:
            for tree in (ROOT, whole):
                assert (tree / "src" / mutants.ADALORA / module).read_text().count(old) == 1, (mutant.name, old)
            assert new != old


def test_an_update_keeps_the_imports_that_only_the_file_of_peft_uses(tmp_path):
    imports, last = "from typing import Any, Optional\n", "\n\nLAST = 1\n"
    old = f"{imports}\n\ndef ours(value: Optional[int]) -> Any: ...\n{last}"
    new = f"\n\ndef ours(value: int) -> int: ...\n{last}"
    edited = tmp_path / "layer.py"
    edited.write_text(f"{old}\n\ndef of_peft(value: Optional[int]) -> None: ...\n")
    assert series.merge(edited, old, new)
    assert edited.read_text() == f"{imports}{new}\n\ndef of_peft(value: Optional[int]) -> None: ...\n"
    assert "F821" not in undefined_names([edited])
