"""Runs the behavioural tests with the versions of Python, torch, PEFT and transformers that people have: `make matrix`."""

import nox


nox.options.default_venv_backend = "venv"

# each Python, each release of PEFT, both lines of transformers, and the oldest and the newest torch at least once
COMBINATIONS = [
    ("3.10", "2.13.0", "0.19.0", "4.57.6"),
    ("3.10", "2.13.0", "0.20.0", "4.57.6"),
    ("3.10", "2.13.0", "0.21.0", "4.57.6"),
    ("3.11", "2.6.0", "0.21.2", "4.57.6"),
    ("3.11", "2.13.0", "0.19.1", "5.0.0"),
    ("3.11", "2.13.0", "0.20.0", "5.0.0"),
    ("3.11", "2.13.0", "0.21.1", "5.0.0"),
    ("3.12", "2.13.0", "0.21.2", "5.12.1"),
    ("3.13", "2.13.0", "0.21.2", "5.23.0"),
]
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "adadora_guards",
        "adadora_math",
        "adadora_model",
        "callback",
        "layer_kinds",
        "peft_api",
        "rank_allocator",
        "real_models",
        "scale_cache",
    )
]


@nox.session
@nox.parametrize(
    "python, torch, peft, transformers",
    COMBINATIONS,
    ids=[
        f"python-{python}, torch-{torch}, peft-{peft}, transformers-{transformers}"
        for python, torch, peft, transformers in COMBINATIONS
    ],
)
def tests(session: nox.Session, torch: str, peft: str, transformers: str) -> None:
    """Install the wheel and run the tests."""
    # torch goes first and alone, so that nothing else resolves to a build of its own choice
    session.install(f"torch=={torch}")
    session.install(f"peft=={peft}", f"transformers=={transformers}", "accelerate", "bitsandbytes")
    session.install("hypothesis", "pytest", "pytest-xdist", ".")
    session.run(
        *("python", "-m", "pytest", "-q", "-n", "2", "-m", "not overlay and not soak", *TESTS),
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
