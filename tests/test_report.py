"""What `peft-adadora report` says is what the model, the run and PEFT say, and what it cannot know it does not say."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_config, make_mlp, make_peft_mlp, svd_layers, train
from safetensors.torch import load_file, save_file
from torch import nn
from trainer_run import STEPS, make_adalora_config, make_llama, make_trainer
from transformers.pytorch_utils import Conv1D

from peft import AdaLoraConfig, LoraConfig, get_peft_model


pytest.importorskip("peft_adadora", reason="not part of a PEFT tree with the change inside")
from peft_adadora.report import Module, budget_table, read_report


pytestmark = pytest.mark.overlay

METHODS = [pytest.param(True, id="AdaDoRA"), pytest.param(False, id="AdaLoRA")]


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """A Trainer after training, whose output folder holds its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, make_adalora_config(use_dora_adaptive=request.param))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path):
    """A trained AdaDoRA model, and the folders of its adapter and its base weights."""
    model = make_peft_mlp()
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(make_mlp().state_dict(), tmp_path / "base" / "model.safetensors")
    return model, tmp_path / "adapter", tmp_path / "base"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(adapter, change):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def command(*arguments, code=""):
    """Run the installed command, after some code if need be."""
    code += "import sys; from _peft_adadora_command import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


class TestRanks:
    def test_are_the_nonzero_singular_values_of_the_model(self, saved):
        model, adapter, _ = saved
        kept = {
            name.removeprefix("base_model.model."): int((layer.lora_E["default"] != 0).sum())
            for name, layer in svd_layers(model).items()
        }
        report = read_report(adapter)
        assert {module.name: module.rank for module in report.modules} == kept
        assert {module.init_r for module in report.modules} == {6}
        assert 0 < report.rank == sum(kept.values()) < 18

    def test_are_all_kept_before_the_first_allocation(self, tmp_path):
        make_peft_mlp().save_pretrained(tmp_path)
        assert [(module.rank, module.init_r) for module in read_report(tmp_path).modules] == [(6, 6)] * 3

    def test_may_be_zero(self, saved):
        _, adapter, _ = saved
        rank_pattern = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
        edit_json(adapter / "adapter_config.json", rank_pattern={**rank_pattern, "middle.lora_E": [False] * 6})

        def empty(weights):
            for part, dim in (("A", 0), ("E", 0), ("B", 1)):
                key = f"base_model.model.middle.lora_{part}"
                weights[key] = weights[key].narrow(dim, 0, 0).clone()

        edit_weights(adapter, empty)
        assert {module.name: module.rank for module in read_report(adapter).modules}["middle"] == 0

    def test_are_told_by_the_weights_whatever_rank_pattern_the_config_has(self, saved):
        _, adapter, _ = saved
        ranks = [module.rank for module in read_report(adapter).modules]
        edit_json(adapter / "adapter_config.json", rank_pattern={"first.lora_E": [True] * 5, "gone.lora_E": [True]})
        assert [module.rank for module in read_report(adapter).modules] == ranks

    @pytest.mark.parametrize("use_dora_adaptive", METHODS)
    def test_leave_out_singular_values_of_zero_among_all_ranks(self, tmp_path, use_dora_adaptive):
        make_peft_mlp(use_dora_adaptive=use_dora_adaptive).save_pretrained(tmp_path)

        def prune(weights):
            weights["base_model.model.first.lora_E"][1:3] = 1e-30
            weights["base_model.model.last.lora_E"][:] = -1

        edit_weights(tmp_path, prune)
        modules = {module.name: (module.rank, module.init_r) for module in read_report(tmp_path).modules}
        assert modules == {"first": (2, 6), "middle": (0, 6), "last": (6, 6)}

    def test_come_in_the_order_of_the_layers(self, tmp_path):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3)) for _ in range(11)))
        config = AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=r"\d+\.0", use_dora_adaptive=True)
        get_peft_model(model, config).save_pretrained(tmp_path)
        assert [module.name for module in read_report(tmp_path).modules] == [f"{index}.0" for index in range(11)]

    def test_of_a_trainer_are_those_of_its_model(self, run):
        report = read_report(run.args.output_dir)
        kept = sum(int((layer.lora_E["default"] != 0).sum()) for layer in svd_layers(run.model).values())
        assert report.rank == kept == report.kept(report.log[-1]) == 2 * len(report.modules)
        assert report.folder.name == f"checkpoint-{STEPS}"


