"""Trains on several processes what `train_single` trains on one; run it with torchrun, or `run_rank` in each process.

torchrun --nproc-per-node 2 distributed_run.py MODE FOLDER [ARGUMENTS]

A mode is one of those in `main`; what `trainer-fsdp2` is asked for follows in JSON.
"""

import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from trainer_run import STEPS, RandomTokens, make_adalora_config, make_llama, make_trainer
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import SVDConv2d, SVDLinear
from peft.tuners.adalora.importance import triplet_scores


BATCH = 4


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def adapter_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """The unpruned adapter."""
    return {name: whole(param.detach()).clone() for name, param in model.named_parameters() if "lora_" in name}


def held_out_logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return whole(model.eval()(input_ids=RandomTokens()[7]["input_ids"][None]).logits).float()


def train(model: nn.Module, peft_model: PeftModel) -> dict[str, Any]:
    """Train for `STEPS` steps on the share of this process, and tell what came out."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    optimizer = torch.optim.AdamW((param for param in model.parameters() if param.requires_grad), lr=1e-2)
    data = RandomTokens()
    for step in range(STEPS):
        tokens = torch.stack([data[(BATCH * step + index) % len(data)]["input_ids"] for index in range(BATCH)])
        tokens = tokens.chunk(world)[rank]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        peft_model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return {
        "adapter": adapter_of(peft_model),
        "rank_pattern": peft_model.peft_config["default"].rank_pattern,
        "averages": {
            name: tensor.clone() for name, tensor in peft_model.base_model.rankallocator.state_dict().items()
        },
        "logits": held_out_logits(model),
    }


def make_model(layers: int = 2) -> PeftModel:
    return get_peft_model(make_llama(layers), make_adalora_config(lora_dropout=0.0))


def layers_of(mode: str) -> int:
    """The layers of its model. To compile each of them takes long."""
    return 1 if mode == "ddp-compiled" else 2


def train_single(layers: int) -> dict[str, Any]:
    model = make_model(layers)
    result = train(model, model)
    model.merge_adapter(safe_merge=True)
    return {**result, "merged_logits": held_out_logits(model)}


def shard(model: PeftModel, param_dtype: torch.dtype) -> PeftModel:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train_sharded(folder: Path, param_dtype: torch.dtype) -> dict[str, Any]:
    model = shard(make_model(), param_dtype)
    result = train(model, model)

    full_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter", state_dict=full_state)
    dist.barrier()
    loaded = PeftModel.from_pretrained(make_llama(), folder / "adapter", is_trainable=True)
    result["logits_of_loaded"] = held_out_logits(shard(loaded, param_dtype))

    # in eval mode, without an optimizer step: what the layers may keep would be wrong now
    with torch.no_grad():
        for name, param in loaded.named_parameters():
            if "lora_magnitude" in name:
                param.mul_(2)
    result["logits_of_changed"] = held_out_logits(loaded)

    model.merge_adapter(safe_merge=True)
    return {**result, "merged_logits": held_out_logits(model)}


class SmallNet(nn.Module):
    """Linear layers whose output holds a loss."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, x: torch.Tensor) -> SequenceClassifierOutput:
        for layer in self.layers:
            x = layer(x).tanh()
        return SequenceClassifierOutput(loss=x.square().mean())


SIZES = [9, 13, 10, 3]  # which leave no process an equal part
SMALL_NETS = {
    "uneven shards": {"sizes": SIZES},
    "fewer rows than processes": {"sizes": [1, 1, 2], "init_r": 2},
    "bfloat16": {"sizes": SIZES, "dtype": torch.bfloat16, "use_dora_adaptive": False},
    "float64": {"sizes": SIZES, "dtype": torch.float64, "use_dora_adaptive": False},
    "plain AdaLoRA": {"sizes": SIZES, "use_dora_adaptive": False},
    "sharded columns": {"sizes": [8, 12, 4], "dim": 1},
    "one unit": {"sizes": SIZES, "by_layer": False},
    "a layer that is not sharded": {"sizes": SIZES, "left_out": 1},
    "resumed": {"sizes": SIZES, "resumes": True},
    "decoupled regularization": {
        "sizes": SIZES,
        "dtype": torch.float64,
        "use_dora_adaptive": False,
        "orth_reg_decoupled": True,
        "orth_reg_weight": 3.0,
    },
    "decoupled, sharded columns": {"sizes": [8, 12, 4], "dim": 1, "orth_reg_decoupled": True, "orth_reg_weight": 3.0},
}


def placement_at(param: nn.Parameter, dim: int) -> Shard:
    """FSDP2 shards no columns unequally."""
    return Shard(dim if param.ndim == 2 and param.shape[1] % 4 == 0 else 0)


