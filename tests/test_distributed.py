"""
Two processes train what one trains, over gloo on the CPU: DDP and FSDP2, and DDP, FSDP2 and DeepSpeed by the Trainer.
"""

import json
import multiprocessing.connection
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from distributed_run import (
    held_out_logits,
    layers_of,
    make_quantized_llama,
    make_trainer_without_dropout,
    rank_pattern_of,
    run_rank,
    train_single,
)
from safetensors.torch import load_file
from trainer_run import CONTEXT, STEPS, make_arguments, make_llama
from transformers import TrainerControl, TrainerState

from peft import PeftModel
from peft.tuners.adalora import AdaLoraCallback


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    # what `--multi_gpu` asks for is several processes on a machine, here on its CPU
    "accelerate launch": "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2"
    " --mixed_precision no --dynamo_backend no",
}


def results_in(folder: Path) -> list[dict]:
    return [torch.load(path, weights_only=False) for path in sorted(folder.glob("rank-*.pt"))]


def launch(mode: str, folder: Path, launcher: str) -> list[dict]:
    """What two processes of a launcher report."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split()]
    script = Path(__file__).with_name("distributed_run.py")
    process = subprocess.run(
        [*command, script, mode, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return results_in(folder)


def fork(mode: str, folder: Path, count: int = 2, **arguments: Any) -> list[dict]:
    """What processes report that are forked from a server which has imported torch, so that they start in no time."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        CONTEXT.Process(target=run_rank, args=(rank, count, store.port, mode, folder, json.dumps(arguments)))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    waiting = {process.sentinel for process in processes}
    while waiting and not any(process.exitcode for process in processes):
        ended = multiprocessing.connection.wait(waiting, timeout=900)
        waiting -= set(ended or waiting)
    for process in processes:
        process.kill()  # the others wait for one that has failed
        process.join()
    errors = [(folder / f"errors-{rank}.txt").read_text()[-4000:] for rank in range(count)]
    assert [process.exitcode for process in processes] == [0] * count, "\n".join(errors)
    return results_in(folder)


@pytest.fixture(scope="module", params=["ddp", "ddp-unused", "ddp-compiled", "fsdp2", "fsdp2-bf16"])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def single(mode):
    return train_single(layers_of(mode))


@pytest.fixture(scope="module")
def folder(mode, tmp_path_factory):
    return tmp_path_factory.mktemp(mode)


@pytest.fixture(scope="module")
def results(mode, folder):
    return fork(mode, folder)


class TestTwoProcesses:
    def test_all_processes_keep_the_ranks_of_a_single_one(self, results, single, mode):
        assert sum(sum(kept) for kept in single["rank_pattern"].values()) == 6 * layers_of(mode)
        for result in results:
            assert result["rank_pattern"] == single["rank_pattern"]

    def test_all_processes_hold_the_same_adapter(self, results):
        for name, tensor in results[0]["adapter"].items():
            assert torch.equal(tensor, results[1]["adapter"][name]), name
        for name, tensor in results[0]["averages"].items():
            assert torch.equal(tensor, results[1]["averages"][name]), name

    def test_the_adapter_is_that_of_a_single_process(self, results, single, mode):
        # in bfloat16 the gradients are rounded to 8 bits, and Adam takes steps of 1e-2 whatever their size
        atol = 1e-5 if mode != "fsdp2-bf16" else 1e-2
        for name, tensor in single["adapter"].items():
            torch.testing.assert_close(results[0]["adapter"][name], tensor, rtol=1e-5, atol=atol, msg=name)

    def test_pruned_entries_are_zero(self, results, single):
        for name, kept in single["rank_pattern"].items():
            pruned = results[0]["adapter"][f"base_model.model.{name}"][~torch.tensor(kept)]
            assert (pruned == 0).all()


