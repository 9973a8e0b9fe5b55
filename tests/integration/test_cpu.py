"""The CPU mode: what it chooses, what it replaces and undoes, which arguments it changes and refuses."""

import argparse
import io
import sys
import types

import pytest
import torch

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.cpu import mode as cpu
from megatron_bfpp.integration.cpu.arguments import _CHANGES, _REFUSALS, cpu_arguments
from megatron_bfpp.integration.cpu.modules import zigzag_positions
from megatron_bfpp.integration.cpu.optimizer import CpuAdam
from megatron_bfpp.integration.relied_on.cpu import INITIALIZE_BRIDGE


@pytest.fixture
def node(monkeypatch):
    """A node with so many GPUs and ranks."""

    def make(gpus: int, ranks: int | None, driver: bool = True, visible: str | None = None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(cpu, "_has_driver", lambda: driver)
        for name, value in (("LOCAL_WORLD_SIZE", ranks), ("CUDA_VISIBLE_DEVICES", visible)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return make


@pytest.fixture
def cpu_enabled():
    cpu.enable_cpu()
    yield
    cpu.seams.undo(cpu.CPU)


# --device, is there a driver, CUDA_VISIBLE_DEVICES, devices that torch sees, ranks of the node -> the answer
NODES = [
    ("auto", True, None, 8, 8, "cuda"),
    ("auto", True, None, 1, None, "cuda"),
    ("auto", True, "0,1,2,3", 4, 4, "cuda"),
    ("auto", True, "3", 1, 8, "cuda"),  # SLURM's --gpus-per-task: each rank sees its own
    ("auto", True, "GPU-5f0c", 1, 8, "cuda"),
    ("auto", True, None, 1, 4, None),  # one GPU for four ranks: they would share it, or train on the CPU unasked
    ("auto", True, "0,1", 2, 8, None),
    ("auto", True, None, 0, 8, None),  # the driver has died: the other nodes use NCCL
    ("auto", True, "", 0, 8, None),
    ("auto", False, None, 0, None, "cpu"),
    ("auto", False, None, 0, 4, "cpu"),
    ("cuda", True, None, 4, 4, "cuda"),
    ("cuda", True, "7", 1, 8, "cuda"),
    ("cuda", True, None, 2, 4, None),
    ("cuda", False, None, 0, 4, None),
    ("cpu", True, None, 8, 8, "cpu"),
    ("cpu", True, None, 0, 8, "cpu"),
    ("gpu", True, None, 8, 4, None),
]


@pytest.mark.parametrize(("requested", "driver", "visible", "gpus", "ranks", "device"), NODES)
def test_the_device_of_every_kind_of_node(node, requested, driver, visible, gpus, ranks, device):
    node(gpus, ranks, driver, visible)
    if device is not None:
        assert cpu.choose_device(requested)[0] == device
        return
    with pytest.raises(UserError) as refusal:
        cpu.choose_device(requested)
    assert len(str(refusal.value).splitlines()) <= 3
    assert "--device" in str(refusal.value)


def test_the_reason_names_the_numbers(node):
    node(4, 4)
    assert cpu.choose_device("auto")[1] == "4 CUDA device(s) for 4 rank(s) on this node"
    node(1, 8, visible="3")
    assert "1 CUDA device(s) for 8 rank(s)" in cpu.choose_device("auto")[1]
    node(1, 4)
    with pytest.raises(UserError, match=r"at most 1 ranks per node .* or use --device cpu"):
        cpu.choose_device("auto")
    node(0, 8, visible="")
    with pytest.raises(UserError, match=r"0 CUDA device\(s\) for 8 rank\(s\) on this node \(CUDA_VISIBLE_DEVICES=\)"):
        cpu.choose_device("auto")


def test_the_reason_names_who_asked(node, monkeypatch):
    node(0, None, driver=False)
    assert cpu.choose_device("cpu") == ("cpu", "--device cpu was given")
    monkeypatch.setenv("BFPP_DEVICE", "cpu")
    assert cpu.choose_device("auto") == ("cpu", "BFPP_DEVICE=cpu was given")
    monkeypatch.setenv("BFPP_DEVICE", "tpu")
    with pytest.raises(UserError, match=r"BFPP_DEVICE=tpu does not exist\.\n  Use BFPP_DEVICE=auto, cuda or cpu\."):
        cpu.choose_device("auto")


def _everything(owners):
    return {(id(owner), name): value for owner in owners for name, value in vars(owner).items()}


def test_disable_undoes_every_attribute():
    import torch.utils.data.dataloader as loader
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    owners = [
        layers,
        DotProductAttention,
        token_dispatcher,
        WrappedTorchNorm,
        torch,
        torch.Tensor,
        torch.cuda,
        torch.cuda.random,
        torch.cuda.nvtx,
        torch.distributed,
    ]
    owners += [distrib_optimizer.DistributedOptimizer, torch.distributed.distributed_c10d]
    owners += [torch.distributed.ProcessGroup]
    owners += [loader.DataLoader, loader._BaseDataLoaderIter, optimizer, clip_grads, distrib_optimizer, base, random]
    training = pytest.importorskip("megatron.training.training")
    owners += [training, sys.modules["megatron.training"], sys.modules["megatron.training.initialize"]]
    before = _everything(owners)
    cpu.enable_cpu()
    during = _everything(owners)
    cpu.enable_cpu()  # idempotent: nothing is wrapped twice
    assert _everything(owners) == during
    changed = {key for key in during if during[key] is not before.get(key)}
    cpu.seams.undo(cpu.CPU)
    after = _everything(owners)
    assert len(changed) > 60
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda", 1)])
def test_cuda_factories_and_moves_land_on_the_cpu(cpu_enabled, device):
    tensor = torch.ones(2)
    made = [torch.zeros(2, device=device), torch.empty_like(tensor, device=device)]
    made += [tensor.new_full((2,), 1, device=device), tensor.cuda(device), tensor.pin_memory()]
    made += [tensor.to(device), tensor.to(device=device, dtype=torch.float64)]
    made += list(torch.nn.Linear(2, 2, device=device).to(device).cuda(0).parameters())
    assert {str(each.device) for each in made} == {"cpu"}
    assert torch.empty(2, device="meta").is_meta


def test_tensors_look_like_cuda_tensors_to_the_optimizers(cpu_enabled):
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert not torch.cuda.is_available()


def test_backward_hooks_and_recomputation_see_the_replacements(cpu_enabled):
    def twice(x):
        return x * torch.full((), 2.0, device=torch.cuda.current_device())

    def add_one(param):
        param.grad += torch.ones(3, device="cuda")

    x = torch.ones(3, requires_grad=True)
    x.register_post_accumulate_grad_hook(add_one)
    torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=True).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0, 3.0]


