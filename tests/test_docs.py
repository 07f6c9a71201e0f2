"""The code blocks of README and docs run as they stand, and the commands that they name exist."""

import ast
import contextlib
import dataclasses
import functools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import make_tokenizer
from trainer_run import make_llama, run_in_process

import peft


pytestmark = [pytest.mark.overlay, pytest.mark.project]
ROOT = Path(__file__).parents[1]
# What a page names and a test does not have: models from the Hub, and time
STAND_INS = {
    "Qwen/Qwen3-0.6B": "model",
    "max_steps=1500": "max_steps=15, use_cpu=True, bf16=False, report_to=[]",
    "total_step=1500": "total_step=15",
    "tinit=150": "tinit=2",
    "tfinal=750": "tfinal=5",
    "deltaT=10": "deltaT=1",
    "target_r=8": "target_r=2",
    "init_r=12": "init_r=3",
}
# A page that links to one of these headings continues so many code blocks of the first page
FIRST_PAGE = ROOT / "docs/source/developer_guides/adadora.md"
RUNS = [["run"], ["adapter"]]
CONTINUED = {"](adadora.md#the-setup)": 1, "](adadora.md#train)": 2}
PAGES = [
    path
    for pattern in ("*.md", "docs/source/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def code_of(page: Path) -> str:
    """The Python blocks of a page, after those that it continues."""
    text = page.read_text()
    before = max((count for link, count in CONTINUED.items() if link in text), default=0)
    return "\n".join([*blocks(FIRST_PAGE, "python")[:before], *blocks(page, "python")])


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks, in words."""
    lines = [line.split("#")[0].split() for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for words in lines if words]


def with_blocks(language: str) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_blocks_of_a_page_run_in_their_order_and_print_the_numbers_beside_them(page, tmp_path):
    script = tmp_path / "page.py"
    code = code_of(page)
    for words, local in STAND_INS.items():
        code = code.replace(words, local)
    script.write_text(code)
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "word{row} word{row + 1}"}}\n' for row in range(20)))
    printed = tmp_path / "printed.txt"
    assert run_in_process(run_page, script, printed) == 0
    said = re.findall(r"^print\(.*\)  # ([\d.]+)$", script.read_text(), flags=re.MULTILINE)
    assert [line for line in printed.read_text().splitlines() if line in said] == said
    program = Path(sys.executable).with_name("peft-adadora")
    for words in commands(page):
        if words == ["peft-adadora", "doctor"] or (words[:2] == ["peft-adadora", "report"] and words[2:] in RUNS):
            subprocess.run([program, *words[1:]], cwd=tmp_path, check=True, capture_output=True)


def run_page(script: Path, printed: Path) -> None:
    os.chdir(script.parent)
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")


@functools.cache
def help_text(*command: str | Path) -> str:
    return subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_the_commands_of_a_page_exist(page):
    assert commands(page)
    for words in commands(page):
        if words[0] == "make":
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] in ("python", "peft-adadora"):
            program = sys.executable if words[0] == "python" else Path(sys.executable).with_name(words[0])
            options = help_text(program, words[1])
            for option in (word for word in words[2:] if word.startswith("--")):
                assert option in options
        else:
            # the installation itself is tested in test_overlay.py
            assert words[:2] in (
                ["accelerate", "launch"],
                ["pip", "install"],
                ["pip", "download"],
                ["pip", "wheel"],
                ["git", "clone"],
            ), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_and_make_targets_that_a_text_names_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for words in map(str.split, re.findall(r"`([^`]+)`", text)):
        if words[:1] == ["make"]:
            subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        for word in words:
            if re.match(r"(benchmarks|docs|examples|src|tests|upstream)/", word):
                assert list(ROOT.glob(word)), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_code_block_is_one_that_is_tested_or_plain_text(page):
    fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
    assert set(fences[::2]) <= {"python", "bash", ""}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|(?:src|srcset)=\")(?!https?://)([^)#\"]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_each_table_of_the_docs_is_linked_from_a_page():
    tables = {path.name for path in (ROOT / "docs/source/tables").iterdir()}
    linked = {name for page in PAGES for name in re.findall(r"\]\(\.\./tables/([\w-]+\.csv)\)", page.read_text())}
    assert tables == linked


def test_the_reference_page_names_each_field_of_the_config():
    page = (ROOT / "docs/source/package_reference/adadora.md").read_text()
    for field in dataclasses.fields(peft.AdaLoraConfig):
        assert f"`{field.name}`" in page, field.name


def test_the_reference_page_names_what_exists():
    page = (ROOT / "docs/source/package_reference/adadora.md").read_text()
    names = re.findall(r"\[\[autodoc\]\] (\S+)((?:\n    - \S+)*)", page)
    assert names
    for name, members in names:
        module, _, attribute = name.rpartition(".")
        __import__(f"peft.{module}")
        documented = getattr(sys.modules[f"{peft.__name__}.{module}"], attribute)
        assert documented.__doc__
        for member in re.findall(r"- (\S+)", members):
            assert getattr(documented, member).__doc__


def test_the_site_builds_without_a_warning(tmp_path):
    """Links between pages and to headings, the tree of contents, and the docstrings of the reference are looked at."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "docs/source", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "package_reference" / "adadora.html").read_text()
    assert "SVDLinear" in reference and "[[autodoc]]" not in reference
    assert "`" not in re.sub(r"<[^>]+>", "", reference)
    method = (tmp_path / "conceptual_guides" / "adadora.html").read_text()
    assert "<math" in method and "$$" not in method


def test_the_pictures_of_the_method_are_those_that_the_script_draws():
    script = runpy.run_path(str(ROOT / "docs/draw_method.py"))
    for theme in script["COLORS"]:
        file = script["IMAGES"] / f"method-{theme}.svg"
        assert file.read_text(encoding="utf-8") == script["draw"](theme)
        for page in (ROOT / "README.md", ROOT / "docs/source/index.md"):
            assert f"{file.relative_to(page.parent)}" in page.read_text()


def texts(source: Path) -> Iterator[str]:
    """The strings of a module, with `…` for what varies."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_the_messages_of_the_troubleshooting_guide_are_those_that_are_raised():
    folders = [ROOT / "src", Path(peft.__file__).parent / "tuners" / "adalora"]
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    sources.append(Path(peft.__file__).parent / "utils" / "save_and_load.py")
    known = [text for source in sources for text in texts(source)]
    page = (ROOT / "docs/source/developer_guides/adadora_troubleshooting.md").read_text()
    seen = re.findall(r"^\| ([^|]*)\|", page, flags=re.MULTILINE)
    messages = [span for cell in seen for span in re.findall(r"`([^`]+)`", cell) if "…" in span or span.endswith(".")]
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        assert any(all(part in text for part in parts) for text in known), message