class TestSharded:
    @pytest.fixture(autouse=True)
    def only_sharded(self, mode):
        if mode.startswith("ddp"):
            pytest.skip("DDP does not shard")

    @pytest.fixture
    def tolerance(self, mode):
        return {"rtol": 1e-5, "atol": 1e-5} if mode == "fsdp2" else {"rtol": 0, "atol": 0.05}

    def test_merging_gives_the_merged_model_of_a_single_process(self, results, single, tolerance):
        torch.testing.assert_close(results[0]["merged_logits"], single["merged_logits"], **tolerance)

    def test_saved_from_shards_it_loads_on_a_single_process(self, results, folder, tolerance):
        loaded = PeftModel.from_pretrained(make_llama(), folder / "adapter")
        assert sum(len(param) for name, param in loaded.named_parameters() if "lora_E" in name) == 12
        torch.testing.assert_close(held_out_logits(loaded), results[0]["logits"], **tolerance)

    def test_loaded_on_a_single_process_it_can_be_sharded_again(self, results, tolerance):
        torch.testing.assert_close(results[0]["logits_of_loaded"], results[0]["logits"], **tolerance)

    def test_a_change_of_sharded_magnitudes_in_eval_mode_is_noticed(self, results, folder, tolerance):
        changed = PeftModel.from_pretrained(make_llama(), folder / "adapter")
        with torch.no_grad():
            for name, param in changed.named_parameters():
                if "lora_magnitude" in name:
                    param.mul_(2)
        expected = held_out_logits(changed)
        assert (expected - results[0]["logits"]).abs().max() > 0.1
        torch.testing.assert_close(results[0]["logits_of_changed"], expected, **tolerance)


# `accelerate launch` runs torchrun, and each forked process has the environment of one of torchrun's
@pytest.mark.parametrize(
    "launcher", ["forked", "accelerate launch", pytest.param("torchrun", marks=pytest.mark.engines)]
)
def test_the_trainer_gives_the_same_on_two_processes(launcher, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for path in folders:
        path.mkdir()
    results = fork("trainer", folders[1]) if launcher == "forked" else launch("trainer", folders[1], launcher)
    trainer = make_trainer_without_dropout(folders[0])
    trainer.train()
    patterns = [result["rank_pattern"] for result in results] + [trainer.model.peft_config["default"].rank_pattern]
    # saving drops the name of the adapter, and not all processes save
    assert all(list(pattern.values()) == list(patterns[0].values()) for pattern in patterns)
    for name, param in trainer.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(results[0]["adapter"][name], param.detach(), rtol=1e-5, atol=1e-5, msg=name)
    assert (folders[1] / f"checkpoint-{STEPS}" / "adalora_state.safetensors").exists()


@pytest.fixture(scope="module")
def single_trainer(tmp_path_factory):
    trainer = make_trainer_without_dropout(tmp_path_factory.mktemp("one"), max_grad_norm=0.0)
    trainer.train()
    return trainer


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_same_on_two_processes(stage, single_trainer, tmp_path):
    pytest.importorskip("deepspeed")
    results = fork(f"zero{stage}", tmp_path)
    expected = single_trainer.model.peft_config["default"].rank_pattern
    for result in results:
        assert list(result["rank_pattern"].values()) == list(expected.values())
    if stage == 2:
        # ZeRO-3 shows no whole parameter in front of a forward pass
        assert len(results[0]["pruned"]) == 5 * 2 * 6
        assert max(results[0]["pruned"] + results[1]["pruned"]) == 0

    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    trained = load_file(checkpoint / "adapter_model.safetensors")
    for name, param in single_trainer.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(trained[name.removesuffix(".default")], param.detach(), rtol=1e-5, atol=1e-5)
    loaded = PeftModel.from_pretrained(make_llama(), checkpoint)
    torch.testing.assert_close(held_out_logits(loaded), held_out_logits(single_trainer.model), rtol=1e-5, atol=1e-5)


# what FSDP2 is asked for through the Trainer, and how far the weights may be from those of a single process
FSDP2 = {
    "full state dicts": ({}, 1e-6),
    "sharded state dicts": ({"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, 1e-6),
    "activation checkpointing": ({"fsdp_config": {"activation_checkpointing": True}}, 1e-6),
    "gradient checkpointing": ({"gradient_checkpointing": True}, 1e-6),
    "offload": ({"fsdp_config": {"offload_params": True}}, 1e-6),
    "RAM-efficient loading": ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, 1e-6),
    "no accumulation": ({"gradient_accumulation_steps": 1}, 1e-6),
    "4-bit weights": ({"quantize": True}, 1e-6),
    # gradients have 8 bits, and Adam takes steps of 1e-2 whatever their size
    "bfloat16": ({"bf16": True}, 2e-2),
}
IN_EVERY_RUN = ("sharded state dicts", "activation checkpointing")


@pytest.mark.parametrize(
    "asked",
    [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.engines) for name in FSDP2],
)
def test_fsdp2_through_the_trainer_gives_the_same_and_resumes_exactly(asked, tmp_path):
    arguments, tolerance = FSDP2[asked]
    if "quantize" in arguments:
        pytest.importorskip("bitsandbytes")
    # before the first allocation, when pruning has begun to bite, and after the last allocation
    checkpoints = {f"from {step}": f"run/checkpoint-{step}" for step in (3, 9, 12)}
    results = fork("trainer-fsdp2", tmp_path, resume_from=checkpoints, **arguments)
    single = make_trainer_without_dropout(
        tmp_path / "single",
        base_model=make_quantized_llama(tmp_path) if "quantize" in arguments else None,
        gradient_accumulation_steps=arguments.get("gradient_accumulation_steps", 2),
    )
    single.train()
    assert len(results) == 2
    for result in results:
        assert result.keys() == {"run", *checkpoints}
        run = result["run"]
        assert run["rank_pattern"] == rank_pattern_of(single)
        for name, kept in run["rank_pattern"].items():
            assert not run["adapter"][name][~torch.tensor(kept)].any()
        for name, param in single.model.named_parameters():
            if "lora_" in name:
                torch.testing.assert_close(run["adapter"][name], param.detach(), rtol=0, atol=tolerance, msg=name)
        for resumed in checkpoints:
            assert result[resumed]["rank_pattern"] == run["rank_pattern"]
            for name, tensor in run["adapter"].items():
                assert torch.equal(result[resumed]["adapter"][name], tensor), (resumed, name)
    # of sharded state dicts the Trainer makes no adapter
    if "SHARDED_STATE_DICT" not in str(arguments) and "quantize" not in arguments:
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "run" / f"checkpoint-{STEPS}")
        torch.testing.assert_close(
            held_out_logits(loaded), results[0]["run"]["logits"], rtol=0, atol=max(1e-6, tolerance)
        )


