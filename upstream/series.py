"""The patches that are proposed to PEFT, and the source tree with them.

    python upstream/series.py --update               write the last two patches anew, after changes in `src/`
    python upstream/series.py --from REPOSITORY      write the patches of AdaDoRA from the last commits of a fork

- `series/fixes/<name>` mends one bug of AdaLoRA in PEFT as it is, alone.
- `series/dora-norm` makes LoRA's DoRA compute its norm without an (out, in) matrix.
- `series/decoupled` decouples AdaLoRA's regularization from the loss, in PEFT as it is, alone.
- `series/method` adds AdaDoRA for linear layers, `series/conv2d` for convolutions, `series/quantized` for quantized
  weights.
- `series/package` adds what only the package has: refusals, exact loading, a faster allocator.
- `series/callback` adds the callback of the Trainer, with the modules that only it uses.

In each folder, `peft.patch` edits PEFT's own files, and `tests.patch` its tests. `repository.patch` edits files that
PEFT's repository has and its source distribution lacks. Our modules (`MODULES`) come whole, in the form that they have
in `src/`, but for the lines of `earlier.patch`, which a later patch of the series brings up to it.

The update merges what has changed in our subclasses since a patch was written into PEFT's files, as `git merge` does.
A change that cannot be merged stays in `build/update` with conflict markers; resolve it there, and update again. For
any other change to a patch, edit the commits of the fork as git does, and write the patches from them.
"""

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from difflib import unified_diff
from importlib.metadata import distribution
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent
FIXES = HERE / "series" / "fixes"
DORA_NORM = HERE / "series" / "dora-norm"
DECOUPLED = HERE / "series" / "decoupled"
METHOD, CONV2D, QUANTIZED = (HERE / "series" / name for name in ("method", "conv2d", "quantized"))
PACKAGE = HERE / "series" / "package"
CALLBACK = HERE / "series" / "callback"
PEFT = Path("src", "peft")
# our modules of AdaLoRA by the patch that they come with; all others come with the package
MODULES = {
    METHOD: ["adadora.py", "rows.py", "variants.py"],
    CONV2D: ["conv2d.py"],
    QUANTIZED: ["low_precision.py", "quantized.py", "rows.py"],
    CALLBACK: ["callback.py", "resume.py", "unfinished_checkpoints.py"],
}
# of PEFT's pyproject.toml, which is not installed with it
STYLE = ["--line-length=119", "--config=lint.isort={lines-after-imports=2, known-first-party=['peft']}"]


def fixes() -> list[Path]:
    """The folders of the patches that stand alone, in the order of their names."""
    return sorted(path.parent for path in FIXES.glob("*/peft.patch"))


def patches() -> list[Path]:
    """The folders of all patches, in the order of the series."""
    return [*fixes(), DORA_NORM, DECOUPLED, METHOD, CONV2D, QUANTIZED, PACKAGE, CALLBACK]


def modules(folder: Path) -> list[Path]:
    """Our modules that a patch brings, or brings up to the form that they have in `src/`."""
    named = {key: [PEFT / "tuners" / "adalora" / name for name in names] for key, names in MODULES.items()}
    if folder != PACKAGE:
        return named.get(folder, [])
    return [path for path in new_modules() if path not in named[CALLBACK]]


def patch_with_edits(name: str) -> Path:
    """The last patch with edits of an override, by its path in PEFT."""
    return CALLBACK if name == str(PEFT / "tuners" / "adalora" / "__init__.py") else PACKAGE


def message(folder: Path) -> str:
    """The commit message of a patch: its page, whose title is the subject."""
    return (folder / "page.md").read_text().removeprefix("# ")


def edited_files(patch: Path) -> dict[str, str]:
    """The files that a patch edits, and the blobs that they must be before."""
    return dict(re.findall(r"^diff --git a/(\S+) .*\nindex (\w+)\.\.", patch.read_text(), re.MULTILINE))


