"""Builds the pages, which are written for PEFT's documentation, into a site: `make docs`.

The tree of contents is that of `_toctree.yml`, and `[[autodoc]]` is understood as PEFT's documentation builder does.
"""

import re
from pathlib import Path

import yaml
from sphinx.application import Sphinx


SOURCE = Path(__file__).parent / "source"
AUTODOC = re.compile(r"^\[\[autodoc\]\] (\S+)((?:\n {4}- \S+)*)", flags=re.MULTILINE)

project = "peft-adadora"
project_copyright = "the authors of peft-adadora, Apache-2.0"
root_doc = "index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "AdaDoRA for PEFT"
nitpicky = True
# types in docstrings are text, as in PEFT's
napoleon_preprocess_types = False
default_role = "code"
autodoc_typehints = "none"
myst_heading_anchors = 3


def reference(match: re.Match) -> str:
    """`[[autodoc]]` as a directive: a function, or a class with the members that are listed."""
    name, members = match[1], ", ".join(re.findall(r"- (\S+)", match[2]))
    is_class = name.rpartition(".")[2][0].isupper()
    directive = f".. auto{'class' if is_class else 'function'}:: peft.{name}"
    return "\n".join(["```{eval-rst}", directive, *([f"   :members: {members}"] if members else []), "```"])


def read_source(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = AUTODOC.sub(reference, source[0])
    # between pages, PEFT's links do without a suffix
    source[0] = re.sub(r"\]\((?!https?://)([\w./]*\w)(#[\w-]+)?\)", r"](\1.md\2)", source[0])
    if page == root_doc:
        for part in yaml.safe_load((SOURCE / "_toctree.yml").read_text(encoding="utf-8")):
            lines = [f"{entry['title']} <{entry['local']}>" for entry in part["sections"]]
            source[0] += "\n".join(["\n```{toctree}", *lines, "```\n"])


def read_docstring(app: Sphinx, kind: str, name: str, documented: object, options: object, lines: list[str]) -> None:
    """PEFT's docstrings are Markdown: names in brackets are links, and examples are fenced."""
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", "\n".join(lines))
    text = re.sub(r"^```python\n(.*?)^```$", indented_example, text, flags=re.MULTILINE | re.DOTALL)
    lines[:] = text.split("\n")


def indented_example(match: re.Match) -> str:
    return "::\n\n" + "".join(f"    {line}\n" for line in match[1].splitlines())


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", read_docstring, priority=1)