@pytest.mark.engines
@pytest.mark.parametrize("begins, ends", [(2, 1), (1, 2)])
def test_fsdp2_resumes_with_another_number_of_processes(begins, ends, tmp_path):
    for folder in ("begun", "ended"):
        (tmp_path / folder).mkdir()
    begun = fork("trainer-fsdp2", tmp_path / "begun", begins, resume_from={})
    ended = fork(
        "trainer-fsdp2", tmp_path / "ended", ends, run=False, resume_from={"run": "../begun/run/checkpoint-9"}
    )
    assert (len(begun), len(ended)) == (begins, ends)
    assert ended[0]["run"]["rank_pattern"] == begun[0]["run"]["rank_pattern"]
    for name, tensor in begun[0]["run"]["adapter"].items():
        torch.testing.assert_close(ended[0]["run"]["adapter"][name], tensor, rtol=0, atol=1e-5, msg=name)


def test_fsdp1_is_refused_before_the_first_step(tmp_path):
    for result in fork("fsdp1", tmp_path):
        assert len(result["errors"]) == 2
        assert all("use FSDP2" in error for error in result["errors"])


def test_fsdp1_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch):
    arguments = make_arguments(tmp_path)  # which resets accelerate's state
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=1))
    with pytest.raises(NotImplementedError, match="use FSDP2"):
        AdaLoraCallback().on_init_end(arguments, TrainerState(), TrainerControl(), model=make_llama())


def test_fsdp2_can_shard_each_adapted_layer_by_itself(tmp_path):
    fork("shard-each-layer", tmp_path, count=1)
