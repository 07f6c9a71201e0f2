"""Puts the series on a clone of PEFT as a branch with a commit for each patch.

    python upstream/apply.py CHECKOUT                make the branch `adadora` from the commit that is checked out
    python upstream/apply.py CHECKOUT --onto PATH    say which commits of the branch apply to the PEFT at PATH

The files that the series edits must be those of the release that it is made for, in the commit and in the work tree.
On any other tree nothing changes, and the files that differ are named. `--onto` changes neither tree. PATH is a clone
or an unpacked source distribution.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import series


BRANCH = "adadora"


def git(repository: Path, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run git in a repository. Raises a `SystemExit` with git's message if it fails."""
    result = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise SystemExit(f"git {arguments[0]}: {result.stderr or result.stdout}")
    return result


def check_release(repository: Path) -> None:
    """Raise a `SystemExit` that names the files that are not those of the release."""
    files = series.files_of_release(repository)
    listed = git(repository, "ls-tree", "-r", "HEAD", "--", *files, "src/peft/tuners/adalora").stdout.splitlines()
    committed = {name: mode.split()[2] for mode, name in (line.split("\t") for line in listed)}
    differing = {name for name, before in files.items() if committed.get(name, "0" * 40) != before}
    differing |= set(series.differing_files(repository, files))
    differing |= {str(path) for path in series.new_modules() if (repository / path).exists()}
    if differing:
        release = series.release()
        raise SystemExit(f"not the files of PEFT {release}, nothing has changed: {', '.join(sorted(differing))}")


@contextmanager
def work_tree(repository: Path) -> Iterator[Path]:
    """A work tree of its own at the commit that is checked out, so that a failure changes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        git(repository, "worktree", "add", "--detach", tree, "HEAD")
        try:
            yield tree
        finally:
            git(repository, "worktree", "remove", "--force", tree)


def make_branch(repository: Path) -> list[str]:
    """Make the branch in a clone of PEFT. Returns its commits. Raises a `SystemExit` as [`check_release`]."""
    check_release(repository)
    if git(repository, "rev-parse", "--verify", "--quiet", f"refs/heads/{BRANCH}", check=False).returncode == 0:
        raise SystemExit(f"there is a branch {BRANCH!r} already; nothing has changed")
    start = git(repository, "rev-parse", "HEAD").stdout.strip()
    with work_tree(repository) as tree:
        for folder in series.patches():
            series.add_patch(tree, folder)
            git(tree, "commit", "--no-verify", "--cleanup=whitespace", "--message", series.message(folder))
        git(repository, "branch", BRANCH, git(tree, "rev-parse", "HEAD").stdout.strip())
    return git(repository, "rev-list", "--reverse", f"{start}..{BRANCH}").stdout.split()


def make_repository(tree: Path, subject: str = "PEFT") -> None:
    """Make an unpacked source distribution a git repository with one commit."""
    git(tree, "init", "--quiet")
    git(tree, "config", "core.autocrlf", "false")
    for key, value in {"user.name": "PEFT", "user.email": "peft@example.com"}.items():
        if git(tree, "config", key, check=False).returncode:  # the user has not told git who they are
            git(tree, "config", key, value)
    git(tree, "add", "--all", "--force", ".")
    git(tree, "commit", "--quiet", "--message", subject)


def try_onto(repository: Path, other: Path) -> dict[str, tuple[str, ...]]:
    """The subjects of the commits of the branch, and the files in which each conflicts with another PEFT."""
    commits = git(repository, "rev-list", "--reverse", f"-{len(series.patches())}", BRANCH).stdout.split()
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        if (other / ".git").exists():
            git(other, "clone", "--quiet", "--shared", other.resolve(), tree)
        else:
            shutil.copytree(other, tree, ignore=shutil.ignore_patterns("__pycache__", "build"))
            make_repository(tree)
        git(tree, "fetch", "--quiet", repository.resolve(), BRANCH)
        for commit in commits:
            subject = git(tree, "log", "-1", "--format=%s", commit).stdout.strip()
            command = ["-c", "user.name=PEFT", "-c", "user.email=peft@example.com", "cherry-pick", commit]
            picked = git(tree, *command, check=False).returncode == 0
            files = git(tree, "diff", "--name-only", "--diff-filter=U").stdout.split()
            if not picked:
                git(tree, "cherry-pick", "--abort")
            outcomes[subject] = () if picked else tuple(files) or ("nothing to change",)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--onto", type=Path, metavar="PATH", help="another PEFT, to try the commits of the branch on")
    options = parser.parse_args()
    if options.onto is None:
        make_branch(options.checkout)
        print(
            git(options.checkout, "log", "--oneline", "--reverse", f"-{len(series.patches())}", BRANCH).stdout, end=""
        )
        return 0
    outcomes = try_onto(options.checkout, options.onto)
    for subject, files in outcomes.items():
        print(f"conflict in {', '.join(files)}" if files else "clean", subject, sep=": ")
    return 1 if any(outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
