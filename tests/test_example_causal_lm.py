"""The causal language model example: killed half way and started again, it ends as if it had not been killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytestmark = [pytest.mark.overlay, pytest.mark.project]

SCRIPT = Path(__file__).parents[1] / "examples" / "causal_lm" / "train.py"
OPTIONS = ["--steps", "20", "--save-steps", "4", "--articles", "40"]


def start(output: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *OPTIONS, "--output", output],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert "mean rank 4.00" in finish(start(folder))
    return folder


def test_a_killed_run_ends_bit_by_bit_as_one_that_was_not(uninterrupted, tmp_path):
    process = start(tmp_path)
    while process.poll() is None and not (tmp_path / "checkpoint-12").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    process.stdout.close()
    assert not (tmp_path / "adapter_model.safetensors").exists()

    finish(start(tmp_path))
    for name in ("adapter_model.safetensors", "checkpoint-20/adalora_state.safetensors"):
        actual, expected = (load_file(folder / name) for folder in (tmp_path, uninterrupted))
        assert actual.keys() == expected.keys()
        for key in expected:
            assert torch.equal(actual[key], expected[key]), key
