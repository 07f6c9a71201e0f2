"""Breaks the code on purpose, and shows that the behavioural tests notice, beside PEFT and inside of a patched one.

    python upstream/mutants.py FOLDER

FOLDER is that of `check.py`, whose environment and PEFT it shares, and makes if they are missing. Exits with 1 if a
mutant survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import check
import series


ROOT = Path(__file__).parents[1]
ADALORA = Path("peft", "tuners", "adalora")
# a test that fails is not to look for a simpler example for minutes
NO_SHRINKING = """
from hypothesis import Phase, settings

settings.register_profile("no_shrinking", phases=[Phase.explicit, Phase.generate])
settings.load_profile("no_shrinking")
"""
TESTS = [
    "test_adadora_math.py",
    "test_scale_cache.py",
    "test_adadora_model.py",
    "test_layer_kinds.py",
    "test_exactness.py",
    "test_rank_allocator.py",
    "test_skipped_steps.py",
    "test_decoupled_regularization.py",
]


class Edit(NamedTuple):
    """In a module of `peft.tuners.adalora`: what occurs there once, and what to put there."""

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A mistake: what it is, the edits that make it, and the file of `TESTS` to begin with, to be done soon."""

    name: str
    edits: tuple[Edit, ...]
    first: str = TESTS[0]

    def apply(self, folder: Path) -> None:
        for module, old, new in self.edits:
            path = folder / ADALORA / module
            code = path.read_text()
            if code.count(old) != 1:
                raise SystemExit(f"{self.name}: {old!r} occurs {code.count(old)} times in {module}")
            path.write_text(code.replace(old, new))


DO_NOT_DETACH = (
    Edit("adadora.py", "lora_A.detach()", "lora_A"),
    Edit("adadora.py", "scaled_E.detach()", "scaled_E"),
    Edit("adadora.py", "lora_B.detach()", "lora_B"),
)

