"""What the tests share: small layers and models with AdaDoRA adapters."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import SVDLinear


GUIDES = Path(__file__).parents[1] / "docs/source/developer_guides"


def make_config(**kwargs) -> AdaLoraConfig:
    """
    A config with a schedule of 20 steps that prunes from rank 6 to an average of 2; AdaDoRA unless told otherwise.
    """
    defaults = {
        "init_r": 6,
        "target_r": 2,
        "tinit": 2,
        "tfinal": 5,
        "deltaT": 1,
        "total_step": 20,
        "lora_alpha": 12,
        "use_dora_adaptive": True,
    }
    return AdaLoraConfig(**{**defaults, **kwargs})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One that knows a word for each token of the small Llama of `trainer_run`."""
    vocabulary = {f"word{index}": index for index in range(32)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="word31", pad_token="word30", unk_token="word0"
    )


def make_layer(
    out_features: int,
    in_features: int,
    rank: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    seed: int = 0,
    **config_kwargs,
) -> SVDLinear:
    """
    An adapted linear layer, by default with an adapter that looks trained: large update, magnitudes moved by 20 %.
    """
    torch.manual_seed(seed)
    base = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    layer = SVDLinear(base, "default", make_config(**config_kwargs), r=rank, lora_alpha=12)
    if trained:
        train_by_hand(layer)
    return layer


@torch.no_grad()
def train_by_hand(layer: SVDLinear, adapter_name: str = "default") -> None:
    """Give an adapter the look of a trained one, without a training loop."""
    layer.lora_A[adapter_name].normal_(std=0.3)
    layer.lora_B[adapter_name].normal_(std=0.3)
    layer.lora_E[adapter_name].normal_(std=0.5)
    if adapter_name in layer.lora_magnitude:
        magnitude = layer.lora_magnitude[adapter_name]
        magnitude.mul_(1 + 0.2 * torch.randn_like(magnitude))


class MLP(nn.Module):
    """Three linear layers, of which the middle one has no bias."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first = nn.Linear(10, width)
        self.middle = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


TARGETS = ["first", "middle", "last"]


def make_mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> MLP:
    torch.manual_seed(seed)
    return MLP().to(dtype)


def make_peft_mlp(seed: int = 0, dtype: torch.dtype = torch.float32, **config_kwargs):
    config = make_config(**{"target_modules": list(TARGETS), **config_kwargs})
    return get_peft_model(make_mlp(seed, dtype), config)


def train(model, steps: int = 20, seed: int = 0, lr: float = 2e-2) -> list[float]:
    """Fit random targets with AdamW, allocating after each optimizer step. Returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 10, generator=generator)
    target = torch.randn(32, 4, generator=generator)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for step in range(steps):
        loss = nn.functional.mse_loss(model(x.to(dtype)).float(), target)
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def svd_layers(model) -> dict[str, SVDLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}


def parameter_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, byte for byte, to show that nothing has changed."""
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if not tensor.is_meta
    }


def allocations(step: Callable[[], None]) -> list[int]:
    """Sizes in bytes of all tensors and scratch space allocated during a step (freed ones count as negative)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    return [event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]


def run_block(folder: Path, first_line: str, changes: dict[str, str] | None = None, **names: Any) -> dict[str, Any]:
    """Run the block of the guides that begins with a line, given some names. Returns the names it defines."""
    text = "".join(page.read_text() for page in GUIDES.glob("*.md"))
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(first_line + "\n"))
    for old, new in (changes or {}).items():
        assert block.count(old) == 1
        block = block.replace(old, new)
    script = folder / "block.py"
    script.write_text(block)
    return runpy.run_path(str(script), init_globals=names)