class TestMagnitudes:
    def test_drift_is_the_change_since_the_adapter_was_fresh(self, saved):
        model, adapter, base = saved
        fresh = svd_layers(make_peft_mlp())
        modules = {module.name: module for module in read_report(adapter, base).modules}
        for name, layer in svd_layers(model).items():
            before = fresh[name].lora_magnitude["default"].detach().flatten()
            after = layer.lora_magnitude["default"].detach().flatten()
            change = modules[name.removeprefix("base_model.model.")].change
            assert change.abs().max() > 1e-2
            torch.testing.assert_close(change, after / before - 1, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("run", [True], indirect=True, ids=["AdaDoRA"])
    def test_drift_of_a_run_is_what_it_has_logged(self, run, base_folder):
        report = read_report(run.args.output_dir, base_folder)
        logged = run.state.log_history[-2]["adalora_magnitude_drift"]
        assert logged > 1e-2
        assert report.change.abs().mean().item() == pytest.approx(logged, rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_drift_is_found_from_base_weights_of_low_precision(self, tmp_path, dtype):
        model = make_peft_mlp(dtype=dtype)
        before = {
            name.removeprefix("base_model.model."): layer.lora_magnitude["default"].detach().flatten().clone()
            for name, layer in svd_layers(model).items()
        }
        train(model)
        model.save_pretrained(tmp_path)
        save_file(make_mlp(dtype=dtype).state_dict(), tmp_path / "model.safetensors")
        for module in read_report(tmp_path, tmp_path).modules:
            torch.testing.assert_close(module.base_norm, before[module.name], rtol=1e-5, atol=0)

    def test_rows_of_zeros_do_not_count(self):
        module = Module("a", 1, 2, magnitude=torch.tensor([0.0, 3.0]), base_norm=torch.tensor([0.0, 2.0]))
        assert module.change.tolist() == [0.5]

    def test_without_the_base_weights_there_is_no_drift_but_the_magnitudes(self, saved):
        model, adapter, _ = saved
        report = read_report(adapter)
        assert report.change is None and report.base is None
        text = str(report)
        assert "base weights were not found" in text and "--base-model" in text
        assert "drift" not in text.replace("how far they have drifted", "")
        for layer in svd_layers(model).values():
            m = sorted(layer.lora_magnitude["default"].flatten().tolist())
            middle = (m[(len(m) - 1) // 2] + m[len(m) // 2]) / 2
            assert re.search(rf"{m[0]:.4g} +{middle:.4g} +{m[-1]:.4g}\n", text + "\n")

    def test_base_weights_that_the_config_names_are_taken_if_they_are_there(self, saved):
        _, adapter, base = saved
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        assert read_report(adapter).base == str(base)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base / "gone"))
        assert read_report(adapter).base is None

    @pytest.mark.parametrize("prefix", ["", "model.", "outer.model."])
    def test_base_weights_may_have_been_saved_without_a_head_or_with_one_more(self, tmp_path, prefix):
        config = make_config(target_modules=["first", "middle"])
        get_peft_model(nn.ModuleDict({"model": make_mlp()}), config).save_pretrained(tmp_path)
        weights = {f"{prefix}{key}": value for key, value in make_mlp().state_dict().items()}
        save_file(weights, tmp_path / "model.safetensors")
        change = read_report(tmp_path, tmp_path).change
        assert len(change) == 32 and change.abs().max() < 1e-6

    @pytest.mark.parametrize("name", ["conv2d", "conv1d", "square conv1d"])
    def test_base_weights_need_not_be_those_of_linear_layers(self, tmp_path, name):
        torch.manual_seed(0)
        layer = {"conv2d": nn.Conv2d(4, 6, 3, groups=2), "conv1d": Conv1D(6, 4), "square conv1d": Conv1D(4, 4)}[name]
        model = nn.ModuleDict({"layer": layer})
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        is_transposed = isinstance(layer, Conv1D)
        config = make_config(init_r=3, target_modules=["layer"], fan_in_fan_out=is_transposed)
        get_peft_model(model, config).save_pretrained(tmp_path)
        module = read_report(tmp_path, tmp_path).modules[0]
        weight = layer.weight.T if is_transposed else layer.weight.flatten(1)
        torch.testing.assert_close(module.base_norm, weight.norm(dim=1).detach())
        assert module.change.abs().max() < 1e-6

    def test_of_a_module_that_the_base_weights_lack_are_not_known(self, saved):
        _, adapter, base = saved
        weights = load_file(base / "model.safetensors")
        del weights["last.weight"]
        save_file(weights, base / "model.safetensors")
        text = str(read_report(adapter, base))
        assert "The base model has no weight for 1 of the modules." in text
        assert re.search(r"^last .* not known +not known +not known$", text, flags=re.MULTILINE)

    def test_are_read_from_shards(self, saved):
        _, adapter, base = saved
        whole = read_report(adapter, base)
        weights = load_file(base / "model.safetensors")
        index = {}
        for number, (key, value) in enumerate(weights.items()):
            index[key] = f"model-{number}.safetensors"
            save_file({key: value}, base / index[key])
        (base / "model.safetensors").unlink()
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert torch.equal(read_report(adapter, base).change, whole.change)


class TestBudget:
    @pytest.mark.parametrize(
        "init_r, target_r, tinit, tfinal, total_step", [(6, 2, 2, 5, 20), (4, 3, 0, 1, 7), (12, 8, 9, 30, 100)]
    )
    def test_is_that_of_pefts_allocator_at_each_step(self, tmp_path, init_r, target_r, tinit, tfinal, total_step):
        model = make_peft_mlp(init_r=init_r, target_r=target_r, tinit=tinit, tfinal=tfinal, total_step=total_step)
        model.save_pretrained(tmp_path)
        report = read_report(tmp_path)
        allocator = model.base_model.rankallocator
        budgets = [report.budget(step) for step in range(total_step + 3)]
        assert budgets == [allocator.budget_schedule(step)[0] for step in range(total_step + 3)]

    def test_in_the_log_is_that_of_the_schedule(self, run):
        report = read_report(run.args.output_dir)
        assert [entry["step"] for entry in report.log] == list(range(1, STEPS + 1))
        assert [entry["adalora_budget"] for entry in report.log] == [report.budget(step) for step in range(STEPS)]
        assert report.log_file == report.folder / "trainer_state.json"

    def test_stands_in_the_table_beside_what_was_logged(self, run):
        header, rows = budget_table(read_report(run.args.output_dir))
        assert header[:4] == ["step", "schedule", "logged budget", "ranks kept"]
        log = [entry for entry in run.state.log_history if "adalora_mean_rank" in entry]
        for row, entry in zip(rows, log, strict=True):
            budget = str(entry["adalora_budget"])
            assert row[:4] == [str(entry["step"]), budget, budget, str(round(6 * entry["adalora_mean_rank"]))]
            if "adalora_magnitude_drift" in entry:
                assert row[4:] == [f"{100 * entry['adalora_magnitude_drift']:.2f} %"]

    def test_table_of_a_long_run_is_thinned_out_from_the_first_to_the_last_log(self, run):
        _, rows = budget_table(read_report(run.args.output_dir), max_rows=4)
        assert [row[0] for row in rows] == ["1", "6", "11", "16"]

    def test_is_not_shown_without_a_log(self, saved):
        _, adapter, _ = saved
        assert "logged budget" not in str(read_report(adapter))


class TestPlaces:
    def test_a_checkpoint_is_what_it_was_then(self, run):
        folder = Path(run.args.output_dir) / "checkpoint-6"
        report = read_report(folder)
        assert report.folder == folder and report.log[-1]["step"] == 6
        weights = load_file(folder / "adapter_model.safetensors")
        assert report.rank == sum(int((value != 0).sum()) for key, value in weights.items() if key.endswith("lora_E"))
        # between two allocations AdaDoRA saves what the optimizer has moved off zero again, too
        assert report.rank >= report.kept(report.log[-1]) > 2 * len(report.modules)

    def test_an_adapter_in_the_output_folder_goes_before_the_checkpoints(self, tmp_path):
        trainer = make_trainer(tmp_path, save_steps=8)
        trainer.train()
        trainer.save_model()
        report = read_report(tmp_path)
        assert report.folder == tmp_path
        assert report.log_file == tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json"

    def test_checkpoint_10_comes_after_checkpoint_9(self, tmp_path):
        for step in (9, 10):
            make_peft_mlp().save_pretrained(tmp_path / f"checkpoint-{step}")
        assert read_report(tmp_path).folder.name == "checkpoint-10"

    def test_an_adapter_of_another_name_is_found_in_its_folder(self, tmp_path):
        config = make_config(target_modules=["first"])
        get_peft_model(make_mlp(), config, adapter_name="other").save_pretrained(tmp_path)
        assert read_report(tmp_path).folder == tmp_path / "other"

    def test_of_several_adapters_one_has_to_be_chosen(self, tmp_path):
        for name in ("a", "b"):
            make_peft_mlp().save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=r"several adapters in .*; choose .*a or .*b\."):
            read_report(tmp_path)


def lora(adapter):
    get_peft_model(make_mlp(), LoraConfig(target_modules=["first"])).save_pretrained(adapter)


def truncate(name):
    def do(adapter):
        content = (adapter / name).read_bytes()
        (adapter / name).write_bytes(content[: len(content) // 2])

    return do


def remove(name):
    return lambda adapter: (adapter / name).unlink()


def edit_config(**changes):
    return lambda adapter: edit_json(adapter / "adapter_config.json", **changes)


def drop(key):
    return lambda adapter: edit_weights(adapter, lambda weights: weights.pop(key))


def spoil(adapter):
    edit_weights(adapter, lambda weights: weights["base_model.model.first.lora_magnitude"].fill_(float("nan")))


def lengthen(adapter):
    edit_weights(adapter, lambda weights: weights.update({"base_model.model.first.lora_E": torch.ones(5, 1)}))


class TestBrokenInput:
    @pytest.mark.parametrize(
        "damage, sentence",
        [
            (lora, "adapter of the type LORA, not of AdaLoRA or AdaDoRA"),
            (truncate("adapter_config.json"), "adapter_config.json cannot be read"),
            (truncate("adapter_model.safetensors"), "adapter_model.safetensors cannot be read"),
            (remove("adapter_model.safetensors"), "There is no adapter_model.safetensors"),
            (remove("adapter_config.json"), "There is no adapter in"),
            (edit_config(tinit=None), "tinit is None instead of a number"),
            (edit_config(init_r=1), "do not fit init_r=1"),
            (lengthen, "The ranks of A, E and B of first in .* do not fit"),
            (drop("base_model.model.first.lora_magnitude"), "first.lora_magnitude is missing"),
            (drop("base_model.model.first.lora_B"), "first.lora_B is missing"),
            (spoil, "first.lora_magnitude in .* is broken"),
            (lambda adapter: (adapter / "trainer_state.json").write_text("{"), "trainer_state.json cannot be read"),
            (lambda adapter: (adapter / "trainer_state.json").write_text("{}"), "trainer_state.json is broken"),
        ],
    )  # fmt: skip
    def test_is_told_in_one_sentence(self, saved, damage, sentence, capsys):
        from _peft_adadora_command import main

        _, adapter, _ = saved
        damage(adapter)
        assert main(["report", str(adapter)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert re.fullmatch(rf"peft-adadora: .*{sentence}.*\n", printed.err)

    @pytest.mark.parametrize(
        "weights, sentence",
        [
            ({"somewhere.weight": torch.ones(4, 4)}, "is not the base model: it has no weight of first"),
            (
                {"first.weight": torch.ones(16, 10, dtype=torch.int8)},
                r"first\.weight in .* is I8 of shape .* not quantized",
            ),
            (
                {"first.weight": torch.ones(3, 10)},
                r"first\.weight in .* is F32 of shape \(3, 10\), but .* of shape \(16, 10\)",
            ),
        ],
    )
    def test_base_weights_of_another_model_are_refused_if_they_were_asked_for(self, saved, weights, sentence):
        _, adapter, base = saved
        save_file(weights, base / "model.safetensors")
        with pytest.raises(ValueError, match=sentence):
            read_report(adapter, base)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        assert read_report(adapter).change is None

    @pytest.mark.parametrize("source", ["no-folder", "nobody/nothing", "not a name"])
    def test_base_weights_that_are_nowhere_are_told_in_one_sentence(self, saved, source):
        _, adapter, _ = saved
        with pytest.raises(ValueError, match=rf"\A{source} cannot be read: [^\n]*\Z"):
            read_report(adapter, source)


class TestCommand:
    @pytest.fixture
    def report(self, capsys):
        """Runs the command in this process."""
        from _peft_adadora_command import main

        def run(*arguments):
            code = main(["report", *map(str, arguments)])
            return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capsys.readouterr())))

        return run

    def test_prints_a_line_for_each_module_and_each_log(self, report, run, base_folder):
        done = report(run.args.output_dir, "--base-model", base_folder)
        assert done.returncode == 0, done.stderr
        expected = read_report(run.args.output_dir, base_folder)
        assert done.stdout == f"{expected}\n"
        for module in expected.modules:
            line = re.search(rf"^{re.escape(module.name)} +{module.rank} +4(.*)$", done.stdout, flags=re.MULTILINE)
            drift = f"{100 * module.change.abs().mean().item():.2f} %" if expected.has_magnitudes else ""
            assert drift in line[1]
        assert re.search(rf"^{STEPS} +12 +12 +12", done.stdout, flags=re.MULTILINE)
        assert ("plain AdaLoRA" in done.stdout) != expected.has_magnitudes

    def test_writes_a_page_and_pictures(self, report, run, tmp_path):
        done = report(run.args.output_dir, "--output", tmp_path / "new" / "folder")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"Written: {tmp_path / 'new' / 'folder' / 'report.html'}\n")

    def test_without_matplotlib_writes_the_page_with_its_tables(self, run, tmp_path):
        without = "import sys; sys.modules['matplotlib'] = None; "
        done = command("report", run.args.output_dir, "--output", tmp_path / "out", code=without)
        page = tmp_path / "out" / "report.html"
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{read_report(run.args.output_dir)}\n\nWritten: {page}\n"
        assert list(page.parent.iterdir()) == [page]
        text = page.read_text()
        assert "pictures need matplotlib: pip install matplotlib" in text
        assert "<img" not in text
        for module in read_report(run.args.output_dir).modules:
            assert module.name in text

    def test_says_its_version(self, capsys):
        from _peft_adadora_command import main

        with pytest.raises(SystemExit, match="0"):
            main(["--version"])
        assert capsys.readouterr().out == f"peft-adadora {version('peft-adadora')}\n"

    @pytest.mark.parametrize(
        "place, sentence", [("file", "is a file; name a folder"), ("file/new", "Not a directory")]
    )
    def test_says_in_one_line_that_the_output_is_no_folder(self, report, saved, tmp_path, place, sentence):
        (tmp_path / "file").write_text("kept")
        done = report(saved[1], "--output", tmp_path / place)
        assert done.returncode == 1
        assert re.fullmatch(rf"peft-adadora: .*{sentence}.*\n", done.stderr)
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe in another way")
    def test_says_in_one_line_that_the_pipe_is_closed(self, saved):
        reader, writer = os.pipe()
        os.close(reader)
        code = "import sys; from _peft_adadora_command import main; sys.exit(main(sys.argv[1:]))"
        arguments = [sys.executable, "-c", code, "report", saved[1]]
        done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert done.returncode == 1
        assert re.fullmatch(r"peft-adadora: .*Broken pipe\n", done.stderr)

    def test_is_installed(self):
        done = subprocess.run(
            [Path(sys.executable).with_name("peft-adadora"), "--help"], capture_output=True, text=True, check=True
        )
        assert "report" in done.stdout and "doctor" in done.stdout


class TestPictures:
    @pytest.fixture
    def figures(self, run, base_folder):
        pytest.importorskip("matplotlib")
        from peft_adadora import figures

        return figures(read_report(run.args.output_dir, base_folder))

    def test_the_heat_map_holds_the_ranks(self, run, figures):
        axes = figures["ranks"].axes[0]
        names = [label.get_text() for label in axes.get_yticklabels()]
        shown = axes.images[0].get_array()
        for name, layer in svd_layers(run.model).items():
            number, _, rest = name.partition("layers.")[2].partition(".")
            assert shown[names.index(rest), int(number)] == (layer.lora_E["default"] != 0).sum()
        assert shown.count() == len(svd_layers(run.model))

    def test_the_heat_map_is_empty_where_there_is_no_adapter(self, saved):
        pytest.importorskip("matplotlib")
        from peft_adadora import figures

        _, adapter, _ = saved
        report = read_report(adapter)
        report.modules = [Module("h.0.a", 0, 6, torch.ones(3)), Module("h.1.b", 3, 6, torch.ones(3))]
        assert figures(report)["ranks"].axes[0].images[0].get_array().tolist() == [[0, None], [None, 3]]

    def test_the_distribution_counts_each_row_once(self, run, base_folder, figures):
        report = read_report(run.args.output_dir, base_folder)
        assert ("magnitudes" in figures) == report.has_magnitudes
        if report.has_magnitudes:
            bars = figures["magnitudes"].axes[0].patches
            assert sum(bar.get_height() for bar in bars) == len(report.change)
            edges = bars[0].get_x(), bars[-1].get_x() + bars[-1].get_width()
            assert edges == pytest.approx((report.change.min().item(), report.change.max().item()))

    def test_the_curve_is_the_schedule_and_the_dots_are_the_log(self, run, figures):
        schedule, dots = figures["budget"].axes[0].lines
        allocator = run.model.base_model.rankallocator
        assert list(schedule.get_ydata()) == [allocator.budget_schedule(step)[0] for step in range(STEPS)]
        log = [entry for entry in run.state.log_history if "adalora_mean_rank" in entry]
        assert list(dots.get_xdata()) == [entry["step"] for entry in log]
        assert list(dots.get_ydata()) == [6 * entry["adalora_mean_rank"] for entry in log]

    def test_the_page_is_one_file_for_light_and_dark_and_escapes_what_it_shows(self, saved):
        pytest.importorskip("matplotlib")
        from peft_adadora.page import write

        _, adapter, _ = saved
        report = read_report(adapter)
        report.modules[0].name = "<script>"
        page = write(report, adapter / "out").read_text()
        assert not re.search(r'(src|href|srcset)="(?!data:image/png;base64,)|@import|url\(|<script', page)
        assert "&lt;script&gt;" in page
        assert page.count("prefers-color-scheme: dark") == 1 + 3
        for name in ("ranks", "magnitudes", "budget"):
            for suffix in ("", "-dark"):
                assert (adapter / "out" / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")

    def test_pictures_are_dark_on_request(self, saved):
        pytest.importorskip("matplotlib")
        from peft_adadora import figures

        report = read_report(saved[1])
        light, dark = (sum(figures(report, dark=dark)["ranks"].get_facecolor()[:3]) for dark in (False, True))
        assert light > 2.5 and dark < 0.5
