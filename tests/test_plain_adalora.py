"""What the guide says of plain AdaLoRA is what PEFT does, without this package and with it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("schedulefree")

from plain_adalora import ROWS, outcomes


pytestmark = pytest.mark.overlay
ROOT = Path(__file__).parents[1]
REPAIRED, LEFT = (
    {words: cells for words, *cells in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", part, flags=re.MULTILINE)}
    for part in (ROOT / "docs/source/developer_guides/adadora_plain_adalora.md")
    .read_text()
    .partition("## Repaired with the flag off and on")[2]
    .split("## Unchanged with the flag off")
)
ENGINES = ("FSDP2", "FSDP1")  # what takes several processes, or the Trainer, is tested with those


@pytest.fixture(scope="module")
def plain():
    command = [sys.executable, ROOT / "tests" / "plain_adalora.py", "--without-adadora"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def off():
    return outcomes(use_dora_adaptive=False)


@pytest.fixture(scope="module")
def on():
    return outcomes(use_dora_adaptive=True)


def assert_says(cell: str, outcome: bool | str) -> None:
    """That a cell of the guide says what came of it: the error, or that there is none but what it tells instead."""
    if isinstance(outcome, str):
        assert f"`{outcome}`" in cell
    else:
        assert not re.fullmatch(r"(torch's )?`\w+Error`.*", cell) or " or " in cell


def test_each_row_of_the_guide_is_done():
    rows = REPAIRED | LEFT
    assert set(ROWS) == {words for words in rows if not any(engine in words for engine in ENGINES)}


@pytest.mark.parametrize("words", ROWS)
def test_peft_alone_goes_wrong_as_the_guide_says(words, plain):
    assert plain[words] is not True
    assert_says((REPAIRED | LEFT)[words][0], plain[words])


@pytest.mark.parametrize("words", sorted(REPAIRED.keys() & ROWS.keys()))
def test_what_is_repaired_goes_right_or_is_refused_with_the_flag_off_and_on(words, off, on):
    assert off[words] == on[words]
    assert on[words] is not False
    assert_says(REPAIRED[words][1], on[words])


@pytest.mark.parametrize("words", sorted(LEFT.keys() & ROWS.keys()))
def test_what_is_left_goes_wrong_with_the_flag_off_and_right_or_is_refused_with_it_on(words, plain, off, on):
    assert off[words] == plain[words]
    assert on[words] is not False
    assert_says(LEFT[words][1], on[words])
