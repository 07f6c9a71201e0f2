"""The series becomes a branch that git can apply and rebase, on the release that it is made for and on no other."""

import shutil
import sys
from pathlib import Path

import pytest


pytestmark = [pytest.mark.overlay, pytest.mark.project]

sys.path.append(str(Path(__file__).parents[1] / "upstream"))

import apply
import series


SUBJECTS = [series.message(folder).splitlines()[0] for folder in series.patches()]


def git(repository, *arguments):
    return apply.git(repository, *arguments).stdout.strip()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A repository with one commit: the installed PEFT."""
    tree = tmp_path_factory.mktemp("release") / "peft"
    series.installed(tree)
    apply.make_repository(tree)
    return tree


@pytest.fixture(scope="module")
def fork(release, tmp_path_factory):
    """The release with the branch."""
    tree = tmp_path_factory.mktemp("fork") / "peft"
    shutil.copytree(release, tree)
    apply.make_branch(tree)
    return tree


@pytest.fixture
def clone(release, tmp_path):
    shutil.copytree(release, tmp_path / "peft")
    return tmp_path / "peft"


def change_line(repository, name, number):
    """Commit a comment on a line of a file."""
    path = repository / name
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].rstrip("\n") + "  # changed\n"
    path.write_text("".join(lines))


def state(repository):
    return git(repository, "for-each-ref"), git(repository, "worktree", "list"), git(repository, "diff", "HEAD")


@pytest.mark.parametrize(
    "config, author",
    [("[user]\nname = Ada\nemail = ada@example.org\n", "Ada"), ("", "PEFT")],
    ids=["known", "unknown"],
)
def test_commits_carry_the_name_of_the_user_if_git_knows_it(config, author, tmp_path, monkeypatch):
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    tree = tmp_path / "peft"
    tree.mkdir()
    (tree / "README.md").touch()
    apply.make_repository(tree)
    assert git(tree, "log", "--format=%an") == author


def test_each_patch_is_a_commit_with_the_message_of_its_page(fork):
    assert git(fork, "log", "--reverse", "--format=%s", f"-{len(SUBJECTS)}", apply.BRANCH).splitlines() == SUBJECTS
    for number, folder in enumerate(reversed(series.patches())):
        assert git(fork, "log", "-1", "--format=%B", f"{apply.BRANCH}~{number}") == series.message(folder).strip()


def test_the_branch_holds_the_whole_and_leaves_the_work_tree_alone(fork, release, tmp_path):
    series.build(release, tmp_path / "whole")
    git(fork, "clone", "--quiet", "--branch", apply.BRANCH, fork, tmp_path / "branch")
    trees = (tmp_path / "whole", tmp_path / "branch")
    whole, branch = ({p.relative_to(t): p.read_bytes() for p in (t / "src").rglob("*.py")} for t in trees)
    assert whole == branch
    assert state(fork)[1:] == (git(fork, "worktree", "list"), "")
    assert len(git(fork, "worktree", "list").splitlines()) == 1
    assert git(fork, "rev-parse", "HEAD") == git(release, "rev-parse", "HEAD")


def test_the_patches_can_be_written_from_the_commits(fork, tmp_path):
    git(fork, "clone", "--quiet", "--branch", apply.BRANCH, fork, tmp_path / "branch")
    expected = [patch for folder in series.patches()[-5:] for patch in folder.glob("*.patch")]
    found = series.patches_from(tmp_path / "branch")
    # the installed PEFT has neither tests nor docs
    assert found.keys() == {path for path in expected if path.name not in ("tests.patch", "repository.patch")}
    assert all(text == path.read_text() for path, text in found.items())


def test_every_commit_compiles(fork):
    for number in range(len(SUBJECTS)):
        commit = f"{apply.BRANCH}~{number}"
        for name in git(fork, "diff", "--name-only", f"{commit}~", commit, "--", "*.py").splitlines():
            compile(git(fork, "show", f"{commit}:{name}"), name, "exec")


def test_git_am_makes_the_same_tree_of_the_commits_as_files(fork, clone, tmp_path):
    git(fork, "format-patch", "-U3", "-o", tmp_path / "patches", f"-{len(SUBJECTS)}", apply.BRANCH)
    git(clone, "am", *sorted((tmp_path / "patches").iterdir()))
    assert git(clone, "rev-parse", "HEAD^{tree}") == git(fork, "rev-parse", f"{apply.BRANCH}^{{tree}}")


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("name", sorted(series.files_of_release(Path("nowhere"))))
def test_a_tree_in_which_one_line_of_a_file_differs_is_refused(clone, name, committed):
    change_line(clone, name, 1)
    if committed:
        git(clone, "commit", "--all", "--message", "Change a line")
    before = state(clone)
    with pytest.raises(SystemExit, match=name):
        apply.make_branch(clone)
    assert state(clone) == before


def test_a_tree_that_has_a_module_of_ours_is_refused(clone):
    (clone / series.PEFT / "tuners" / "adalora" / "variants.py").touch()
    with pytest.raises(SystemExit, match="src/peft/tuners/adalora/variants.py"):
        apply.make_branch(clone)
    assert git(clone, "branch", "--list", apply.BRANCH) == ""


def test_a_branch_that_is_there_is_left_alone(fork):
    before = state(fork)
    with pytest.raises(SystemExit, match="already"):
        apply.make_branch(fork)
    assert state(fork) == before


def test_git_rebases_the_branch_over_lines_that_it_does_not_touch(fork, tmp_path):
    shutil.copytree(fork, tmp_path / "peft")
    names = series.files_of_release(fork)
    for name in names:
        change_line(tmp_path / "peft", name, 1)
    git(tmp_path / "peft", "commit", "--all", "--message", "Change a line of each file")
    main = git(tmp_path / "peft", "rev-parse", "HEAD")
    assert set(apply.try_onto(fork, tmp_path / "peft").items()) == {(subject, ()) for subject in SUBJECTS}
    git(tmp_path / "peft", "rebase", main, apply.BRANCH)
    for name in names:
        original = git(fork, "show", f"{apply.BRANCH}:{name}")
        assert git(tmp_path / "peft", "show", f"{apply.BRANCH}:{name}") == original.replace("\n", "  # changed\n", 1)


def test_a_conflict_is_named_by_its_commit_and_file(fork, tmp_path):
    series.installed(tmp_path / "peft")
    model = tmp_path / "peft" / series.PEFT / "tuners" / "adalora" / "model.py"
    line = '        if (getattr(outputs, "loss", None) is not None) and isinstance(outputs.loss, torch.Tensor):\n'
    assert model.read_text().count(line) == 1
    model.write_text(model.read_text().replace(line, line.replace("torch.Tensor", "(torch.Tensor, float)")))
    outcomes = apply.try_onto(fork, tmp_path / "peft")
    where = (str(series.PEFT / "tuners" / "adalora" / "model.py"),)
    in_eval_mode = "FIX AdaLoRA: no orthogonality term in eval mode"
    assert {subject for subject, files in outcomes.items() if files} <= {in_eval_mode, SUBJECTS[4], SUBJECTS[-2]}
    assert outcomes[in_eval_mode] == where
    assert outcomes[SUBJECTS[0]] == ()
