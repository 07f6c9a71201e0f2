"""The comparison trains what it says, keeps its test examples apart, and computes its intervals rightly."""

import collections
import csv
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


pytestmark = [pytest.mark.overlay, pytest.mark.project]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FOLDER = BENCHMARKS / "method_comparison"
DOCS = BENCHMARKS.parent / "docs/source"
METHODS = ["LoRA", "DoRA", "AdaLoRA", "AdaDoRA"]
ADAPTIVE = ["AdaLoRA", "AdaDoRA"]


@pytest.fixture(scope="module")
def comparison():
    """The modules by name. They import each other, and those of the other benchmarks, as neighbours of a script do."""
    path, loaded = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(FOLDER), str(BENCHMARKS)]
    yield SimpleNamespace(**{file.stem: importlib.import_module(file.stem) for file in FOLDER.glob("*.py")})
    sys.path[:] = path
    for name in set(sys.modules) - loaded:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def make_run(comparison, method="AdaDoRA", **changes):
    run = comparison.training.Run(
        task="digits",
        examples=50,
        method=method,
        rank=2,
        lr=5e-3,
        scale=1.0,
        seed=0,
        split="validation",
        steps=10,
        schedule="early" if method in ADAPTIVE else None,
    )
    return replace(run, **changes)


@pytest.mark.parametrize(
    "name, count",
    [("headlines", 2096), ("digits", 1797), ("tweets", 1200), ("speakers", 640), ("paraphrases", 2150)],
)
def test_no_test_example_is_trained_on_or_chosen_with(comparison, name, count):
    task = comparison.tasks.task(name)
    key = next(iter(task.test[0]))
    train, validation, test = (
        {str(example[key]) for example in examples} for examples in (task.train, task.validation, task.test)
    )
    assert len(task.train) + len(task.validation) + len(task.test) == count
    assert not test & train and not test & validation and not train & validation


def test_padding_changes_no_prediction(comparison):
    training = comparison.training.Training(make_run(comparison, task="speakers"))
    training.model.eval()
    shortest, *_, longest = sorted(training.data.test, key=lambda example: len(example["inputs_embeds"]))
    with torch.no_grad():
        alone, padded = (
            training.model(**training.data.collate(batch)).logits[0] for batch in ([shortest], [shortest, longest])
        )
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)


def test_a_sample_has_as_many_examples_of_each_label(comparison):
    task = comparison.tasks.task("headlines")
    labels = [example["labels"] for example in task.sample(50, seed=3)]
    assert sorted(labels) == sorted(list(range(5)) * 10)
    assert task.sample(50, seed=3) == task.sample(50, seed=3) != task.sample(50, seed=4)
    assert len(task.sample(None, seed=3)) == len(task.train)


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_end_with_the_same_average_rank(comparison, method):
    record = comparison.training.execute(make_run(comparison, method))
    assert record["average_rank"] == 2
    assert record["accuracy"] == record["right"].count("1") / len(record["right"])


def test_a_run_repeats_itself(comparison):
    first, second = (comparison.training.execute(make_run(comparison, steps=4)) for _ in range(2))
    assert first["right"] == second["right"]


def test_an_interval_is_that_of_a_paired_bootstrap(comparison):
    seeds, examples = 5, 400
    random = np.random.default_rng(1)
    base = (random.random((seeds, examples)) < 0.7).astype(int)
    better = np.maximum(base, random.random((seeds, examples)) < 0.1)
    runs, reference = list("ABCDE"), list("abcde")
    rows = zip(runs + reference, [*better, *base])
    log = {name: {"right": "".join(map(str, row.astype(int)))} for name, row in rows}
    mean, lower, upper = comparison.results.difference(log, runs, reference)
    assert mean == (better - base).mean()
    # resampling examples alone already gives this deviation
    deviation = (better - base).mean(axis=0).std() / examples**0.5
    assert 0 < lower < mean - 1.9 * deviation and mean + 1.9 * deviation < upper < mean + 5 * deviation
    assert comparison.results.difference(log, reference, reference) == (0, 0, 0)


