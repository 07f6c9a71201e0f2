"""
The allocation and the regularization of sharded parameters: as on one process by value, in few collectives.
"""

import pytest
import torch
import torch.distributed as dist
from distributed_run import SMALL_NETS, SmallNet, local, train_small_net
from helpers import make_config
from test_distributed import fork
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from peft import PeftModel, get_peft_model


NO_COLLECTIVE = {"wait_tensor", "_wrap_tensor_autograd", "_allgather_base_", "_reduce_scatter_base_"}
REGULARIZATION = ["all_to_all_single", "all_reduce"]


@pytest.fixture(scope="module")
def alone():
    return {name: train_small_net(None, **case) for name, case in SMALL_NETS.items()}


@pytest.fixture(scope="module", params=[[2], [4], [2, 2]], ids=["2 processes", "4 processes", "2 x 2 processes"])
def shared(request, alone, tmp_path_factory):
    """What each process has got."""
    folder = tmp_path_factory.mktemp("shared")
    torch.save(alone["resumed"]["averages"], folder / "averages.pt")
    count = torch.Size(request.param).numel()
    return fork("small-nets", folder, count, mesh_shape=request.param)


def tolerance(values: torch.Tensor) -> dict[str, float]:
    """Sums in another order round otherwise: 1e-6 of the largest value in float32."""
    of_dtype = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-14}
    return {"rtol": 0, "atol": of_dtype[values.dtype] * values.abs().max().item()}


@pytest.mark.parametrize("name", SMALL_NETS)
class TestSmallNets:
    def test_scores_are_those_of_one_process_and_the_same_on_all(self, name, alone, shared):
        for step, expected in enumerate(alone[name]["scores"]):
            for process in shared:
                assert torch.equal(process[name]["scores"][step], shared[0][name]["scores"][step])
            torch.testing.assert_close(shared[0][name]["scores"][step], expected, **tolerance(expected))

    def test_ranks_are_those_of_one_process(self, name, alone, shared):
        for process in shared:
            assert process[name]["kept"] == alone[name]["kept"]
        assert 0 < sum(map(sum, alone[name]["kept"][-1].values())) < sum(map(len, alone[name]["kept"][-1].values()))

    def test_the_loss_and_its_gradients_are_those_of_one_process(self, name, alone, shared):
        for process in shared:
            for loss, expected in zip(process[name]["loss"], alone[name]["loss"]):
                torch.testing.assert_close(loss.to(expected), expected, **tolerance(expected))
            largest = torch.stack([gradient.abs().max() for gradient in alone[name]["gradients"].values()])
            for key, expected in alone[name]["gradients"].items():
                gradient = process[name]["gradients"][key]
                torch.testing.assert_close(gradient, expected, **tolerance(largest), msg=key)

    def test_pruned_entries_are_zero_on_all_shards(self, name, alone, shared):
        for process in shared:
            for key, kept in process[name]["kept"][-1].items():
                values = process[name]["adapter"][f"base_model.model.{key}"]
                assert (values.view(-1) != 0).tolist() == kept

    def test_saved_averages_are_full(self, name, alone, shared):
        for process in shared:
            assert process[name]["averages"].keys() == alone[name]["averages"].keys()
            for key, expected in alone[name]["averages"].items():
                torch.testing.assert_close(process[name]["averages"][key], expected, **tolerance(expected), msg=key)


class Collectives(TorchDispatchMode):
    """The operations that communicate while it is entered, without those of FSDP2 itself, and reads of the host."""

    def __enter__(self):
        self.names, self.reads = [], 0
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        namespace, name = operation._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name not in NO_COLLECTIVE:
            self.names.append(name.strip("_"))
        self.reads += name == "_local_scalar_dense"
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def eight_processes():
    """The first one of eight, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.fixture
def one_process():
    """In a real group, because DDP waits for what it sends."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_net(layers: int, **options) -> PeftModel:
    torch.manual_seed(0)
    config = make_config(
        init_r=8, target_modules=[f"layers.{index}" for index in range(layers)], init_lora_weights=False, **options
    )
    return get_peft_model(SmallNet([16] * (layers + 1)), config)


