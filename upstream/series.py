"""The series of patches that is proposed to PEFT: the source tree after each of its steps.

A step is a folder of `series/`, in the order of their names:

- `peft.patch`: its edits of PEFT's own files, without context.
- `step.json`: `files`, our modules that come with it; and `adds`, of modules that an earlier step brought, the
  functions, classes and methods that come with this one.
- `ours.patch`: what else it changes in modules that an earlier step brought.
- `page.md`: the text of its pull request.

No code of ours is kept twice: what a module is after a step is its source in `src/` without what later steps bring.
`not-proposed` is read like a step after the last one, and stays in `peft-adadora`.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent
SERIES = HERE / "series"
NOT_PROPOSED = HERE / "not-proposed"
ADALORA = Path("src", "peft", "tuners", "adalora")


def steps() -> list[Path]:
    """The folders of the steps, in their order."""
    return sorted(folder for folder in SERIES.iterdir() if (folder / "step.json").exists())


def read_step(folder: Path) -> dict:
    return json.loads((folder / "step.json").read_text())


def apply(tree: Path, patch: Path, *options: str) -> None:
    """Apply a patch to a tree. Raises a `SystemExit` that names it if it does not fit."""
    # outside of any repository, or git takes the paths as those of the repository that the tree is in
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = ["git", "apply", *options, str(patch)]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{patch.relative_to(HERE)} does not apply: {result.stderr}")


def definitions(code: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The functions and classes of a module, and the methods of its classes as `Class.method`."""
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(child, ast.FunctionDef):
                yield f"{node.name}.{child.name}", child


def without_definitions(code: str, names: list[str]) -> str:
    """Code without some of its [`definitions`], and the comments above them."""
    lines, found = code.splitlines(keepends=True), dict(definitions(code))
    left_out = set()
    for name in names:
        first = min([found[name].lineno, *(decorator.lineno for decorator in found[name].decorator_list)]) - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        left_out.update(range(first, found[name].end_lineno))
    return "".join(line for number, line in enumerate(lines) if number not in left_out)


def tidy(paths: list[Path]) -> None:
    """Drop imports that nothing uses any more, and format."""
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--quiet", "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["check", "--fix", "--select", "F401,I"], ["format"]):
        subprocess.run([*ruff, *command, *options, *map(str, paths)], check=True)


def take_back(tree: Path, folder: Path) -> None:
    """Take what a step brings out of our modules."""
    step = read_step(folder)
    for name in step.get("files", ()):
        (tree / ADALORA / name).unlink()
    changed = []
    for name, added in step.get("adds", {}).items():
        path = tree / ADALORA / name
        path.write_text(without_definitions(path.read_text(), added))
        changed.append(path)
    tidy(changed)
    if (folder / "ours.patch").exists():
        apply(tree, folder / "ours.patch", "--reverse")


def build(stock: Path, tree: Path, last: str) -> None:
    """Make `tree` PEFT's source distribution with the steps up to the one called `last`."""
    names = [folder.name for folder in steps()]
    if last not in names:
        raise SystemExit(f"there is no step {last!r} among {', '.join(names)}")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(stock, tree)
    for folder in steps()[: names.index(last) + 1]:
        apply(tree, folder / "peft.patch", "--unidiff-zero")
    brought = [name for folder in (*steps(), NOT_PROPOSED) for name in read_step(folder).get("files", ())]
    for name in brought:
        code = (ROOT / ADALORA / name).read_text()
        # what the overlay calls `stock_layer` is PEFT's own `layer`
        (tree / ADALORA / name).write_text(code.replace("from . import stock_layer as", "from . import layer as"))
    for folder in reversed([*steps()[names.index(last) + 1 :], NOT_PROPOSED]):
        take_back(tree, folder)
