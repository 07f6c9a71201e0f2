"""A run that is killed again and again at random moments, and ends as one that never was."""

import random

import pytest
from test_callback import assert_same, everything_in
from trainer_run import STEPS, run_in_process, train


def soak(folder, cycles: int, seed: int) -> None:
    """
    Runs with `cycles` kills in all; each run that comes to its end has to end as the first one, which is left alone.
    """
    moments = random.Random(seed)
    expected_folder = folder / "expected"
    assert run_in_process(train, expected_folder, save_total_limit=2) == 0
    expected = everything_in(expected_folder / f"checkpoint-{STEPS}")
    kills = run = 0
    while kills < cycles:
        exit_code = run_in_process(
            train, folder / f"run-{run}", kill_after=moments.uniform(0.2, 2.5), save_total_limit=2
        )
        if exit_code == -9:
            kills += 1
            continue
        assert exit_code == 0
        assert_same(everything_in(folder / f"run-{run}" / f"checkpoint-{STEPS}"), expected)
        run += 1
    assert run_in_process(train, folder / f"run-{run}", save_total_limit=2) == 0
    assert_same(everything_in(folder / f"run-{run}" / f"checkpoint-{STEPS}"), expected)


def test_six_kills(tmp_path):
    soak(tmp_path, cycles=6, seed=0)


@pytest.mark.soak
def test_two_hundred_kills(tmp_path):
    soak(tmp_path, cycles=200, seed=1)