def test_the_tracker_forks_saves_and_restores_the_states(cpu_enabled):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.manual_seed(5)
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 7)
    saved = (torch.cuda.get_rng_state(), tracker.get_states())

    def draw():
        first = torch.rand(3, device="cuda")
        with tracker.fork("a"):
            forked = torch.rand(3, device="cuda")
        return torch.cat([first, forked, torch.rand(3, device="cuda")])

    drawn = draw()
    torch.cuda.set_rng_state(saved[0])
    tracker.set_states(saved[1])
    assert torch.equal(draw(), drawn)
    torch.manual_seed(5)
    assert torch.equal(drawn[[0, 1, 2, 6, 7, 8]], torch.rand(6))  # the fork drew nothing from the default state


def test_a_data_loader_leaves_dropout_alone(cpu_enabled):
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    assert len(list(torch.utils.data.DataLoader(range(8), batch_size=2, shuffle=True))) == 4
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_are_marked_for_the_reduction_over_a_cut_sequence(cpu_enabled, normalization, sequence_parallel):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = argparse.Namespace(normalization=normalization, sequence_parallel=sequence_parallel,
                                persist_layer_norm=False,
                                layernorm_zero_centered_gamma=False, memory_efficient_layer_norm=False)  # fmt: skip
    norm = WrappedTorchNorm(config=config, hidden_size=8, eps=1e-6)
    assert isinstance(norm, getattr(torch.nn, normalization)) and norm.eps == 1e-6
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * len(
        list(norm.parameters())
    )
    assert config.sequence_parallel == sequence_parallel
    config.persist_layer_norm = True
    with pytest.raises(AssertionError, match="persist_layer_norm"):  # what torch's norms cannot do stays refused
        WrappedTorchNorm(config=config, hidden_size=8)