class TestOverTasks:
    def pairs(self, comparison, gains, examples=400):
        """A row for each task and gain: runs of two seeds that are right where the reference is, and a share more."""
        log, rows = {}, []
        for task, gain in gains:
            pair = []
            for share in (0, gain):
                runs = [make_run(comparison, task=task, seed=seed, lr=1 + share) for seed in range(2)]
                right = "1" * round((0.5 + share) * examples)
                log |= {run: {"right": right.ljust(examples, "0")} for run in runs}
                pair.insert(0, runs)
            rows.append(tuple(pair))
        return log, rows

    def test_each_task_counts_the_same(self, comparison):
        log, rows = self.pairs(comparison, [("a", 0.1), ("a", 0.1), ("a", 0.1), ("b", 0.3)])
        mean, lower, upper = comparison.results.difference_over_tasks(log, rows)
        assert mean == pytest.approx(0.2)
        # a resample may have one of the tasks twice
        assert lower < 0.1 and 0.3 < upper

    def test_rows_that_differ_in_nothing_have_the_interval_of_one(self, comparison):
        log, rows = self.pairs(comparison, [("a", 0.1)])
        assert comparison.results.difference_of_task(log, rows * 3) == pytest.approx(
            comparison.results.difference(log, *rows[0])
        )

    def test_a_row_is_won_if_its_interval_lies_above_0(self, comparison):
        log, rows = self.pairs(comparison, [("a", 0.2), ("b", -0.2), ("c", 0.1), ("d", 0)])
        assert comparison.results.won_and_lost(log, rows) == "2 : 1 of 4"


