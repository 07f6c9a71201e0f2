"""Runs the behavioural tests with the Pythons and the torch, PEFT and transformers that people have: `make matrix`."""

import shutil

import nox


nox.options.default_venv_backend = "venv"

# each Python, each release of PEFT, both lines of transformers, and each torch from 2.6 on
COMBINATIONS = [
    ("3.10", "2.7.1", "0.21.0", "4.57.6"),
    ("3.10", "2.8.0", "0.21.1", "4.57.6"),
    ("3.10", "2.9.1", "0.21.0", "4.57.6"),
    ("3.11", "2.6.0", "0.21.2", "4.57.6"),
    ("3.11", "2.10.0", "0.21.0", "5.0.0"),
    ("3.11", "2.11.0", "0.21.2", "5.0.0"),
    ("3.11", "2.12.1", "0.21.1", "5.0.0"),
    ("3.12", "2.13.0", "0.21.2", "5.12.1"),
    ("3.13", "2.14.1", "0.21.2", "5.23.0"),
    ("3.13", "2.15.0", "0.21.2", "5.24.0"),
]
# older ones cannot import torchao 0.18
TORCH_WITH_TORCHAO = ("2.13.0", "2.14.1", "2.15.0")
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "adadora_guards",
        "adadora_math",
        "adadora_model",
        "callback",
        "exactness",
        "layer_kinds",
        "order_and_templates",
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
    if torch in TORCH_WITH_TORCHAO:
        session.install("torchao==0.18.0")
    session.run(
        *("python", "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"),
        *("-m", "not overlay and not soak", *TESTS),
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    # with CUDA, which torch comes with, each environment takes some 7 GB
    shutil.rmtree(session.virtualenv.location)
