"""The loops of the training guide, as they stand there, give what a plain loop gives, bit for bit."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from trainer_run import RandomTokens, make_adalora_config, make_llama

from peft import PeftModel, get_peft_model


pytestmark = pytest.mark.overlay
GUIDE = Path(__file__).parents[1] / "docs/source/developer_guides/adadora_training.md"


def run_block(folder: Path, first_line: str, **names: Any) -> dict[str, Any]:
    """Run the block of the guide that begins with a line, given some names. Returns the names that it defines."""
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(first_line + "\n"))
    script = folder / "block.py"
    script.write_text(block)
    return runpy.run_path(str(script), init_globals=names)


def make_model() -> PeftModel:
    return get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0)).train()


def plain_loop(accumulate: int) -> PeftModel:
    model = make_model()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    for index, batch in enumerate(DataLoader(RandomTokens(), batch_size=4 // accumulate)):
        (model(**batch).loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            model.base_model.update_and_allocate(index // accumulate)
            optimizer.zero_grad()
    return model


def assert_same(model: PeftModel, expected: PeftModel) -> None:
    rank_pattern = expected.peft_config["default"].rank_pattern
    assert not all(map(all, rank_pattern.values()))
    assert model.peft_config["default"].rank_pattern == rank_pattern
    for (name, param), other in zip(model.named_parameters(), expected.parameters()):
        assert torch.equal(param, other), name


def test_the_loop_with_accelerate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_block(
        tmp_path,
        "from accelerate import Accelerator",
        torch=torch,
        get_peft_model=get_peft_model,
        base_model=make_llama(),
        config=make_adalora_config(lora_dropout=0.0),
        trainer=SimpleNamespace(train_dataset=RandomTokens()),
    )
    assert names["step"] == 16
    assert_same(names["model"], plain_loop(2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_module_for_lightning(accumulate, tmp_path):
    lightning = pytest.importorskip("lightning")
    module = run_block(tmp_path, "import lightning", torch=torch)["AdaLoraModule"](make_model())
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(RandomTokens(), batch_size=4 // accumulate))
    assert_same(module.model, plain_loop(accumulate))