def blob(content: bytes) -> str:
    """The name that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def differing_files(tree: Path, files: dict[str, str]) -> list[str]:
    """The files of a tree that are not the given blobs."""
    return [name for name, name_of_blob in files.items() if name_of_blob != blob_at(tree / name)]


def blob_at(path: Path) -> str:
    return blob(path.read_bytes()) if path.exists() else "0" * 40


def apply(tree: Path, patch: Path) -> None:
    """
    Apply a patch to a source tree of PEFT. Raises a `SystemExit` if a file differs from the one that the patch was
    made for; nothing has changed then.
    """
    for name in differing_files(tree, edited_files(patch)):
        raise SystemExit(f"{patch.relative_to(HERE)} is not made for this {name}; nothing has changed")
    # outside of any repository, or git takes the paths as those of the repository that the tree is in
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(["git", "apply", str(patch)], cwd=tree, env=environment, check=True)


def patch_files(folder: Path, tree: Path) -> list[Path]:
    """
    What a folder changes in a tree: the package, PEFT's tests if the tree has them, and other files of PEFT's
    repository if they are those that the patch is made for.
    """
    others = [patch for patch in folder.glob("repository.patch") if not differing_files(tree, edited_files(patch))]
    tests = folder.glob("tests.patch") if (tree / "tests").exists() else ()
    return [*folder.glob("peft.patch"), *tests, *others]


def files_of_release(tree: Path) -> dict[str, str]:
    """The files that the series edits in a tree of PEFT, and their blobs in the release that it is made for."""
    files = {}
    for folder in patches():
        for patch in patch_files(folder, tree):
            files = {**edited_files(patch), **files}
    return files


def release() -> str:
    """The version of PEFT that the series is made for."""
    return re.search(r"peft==(\S+)", (HERE / "requirements.txt").read_text())[1]


def add_patch(repository: Path, folder: Path) -> None:
    """
    Put a patch into the work tree and the index of a repository that has the patches before it. A fix is made for the
    release, so git merges it with the fixes before it.
    """
    for patch in patch_files(folder, repository):
        command = ["git", "apply", "--3way", "--index", str(patch)]
        result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{patch.relative_to(HERE)} does not apply after the patches before it:\n{result.stderr}")
    brought = modules(folder)
    for path in brought:
        (repository / path).write_text(in_peft((ROOT / path).read_text()))
    for patch in folder.glob("earlier.patch"):
        result = subprocess.run(["git", "apply", patch], cwd=repository, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{patch.relative_to(HERE)} does not fit the modules in src:\n{result.stderr}")
    if brought:
        subprocess.run(["git", "add", "--force", *brought], cwd=repository, check=True)


def add_patches(tree: Path, folders: list[Path]) -> None:
    """
    Put patches into a source tree of PEFT. Raises a `SystemExit` if a file differs from that of the release; nothing
    has changed then.
    """
    files = files_of_release(tree)
    for name in differing_files(tree, files):
        raise SystemExit(f"the series is not made for this {name}; nothing has changed")
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    subprocess.run(["git", "add", *files], cwd=tree, check=True)
    try:
        for folder in folders:
            add_patch(tree, folder)
    finally:
        shutil.rmtree(tree / ".git")


def installed(tree: Path) -> None:
    """Make `tree` the source tree of the installed PEFT."""
    shutil.rmtree(tree, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(distribution("peft").locate_file("peft"), tree / PEFT, ignore=ignore)


def our_modules() -> list[Path]:
    """Our modules and overrides, by their paths in a source tree of PEFT."""
    return [path.relative_to(ROOT) for path in sorted((ROOT / PEFT).rglob("*.py"))]


def new_modules() -> list[Path]:
    """Our modules that PEFT lacks."""
    stock = Path(distribution("peft").locate_file("peft")).parent
    return [path for path in our_modules() if not (stock / path.relative_to("src")).exists()]


def in_peft(code: str) -> str:
    """One of our modules as it is inside of PEFT: the overlay calls PEFT's own `layer` `stock_layer`."""
    code = code.replace("from . import stock_layer as", "from . import layer as")
    # in the order of imports, `layer` has another place
    imports = re.compile(r"(^from \. import .*\n)+", re.MULTILINE)
    return imports.sub(lambda found: "".join(sorted(found[0].splitlines(keepends=True))), code)