@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_of_a_cut_sequence_hold_every_position_once_as_megatron_cuts_it(monkeypatch, size):
    from megatron.core import utils

    whole = torch.arange(12 * size)[None]  # [micro-batch, sequence]
    cut = getattr(utils, "_get_batch_on_this_cp_rank_per_sequence_balancing", None)
    held = []
    for rank in range(size):
        held.append(zigzag_positions(12, rank, size))
        if cut is not None:  # 0.19; before, it is inside a function that reads the process groups
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
            assert torch.equal(cut({"tokens": whole.clone()}, None)["tokens"][0], held[-1])
    assert torch.equal(torch.cat(held).sort().values, whole[0])


def test_a_reduction_over_one_rank_is_not_a_view(cpu_enabled):
    from megatron.core.tensor_parallel import layers

    class Alone:
        def size(self):
            return 1

    x = torch.ones(2, requires_grad=True)
    y = layers.reduce_from_tensor_model_parallel_region(x * 2, group=Alone())
    y += 1  # as experts add their bias
    y.sum().backward()
    assert y.tolist() == [3, 3] and x.grad.tolist() == [2, 2]


def test_the_dispatcher_of_experts_gets_numpy_counts(cpu_enabled):
    from megatron.core.transformer.moe import token_dispatcher

    counts = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 1]), as_numpy=True)
    assert counts.tolist() == [3, 1] and type(counts).__module__ == "numpy"
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    assert torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(1)))