def count(tuner: nn.Module, model: nn.Module, steps: int) -> dict[str, list]:
    """The collectives and reads of training steps by their phase."""
    optimizer = torch.optim.SGD((param for param in tuner.parameters() if param.requires_grad), lr=0.1)
    counted = {"forward": [], "backward": [], "allocation": [], "reads": []}
    for step in range(steps):
        with Collectives() as forward:
            loss = model(torch.ones(4, 16)).loss
        with Collectives() as backward:
            loss.backward()
        with Collectives() as allocation:
            tuner.update_and_allocate(step, optimizer)
        tuner.zero_grad()
        for phase, counter in (("forward", forward), ("backward", backward), ("allocation", allocation)):
            counted[phase].append(counter.names)
        counted["reads"].append(allocation.reads)
    return counted


@pytest.mark.parametrize("use_dora_adaptive", [True, False], ids=["adadora", "adalora"])
@pytest.mark.parametrize("layers", [1, 5])
def test_under_fsdp2_no_number_of_layers_needs_more_collectives(layers, use_dora_adaptive, eight_processes):
    tuner = make_net(layers, use_dora_adaptive=use_dora_adaptive).base_model
    for layer in tuner.model.layers:
        fully_shard(layer, mesh=eight_processes)
    counted = count(tuner, fully_shard(tuner, mesh=eight_processes), 17)
    # averages up to step 14, allocations from step 3 to step 15, and then masks
    assert counted["allocation"] == [["all_reduce"]] * 3 + [["all_reduce"] * 2] * 12 + [["all_reduce"], []]
    assert counted["forward"] == [REGULARIZATION] * 17
    assert counted["backward"] == [["all_to_all_single"]] * 17
    assert counted["reads"][:3] == [0, 0, 0]
    with Collectives() as reading:
        tuner.rankallocator.read_kept(tuner.model)
    assert reading.names == ["all_reduce"]


@pytest.mark.parametrize("layers", [1, 5])
def test_the_decoupled_regularization_needs_three_collectives(layers, eight_processes):
    tuner = make_net(layers, orth_reg_decoupled=True).base_model
    for layer in tuner.model.layers:
        fully_shard(layer, mesh=eight_processes)
    counted = count(tuner, fully_shard(tuner, mesh=eight_processes), 3)
    assert counted["forward"] == counted["backward"] == [[]] * 3
    assert counted["allocation"] == [["all_reduce", *REGULARIZATION, "all_to_all_single"]] * 3
    assert counted["reads"] == [0, 0, 0]


def test_parameters_that_are_gathered_anyway_need_no_collective_for_the_regularization(eight_processes):
    tuner = make_net(3).base_model
    counted = count(tuner, fully_shard(tuner, mesh=eight_processes), 4)
    assert counted["forward"][1:] == [[]] * 3
    assert counted["backward"] == [[]] * 4


def test_under_ddp_the_allocation_and_the_regularization_need_no_collective(one_process):
    tuner = make_net(3).base_model
    counted = count(tuner, DistributedDataParallel(tuner), 17)
    assert counted["allocation"] == [[]] * 17
    assert counted["forward"][2:] == [[]] * 15  # when DDP has ordered its buckets
    assert counted["backward"] == [["allreduce"]] * 17  # of the gradients


def test_captured_gradients_are_averaged_in_one_collective(eight_processes):
    """Those of DeepSpeed, which clears gradients."""
    tuner = make_net(3).base_model
    tuner.rankallocator.capture_gradients(tuner.model)
    assert count(tuner, tuner, 3)["allocation"] == [["allreduce"]] * 3


def test_each_process_keeps_the_averages_of_its_shards(eight_processes):
    tuner = make_net(2).base_model
    fully_shard(tuner, mesh=eight_processes)
    count(tuner, tuner, 3)
    allocator = tuner.rankallocator
    of_two_layers = 2 * (8 * 16 + 8 + 16 * 8)
    for scores in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
        assert sum(local(score).numel() for score in scores.values()) == of_two_layers // 8
