"""A whole training step of a Llama, optimizer and allocation included, against PEFT's AdaLoRA without peft-adadora."""

import sys
import time
from collections.abc import Iterator

import apart
import torch
from apart import STOCK
from model import QUICK_LLAMA, SMALL_LLAMA
from report import Table
from settings import Settings
from timing import comparison
from variants import ADADORA, ADALORA


CASES = {case.name: case for case in (SMALL_LLAMA, QUICK_LLAMA)}


def serve(case_name: str, variant: str, threads: str) -> None:
    """Run a training step for each line of the input, and answer with its seconds."""
    torch.set_num_threads(int(threads))
    case, device = CASES[case_name], torch.device("cpu")
    model, inputs = case.build(device, [variant])[variant], case.inputs(device)
    tuner = model.base_model
    tuner.rankallocator.peft_config.tinit = 0  # prune from the second step on
    passes = case.training_step(model, inputs)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for step, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        passes()
        optimizer.step()
        tuner.update_and_allocate(step)
        print(time.perf_counter() - start, flush=True)


def tables(settings: Settings) -> Iterator[Table]:
    if settings.on_cuda:
        return
    case = settings.pick(SMALL_LLAMA, QUICK_LLAMA)
    workers = {
        name: apart.start("step", case.name, variant, str(settings.threads), with_us=variant == ADADORA)
        for name, variant in ((STOCK, ADALORA), (ADADORA, ADADORA))
    }
    warm_up, rounds = settings.pick((3, 30), (1, 3))
    seconds = {name: [] for name in workers}
    for _ in range(warm_up + rounds):
        for name, worker in workers.items():
            print(file=worker.stdin, flush=True)
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    row = {**case.labels, **comparison({name: times[warm_up:] for name, times in seconds.items()}, STOCK)}
    yield Table(
        "step",
        "A whole training step on the CPU",
        [row],
        f"Forward and backward pass, AdamW and allocation, in two processes that take turns, {rounds} rounds. "
        "The time of AdaDoRA is relative to PEFT's AdaLoRA without peft-adadora.",
    )


if __name__ == "__main__":
    serve(*sys.argv[1:])
