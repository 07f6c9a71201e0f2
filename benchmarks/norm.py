"""The row norm of W + ΔW alone: from the factors, and from the dense matrix."""

from collections.abc import Callable, Iterator

import torch
from cases import LayerCase, without_gradients
from internals import row_norm
from norm_forms import as_it_is, with_base_norm
from report import Table
from settings import Settings
from timing import comparison, measure
from variants import ADADORA, ADAPTER, DORA, adapted_layers


FACTORED, KEPT, DENSE_NORM, DORA_NORM = "from the factors", "with ‖W‖² kept", "dense", "PEFT's DoRA"
SHAPES = [(4096, 4096, 8), (11008, 4096, 64), (2048, 2048, 12), (2048, 2048, 384)]
# Times dense on a CPU, as PEFT's pull request 3387 reports it.
PUBLISHED = {(4096, 4096, 8): 4.76, (11008, 4096, 64): 5.80}


def norm_functions(case: LayerCase, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that give the row norms of an adapted layer, without gradients.

    The layer computes ‖W‖² in each step; one form shows the time without it. The dense one makes W + ΔW in float32 and
    takes its norm. PEFT's is what its DoRA does in each forward pass: the update is a product with an identity matrix,
    the rest is as in the dense one.
    """
    adadora, dora = (adapted_layers(model)[0] for model in case.build(device, (ADADORA, DORA)).values())
    weight = adadora.get_base_layer().weight
    lora_A, lora_E, lora_B = (getattr(adadora, name)[ADAPTER] for name in ("lora_A", "lora_E", "lora_B"))
    scaled_E = lora_E * (adadora.scaling[ADAPTER] / (adadora.ranknum[ADAPTER] + 1e-5))
    factors = weight, lora_A, scaled_E, lora_B
    norm_with_base_norm = with_base_norm(row_norm(weight).square())
    magnitude = dora.lora_magnitude_vector[ADAPTER]

    def dense() -> torch.Tensor:
        return torch.linalg.vector_norm(weight + adadora.get_delta_weight(ADAPTER), dim=1, keepdim=True)

    def peft_dora() -> torch.Tensor:
        update = magnitude.get_lora_weight(dora.lora_A[ADAPTER], dora.lora_B[ADAPTER])
        base = dora.get_base_layer().weight.to(update.dtype)
        return magnitude.get_weight_norm(base, update, dora.scaling[ADAPTER])

    functions = {
        FACTORED: lambda: as_it_is(*factors),
        KEPT: lambda: norm_with_base_norm(*factors),
        DENSE_NORM: dense,
        DORA_NORM: peft_dora,
    }
    return {name: without_gradients(function) for name, function in functions.items()}


def cases(settings: Settings) -> list[LayerCase]:
    shapes = settings.pick(SHAPES, [(1024, 1024, 8), (1024, 1024, 192)])
    return [
        LayerCase(out_features, in_features, 0, rank, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for out_features, in_features, rank in shapes
    ]


def labels(case: LayerCase) -> dict[str, object]:
    return {name: value for name, value in case.labels.items() if name != "tokens"}


def published(case: LayerCase, settings: Settings) -> float | None:
    if settings.on_cuda or case.dtype != torch.float32:
        return None
    return PUBLISHED.get((case.out_features, case.in_features, case.rank))


def tables(settings: Settings) -> Iterator[Table]:
    rows = []
    for case in cases(settings):
        seconds = measure(norm_functions(case, settings.device), settings)
        rows.append({**labels(case), **comparison(seconds, FACTORED), "published": published(case, settings)})
    yield Table(
        name="norm",
        title="The norm alone",
        rows=rows,
        note="Times are relative to the norm from the factors: median (quartiles) of the rounds. The published "
        "figure is dense over factored from PEFT's pull request 3387.",
        plot="bars",
    )
