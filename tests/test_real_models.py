"""AdaDoRA on architectures that people fine-tune, built small from their configs: trained, saved, loaded, merged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

import pytest
import torch
from helpers import make_config
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
    ViTConfig,
    ViTForImageClassification,
)

from peft import PeftModel, get_peft_model


@dataclass
class Case:
    """
    An architecture.

    Args:
        make: Gives the model.
        target_modules: Of the config.
        batch: Gives inputs and labels.
        layers: How many layers are adapted.
    """

    make: Callable[[], PreTrainedModel]
    target_modules: Union[list[str], str]
    batch: Callable[[], dict[str, torch.Tensor]]
    layers: int


def text(**labels: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 64, (4, 12))
    return {"input_ids": tokens, "labels": tokens, **labels}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8) % 3}


DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

CASES = {
    "GPT-2": Case(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)),
        ["c_attn", "c_proj", "c_fc"],
        text,
        2 * 4,
    ),
    "BERT": Case(
        lambda: BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **ENCODER)),
        ["query", "key", "value", "dense"],
        lambda: text(labels=torch.arange(4) % 3),
        2 * 6 + 1,
    ),
    "T5": Case(
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        ),
        ["q", "k", "v", "o", "wi", "wo"],
        text,
        2 * 6 + 2 * 10,
    ),
    "Llama": Case(lambda: LlamaForCausalLM(LlamaConfig(**DECODER)), "all-linear", text, 2 * 7),
    "Qwen": Case(lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)), "all-linear", text, 2 * 7),
    "ViT": Case(
        lambda: ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **ENCODER)),
        # the embedding of the patches is a convolution, `projection`
        r".*(projection|(q|k|v|o)_proj|query|key|value|dense|fc1|fc2)",
        images,
        1 + 2 * 6,
    ),
    "ResNet": Case(
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
        ),
        ["convolution"],
        images,
        9,
    ),
}


def fit(model: PeftModel, batch: dict[str, torch.Tensor]) -> list[float]:
    """Train for 20 steps on one batch, and give the losses after each."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    losses = []
    model.eval()  # without the noise of dropout and of statistics of batches
    for step in range(20):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(model.get_base_model()(**batch).loss.item())
    return losses


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_model_trains_saves_loads_and_merges(case, tmp_path):
    torch.manual_seed(0)
    base = case.make()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    batch = case.batch()
    fan_in_fan_out = isinstance(base, GPT2LMHeadModel)
    config = make_config(target_modules=case.target_modules, fan_in_fan_out=fan_in_fan_out, orth_reg_weight=0.1)
    model = get_peft_model(base, config)
    magnitudes = [name for name, _ in model.named_parameters() if ".lora_magnitude." in name]
    assert len(magnitudes) == case.layers
    losses = fit(model, batch)
    assert losses[-1] < 0.95 * losses[0]
    kept = sum(int((param != 0).sum()) for name, param in model.named_parameters() if ".lora_E." in name)
    assert kept == config.target_r * case.layers

    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    fresh = case.make()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        merged = loaded.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == weights.keys()


def test_a_model_that_transformers_quantizes_with_torchao_trains_saves_loads_and_merges(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**DECODER)).save_pretrained(tmp_path / "base")
    quantization_config = TorchAoConfig(torchao.Int8WeightOnlyConfig())

    def load() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization_config)

    batch = text()
    model = get_peft_model(load(), make_config(target_modules="all-linear", orth_reg_weight=0.1))
    losses = fit(model, batch)
    assert losses[-1] < 0.95 * losses[0]

    with torch.no_grad():
        expected = model(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        merged = loaded.merge_and_unload(safe_merge=True)
        change = (expected - load()(**batch).logits).norm()
        assert (merged(**batch).logits - expected).norm() < 0.02 * change
    assert type(merged.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