@pytest.mark.parametrize(("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_cpu_adam_equals_torch_and_resumes(adam_w_mode, reference):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    adam, oracle = CpuAdam([ours], adam_w_mode=adam_w_mode, **settings), reference([theirs], **settings)
    for step in range(4):
        ours.grad = torch.randn(8)
        theirs.grad = ours.grad.clone()
        if step == 2:  # a restart
            file = io.BytesIO()
            torch.save(adam.state_dict(), file)
            adam = CpuAdam([ours], adam_w_mode=adam_w_mode, **settings)
            adam.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        adam.step()
        oracle.step()
    assert torch.equal(ours, theirs)
    assert set(adam.state[ours]) == {"exp_avg", "exp_avg_sq"} and adam.param_groups[0]["step"] == 4


def test_arguments_are_changed_and_each_change_is_said():
    args = argparse.Namespace(transformer_impl="transformer_engine", distributed_backend="gloo", num_workers=2)
    assert cpu_arguments(args) == [
        "--transformer-impl local: Transformer Engine needs CUDA",
        "--num-workers 0: no forked data loaders beside gloo's threads",
    ]
    assert vars(args) == {"transformer_impl": "local", "distributed_backend": "gloo", "num_workers": 0}
    assert cpu_arguments(args) == []


@pytest.mark.parametrize("name", [refusal[0] for refusal in _REFUSALS])
def test_every_refusal_names_its_flag_in_three_lines(name):
    with pytest.raises(UserError) as refusal:
        cpu_arguments(argparse.Namespace(**{name: 1}))
    assert name.split("_")[0] in str(refusal.value)
    assert len(str(refusal.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "asked",
    [
        {"cuda_graph_impl": "local"},
        {"context_parallel_size": 2, "window_size": (4, 0)},
        {"transformer_impl": "inference_optimized"},
        {"profile": True, "use_pytorch_profiler": False},
    ],
)
def test_other_refusals(asked):
    with pytest.raises(UserError):
        cpu_arguments(argparse.Namespace(**asked))


def test_megatron_knows_every_argument_that_is_changed():
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = argparse.ArgumentParser()
    arguments.add_megatron_arguments(parser)
    assert {change[0] for change in _CHANGES} - vars(parser.parse_args([])).keys() == set()


def test_the_helpers_are_not_compiled_where_there_is_no_makefile(monkeypatch):
    from megatron.core.datasets import utils

    called = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: called.append("make"))
    monkeypatch.setattr(cpu.os.path, "exists", lambda path: True)
    cpu.skip_compile_without_makefile()
    utils.compile_helpers()
    assert called == ["make"]
    monkeypatch.setattr(cpu.os.path, "exists", lambda path: False)
    cpu.skip_compile_without_makefile()
    cpu.skip_compile_without_makefile()
    utils.compile_helpers()
    assert called == ["make"]
    cpu.seams.undo(cpu.HELPERS)
    utils.compile_helpers()
    assert called == ["make", "make"]


def test_helpers_that_a_trainer_imported_by_name_are_not_compiled_either(monkeypatch):
    from megatron.core.datasets import utils

    called = []
    trainer = types.ModuleType("a_trainer")
    trainer.compile_helpers = lambda: called.append("make")
    monkeypatch.setattr(utils, "compile_helpers", trainer.compile_helpers)
    monkeypatch.setitem(sys.modules, "a_trainer", trainer)
    monkeypatch.setattr(cpu.os.path, "exists", lambda path: False)
    cpu.skip_compile_without_makefile()
    trainer.compile_helpers()
    assert called == []
    cpu.seams.undo(cpu.HELPERS)


def test_megatron_bridge_starts_without_cuda(monkeypatch, cpu_enabled):
    bridge = types.ModuleType(INITIALIZE_BRIDGE.module)
    bridge.initialize_megatron = lambda cfg, allow_no_cuda=False: allow_no_cuda
    for name in ("megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, bridge.__name__, bridge)
    cpu.apply_to_bridge()
    assert bridge.initialize_megatron("config")
    cpu.seams.undo(cpu.CPU)
    assert not bridge.initialize_megatron("config")


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", "gloo"])
def test_who_names_nccl_gets_gloo(cpu_enabled, backend):
    distributed = torch.distributed
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert distributed.get_backend() == "gloo"
        assert distributed.get_backend(distributed.new_group([0], backend=backend)) == "gloo"
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("is_async", [False, True])
def test_several_gathers_are_launched_one_by_one(monkeypatch, is_async):
    distributed, groups = torch.distributed, torch.distributed.ProcessGroup
    name = "all_gather_single" if hasattr(groups, "all_gather_single") else "_allgather_base"
    real, launched = getattr(groups, name), []

    def launching(group, output, *args):
        launched.append(output)
        return real(group, output, *args)

    monkeypatch.setattr(groups, name, launching)
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    cpu.enable_cpu()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        inputs = [torch.arange(4.0), torch.arange(3, dtype=torch.float64)]
        outputs = [torch.zeros_like(each) for each in inputs]
        with distributed._coalescing_manager(async_ops=is_async) as together:
            for output, each in zip(outputs, inputs, strict=True):
                gather(output, each, async_op=is_async)
        if is_async:
            together.wait()
        assert all(map(torch.equal, outputs, inputs))
        assert [id(each) for each in launched] == [id(each) for each in outputs]
    finally:
        distributed.destroy_process_group()
        cpu.seams.undo(cpu.CPU)
