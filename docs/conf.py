"""Build the pages, which are written for PEFT's documentation, into a site: `make docs`.

The navigation comes from `_toctree.yml`. `[[autodoc]]` works as in PEFT's documentation builder. Formulas stand
between `$$`, which GitHub and PEFT's builder also read. They become MathML, so a browser needs no script for them.
"""

import dataclasses
import re
from pathlib import Path

import yaml
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


SOURCE = Path(__file__).parent / "source"
AUTODOC = re.compile(r"^\[\[autodoc\]\] (\S+)((?:\n {4}- \S+)*)", flags=re.MULTILINE)
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img src="([^"]+)"([^>]*)>\s*</picture>')

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
myst_enable_extensions = ["dollarmath", "html_image"]


def reference(match: re.Match) -> str:
    """Turn `[[autodoc]]` into a directive for a function, or for a class with the listed members."""
    name, members = match[1], ", ".join(re.findall(r"- (\S+)", match[2]))
    is_class = name.rpartition(".")[2][0].isupper()
    directive = f".. auto{'class' if is_class else 'function'}:: peft.{name}"
    return "\n".join(["```{eval-rst}", directive, *([f"   :members: {members}"] if members else []), "```"])


def read_source(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = AUTODOC.sub(reference, source[0])
    # the reader may choose a theme that differs from the browser's
    source[0] = PICTURE.sub(r'<img class="only-dark" src="\1"\3><img class="only-light" src="\2"\3>', source[0])
    if page == root_doc:
        for part in yaml.safe_load((SOURCE / "_toctree.yml").read_text(encoding="utf-8")):
            entries = [f"{entry['title']} <{entry['local']}>" for entry in part["sections"]]
            lines = [":hidden:", f":caption: {part['title']}", *entries]
            source[0] += "\n".join(["\n```{toctree}", *lines, "```\n"])


def read_docstring(app: Sphinx, kind: str, name: str, documented: object, options: object, lines: list[str]) -> None:
    """Read PEFT's Markdown docstrings: names in brackets are links, and examples and formulas are fenced."""
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", "\n".join(lines))
    text = re.sub(r"^```(?:python)?\n(.*?)^```$", indented_block, text, flags=re.MULTILINE | re.DOTALL)
    lines[:] = text.split("\n")


def short_signature(app: Sphinx, kind: str, name: str, documented: object, *_: object) -> tuple[str, str] | None:
    """A config's fields have a table, so its signature leaves them out."""
    return ("(…)", "") if kind == "class" and dataclasses.is_dataclass(documented) else None


def indented_block(match: re.Match) -> str:
    return "::\n\n" + "".join(f"    {line}\n" for line in match[1].splitlines())


def formula(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    is_block = isinstance(node, nodes.math_block)
    mathml = convert(node.astext(), display="block" if is_block else "inline")
    writer.body.append(f"<p>{mathml}</p>" if is_block else mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", read_docstring, priority=1)
    app.connect("autodoc-process-signature", short_signature)