def train_small_net(
    mesh: DeviceMesh | None,
    sizes: list[int],
    dtype: torch.dtype = torch.float32,
    dim: int = 0,
    by_layer: bool = True,
    left_out: int | None = None,
    resumes: bool = False,
    averages: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Train seven steps with the same batch on every process, and tell what came out of each. In the third step, part of
    the processes has an infinite gradient.

    Args:
        mesh: Shards the model, if given.
        sizes: Of the layers.
        dim: The dimension to shard of a matrix whose columns four processes can share.
        by_layer: Whether each layer is a unit. A single unit is gathered when the regularization is computed.
        left_out: A layer that is not sharded.
        resumes: Whether to load `averages` before the third step.
        options: Of the config.
    """
    torch.manual_seed(0)
    targets = [f"layers.{index}" for index in range(len(sizes) - 1)]
    schedule = {"tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 7, "init_r": 8, "target_r": 1}
    options = {"use_dora_adaptive": True, "init_lora_weights": False, "orth_reg_weight": 0.3, **schedule, **options}
    model = get_peft_model(SmallNet(sizes), AdaLoraConfig(target_modules=targets, **options)).to(dtype)
    tuner = model.base_model
    inputs, layers = torch.randn(6, sizes[0], dtype=dtype), list(tuner.model.layers)
    with torch.no_grad():
        for layer in layers:
            for part in (layer.lora_A, layer.lora_E, layer.lora_B):
                part["default"].mul_(0.3)
    if mesh is not None:
        arguments = {"mesh": mesh, "shard_placement_fn": lambda param: placement_at(param, dim)}
        for index in range(len(layers)) if by_layer else ():
            if index != left_out:
                fully_shard(layers[index], **arguments)
        fully_shard(tuner, **arguments, ignored_params=set(layers[left_out].parameters()) if left_out else None)
    results = {"loss": [], "scores": [], "kept": []}
    optimizer = torch.optim.SGD((param for param in model.parameters() if param.requires_grad), lr=0.1)
    for step in range(7):
        if step == 2 and resumes and averages is not None:
            tuner.rankallocator.load_state_dict(averages)
        loss = tuner(inputs).loss
        loss.backward()
        if step == 0:
            results["gradients"] = {
                name: whole(param.grad).clone() for name, param in model.named_parameters() if param.grad is not None
            }
        optimizer.step()
        if step == 2 and (mesh is None or mesh.get_coordinate()[-1] == 0):
            local(layers[0].lora_B["default"].grad).fill_(torch.inf)
        tuner.update_and_allocate(step, optimizer)
        optimizer.zero_grad()
        results["loss"].append(loss.detach())
        if step < 6:  # the last allocation drops them
            allocator = tuner.rankallocator
            scores = triplet_scores(allocator.exp_avg_ipt, allocator.exp_avg_unc, allocator.name_set)
            results["scores"].append(torch.cat(scores))
        results["kept"].append(tuner.rankallocator.kept)
        if step == 1:
            results["averages"] = tuner.rankallocator.state_dict()
    return {**results, "adapter": adapter_of(model)}


def train_small_nets(mesh_shape: list[int], averages: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
    return {name: train_small_net(mesh, averages=averages, **case) for name, case in SMALL_NETS.items()}


def make_trainer_without_dropout(folder: Path, **arguments: Any) -> Trainer:
    """The same batches on any number of processes, and one that divides 2."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return make_trainer(
        folder,
        make_adalora_config(lora_dropout=0.0),
        per_device_train_batch_size=2 // world,
        # otherwise the Trainer scales the loss by the number of processes, and with it AdaLoRA's regularization
        average_tokens_across_devices=False,
        **arguments,
    )


def train_with_trainer(folder: Path) -> dict[str, Any]:
    trainer = make_trainer_without_dropout(folder)
    trainer.train()
    return {
        "adapter": adapter_of(trainer.model),
        "rank_pattern": trainer.model.peft_config["default"].rank_pattern,
        "logits": held_out_logits(trainer.model),
    }


def rank_pattern_of(trainer: Trainer) -> dict[str, list[bool]]:
    """Which triplets are kept, by the names of the parameters E. Saving drops the name of the adapter from these."""
    rank_pattern = trainer.model.peft_config["default"].rank_pattern
    return {f"base_model.model.{name.removesuffix('.default')}.default": kept for name, kept in rank_pattern.items()}


def watch_pruned_entries(trainer: Trainer) -> list[float]:
    """
    The largest pruned entry of any E at each forward pass after the last allocation, from where on each step masks.
    """
    largest = []

    def look(*_: Any) -> None:
        config = trainer.model.peft_config["default"]
        if trainer.state.global_step < STEPS - config.tfinal:
            return
        # saving drops the name of the adapter
        rank_pattern = {name.removesuffix(".default"): kept for name, kept in config.rank_pattern.items()}
        for name, param in trainer.model.base_model.model.named_parameters():
            if ".lora_E." in name and param.numel() > 0:
                kept = torch.tensor(rank_pattern[name.removesuffix(".default")])
                largest.append(param.detach().flatten().masked_fill(kept, 0).abs().max().item())

    trainer.model.register_forward_pre_hook(look)
    return largest


def train_with_deepspeed(folder: Path, stage: int) -> dict[str, Any]:
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    trainer = make_trainer_without_dropout(folder, deepspeed=config, max_grad_norm=0.0)
    pruned = watch_pruned_entries(trainer)
    trainer.train()
    return {"rank_pattern": trainer.model.peft_config["default"].rank_pattern, "pruned": pruned}


