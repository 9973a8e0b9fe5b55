"""The rules that hold on GPUs only: what would wait for the whole device is refused, and what NCCL recorded is kept."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration import process, validation
from megatron_bfpp.integration.flags.arguments import refuse_on_cuda
from megatron_bfpp.integration.flags.settings import Settings, settings_of
from megatron_bfpp.integration.reliability import watch
from megatron_bfpp.integration.reliability.watch import keep_flight_recorder
from megatron_bfpp.integration.step.forward_backward import _places, loads_kernels
from megatron_bfpp.runtime.channels import ChannelGroups
from megatron_bfpp.schedule import PipelineShape, breadth_first, lower

PLAN, LOOP = Settings("breadth-first"), Settings("breadth-first", engine="megatron")


@pytest.mark.parametrize("blocking, level, told", [("1", 0, "CUDA_LAUNCH_BLOCKING"), (None, 2, "--timing-log-level 2")])
def test_waits_for_the_whole_device_are_refused_where_receives_are_posted_ahead(monkeypatch, blocking, level, told):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    if blocking is not None:
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", blocking)
    args = SimpleNamespace(timing_log_level=level)
    with pytest.raises(UserError, match=told) as refusal:
        refuse_on_cuda(args, PLAN)
    assert len(str(refusal.value).splitlines()) <= 3
    refuse_on_cuda(args, LOOP)  # Megatron's loop posts no receive ahead of what it computes
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    refuse_on_cuda(SimpleNamespace(timing_log_level=1), PLAN)


def test_they_are_refused_on_cuda_and_not_on_a_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")

    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setattr(process, "explicit_schedule", "breadth-first")
    for name in ("place", "_check_validated"):
        monkeypatch.setattr(validation, name, reached)
    for name in ("refuse", "cpu_arguments", "observe"):
        monkeypatch.setattr(validation, name, lambda *_: [])
    for device, error in (("cuda", UserError), ("cpu", Reached)):
        chosen = validation.Validation(device, lambda: None)
        for validate in (chosen.of_args, chosen.of_yaml):
            with pytest.raises(error):
                validate(lambda args: args, SimpleNamespace())


def test_on_a_gpu_the_first_step_of_each_kind_posts_nothing_ahead(monkeypatch):
    monkeypatch.setattr(ChannelGroups, "__init__", lambda self: setattr(self, "_has_run", set()))
    channels, shape = ChannelGroups(), PipelineShape(4, 2, 8)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert not loads_kernels(cpu, channels, forward_only=False)
    answers = [loads_kernels(gpu, channels, forward_only=kind) for kind in (False, False, True, False, True)]
    assert answers == [True, False, True, False, False]
    ahead, first = PLAN.plan_of(shape).actions, PLAN.plan_of(shape, is_ahead=False).actions
    assert first == lower(breadth_first(shape), shape, hop=None) != ahead == lower(breadth_first(shape), shape)
    assert [sorted(actions) for actions in first] == [sorted(actions) for actions in ahead]


def test_a_hop_below_zero_is_refused_and_one_of_a_job_is_that_of_its_plan():
    for hop in (-0.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--breadth-first-hop is"):
            Settings("breadth-first", hop=hop)
    shape = PipelineShape(8, 2, 32)
    args = SimpleNamespace(pipeline_schedule="breadth-first", breadth_first_hop=0.5)
    assert settings_of(args).plan_of(shape).actions == lower(breadth_first(shape), shape, hop=0.5)
    assert settings_of(args).plan_of(shape).digest != PLAN.plan_of(shape).digest


def test_the_line_at_start_says_for_which_hop_receives_are_placed_and_where_it_changes_nothing():
    def said(shape, **choices):
        chosen = Settings("breadth-first", **choices)
        return _places(chosen, shape, chosen.plan_of(shape), False, False)

    assert said(PipelineShape(4, 2, 8)) == ""
    assert said(PipelineShape(8, 2, 32), hop=0.5) == ", receives placed for a hop of 0.5"
    few = {"hop": 1.0, "group_size": 1, "backward": "late"}  # sends would wait for receives that wait for them
    assert said(PipelineShape(2, 2, 3), **few) == ", receives placed for a hop of 1 (they stand as for 0.25)"
    unknown_sizes = Settings("breadth-first", hop=0.5)
    plan = unknown_sizes.plan_of(PipelineShape(8, 2, 32), is_ahead=False)
    assert _places(unknown_sizes, PipelineShape(8, 2, 32), plan, False, False) == ""


@pytest.mark.parametrize(
    "backend, recorded, is_kept", [("nccl", b"trace", True), ("nccl", b"", False), ("gloo", b"x", False)]
)
def test_the_flight_recorder_of_nccl_is_kept(monkeypatch, tmp_path, capsys, backend, recorded, is_kept):
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "rank_"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: recorded, raising=False)
    keep_flight_recorder()
    path = tmp_path / "rank_3"
    assert path.exists() == is_kept and (str(path) in capsys.readouterr().err) == is_kept
    if is_kept:
        assert path.read_bytes() == recorded
        monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "nowhere" / "rank_"))
        keep_flight_recorder()  # the job ends for another reason


def test_a_flight_recorder_that_hangs_does_not_keep_the_process_from_its_end(monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(watch, "MOST_DUMP_S", 0.05)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: held.wait(60) and b"", raising=False)
    begin = time.monotonic()
    watch.keep_flight_recorder()
    assert time.monotonic() - begin < 30
    held.set()


def test_an_old_torch_is_refused_with_fsdp2_before_the_model(monkeypatch):
    from torch.distributed.fsdp._fully_shard import _fsdp_state

    from megatron_bfpp.integration import relied_on

    class FSDPState:  # as in 2.9
        def __init__(self):
            self._fsdp_param_group = None

    monkeypatch.setattr(_fsdp_state, "FSDPState", FSDPState)
    relied_on.forget()
    with pytest.raises(
        UserError, match=r"torch 2\.\d+.* Use a torch from 2\.12 to 2\.15, or leave out --use-torch-fsdp2"
    ):
        relied_on.check(relied_on.SHARDED)


@pytest.mark.parametrize("backend, makes_one", [("nccl", True), ("fake", False)])
def test_headers_have_one_group_of_gloo_also_where_megatron_has_none(monkeypatch, backend, makes_one):
    from megatron_bfpp.integration.step import groups

    made, pp_group = [], threading.Event()  # any object
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [1, 5])
    monkeypatch.setattr(
        groups, "local_group", lambda ranks, name, **more: made.append((ranks, more["backend"])) or made
    )
    monkeypatch.setattr(groups, "_is_alive", lambda group: True)
    found = [groups.header_group(pp_group) for _ in range(2)]
    assert found == ([made, made] if makes_one else [None, None])
    assert made == [([1, 5], "gloo")] * makes_one