def build(stock: Path, tree: Path) -> None:
    """Make `tree` a copy of the source tree `stock` of PEFT with the whole series."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(stock, tree, ignore=shutil.ignore_patterns("__pycache__"))
    add_patches(tree, patches())


# --- update


def made_of(patch: Path) -> dict[str, str]:
    """Our modules that a patch was made of, and the blobs that they were."""
    found = re.findall(r"^made of (\w+) (\S+)", patch.read_text(), re.MULTILINE)
    return {name: name_of_blob for name_of_blob, name in found}


def imports_of(code: str) -> dict[str, ast.ImportFrom]:
    """The statements `from … import …` of a module by the names that they bind, but those of the overlay."""
    statements = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {}
    for node in statements:
        for alias in node.names:
            only = ast.ImportFrom(node.module, [alias], node.level) if isinstance(node, ast.ImportFrom) else None
            statement = ast.unparse(only or ast.Import([alias]))
            if "stock" not in statement:
                found[statement] = node
    return found


def without_imports(code: str, statements: set[str]) -> str:
    """A module without some of the names that its statements import."""
    lines = code.splitlines(keepends=True)
    found = imports_of(code)
    for node in {found[statement] for statement in statements & found.keys()}:
        rest = [
            statement + "\n" for statement, other in found.items() if other is node and statement not in statements
        ]
        lines[node.lineno - 1 : node.end_lineno] = ["".join(rest)] + [""] * (node.end_lineno - node.lineno)
    return "".join(lines)


def merge(edited: Path, old: str, new: str) -> bool:
    """
    Merge what has changed between two versions of our module into the file of PEFT with its edits. Returns whether it
    could be merged. New imports are added name by name, because their lines stand close together. Imports that ours no
    longer has stay, because PEFT's code may use them.
    """
    before, after = imports_of(old).keys(), imports_of(new).keys()
    versions = {edited.with_suffix(".old"): old, edited.with_suffix(".new"): new}
    for path, version in versions.items():
        path.write_text(without_imports(version, before | after))
    labels = ["-L", "PEFT with AdaDoRA", "-L", "before", "-L", "src"]
    merged = subprocess.run(["git", "merge-file", *labels, edited, *versions], check=False).returncode == 0
    for path in versions:
        path.unlink()
    code = edited.read_text()
    used = [line for line in sorted(after - before) if re.search(rf"\b{line.split()[-1]}\b", code)]
    edited.write_text(
        re.sub(r"^(?=import|from)", "".join(line + "\n" for line in used), code, count=1, flags=re.MULTILINE)
    )
    return merged


def has_conflicts(path: Path) -> bool:
    return re.search(r"^(<<<<<<<|>>>>>>>) ", path.read_text(), re.MULTILINE) is not None


def write_patch(patch: Path, before: Path, after: Path, ours: Path, names: list[str]) -> None:
    """Write a patch between two source trees, headed by the blobs of our modules that it is made of."""
    head = "".join(f"made of {blob((ours / name).read_bytes())} {name}\n" for name in names)
    diffs = []
    for name in names:
        command = ["git", "diff", "--no-index", "--full-index", "--unified=3", before / name, after / name]
        diff = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        diffs.append(diff.replace(f"a{before}/", "a/").replace(f"b{before}/", "b/").replace(f"b{after}/", "b/"))
    patch.write_text(head + "".join(diffs))


def patches_from(repository: Path) -> dict[Path, str]:
    """
    The patches from the method on, by their paths, from the last commits of a fork that is made of the modules in
    `src/`.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout

    found = {}
    for number, folder in enumerate(reversed(patches()[-5:])):
        commit, brought = f"HEAD~{number}", list(map(str, modules(folder)))
        names = git("diff", "--name-only", f"{commit}~", commit).split()
        others = [name for name in names if name.startswith(("docs/", "tests/regression/"))]
        groups = {
            "peft.patch": [name for name in names if name.startswith("src/") and name not in brought],
            "tests.patch": [name for name in names if name.startswith("tests/") and name not in others],
            "repository.patch": others,
        }
        for patch, of_this in groups.items():
            if of_this:
                made_of_ours = of_this if folder in (PACKAGE, CALLBACK) and patch == "peft.patch" else []
                head = "".join(f"made of {blob((ROOT / name).read_bytes())} {name}\n" for name in made_of_ours)
                diff = git("diff", "--full-index", "--unified=3", f"{commit}~", commit, "--", *of_this)
                found[folder / patch] = head + diff
        versions = [(name, in_peft((ROOT / name).read_text()), git("show", f"{commit}:{name}")) for name in brought]
        earlier = "".join(
            "".join(unified_diff(*(text.splitlines(keepends=True) for text in texts), f"a/{name}", f"b/{name}"))
            for name, *texts in versions
        )
        if earlier:
            found[folder / "earlier.patch"] = earlier
    return found


