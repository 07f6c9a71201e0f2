"""Breaks the code on purpose, and shows that the behavioural tests notice, beside PEFT and inside of a patched one.

    python upstream/mutants.py FOLDER

FOLDER is that of `check.py`, which makes the patched PEFT and its environment. Each mutant is made in a copy. Exits
with 1 if one survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
ADALORA = Path("peft", "tuners", "adalora")
TESTS = ["test_adadora_math.py", "test_adadora_model.py", "test_layer_kinds.py"]


@dataclass(frozen=True)
class Mutant:
    """
    A mistake.

    Args:
        name: What it is.
        module: The module of `peft.tuners.adalora` to change.
        old: What occurs there once.
        new: What to put there.
        module_in_peft, old_in_peft, new_in_peft: The same inside of PEFT, where the line is elsewhere.
    """

    name: str
    module: str
    old: str
    new: str
    module_in_peft: str = ""
    old_in_peft: str = ""
    new_in_peft: str = ""

    def apply(self, folder: Path, inside_peft: bool) -> None:
        changes_peft = inside_peft and self.module_in_peft
        module, old, new = (
            (self.module_in_peft, self.old_in_peft, self.new_in_peft)
            if changes_peft
            else (self.module, self.old, self.new)
        )
        path = folder / ADALORA / module
        code = path.read_text()
        if code.count(old) != 1:
            raise SystemExit(f"{self.name}: {old!r} occurs {code.count(old)} times in {module}")
        path.write_text(code.replace(old, new))


MUTANTS = [
    Mutant(
        "do not detach the norm",
        "adadora_layer.py",
        "            return add_update_and_scale(output, projected, lora_B, magnitude, squared_norm, bias)\n",
        "            adapted = self.get_base_layer().weight + lora_B @ (lora_A * scaled_E)\n"
        "            squared_norm = adapted.square().sum(dim=1, keepdim=True)\n"
        "            scale = magnitude_scale(magnitude, squared_norm)\n"
        "            return scale_output(output + projected @ lora_B.T, scale, bias)\n",
    ),
    Mutant(
        "do not clamp the squared norm",
        "adadora.py",
        "(squared_base_norm + update).clamp_min_(0)",
        "squared_base_norm + update",
    ),
    Mutant(
        "lose the magnitude when resizing",
        "adadora_model.py",
        "                layer.keep_ranks(adapter_name, mask.nonzero().view(-1))\n",
        "                layer.keep_ranks(adapter_name, mask.nonzero().view(-1))\n"
        "                layer.reset_magnitude(adapter_name)\n",
    ),
    Mutant(
        "scale the bias, too",
        "adadora.py",
        "    scale = scale.view(-1)\n    if bias is None:",
        "    scale = scale.view(-1)\n    bias = None\n    if bias is None:",
    ),
    Mutant(
        "take the norm over the wrong axis",
        "base_weight.py",
        "    if isinstance(module, Conv1D):\n        return weight.T\n    return weight.flatten(1)",
        "    if isinstance(module, Conv1D) or weight.shape[0] == weight.shape[-1]:\n"
        "        return weight.T\n    return weight.flatten(1)",
    ),
    Mutant(
        "do not mask",
        "layer.py",
        "            super().mask_using_rank_pattern(model, rank_pattern)",
        "            pass",
        "layer.py",
        "                    p.masked_fill_(~mask.bool(), 0.0)",
        "                    pass",
    ),
    Mutant(
        "let the magnitude take part in the importance",
        "allocator.py",
        ' and "lora_magnitude" not in name',
        "",
    ),
    Mutant(
        "train the number that the update is divided by",
        "adadora_layer.py",
        "            self.ranknum[adapter_name].requires_grad_(False)\n",
        "            self.ranknum[adapter_name].requires_grad_(True)\n",
    ),
    Mutant(
        "divide by a norm of zero",
        "adadora.py",
        "    is_zero = squared_norm <= ZERO_ROW\n",
        "    is_zero = squared_norm < 0\n",
    ),
]


def is_caught(python: Path, source: Path, mutant: Mutant, folder: Path, inside_peft: bool) -> bool:
    copy = folder / "mutant"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    mutant.apply(copy, inside_peft)
    environment = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not overlay and not soak", *TESTS]
    result = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1) or " error" in result.stdout.splitlines()[-1]:
        raise SystemExit(f"{mutant.name}: the tests did not run\n{result.stdout}{result.stderr}")
    return result.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    forms = {
        "over the installed PEFT": (Path(sys.executable), ROOT / "src", False),
        "inside of PEFT": (folder / "venv" / "bin" / "python", folder / "patched" / "src", True),
    }
    if not forms["inside of PEFT"][0].exists():
        raise SystemExit(f"{folder} has no environment with a patched PEFT; run check.py first")
    print("| mutant | " + " | ".join(forms) + " |\n|---|---|---|", flush=True)
    survived = 0
    for mutant in MUTANTS:
        caught = [is_caught(python, source, mutant, folder, inside) for python, source, inside in forms.values()]
        survived += caught.count(False)
        print(
            f"| {mutant.name} | " + " | ".join("caught" if each else "SURVIVED" for each in caught) + " |", flush=True
        )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
