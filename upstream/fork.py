"""Makes a fork of PEFT with AdaDoRA: the release as a git repository with a commit for each patch of the series.

    python upstream/fork.py FOLDER            make the fork, and say which commits apply to the newest PEFT
    python upstream/fork.py FOLDER --offline  use the source distribution that an earlier run has unpacked

FOLDER becomes the repository, which `pip install FOLDER` installs. Beside it, FOLDER-files gets the source
distribution, the commits as files for `git am`, and a wheel. Each commit must compile, and must be formatted and
linted as PEFT's configuration wants. Prints a row for each commit, and exits with 1 if one fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import apply
import check
import series


def install_ruff(stock: Path, folder: Path) -> Path:
    """Install ruff in the version that PEFT wants, in a folder of its own. Returns the program."""
    version = re.search(r'^required-version = "(.*)"', (stock / "pyproject.toml").read_text(), re.MULTILINE)[1]
    if not (folder / "bin" / "ruff").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", folder]
        subprocess.run([*pip, f"ruff{version}"], check=True)
    return folder / "bin" / "ruff"


def check_commit(repository: Path, commit: str, ruff: Path) -> list[str]:
    """Check out a commit. Returns the outcomes of compiling, formatting and linting the files that it changes."""
    apply.git(repository, "checkout", "--quiet", "--detach", commit)
    changed = apply.git(repository, "diff", "--name-only", f"{commit}~", commit).stdout.split()
    python = [name for name in changed if name.endswith(".py")]
    commands = [
        [sys.executable, "-m", "compileall", "-q", "src"],
        [ruff, "format", "--check", "--quiet", "--no-cache", *python],
        [ruff, "check", "--quiet", "--no-cache", *python],
    ]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(repository.with_name(repository.name + "-files") / "pyc")}
    codes = [subprocess.run(command, cwd=repository, env=environment, check=False).returncode for command in commands]
    return ["yes" if code == 0 else "NO" for code in codes]


def build_wheel(repository: Path, folder: Path) -> Path:
    """Build a wheel of the branch, outside of its work tree."""
    source, wheels = folder / "wheel-source", folder / "wheel"
    wheels.mkdir()
    apply.git(repository, "clone", "--quiet", "--branch", apply.BRANCH, repository, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", wheels, source], check=True)
    shutil.rmtree(source)
    return next(wheels.glob("*.whl"))


def make_fork(stock: Path, repository: Path) -> list[str]:
    """Make the repository from an unpacked source distribution. Returns the commits of the series."""
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(stock, repository, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    apply.make_repository(repository, f"The source distribution {stock.name}")
    return apply.make_branch(repository)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--offline", action="store_true", help="use the source distribution of an earlier run")
    options = parser.parse_args()
    repository = options.folder.resolve()
    files = repository.with_name(repository.name + "-files")
    files.mkdir(parents=True, exist_ok=True)
    stock = files / f"peft-{series.release()}"
    if not options.offline:
        check.fetch(files, "--require-hashes", "-r", str(series.HERE / "requirements.txt"))
    commits, ruff = make_fork(stock, repository), install_ruff(stock, files / "ruff")
    print("| commit | source: lines added | removed | tests: added | removed | compiles | formatted | linted |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for commit in commits:
        subject = apply.git(repository, "log", "-1", "--format=%s", commit).stdout.strip()
        numstat = apply.git(repository, "show", "--numstat", "--format=", commit).stdout.splitlines()
        counts = {"src/": [0, 0], "tests/": [0, 0]}
        for added, removed, name in map(str.split, numstat):
            count = counts[name[: name.index("/") + 1]]
            count[:] = count[0] + int(added), count[1] + int(removed)
        outcomes = check_commit(repository, commit, ruff)
        failed |= "NO" in outcomes
        check.print_row([subject, *counts["src/"], *counts["tests/"], *outcomes])
    apply.git(repository, "checkout", "--quiet", apply.BRANCH)
    for folder in ("patches", "wheel"):
        shutil.rmtree(files / folder, ignore_errors=True)
    apply.git(repository, "format-patch", "--quiet", "-U3", "-o", files / "patches", f"{commits[0]}~")
    print(f"patches for git am: {os.path.relpath(files / 'patches')}")
    print(f"wheel: {os.path.relpath(build_wheel(repository, files))}", flush=True)
    if not options.offline:
        report_newest(repository, files)
    return 1 if failed else 0


def report_newest(repository: Path, files: Path) -> None:
    """Say which commits apply to the newest PEFT of the registry."""
    newest = check.fetch(files, "peft")
    for subject, conflicts in apply.try_onto(repository, newest).items():
        print(f"onto {newest.name}: {'conflict in ' + ', '.join(conflicts) if conflicts else 'clean'}: {subject}")


if __name__ == "__main__":
    sys.exit(main())