def merge_all(ours: Path, before: Path, tree: Path) -> None:
    """Make `tree` the source tree `before` with the last two patches and with what has changed in `ours` since."""
    shutil.copytree(before, tree)
    versions = {}
    for folder in (PACKAGE, CALLBACK):
        apply(tree, folder / "peft.patch")
        versions |= made_of(folder / "peft.patch")
    for path in sorted((ours / PEFT).rglob("*.py")):
        name = str(path.relative_to(ours))
        if name not in versions:  # a new override
            with (tree / name).open("a") as file:
                file.write(f"<<<<<<< PEFT with AdaDoRA\n=======\n{path.read_text()}>>>>>>> src\n")
            continue
        show = ["git", "cat-file", "blob", versions[name]]
        old = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=False)
        if old.returncode:
            raise SystemExit(f"the history lacks blob {versions[name]} of {name}, which the patch is made of")
        merge(tree / name, old.stdout, path.read_text())


def update(folder: Path) -> None:
    """
    Write the last two patches anew. Raises a `SystemExit` if a change has to be merged by hand in `folder`.
    """
    before, after, ours = folder / "before", folder / "after", folder / "ours"
    if not folder.exists():
        for path in our_modules():
            if path not in new_modules():
                (ours / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, ours / path)
        try:
            installed(before)
            add_patches(before, patches()[:-2])
            merge_all(ours, before, after)
        except SystemExit:
            shutil.rmtree(folder)
            raise
    names = [str(path.relative_to(ours)) for path in sorted(ours.rglob("*.py"))]
    conflicts = [str(after / name) for name in names if has_conflicts(after / name)]
    if conflicts:
        raise SystemExit("resolve the conflicts, then update again: " + ", ".join(conflicts))
    for arguments in (["check", "--fix", "--exit-zero", "--select=F401,I001"], ["format"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--quiet", "--no-cache", "--isolated"]
        subprocess.run([*command, *STYLE, *(after / name for name in names)], check=True)
    for patch in (PACKAGE, CALLBACK):
        of_this = [name for name in names if patch_with_edits(name) == patch]
        write_patch(patch / "peft.patch", before, after, ours, of_this)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_mutually_exclusive_group(required=True)
    actions.add_argument("--update", action="store_true", help="write the last two patches anew")
    actions.add_argument("--from", dest="repository", type=Path, help="write the patches from the commits of a fork")
    options = parser.parse_args()
    if options.update:
        update(ROOT / "build" / "update")
    else:
        for path, text in patches_from(options.repository).items():
            path.write_text(text)


if __name__ == "__main__":
    main()