class TestPlan:
    @pytest.fixture
    def finished(self, comparison):
        """The quick plan with all tables, and a log of made-up records of all of its runs."""
        quick = comparison.plan.QUICK
        plan = replace(
            quick,
            ablated=quick.cells[0],
            loraplus=quick.cells[:1],
            short=(replace(quick.cells[0], steps=15),),
            judged=quick.cells[1:],
            decoupled=quick.cells[:1],
            regularized=quick.cells[:1],
        )
        log = {}
        for number, stage in enumerate(plan.stages(log)):
            for run in stage:
                accuracy = run.lr if run.split == "validation" else 0.5
                parameters = run.rank * 100 if run.method == "LoRA" else run.rank * 160
                log.setdefault(
                    run,
                    {
                        "accuracy": accuracy,
                        "right": "10" * 20,
                        "parameters": parameters,
                        "average_rank": run.rank,
                        "seconds_per_step": 1.0 + number,
                    },
                )
        return plan, log

    def test_each_method_has_the_same_trials(self, comparison):
        plan = comparison.plan.FULL
        trials = {
            method: [(run.lr, run.scale, run.seed) for run in plan.tuning(plan.cells[0], method)] for method in METHODS
        }
        assert all(trials[method] == trials["LoRA"] for method in METHODS)
        assert len(set(trials["LoRA"])) == 8

    def test_both_groups_of_loraplus_have_the_same_trials_and_tests(self, comparison, finished):
        plan, log = finished
        cell = plan.loraplus[0]
        for runs_of in (plan.loraplus_trials, plan.loraplus_tests):
            first, second = (runs_of(log, cell, name) for name in comparison.ablations.LORAPLUS)
            assert [replace(run, ablation=None) for run in first] == [replace(run, ablation=None) for run in second]
            assert first != second
        finalists = [plan.loraplus_finalists(log, cell, name) for name in comparison.ablations.LORAPLUS]
        assert len(finalists[0]) == len(finalists[1]) == 2

    def test_nothing_is_chosen_with_test_examples(self, finished):
        plan, log = finished
        tested = [run for run in log if run.split == "test"]
        assert tested and not {run.seed for run in tested} & {run.seed for run in log if run.split == "validation"}
        assert {run.lr for run in tested} == {max(lr for lr, _, _ in plan.trials)}  # by the made-up accuracies

    def test_ranks_of_equal_parameters(self, finished):
        plan, log = finished
        # AdaDoRA has 640, and LoRA 100 for each rank
        assert plan.equal_parameters(log, "LoRA")[0].rank == 6

    def test_all_that_the_tables_and_plots_need_was_run(self, comparison, finished, tmp_path):
        plan, log = finished
        names = [table.name for table in comparison.results.tables(plan, log)]
        assert names == [
            "compared",
            "tasks",
            "needed",
            "equal-parameters",
            "ablations",
            "short",
            "mended",
            "decoupled-tasks",
            "decoupled",
            "gradients",
            "regularizations",
            "loraplus",
            "cost",
            "chosen",
        ]
        comparison.figures.write_figures(plan, log, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"accuracies.png", "gains.png", "ablations.png"}

    def test_the_changes_that_are_judged_are_the_best_of_the_trials(self, comparison, finished):
        plan, _ = finished
        names = list(comparison.ablations.SLOW_START)
        plan = replace(plan, short=(plan.short[0], replace(plan.short[0], steps=16)))

        def scored(best):
            scores = [dict.fromkeys(names, 0.3) | scores for scores in best]
            return {
                run: {"accuracy": of_cell[name]}
                for cell, of_cell in zip(plan.short, scores)
                for name in names
                for trial in plan.tuning(cell, "AdaDoRA", name)
                for run in (trial, replace(trial, seed=comparison.plan.TUNING_SEEDS[1]))
            }

        assert plan.mends(scored([{names[1]: 0.8, names[2]: 0.7}, {names[2]: 0.7, names[3]: 0.75}])) == [
            names[2],
            names[1],
            names[3],
        ]
        assert plan.mends(scored([{names[4]: 0.9}, {names[4]: 0.4}])) == [names[4]]

    def test_what_was_run_is_not_run_again(self, comparison, tmp_path):
        run = make_run(comparison, "LoRA", steps=1)
        record = comparison.training.execute(run)
        path = tmp_path / "runs.jsonl"
        path.write_text(json.dumps(record) + "\n" + json.dumps(record)[:50])
        log = comparison.compare.read_log(path)
        assert log == {run: record}

    def test_an_unfinished_log_is_refused_with_a_sentence(self, comparison, tmp_path):
        lines = (FOLDER / "runs.jsonl").read_text().splitlines()
        finished = comparison.compare.read_finished_log(comparison.plan.FULL, FOLDER / "runs.jsonl")
        assert len(finished) == len(lines)
        for kept in (lines[:-1], lines[1:], []):
            path = tmp_path / "runs.jsonl"
            path.write_text("\n".join(kept))
            with pytest.raises(SystemExit, match="not the log of a finished comparison"):
                comparison.compare.read_finished_log(comparison.plan.FULL, path)

    def test_the_tables_of_the_docs_are_those_of_the_log(self, comparison, monkeypatch):
        monkeypatch.setattr(comparison.results, "peak_memory", lambda run: 1)  # measured, not in the log
        monkeypatch.setattr(comparison.results, "gradient_rows", lambda run: [])
        plan = comparison.plan.FULL
        log = comparison.compare.read_finished_log(plan, FOLDER / "runs.jsonl")
        tables = {table.name: table for table in comparison.results.tables(plan, log)}
        files = {path.stem: path for path in (DOCS / "tables").glob("*.csv") if path.stem in tables}
        assert files.keys() == {"chosen", "compared", "decoupled", "loraplus", "mended", "regularizations", "short"}
        for name, path in files.items():
            assert path.read_text(encoding="utf-8") == tables[name].csv()
        page = (DOCS / "developer_guides/adadora_comparison.md").read_text().splitlines()
        for name in tables.keys() - files.keys() - {"cost", "gradients"}:  # which are measured
            rows = [line for line in tables[name].markdown().splitlines() if line.startswith("| ")][2:]
            assert len(rows) == len(tables[name].rows)
            assert set(rows) <= set(page)

    def test_the_table_of_the_front_page_is_part_of_those_of_the_docs(self, comparison):
        def rows_of(page):
            lines = (FOLDER.parents[1] / page).read_text().splitlines()
            return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]

        rows = rows_of("docs/source/developer_guides/adadora_comparison.md")
        by_task = {row[0]: [row[4], row[2], row[5]] for row in rows if len(row) == 7}
        runs = collections.Counter()
        compared, decoupled = (
            list(csv.DictReader((DOCS / f"tables/{name}.csv").read_text(encoding="utf-8").splitlines()))
            for name in ("compared", "decoupled")
        )
        cells = {(row["task"], row["examples"]) for row in decoupled}
        for row in compared:
            runs[row["task"]] += int(row["seeds"]) * ((row["task"], row["examples"]) in cells)
        names = {"spoken vowels": "speakers", "movie reviews": "reviews"}
        table = [row for row in rows_of("README.md") if len(row) == 4 and row[0][-1:].isdecimal()]
        assert len(table) == 4
        for words, *differences in table:
            task, count = words.rsplit(", ", 1)
            task = names.get(task, task)
            assert differences == by_task[task]
            assert int(count) == runs[task]