MUTANTS = [
    Mutant("do not detach the norm", DO_NOT_DETACH),
    Mutant(
        "stop the gradient of the norm with no_grad, which forward mode passes over",
        (
            *DO_NOT_DETACH,
            Edit(
                "adadora.py",
                "    with full_precision(weight.device):\n        # `detach`",
                "    with torch.no_grad(), full_precision(weight.device):\n        # `detach`",
            ),
        ),
        first="test_exactness.py",
    ),
    Mutant(
        "write into what the base layer returned",
        (
            Edit(
                "adadora.py",
                "else torch.addcmul(bias - scale * bias, output, scale)",
                "else output.sub_(bias).mul_(scale).add_(bias)",
            ),
        ),
        first="test_exactness.py",
    ),
    Mutant(
        "cache m / n outside of generate() and DoraCaching()",
        (Edit("cache.py", "default=None)", "default=Cache(in_training=False))"),),
        first="test_exactness.py",
    ),
    Mutant(
        "do not clamp the squared norm",
        (Edit("adadora.py", "return torch.maximum(squared_norm, ", "return torch.maximum(squared_norm, 0 * "),),
    ),
    Mutant(
        "let a cast of the model round the magnitudes",
        (Edit("layer.py", "if is_rounded else applied", "if False else applied"),),
        "test_adadora_model.py",
    ),
    Mutant(
        "let gradients that are not finite into the averages",
        (
            Edit(
                "allocator.py",
                "finite = all_finite([*gradients_of(model), *chain(*importance.values())])",
                "finite = True",
            ),
        ),
        "test_skipped_steps.py",
    ),
    Mutant(
        "lose the magnitude when resizing",
        (
            Edit(
                "loading.py",
                "    layer.r[adapter_name] = len(indices)\n",
                "    layer.r[adapter_name] = len(indices)\n"
                "    if adapter_name in layer.lora_variant:\n"
                "        layer.lora_variant[adapter_name].init(layer, adapter_name)\n",
            ),
        ),
        first="test_adadora_model.py",
    ),
    Mutant(
        "scale the bias, too",
        (Edit("adadora.py", "output * scale if bias is None else", "output * scale if True else"),),
    ),
    Mutant(
        "take the norm over the wrong axis",
        (
            Edit(
                "layer.py",
                "isinstance(base_layer, Conv1D) else",
                "isinstance(base_layer, Conv1D) or weight.shape[0] == weight.shape[-1] else",
            ),
        ),
    ),
    Mutant(
        "do not mask",
        (Edit("allocator.py", ".masked_fill_(~masks[sharding.local_indices(singular_values[0], 0)], 0.0)", ""),),
        first="test_adadora_model.py",
    ),
    Mutant(
        "let the magnitude take part in the importance",
        (
            Edit(
                "allocator.py",
                "            for part in FACTORS\n        }",
                '            for part in (*FACTORS, "lora_magnitude")\n'
                "            if self.adapter_name in getattr(layer, part)\n        }",
            ),
            Edit(
                "importance.py",
                'return torch._foreach_add(of["lora_E"], torch._foreach_add(of["lora_A"], of["lora_B"]))',
                'of_E = [averages[n % "lora_magnitude"].mean() + score for n, score in zip(names, of["lora_E"])]\n'
                '    return torch._foreach_add(of_E, torch._foreach_add(of["lora_A"], of["lora_B"]))',
            ),
        ),
        first="test_adadora_model.py",
    ),
    Mutant(
        "sum the scores of a vector instead of averaging them",
        (Edit("importance.py", ".mean(dim=1 + dim)", ".sum(dim=1 + dim)"),),
        first="test_rank_allocator.py",
    ),
    Mutant(
        "leave the score of B out",
        (
            Edit(
                "importance.py",
                'torch._foreach_add(of["lora_A"], of["lora_B"])',
                'of["lora_A"]',
            ),
        ),
        first="test_rank_allocator.py",
    ),
    Mutant(
        "leave a layer out of the allocation",
        (
            Edit(
                "allocator.py",
                '{self.adapter_name}" for name in layers)',
                '{self.adapter_name}" for name in layers)[1:]',
            ),
        ),
        first="test_rank_allocator.py",
    ),
    Mutant(
        "allocate after a step that a gradient scaler skipped",
        (Edit("callback.py", 'getattr(optimizer, "step_was_skipped", False)', "False"),),
        first="test_skipped_steps.py",
    ),
    Mutant(
        "leave the magnitude behind when its adapter moves to another device",
        (Edit("layer.py", "return param if param.device == device else", "return param if True else"),),
        first="test_adadora_model.py",
    ),
    Mutant(
        "keep the cache after a generation",
        (Edit("cache.py", "    finally:\n        swap_cache(before)\n", "    finally:\n        pass\n"),),
        first="test_exactness.py",
    ),
    Mutant(
        "train the number that the update is divided by",
        (
            Edit(
                "layer.py",
                "self.ranknum[adapter_name].requires_grad_(False)",
                "self.ranknum[adapter_name].requires_grad_(True)",
            ),
        ),
        first="test_adadora_model.py",
    ),
    Mutant(
        "divide by a norm of zero",
        (Edit("adadora.py", "nn.functional.threshold(squared_norm, ZERO_ROW, torch.inf)", "squared_norm"),),
    ),
    Mutant("scale a row of zeros by 0", (Edit("adadora.py", "squared_norm <= ZERO_ROW", "squared_norm < 0"),)),
    Mutant(
        "round the factors to the weight's precision, where a GPU multiplies",
        (Edit("low_precision.py", "torch.cat([high, matrix - high])", "torch.cat([high, torch.zeros_like(high)])"),),
    ),
    Mutant(
        "orthogonalize all factors by the same learning rate",
        (Edit("regularization.py", "torch.as_tensor(trained[index][1],", "torch.as_tensor(trained[0][1],"),),
        first="test_decoupled_regularization.py",
    ),
    Mutant(
        "add the term to the loss although it is decoupled",
        (
            Edit(
                "model.py",
                "if adapter_name is None or self.peft_config[adapter_name].orth_reg_decoupled:",
                "if adapter_name is None:",
            ),
        ),
        first="test_decoupled_regularization.py",
    ),
]


def catcher_of(mutant: Mutant, python: Path, source: Path, folder: Path) -> Optional[str]:
    """The first test that fails with the mutant, or `None` if it survives all of them."""
    copy = folder / "mutant"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    mutant.apply(copy)
    (copy / "no_shrinking.py").write_text(NO_SHRINKING)
    environment = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no_shrinking", "-m", "not overlay and not soak"]
    tests = sorted(TESTS, key=lambda name: name != mutant.first)
    command = [python, "-m", "pytest", *options, *tests]
    result = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    failed = re.search(r"^FAILED test_\w+\.py::([^\s\[]+)", result.stdout, re.MULTILINE)
    if result.returncode != 1 or failed is None:
        raise SystemExit(f"{mutant.name}: the tests did not run\n{result.stdout}{result.stderr}")
    return failed[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    stock, python = check.prepare(folder)
    series.build(stock, folder / "whole")
    forms = {
        "over the installed PEFT": (Path(sys.executable), ROOT / "src"),
        "inside of PEFT": (python, folder / "whole" / "src"),
    }
    print("| mutant | noticed first, " + " | noticed first, ".join(forms) + " |\n|---|---|---|", flush=True)
    survived = 0
    for mutant in MUTANTS:
        catchers = [catcher_of(mutant, python, source, folder) for python, source in forms.values()]
        survived += catchers.count(None)
        check.print_row([mutant.name, *(f"`{each}`" if each else "SURVIVED" for each in catchers)])
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
