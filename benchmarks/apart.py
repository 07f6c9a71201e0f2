"""Runs a module of the benchmarks in a process of its own, with PEFT as it is without peft-adadora, or with it."""

import subprocess
import sys
from pathlib import Path
from typing import IO, Optional


# what ran without peft-adadora
STOCK = "PEFT's AdaLoRA"

WITHOUT_US = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") != "_peft_adadora"]
"""


def start(module: str, *arguments: str, with_us: bool, errors: Optional[IO] = None) -> subprocess.Popen:
    """
    The process that runs `module` as a script with these arguments, with its input and output as pipes of text. What
    it writes to stderr goes to the file `errors`, if given.
    """
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
    command = [sys.executable, "-c", code if with_us else WITHOUT_US + code, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, cwd=Path(__file__).parent)
