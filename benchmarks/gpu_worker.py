"""A process that builds what `gpu.py` asks for, and times it; a request and its answer are a line each.

    python gpu_worker.py cuda 16
    {"task": "prepare_training", "variant": "AdaDoRA", "kind": "bfloat16", "width": 4096, "tokens": 2048}

The answer to a task that fails is {"error": …}.
"""

import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any


if __name__ == "__main__" and sys.argv[1] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which other packages may do

import torch
from counters import launches, peak_bytes
from names import (
    ADADORA,
    BFLOAT16,
    BOTH_KERNELS,
    CACHING,
    CANCELLING_ERROR,
    ERROR,
    GENERATE,
    GRADIENT_ERROR,
    NORM_KERNEL,
    NOW,
    OUTPUT_ERROR,
    OUTPUT_KERNEL,
    TWO_PARTS,
)
from timing import Stopwatch, take_turns


MIB = 2**20
# The gradients of h are checked in float64 up to so many elements.
MOST_CHECKED = 2**25

Step = Callable[[Stopwatch], None]
Facts = dict[str, Any]


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:200]


def relative_error(values: torch.Tensor, exact: torch.Tensor) -> float:
    """L2 norm of the difference over that of the exact values."""
    return float((values.double() - exact).norm() / exact.norm())


def timed(function: Callable[[], Any]) -> Step:
    """A step of one phase."""

    def step(stopwatch: Stopwatch) -> None:
        stopwatch.mark()
        function()
        stopwatch.mark()

    return step