def make_quantized_llama(folder: Path) -> LlamaForCausalLM:
    """In 4 bits, stored as what FSDP2 can shard."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        make_llama().save_pretrained(folder / "base")
    if dist.is_initialized():
        dist.barrier()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_storage=torch.float32, bnb_4bit_compute_dtype=torch.float32
    )
    model = LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=config, device_map="cpu")
    torch.manual_seed(0)  # of the adapter that it will get
    return model


def let_accelerate_shard_on_cpus() -> None:
    """accelerate takes FSDP on accelerators alone. Here its state says that this is one."""
    init = AcceleratorState.__init__

    def init_with_fsdp(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or state.__dict__.get("fsdp_plugin")
        if plugin is None:
            return
        if fsdp_plugin is not None and state._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(state._mixed_precision)
        state.fsdp_plugin = plugin
        state.distributed_type = DistributedType.FSDP
        state.device = torch.device("cpu")

    AcceleratorState.__init__ = init_with_fsdp


def train_with_fsdp(
    folder: Path,
    resume_from: dict[str, str],
    run: bool = True,
    quantize: bool = False,
    fsdp_config: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """
    Train with FSDP2 through the Trainer.

    Args:
        folder: Gets the checkpoints of the runs.
        resume_from: The checkpoints to train on from, by the names of these runs.
        run: Whether to train from the beginning as well, as the run called "run".
        quantize: Whether the base model has 4 bits.
        fsdp_config: What the Trainer is told beyond what is always needed.
        arguments: More arguments of the Trainer.

    Returns:
        What came out of each run.
    """
    let_accelerate_shard_on_cpus()
    needed = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
    arguments |= {"fsdp": "full_shard", "fsdp_config": {**needed, **(fsdp_config or {})}}
    results = {}
    for name, checkpoint in {**({"run": None} if run else {}), **resume_from}.items():
        if checkpoint and dist.get_rank() == 0:
            shutil.copytree(folder / checkpoint, folder / name / Path(checkpoint).name)
        dist.barrier()
        base_model = make_quantized_llama(folder) if quantize else None
        trainer = make_trainer_without_dropout(folder / name, base_model=base_model, **arguments)
        trainer.train(resume_from_checkpoint=checkpoint is not None)
        results[name] = {
            "adapter": {
                key.replace("_checkpoint_wrapped_module.", ""): value
                for key, value in adapter_of(trainer.model).items()
            },
            "rank_pattern": rank_pattern_of(trainer),
            # in eval mode bitsandbytes packs weights for some CPUs, which takes larger ones than these
            "logits": None if quantize else held_out_logits(trainer.model),
        }
    return results


def train_flattened() -> dict[str, Any]:
    """What FSDP1 raises, with a loss that holds AdaLoRA's regularization and without."""
    errors = []
    for task_type in ("CAUSAL_LM", None):
        model = get_peft_model(make_llama(), make_adalora_config(lora_dropout=0.0, task_type=task_type))
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        device = torch.device("cpu")
        try:
            train(
                FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device), model
            )
        except NotImplementedError as error:
            errors.append(str(error))
    return {"errors": errors}


def shard_each_layer() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer_class, base, x in (
        (SVDLinear, nn.Linear(6, 8), torch.randn(2, 6)),
        (SVDConv2d, nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)),
    ):
        layer = layer_class(base, "default", make_adalora_config(lora_dropout=0.0), r=4)
        expected = layer(x)
        torch.testing.assert_close(fully_shard(layer, mesh=mesh)(x), expected)


def main(mode: str, folder: Path, arguments: str = "{}") -> None:
    torch.set_num_threads(1)
    if not mode.startswith("zero"):  # DeepSpeed does so itself
        dist.init_process_group("gloo")
    if mode.startswith("ddp"):
        model = make_model(layers_of(mode))
        replica = DistributedDataParallel(model, find_unused_parameters=mode == "ddp-unused")
        if mode == "ddp-compiled":
            replica.compile(backend="aot_eager")
        result = train(replica, model)
    elif mode == "trainer":
        result = train_with_trainer(folder)
    elif mode == "trainer-fsdp2":
        result = train_with_fsdp(folder, **json.loads(arguments))
    elif mode == "small-nets":
        result = train_small_nets(averages=torch.load(folder / "averages.pt"), **json.loads(arguments))
    elif mode == "shard-each-layer":
        result = shard_each_layer()
    elif mode == "fsdp1":
        result = train_flattened()
    elif mode.startswith("zero"):
        result = train_with_deepspeed(folder, int(mode[-1]))
    else:
        result = train_sharded(folder, torch.bfloat16 if mode == "fsdp2-bf16" else torch.float32)
    torch.save(result, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_rank(rank: int, count: int, port: int, mode: str, folder: Path, arguments: str) -> None:
    """Be a process of torchrun, whose store listens on a port of this machine. Errors go to a file of the folder."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "DS_ACCELERATOR": "cpu",
    }
    with (folder / f"errors-{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    main(mode, folder, arguments)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