class TestAblations:
    def make(self, comparison, name, **changes):
        return comparison.training.Training(make_run(comparison, ablation=name, **changes))

    def magnitudes(self, training):
        return [layer.lora_magnitude["default"].detach().clone() for layer in self.layers(training)]

    def layers(self, training):
        from peft.tuners.adalora import AdaLoraLayer

        return [module for module in training.model.modules() if isinstance(module, AdaLoraLayer)]

    def test_a_fixed_magnitude_stays(self, comparison):
        for name, stays in (("magnitude fixed", True), (None, False)):
            training = self.make(comparison, name)
            before = self.magnitudes(training)
            for _ in range(3):
                training.step()
            assert all(map(torch.equal, before, self.magnitudes(training))) == stays

    def test_a_differentiated_norm_changes_gradients_but_not_outputs(self, comparison):
        outputs, gradients = [], []
        for name in (None, "norm in the gradient"):
            training = self.make(comparison, name)
            for layer in self.layers(training):
                torch.nn.init.normal_(layer.lora_E["default"], generator=torch.Generator().manual_seed(0))
            training.model.eval()
            output = training.model(**next(training.batches))
            output.loss.backward()
            outputs.append(output.logits)
            gradients.append(self.layers(training)[0].lora_E["default"].grad)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(*gradients, rtol=1e-2)

    def test_learning_rates(self, comparison):
        training = self.make(comparison, "learning rate of m · 10")
        own = training.optimizer.param_groups[1]
        assert own["initial_lr"] == pytest.approx(10 * training.optimizer.param_groups[0]["initial_lr"])
        assert {id(param) for param in own["params"]} == {
            id(layer.lora_magnitude["default"]) for layer in self.layers(training)
        }

    @pytest.mark.parametrize("name, ratio", [("LoRA+, m at the base rate", 1), ("LoRA+, m at B's rate", 16)])
    def test_loraplus_has_the_magnitude_in_the_group_that_it_says(self, comparison, name, ratio):
        training = self.make(comparison, name)
        rates = {
            id(param): group["initial_lr"] / training.run.lr
            for group in training.optimizer.param_groups
            for param in group["params"]
        }
        trained = {key: param for key, param in training.model.named_parameters() if param.requires_grad}
        assert sum(len(group["params"]) for group in training.optimizer.param_groups) == len(trained)
        for part, expected in (("lora_A", 1), ("lora_E", 1), ("lora_B", 16), ("lora_magnitude", ratio)):
            of_part = [rates[id(param)] for key, param in trained.items() if part in key]
            assert of_part == pytest.approx([expected] * len(self.layers(training)))

    def test_the_scale_follows_the_rank_that_is_kept(self, comparison):
        training = self.make(comparison, "scale by the rank kept")
        for _ in range(10):
            training.step()
        kept = [max(1, int(layer.lora_E["default"].count_nonzero())) for layer in self.layers(training)]
        assert [int(layer.ranknum["default"]) for layer in self.layers(training)] == kept
        assert len(set(kept)) > 1

    @pytest.mark.parametrize(
        "name", ["orthonormal start", "LoRA's start", "start along the gradient", "start along the weight"]
    )
    def test_another_start_does_not_change_the_fresh_model(self, comparison, name):
        training = self.make(comparison, name)
        training.model.eval()
        batch = next(training.batches)
        with torch.no_grad(), training.model.disable_adapter():
            expected = training.model(**batch).logits
        with torch.no_grad():
            torch.testing.assert_close(training.model(**batch).logits, expected, rtol=1e-4, atol=1e-5)

    def test_the_start_along_the_gradient_is_where_the_loss_falls_fastest(self, comparison):
        training = self.make(comparison, "start along the gradient")
        assert not any(layer.get_base_layer().weight.requires_grad for layer in self.layers(training))
        training.model.eval()  # without dropout, as the start is made
        examples = training.data.sample(training.run.examples, training.run.seed)
        layers = self.layers(training)
        weights = [layer.get_base_layer().weight.requires_grad_() for layer in layers]
        with training.model.disable_adapter():
            loss = training.model(**training.data.collate(examples)).loss
        for layer, gradient in zip(layers, torch.autograd.grad(loss, weights)):
            along = layer.lora_B["default"].T @ gradient @ layer.lora_A["default"].T
            best = torch.linalg.svdvals(gradient)[: len(along)]
            torch.testing.assert_close(along.diagonal(), best, rtol=1e-2, atol=1e-3 * best[0].item())

    def test_the_start_along_the_weight_is_where_it_is_largest(self, comparison):
        training = self.make(comparison, "start along the weight")
        for layer in self.layers(training):
            weight = layer.get_base_layer().weight
            along = layer.lora_B["default"].T @ weight @ layer.lora_A["default"].T
            best = torch.linalg.svdvals(weight)[: len(along)]
            torch.testing.assert_close(along, best.diag(), rtol=1e-3, atol=1e-3 * best[0].item())

    def test_together_has_what_each_has(self, comparison):
        training = self.make(comparison, "start along the gradient, learning rate of E · 10")
        alone = self.make(comparison, "start along the gradient")
        for layer, other in zip(self.layers(training), self.layers(alone)):
            assert torch.equal(layer.lora_A["default"], other.lora_A["default"])
        rates = [group["initial_lr"] for group in training.optimizer.param_groups]
        assert rates == pytest.approx([training.run.lr, 10 * training.run.lr])

    def test_a_constant_rank_is_the_final_one(self, comparison):
        training = self.make(comparison, "constant rank")
        for _ in range(10):
            training.step()
        assert {layer.lora_E["default"].shape for layer in self.layers(training)} == {(2, 1)}
        assert all(layer.lora_E["default"].all() for layer in self.layers(training))

    def test_allocating_before_the_step_leaves_pruned_entries_that_are_not_zero(self, comparison):
        for name, are_zero in (("allocation before the optimizer's step", False), (None, True)):
            training = self.make(comparison, name)
            for _ in range(10):
                training.step()
            masks = training.model.peft_config["default"].rank_pattern
            pruned = [
                training.model.get_parameter(f"base_model.model.{key}").detach().view(-1)[~torch.tensor(mask)]
                for key, mask in masks.items()
            ]
            assert bool((torch.cat(pruned) == 0).all()) == are_zero
