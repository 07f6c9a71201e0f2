"""Train, save, load and merge plain AdaLoRA adapters, and write down every number that comes out.

    python train_adalora.py FOLDER [--without-adadora]

For each variant, `FOLDER/<model>-<dtype>` gets files that are the same, byte for byte, when PEFT behaves the same.
"""

import sys
from pathlib import Path
from types import SimpleNamespace


if "--without-adadora" in sys.argv:
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ != "_peft_adadora"]

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peft


LAYERS = {
    "linear": lambda: (nn.Linear(8, 12), nn.Linear(12, 6)),
    "conv1d": lambda: (Conv1D(12, 8), Conv1D(6, 12)),
    "conv2d": lambda: (nn.Conv2d(8, 12, kernel_size=3), nn.Conv2d(12, 6, kernel_size=1, bias=False)),
}
INPUT_SHAPES = {"linear": (5, 8), "conv1d": (5, 8), "conv2d": (5, 8, 4, 4)}


class Model(nn.Module):
    """Two layers. The output has a loss, to which AdaLoRA adds its regularization."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = LAYERS[kind]()

    def forward(self, x):
        output = self.second(F.gelu(self.first(x)))
        return SimpleNamespace(output=output, loss=output.float().square().mean())


def train_save_load(kind, dtype, folder):
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    base_state = Model(kind).to(dtype).state_dict()
    batches = torch.randn(16, *INPUT_SHAPES[kind]).to(dtype)

    def base_model():
        model = Model(kind).to(dtype)
        model.load_state_dict(base_state)
        return model

    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=2,
        tinit=2,
        tfinal=4,
        deltaT=2,
        total_step=15,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules="first|second",  # not a list, which PEFT would save in the order of a set
    )
    model = peft.get_peft_model(base_model(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(config.total_step):
        loss = model(batches[step]).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    (folder / "losses.txt").write_text("\n".join(losses))
    kept = [keep for mask in config.rank_pattern.values() for keep in mask]
    assert 0 < sum(kept) < len(kept), "nothing was pruned"
    save_file(model.state_dict(), folder / "trained.safetensors")
    model.save_pretrained(folder)

    model = peft.PeftModel.from_pretrained(base_model(), folder)
    with torch.no_grad():
        save_file({"output": model(batches[-1]).output}, folder / "output.safetensors")
    model.merge_adapter()
    save_file(model.state_dict(), folder / "merged.safetensors")
    model.unmerge_adapter()
    save_file(model.state_dict(), folder / "unmerged.safetensors")
    save_file({"draw": torch.rand(4)}, folder / "next_random_numbers.safetensors")


if __name__ == "__main__":
    expects_adadora = "--without-adadora" not in sys.argv
    assert ("peft.tuners.adalora.stock_layer" in sys.modules) == expects_adadora
    torch.set_num_threads(1)
    for kind in LAYERS:
        for dtype in ("float32", "bfloat16"):
            train_save_load(kind, getattr(torch, dtype), Path(sys.argv[1]) / f"{kind}-{dtype}")