class Tasks:
    """What can be asked for: the public methods. Models stay until `release`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._models: dict[tuple, Any] = {}

    def release(self) -> None:
        """Free the models, and the memory that PyTorch keeps for later."""
        self._models.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ----------------------------------------------------------------------------------------------------- comparisons

    def count(self, **arguments: Any) -> Facts:
        """The launches of a training step, counted, and their price; of one decoder layer, without the optimizer."""
        from launches import one_layer

        return one_layer(**arguments)

    def prepare_training(self, **case: Any) -> Facts:
        """Warm up. The seconds of the first step, the peak of a step in MiB, and the kernels launched but by AdamW."""
        training = self._training(**case)
        stopwatch, start = Stopwatch(self.device), time.perf_counter()
        training.step(stopwatch)
        stopwatch.seconds()  # waits for the device
        first = time.perf_counter() - start
        for _ in range(2):
            training.step(stopwatch)
        return {
            "first step (s)": first,
            "peak (MiB)": peak_bytes(lambda: training.step(stopwatch), self.device) / MIB,
            "kernels": launches(lambda: training.step(stopwatch, with_optimizer=False), self.device),
        }

    def time_training(self, steps: int, **case: Any) -> list[float]:
        """The seconds of each phase of a training step, medians of some steps after one that is not timed."""
        return self._median_phases(self._training(**case).step, steps)

    def time_evaluation(
        self, variant: str, step: str, width: int, layers: int, tokens: int, generated: int, steps: int
    ) -> list[float]:
        """The seconds of a prefill, or of generating tokens after a prompt of 16, as the only item of a list."""
        from cases import LlamaCase
        from model import generation

        from peft.helpers import DoraCaching

        heads = max(4, width // 128)
        case = LlamaCase("", width, 7 * width // 2, heads, heads // 4, layers, tokens, torch.bfloat16)
        key = variant, case
        if key not in self._models:
            self._models[key] = case.build(self.device, [variant])[variant]
        model, inputs = self._models[key], case.inputs(self.device)
        function = (
            generation(model, inputs[:, :16], generated) if step == GENERATE else case.forward_pass(model, inputs)
        )
        with DoraCaching() if step == CACHING else nullcontext():
            return self._median_phases(timed(function), steps)

    def _training(self, variant: str, kind: str, width: int, tokens: int, is_compiled: bool = False) -> Any:
        from decoder import Training

        key = variant, kind, width, is_compiled
        if key not in self._models:
            self._models[key] = Training(variant, kind, width, self.device)
            if is_compiled:
                self._models[key].compile()
        self._models[key].set_tokens(tokens)
        return self._models[key]

    def _median_phases(self, step: Step, steps: int) -> list[float]:
        step(Stopwatch(self.device))
        stopwatches = [Stopwatch(self.device) for _ in range(steps)]
        for stopwatch in stopwatches:
            step(stopwatch)
        return [statistics.median(values) for values in zip(*(stopwatch.seconds() for stopwatch in stopwatches))]

    # ----------------------------------------------------------------------------------------------- norms and kernels

    def norms(
        self, out_features: int, in_features: int, rank: int, rounds: int, share: float, with_kernel: bool
    ) -> dict[str, Facts]:
        """
        Of each form of the norm of a bfloat16 weight: its seconds, launches, peak, and largest relative errors. With
        the kernel, of the form as it is and the kernel alone.
        """
        import norm_forms
        from accuracy import Factors, random_factors, with_cancelling_rows

        def forms(weight: torch.Tensor) -> dict[str, norm_forms.Norm]:
            found = norm_forms.forms(weight)
            if not with_kernel:
                return found
            from candidates.norm import squared_adapted_row_norm

            return {NOW: found[TWO_PARTS], NORM_KERNEL: lambda *args: squared_adapted_row_norm(*args).sqrt()}

        def error(name: str, factors: Factors) -> float:
            exact = norm_forms.dense(*vars(factors.to(torch.float64)).values())
            values = forms(factors.weight)[name](*vars(factors).values())
            return float(((values.double() - exact).abs() / exact).max())

        cases = [
            change(random_factors(out_features, in_features, rank, self.device))
            for change in (lambda factors: factors, with_cancelling_rows)
        ]
        random, cancelling = (
            Factors(factors.weight.bfloat16(), factors.lora_A, factors.scaled_E, factors.lora_B) for factors in cases
        )
        functions = {name: partial(form, *vars(random).values()) for name, form in forms(random.weight).items()}
        facts = {
            name: lambda name=name: {ERROR: error(name, random), CANCELLING_ERROR: error(name, cancelling)}
            for name in functions
        }
        steps = {name: timed(function) for name, function in functions.items()}
        with torch.no_grad():
            return self._against_each_other(functions, steps, facts, rounds, share)

    def outputs(self, tokens: int, features: int, rank: int, rounds: int, share: float) -> dict[str, Facts]:
        """Of h as it is and in one kernel: seconds of the passes, launches, peak, and relative errors."""
        from candidates.output import adapted_output as kernel
        from internals import adapted_output

        torch.manual_seed(0)
        with self.device:
            output, gradient = (torch.randn(tokens, features, dtype=torch.bfloat16) for _ in range(2))
            scale, projected = 1 + 0.1 * torch.randn(features), torch.randn(tokens, rank)
            scaled_B = 0.1 * torch.randn(features, rank)
        inputs = [tensor.requires_grad_() for tensor in (output, scale, projected, scaled_B)]
        forms = {
            NOW: lambda output, scale, *factors: adapted_output(output, scale, None, *factors).to(output.dtype),
            OUTPUT_KERNEL: lambda output, scale, *factors: kernel(output, scale, None, *factors),
        }

        def both_passes(form: Callable[..., torch.Tensor], stopwatch: Stopwatch) -> list[torch.Tensor]:
            stopwatch.mark()
            h = form(*inputs)
            stopwatch.mark()
            gradients = torch.autograd.grad(h, inputs, gradient)
            stopwatch.mark()
            return [h.detach(), *gradients]

        def errors(form: Callable[..., torch.Tensor]) -> Facts:
            found = both_passes(form, Stopwatch(self.device))
            if output.numel() > MOST_CHECKED:
                return {OUTPUT_ERROR: None, GRADIENT_ERROR: None}
            exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
            W_x, scale, projected, scaled_B = exact_inputs
            exact = scale * W_x + projected @ scaled_B.T
            gradients = torch.autograd.grad(exact, exact_inputs, gradient.double())
            error, *others = map(relative_error, found, [exact.detach(), *gradients])
            return {OUTPUT_ERROR: error, GRADIENT_ERROR: max(others)}

        steps = {name: partial(both_passes, form) for name, form in forms.items()}
        functions = {name: partial(step, Stopwatch(self.device)) for name, step in steps.items()}
        facts = {name: partial(errors, form) for name, form in forms.items()}
        return self._against_each_other(functions, steps, facts, rounds, share)

    def training_with_kernels(self, width: int, tokens: int, rounds: int, share: float) -> dict[str, Facts]:
        """Of a whole training step of AdaDoRA, as it is and with the kernels: seconds of its phases, kernels, peak."""
        from candidates import norm, output
        from internals import replaced

        training = self._training(ADADORA, BFLOAT16, width, tokens)
        replaced_output = {"adapted_output": output.adapted_output}
        replaced_norm = {"squared_adapted_row_norm": norm.squared_adapted_row_norm}
        forms = {
            NOW: {},
            OUTPUT_KERNEL: replaced_output,
            NORM_KERNEL: replaced_norm,
            BOTH_KERNELS: {**replaced_output, **replaced_norm},
        }

        def step(functions: dict[str, Callable], stopwatch: Stopwatch, **options: bool) -> None:
            with replaced(**functions):
                training.step(stopwatch, **options)

        functions = {
            name: partial(step, form, Stopwatch(self.device), with_optimizer=False) for name, form in forms.items()
        }
        steps = {name: partial(step, form) for name, form in forms.items()}
        facts = dict.fromkeys(forms, dict)
        return self._against_each_other(functions, steps, facts, rounds, share, is_cold=False)

    def _against_each_other(
        self,
        functions: dict[str, Callable[[], Any]],
        steps: dict[str, Step],
        facts: dict[str, Callable[[], Facts]],
        rounds: int,
        share: float,
        is_cold: bool = True,
    ) -> dict[str, Facts]:
        """The facts of each form, its peak and launches, and the seconds of its phases; or its failure alone."""
        found: dict[str, Facts] = {}
        for name, function in functions.items():
            try:
                function()
                found[name] = {
                    "launches": launches(function, self.device),
                    "peak (MiB)": peak_bytes(function, self.device) / MIB,
                    **facts[name](),
                }
            except Exception as error:  # noqa: BLE001 - a form that fails does not lose the others
                traceback.print_exc()
                found[name] = {"failure": one_line(error)}
        working = {name: step for name, step in steps.items() if "failure" not in found[name]}
        for name, seconds in take_turns(working, self.device, rounds, share, is_cold).items():
            found[name]["seconds"] = seconds
        return found


def answer(tasks: Tasks, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": getattr(tasks, request.pop("task"))(**request)}
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the answer
        traceback.print_exc()
        return {"error": one_line(error)}


def main(device: str, threads: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(threads))
    tasks = Tasks(torch.device(device))
    for line in sys.stdin:
        print(json.dumps(answer(tasks, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
