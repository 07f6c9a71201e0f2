"""The benchmarks compare, count, fit and write what they say. How fast anything is, is not tested."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn


pytestmark = [pytest.mark.overlay, pytest.mark.project]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = [path.stem for path in sorted(BENCHMARKS.glob("*.py"))]
VARIANTS = ["AdaLoRA", "DoRA", "AdaDoRA", "AdaDoRA, dense norm"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmarks by name. They import each other as neighbours of a script do."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def settings(bench):
    return bench.settings.Settings(CPU, threads=torch.get_num_threads(), quick=True)


@pytest.fixture
def layer_case(bench):
    return bench.cases.LayerCase(24, 40, tokens=6, rank=4)


@pytest.fixture
def block_case(bench):
    return bench.cases.LlamaCase("block", 16, 24, 2, 1, layers=1, tokens=8, rank=4, is_block=True)


@pytest.fixture
def tables(bench):
    spread = bench.timing.Spread((4.0, 1.0, 2.0))
    rows = [
        {"size": size, "AdaLoRA (ms)": spread, "AdaDoRA": spread, "kept (MiB)": 0.5, "note": None} for size in (1, 2)
    ]
    return [
        bench.report.Table("made-up", "Made up", rows, "A note.", plot="bars"),
        bench.report.Table("growing", "Growing", rows, plot="growth"),
    ]


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize("case_name", ["layer_case", "block_case"])
def test_the_dense_yardstick_computes_what_adadora_computes(case_name, request):
    case = request.getfixturevalue(case_name)
    models = case.build(CPU, ["AdaDoRA", "AdaDoRA, dense norm"])
    results = []
    for model in models.values():
        inputs = case.inputs(CPU)
        output = case.forward(model, inputs)
        output.backward(torch.ones_like(output))
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        results.append([output, inputs.grad, *gradients])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case_name", ["layer_case", "block_case"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_changes_the_output(variant, case_name, dtype, request):
    case = replace(request.getfixturevalue(case_name), dtype=dtype)
    model, inputs = case.build(CPU, [variant])[variant], case.inputs(CPU)
    case.training_step(model, inputs)()
    assert inputs.grad is not None
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)

    output = case.forward_pass(model, inputs)()
    assert output.dtype == dtype and not output.requires_grad
    base = case.build(CPU, ["AdaLoRA"])["AdaLoRA"]
    with base.disable_adapter():
        assert not torch.allclose(case.forward_pass(base, inputs)(), output)


def test_a_training_step_starts_without_gradients(layer_case):
    model, inputs = layer_case.build(CPU, ["AdaDoRA"])["AdaDoRA"], layer_case.inputs(CPU)
    step = layer_case.training_step(model, inputs)
    step()
    once = inputs.grad.clone()
    step()
    assert torch.equal(inputs.grad, once)


@pytest.mark.parametrize("section, case_name", [("layer", "layer_case"), ("model", "block_case")])
def test_inside_of_dora_caching_only_what_keeps_something_does_less(
    section, case_name, bench, settings, request, monkeypatch
):
    def count(steps, settings, **options):
        for step in steps.values():
            step()
        return {variant: [bench.counters.launches(step, CPU)] for variant, step in steps.items()}

    module = getattr(bench, section)
    monkeypatch.setattr(module, "cases", lambda settings: [request.getfixturevalue(case_name)])
    monkeypatch.setattr(module, "measure", count)
    _, without, inside = (row for table in module.tables(settings) for row in table.rows)
    less = {column for column in inside if column in VARIANTS and inside[column].median < without[column].median}
    assert less == {"DoRA", "AdaDoRA"}
    assert inside["AdaLoRA (ms)"] == without["AdaLoRA (ms)"]
    assert inside["AdaDoRA, dense norm"] == without["AdaDoRA, dense norm"]


# -------------------------------------------------------------------------------------------------------------- timing


def test_steps_take_turns(bench, settings):
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    bench.timing.measure(steps, settings, min_rounds=2, share=1e-9)
    turns = [name for name, before in zip(calls, [None, *calls]) if name != before]
    assert turns == ["a", "b", "a", "b"]


@pytest.mark.parametrize(("share", "rounds"), [(1e-9, 2), (1e9, 7)])
def test_a_step_leaves_once_its_share_of_the_time_is_used_up(bench, settings, share, rounds):
    seconds = bench.timing.measure({"step": lambda: None}, settings, min_rounds=2, share=share)
    assert len(seconds["step"]) == rounds
    assert min(seconds["step"]) > 0


def test_ratios_are_taken_round_by_round(bench):
    comparison = bench.timing.comparison({"a": [1.0, 2.0, 8.0], "b": [3.0, 2.0]}, "a")
    assert comparison["a (ms)"].median == 2000
    assert comparison["b"].values == (3.0, 1.0)


# ------------------------------------------------------------------------------------------------------------ counters


def test_bytes_kept_by_autograd_are_counted_exactly(bench):
    x, y = torch.randn(30, 50, requires_grad=True), torch.randn(30, 50)
    # the product keeps y for the gradient of x, and the exponential keeps its result
    kept = bench.counters.kept_storages(lambda: (x * y).exp())
    assert bench.counters.byte_count(kept) == 2 * 30 * 50 * 4


def test_a_shared_storage_is_counted_once_and_an_excluded_one_not_at_all(bench):
    x = torch.randn(30, 50, requires_grad=True)
    y = torch.randn(50, 30)

    def forward():
        return (x * y.T, x * y.view(30, 50))

    assert bench.counters.byte_count(bench.counters.kept_storages(forward)) == y.nbytes
    assert not bench.counters.kept_storages(forward, exclude=[y])


def test_what_a_dropped_branch_of_the_graph_saved_does_not_count(bench):
    x = torch.randn(30, 50, requires_grad=True)

    def forward():
        x.exp()
        return x.sin()

    assert bench.counters.byte_count(bench.counters.kept_storages(forward, exclude=[x])) == 0


def test_a_temporary_counts_for_the_peak_but_is_not_held(bench):
    x = torch.randn(512, 256)

    def function():
        return (x + x).sum(dim=0)

    assert bench.counters.held_bytes(function, CPU) == 256 * 4
    assert x.nbytes + 256 * 4 <= bench.counters.peak_bytes(function, CPU) < 1.1 * x.nbytes


def test_operations_are_counted_without_the_ones_inside_of_them(bench):
    x = torch.randn(4, 4)
    assert bench.counters.launches(lambda: nn.functional.linear(x, x).add_(1), CPU) == 2


def test_the_outputs_that_nothing_else_keeps_are_those_of_q_k_o_and_down(bench, block_case):
    model = block_case.build(CPU, ["AdaLoRA"])["AdaLoRA"]
    inputs = block_case.inputs(CPU)
    kept = bench.memory.kept_by_autograd(model, lambda: block_case.forward(model, inputs))
    token_bytes = 4 * block_case.tokens
    # hidden is 16, with half as many features for keys and values, and 24 inside of the MLP
    assert kept.outputs == token_bytes * (16 + 8 + 8 + 16 + 24 + 24 + 16)
    assert kept.other_outputs == token_bytes * (16 + 8 + 16 + 16)


def test_the_roofline_is_the_slower_of_moving_and_computing(bench, settings):
    model = nn.Linear(64, 32, bias=False)
    x = torch.randn(16, 64)

    def bound(**rates):
        return bench.model.lower_bound(lambda: model(x), model, 1, 0, replace(settings, **rates))

    assert bound() is None
    assert bound(gbps=1.0, tflops=1e6) == pytest.approx(1e3 * 64 * 32 * 4 / 1e9)
    assert bound(gbps=1e6, tflops=1.0) == pytest.approx(1e3 * 2 * 16 * 64 * 32 / 1e12)


# ------------------------------------------------------------------------------------------------- growth and accuracy


def test_the_fit_recovers_the_exponent_of_the_upper_half(bench):
    sizes = [8, 16, 32, 64, 128, 256]
    values = [7.0, 1.0, 5.0, *(3 * size**1.5 for size in sizes[3:])]
    assert bench.growth.fitted_exponent(sizes, values) == pytest.approx(1.5)


def test_the_dense_norm_in_float64_is_the_exact_one(bench):
    factors = bench.accuracy.random_factors(32).to(torch.float64)
    expected = (factors.weight + factors.lora_B @ torch.diag(factors.scaled_E.flatten()) @ factors.lora_A).norm(dim=1)
    for way, norm in bench.accuracy.norms(factors).items():
        tolerance = 1e-5 if "float32" in way else 1e-12
        torch.testing.assert_close(norm.double(), expected, rtol=tolerance, atol=0)


def test_the_ways_to_the_norm_agree_on_a_layer(bench, layer_case):
    functions = bench.norm.norm_functions(layer_case, CPU)
    dense = functions["dense"]()
    assert dense.shape == (24, 1)
    torch.testing.assert_close(functions["from the factors"](), dense)
    torch.testing.assert_close(functions["with ‖W‖² kept"](), dense)
    assert functions["PEFT's DoRA"]().shape == (24,)  # of another adapter


# ------------------------------------------------------------------------------------------------------------- reports


def test_a_step_that_does_not_compile_is_told_and_not_raised(bench):
    model = nn.Linear(3, 3)

    def broken():
        raise RuntimeError("no compiler\nand a long trace")

    call = bench.compiled.first_call(model, lambda: model.weight, broken)
    assert call["failure"] == "RuntimeError no compiler"
    assert call["relative difference"] is None


def test_a_table_becomes_markdown(tables):
    lines = tables[0].markdown().splitlines()
    assert lines[0] == "## Made up"
    assert lines[2] == "A note."
    assert lines[4] == "| size | AdaLoRA (ms) | AdaDoRA | kept (MiB) | note |"
    assert lines[6] == "| 1 | 2.000 (1.500–3.000) | 2.000 (1.500–3.000) | 0.500 |  |"


def test_a_table_becomes_csv_with_the_medians(bench, tables):
    header, first = tables[0].csv().splitlines()[:2]
    assert header == "size,AdaLoRA (ms),AdaDoRA,kept (MiB),note"
    assert first == "1,2.000,2.000,0.500,"
    assert bench.report.Table("", "", [{"norm": "|W|", "runs": "1, 2"}]).csv() == 'norm,runs\n|W|,"1, 2"\n'


def test_the_json_holds_the_machine_the_versions_and_every_round(bench, settings, tables, tmp_path):
    bench.report.write_json(tmp_path / "benchmarks.json", bench.report.environment(settings), tables)
    written = json.loads((tmp_path / "benchmarks.json").read_text())
    assert written["machine"]["device"]
    assert written["machine"]["threads"] == settings.threads
    assert written["machine"]["versions"].keys() == {"python", "torch", "peft", "transformers", "peft-adadora"}
    row = written["tables"]["made-up"]["rows"][0]
    assert row["size"] == 1
    assert row["AdaDoRA"] == {"median": 2.0, "quartiles": [1.5, 3.0], "rounds": [4.0, 1.0, 2.0]}


def test_merging_is_as_exact_as_storing(bench, settings):
    (table,) = bench.merging.tables(settings)
    errors = {row["layer"]: (row["merged"], row["the exact weight, stored"]) for row in table.rows}
    assert max(errors.pop(f"{name}, float32")[0] for name in ("Linear", "Conv1D", "Conv2d")) < 1e-6
    for merged, stored in errors.values():
        assert 1e-4 < stored < 0.2
        assert abs(merged / stored - 1) < 0.02


def test_tables_are_plotted(bench, tables, tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot.write_plots(tables, tmp_path)
    for table in tables:
        assert (tmp_path / f"{table.name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(bench, tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench.plot.write_plots(tables, tmp_path)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.splitlines() == [
        "No plots were made, because matplotlib is not installed: pip install matplotlib"
    ]


def test_the_command_prints_and_writes_the_sections_asked_for(tmp_path):
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--only", "accuracy", "--output", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "## Accuracy of the norm" in result.stdout
    assert json.loads((tmp_path / "benchmarks.json").read_text())["tables"].keys() == {"accuracy", "cancellation"}


class TestLaunches:
    """The counts are exact, so these hold what a training step asks of a GPU."""

    def test_views_and_allocations_are_no_launches(self, bench):
        with bench.launches.Launches() as counter:
            x = torch.empty(6, 4, device="meta")
            x.T.reshape(2, 12).view(4, 6)[1:].detach().split(2)
            assert counter.count == 1  # to reshape a transposed matrix copies it
            x += 1
        assert counter.count == 2

    def test_the_price_is_that_of_bytes_operations_or_the_launch(self, bench):
        def price(rows: int, columns: int, dtype: torch.dtype) -> float:
            matrix = torch.empty(rows, columns, dtype=dtype, device="meta")
            with bench.launches.Launches(gbps=1000, tflops=100, float32_tflops=10) as counter:
                matrix @ matrix.T
            return counter.price

        assert price(2, 2, torch.float32) == bench.launches.LAUNCH_SECONDS
        assert price(10**4, 10**4, torch.bfloat16) == pytest.approx(2e12 / 100e12)
        assert price(10**4, 10**4, torch.float32) == pytest.approx(2e12 / 10e12)
        assert price(10**4, 1, torch.float32) == pytest.approx(4 * (10**8 + 2 * 10**4) / 1e12)

    @pytest.mark.parametrize("kind, most", [("bfloat16", 481), ("float32", 394), ("4-bit", 495)])
    def test_a_layer_takes_no_more_of_them_at_any_size(self, bench, kind, most):
        if kind == "4-bit":
            pytest.importorskip("bitsandbytes")
        counts = [
            bench.launches.one_layer("AdaDoRA", kind, tokens, width) for tokens, width in ((8, 1024), (16, 2048))
        ]
        assert [count["total"] for count in counts] == [most, most]
        assert counts[0]["allocate"] == 0

    def test_the_count_of_pefts_adalora_is_without_us(self, bench):
        arguments = {"variant": "AdaLoRA", "kind": "bfloat16", "tokens": 8, "width": 1024}
        ours, stock = bench.launches.one_layer(**arguments), bench.launches.without_us(**arguments)
        assert (ours["allocate"], stock["allocate"]) == (0, 42 * 7)
        assert ours["forward"] == stock["forward"]


@pytest.fixture(scope="module")
def rows(bench):
    """What the section of collectives counts for each method."""
    settings = bench.settings.Settings(CPU, 1, quick=True, latency_us=10.0, bandwidth_gbs=1.0)
    (table,) = bench.collectives.tables(settings)
    return {row["method"]: row for row in table.rows}


class TestCollectives:
    """The counts are exact, so these hold what a training step asks of a network."""

    def test_adadora_adds_five_collectives_to_those_of_lora(self, rows):
        lora, adadora = rows["LoRA"], rows["AdaDoRA"]
        # a gather in each pass and a scatter for each of 4 blocks, and a gather of what is left of the model
        assert lora["forward and backward"] == adadora["forward and backward"] == 4 * 3 + 1
        assert (lora["regularization"], lora["allocation"], lora["state (MB)"]) == (0, 0, 0)
        assert (adadora["regularization"], adadora["allocation"]) == (3, 2)

    def test_pefts_adalora_stops_with_an_error(self, rows):
        stock = rows["PEFT's AdaLoRA"]
        assert stock["forward and backward"] == 4 * 3 + 1
        assert "Error" in stock["regularization"] and "Error" in stock["allocation"]

    def test_the_state_is_that_of_the_shards(self, rows):
        # 2 of 12 rows of A and E, and an eighth of the rows of B, in float32, of the average and two more
        lengths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
        of_a_block = sum(2 * length + 2 + 12 * out // 8 for length, out in lengths)
        # and a byte that says whether the gradients of the last step were finite
        assert rows["AdaDoRA"]["state (MB)"] == (4 * 4 * 3 * of_a_block + 1) / 1e6

    def test_the_price_is_that_of_latency_and_bytes(self, bench):
        counts = {"errors": {}, "allocation": {"number": 2, "bytes": 3e6, "passed": 5e6}}
        assert bench.collectives.cells(counts, ("allocation",), 10.0, 2.0) == [2, 3.0, pytest.approx(0.02 + 2.5)]

    def test_a_count_that_is_not_linear_is_an_error(self, bench, monkeypatch):
        counts = {1: {"state": 1}, 2: {"state": 2}, 3: {"state": 4}}
        monkeypatch.setattr(bench.collectives, "count", lambda variant, shape, blocks: (counts[blocks], {}))
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
        with pytest.raises(AssertionError, match="state"):
            bench.collectives.count_all("AdaDoRA", "a small Llama")


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    """Where the command for a GPU, run on a CPU at small sizes, has written what it found."""
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["--device", "cpu", "--preset", "gpu", "--minutes", "9", "--output", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        bench.run.main(arguments)
    assert (folder / "summary.md").read_text().partition("## Summary")[2] in printed.getvalue()
    return folder


class TestGpuPreset:
    """The command for a GPU, run on a CPU at small sizes. The kernels are tested in test_triton_candidates.py."""

    METHODS = ("LoRA", "DoRA", "PEFT's AdaLoRA", "AdaDoRA")
    FORMS = ("as it is", "h in one kernel", "norm in one kernel", "both kernels")

    def rows(self, folder, part, table):
        return json.loads((folder / f"{part}.json").read_text())["tables"][table]["rows"]

    def test_each_part_is_finished_and_written_as_json_and_as_markdown(self, folder):
        parts = {path.stem for path in folder.glob("*.json")} - {"summary"}
        assert parts == {"A", "B", "C", "D", "E", "A-compiled"}
        for part in parts:
            tables = json.loads((folder / f"{part}.json").read_text())["tables"]
            markdown = (folder / f"{part}.md").read_text()
            assert all(f"## {table['title']}" in markdown for table in tables.values())
            assert f"{part}-failure" not in tables

    @pytest.mark.parametrize("part, kind", [("A", "bfloat16"), ("E", "4-bit")])
    def test_a_training_step_is_timed_counted_and_priced(self, folder, part, kind):
        if kind == "4-bit":
            pytest.importorskip("bitsandbytes")
        rows = self.rows(folder, part, f"gpu-training-{kind}")
        assert tuple(row["method"] for row in rows if row["tokens"] == 16) == self.METHODS
        for row in rows:
            assert row["failure"] is None
            phases = [row[f"{phase} (ms)"] for phase in ("forward", "backward", "optimizer", "allocation")]
            assert row["step (ms)"]["median"] == pytest.approx(sum(phases), rel=0.5)
            assert row["launches"] > 50 and row["peak (MiB)"] > 0
            if (row["method"], kind) != ("DoRA", "4-bit"):  # which cannot be counted
                assert row["time / price"] * row["price (ms)"] == pytest.approx(sum(phases) - phases[2], rel=0.5)
        assert rows[2]["/ PEFT's AdaLoRA"]["median"] == 1

    def test_what_is_counted_is_what_the_section_of_launches_counts(self, folder, bench):
        rows = self.rows(folder, "A", "gpu-training-bfloat16")
        counts = {row["method"]: row["launches, counted"] for row in rows if row["tokens"] == 16}
        for method in ("LoRA", "DoRA", "AdaDoRA"):
            assert counts[method] == bench.launches.one_layer(method, "bfloat16", 16, 64)["total"]
        # PEFT's own regularization and allocation take more than ours
        assert counts["PEFT's AdaLoRA"] > bench.launches.one_layer("AdaLoRA", "bfloat16", 16, 64)["total"]

    def test_each_form_of_the_norm_is_timed_and_checked(self, folder):
        rows = self.rows(folder, "B", "gpu-norm")
        shapes = {(row["out×in"], row["layers"]) for row in rows}
        assert shapes == {("64×64", 2), ("16×64", 2), ("224×64", 2), ("64×224", 1)}
        errors = {row["form"]: row["error"] for row in rows}
        assert errors.pop("R in one part") > 1e-6 > max(errors.values())
        assert errors.keys() == {"R in two parts", "R in two parts, ‖W‖² kept", "float32 blocks", "dense"}

    def test_evaluation_is_timed_inside_and_outside_of_dora_caching(self, folder):
        rows = self.rows(folder, "C", "gpu-evaluation")
        steps = ["prefill", "prefill, DoraCaching()", "generate"]
        assert [(row["step"], row["method"]) for row in rows] == [
            (step, name) for step in steps for name in self.METHODS
        ]
        assert all(row["time (ms)"]["median"] > 0 and row["failure"] is None for row in rows)

    def test_each_kernel_stands_beside_the_form_that_it_would_replace(self, folder):
        pytest.importorskip("triton")
        rows = self.rows(folder, "D", "gpu-training-kernels")
        assert tuple(row["form"] for row in rows if row["tokens"] == 16) == self.FORMS
        assert all(row["failure"] is None for row in rows)
        for table, error in (("gpu-output-kernel", "error of the gradients"), ("gpu-norm-kernel", "error")):
            for row in self.rows(folder, "D", table):
                assert row["failure"] is None
                assert row[error] < (1e-2 if "output" in table else 1e-6)

    def test_the_summary_answers_what_the_norm_and_the_kernels_are_worth(self, folder):
        answers = json.loads((folder / "summary.json").read_text())["summary"]
        assert any(answer.startswith("B. To take ‖W‖² anew costs") for answer in answers)
        kernels = [answer for answer in answers if answer.startswith("D. ")]
        if len(kernels) == 3:
            assert all("(a kernel has to save 10 %)" in answer for answer in kernels)
        assert not any("Not finished" in answer or "not measured" in answer for answer in answers)


class TestGpuRun:
    """What goes wrong in a run costs what it concerns, and no more."""

    @pytest.fixture
    def run(self, bench, settings, tmp_path, monkeypatch):
        run = bench.gpu.Run(settings, bench.gpu_parts.SMALL, tmp_path, 60, {})
        monkeypatch.setattr(run, "release", lambda: None)
        return run

    @pytest.fixture
    def worker(self, bench, tmp_path, monkeypatch):
        """A worker whose process answers what it is asked to answer."""
        with open(tmp_path / "log.txt", "w") as log:
            worker = bench.gpu.Worker(True, None, log)
            code = "import json, sys, time\nfor line in sys.stdin:\n {}\n print(json.loads(line)['reply'], flush=True)"

            def start():
                if worker.process is None:
                    ending = "json.loads(line)['reply'] == 'end' and sys.exit()"
                    pipe = subprocess.PIPE
                    command = [sys.executable, "-c", code.format(ending)]
                    worker.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

            monkeypatch.setattr(worker, "start", start)
            yield worker
            worker.stop()

    def test_a_part_that_fails_keeps_the_tables_that_it_had(self, bench, run, tmp_path):
        def tables():
            yield bench.report.Table("first", "First", [{"a": 1}])
            raise ValueError("no such thing")

        run.part("X", "A part", 1.0, tables())
        written = json.loads((tmp_path / "X.json").read_text())["tables"]
        assert written["first"]["rows"] == [{"a": 1}]
        assert written["X-failure"]["rows"] == [{"failure": "ValueError no such thing"}]
        assert "| ValueError no such thing |" in (tmp_path / "X.md").read_text()
        assert run.failures == ["X (A part), ValueError no such thing"]

    def test_a_part_whose_time_is_up_does_not_begin(self, bench, run):
        begun = []
        run.part("X", "A part", 0.0, (begun.append(1) for _ in range(1)))
        assert not begun
        assert run.failures == ["X (A part), its time is up"]

    @pytest.mark.parametrize(
        "reply, seconds, message",
        [
            ('{"error": "ValueError wrong"}', 60, "ValueError wrong"),
            ("end", 60, "the process ended"),
            ('{"result": 1}', 0, "no answer in 0 s"),
        ],
    )
    def test_a_process_that_does_not_answer_is_replaced(self, bench, worker, reply, seconds, message):
        with pytest.raises(bench.gpu_parts.NoAnswer, match=message):
            worker.ask(seconds, reply=reply)
        assert worker.ask(60, reply='{"result": [2]}') == [2]

    def test_a_method_that_fails_does_not_lose_the_others(self, bench, run, monkeypatch):
        def ask(process, task, variant, **arguments):
            if variant == "DoRA":
                raise bench.gpu_parts.NoAnswer("out of memory")
            return {"kernels": 1} if task == "prepare" else [0.5, 1.5]

        monkeypatch.setattr(run, "ask", ask)
        turns = bench.gpu_parts.in_turns(run, ("LoRA", "DoRA", "AdaDoRA"), "prepare", "time")
        assert turns.failures == {"DoRA": "out of memory"}
        assert turns.ratio("AdaDoRA", "LoRA").median == 1
        assert turns.spread("LoRA").median == 2000
        assert turns.spread("DoRA") is None and turns.ratio("LoRA", "DoRA") is None

    def test_a_form_that_fails_does_not_lose_the_others(self, bench):
        def fails():
            raise RuntimeError("no such kernel\nand more")

        tasks = bench.gpu_worker.Tasks(CPU)
        x = torch.ones(4)
        functions = {"good": lambda: x + 1, "bad": fails}
        steps = {name: bench.gpu_worker.timed(function) for name, function in functions.items()}
        found = tasks._against_each_other(functions, steps, dict.fromkeys(functions, dict), rounds=2, share=1)
        assert found["bad"] == {"failure": "RuntimeError no such kernel"}
        assert found["good"]["launches"] == 1 and len(found["good"]["seconds"]) == 2

    def test_a_package_that_is_missing_is_the_answer(self, bench, monkeypatch):
        monkeypatch.setitem(sys.modules, "candidates", None)
        request = {"task": "outputs", "tokens": 4, "features": 4, "rank": 2, "rounds": 1, "share": 0}
        answer = bench.gpu_worker.answer(bench.gpu_worker.Tasks(CPU), request)
        assert answer["error"].startswith("ModuleNotFoundError")

    @pytest.mark.parametrize("ratio, verdict", [(0.9, "; worth it"), (0.91, "; not worth it")])
    def test_a_kernel_is_worth_it_if_it_saves_a_tenth(self, bench, ratio, verdict):
        row = {"tokens": 16, "form": "h in one kernel", "/ as it is": bench.timing.Spread((ratio,)), "failure": None}
        tables = {"gpu-training-kernels": bench.report.Table("", "", [row])}
        (answer,) = bench.gpu_summary.kernel_answer(tables, bench.gpu_parts.SMALL)
        assert f"{ratio:.3f}×" in answer and verdict in answer


def test_steps_are_timed_in_processes_that_take_turns(bench, settings):
    (table,) = bench.step.tables(settings)
    assert len(table.rows[0]["AdaDoRA"].values) == 3
    assert min(table.rows[0]["PEFT's AdaLoRA (ms)"].values) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [(["--only", "layers"], "no section layers; there are layer,"), (["--device", "cuda"], "--device cpu")],
)
def test_what_cannot_be_run_is_refused(bench, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.run.parse_arguments(arguments)
    assert message in capsys.readouterr().err


class TestMedian:
    def test_the_median_of_runs(self, bench):
        def run(ratio, count):
            row = {"case": "a", "ratio": {"median": ratio, "quartiles": [0, 9], "rounds": [ratio]}, "count": count}
            return {"tables": {"layer": {"title": "Layer", "note": "Ratios.", "rows": [row]}}}

        (table,) = bench.median.medians([run(1.5, 2.0), run(1.1, 4.0), run(1.2, 3.0)])
        assert table.rows == [{"case": "a", "ratio": 1.2, "count": 3.0}]
        assert table.note == "Median of 3 runs. Ratios."

    def test_runs_of_different_cases_are_refused(self, bench):
        runs = [{"tables": {"layer": {"title": "", "note": "", "rows": [{"case": case}]}}} for case in "ab"]
        with pytest.raises(SystemExit, match="do not go together"):
            bench.median.medians(runs)
