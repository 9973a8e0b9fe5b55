"""enable() and disable(): every seam applied where the function is bound, once, and undone."""

import subprocess
import sys

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")


def run(code: str) -> str:
    """In a process of its own: seams are process-wide."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_enable_twice_and_disable_leave_megatron_as_it_was():
    run(
        """
import megatron_bfpp
from megatron.core.pipeline_parallel import schedules
from megatron.training import arguments, yaml_arguments, training, initialize
names = [(schedules, "forward_backward_pipelining_with_interleaving"), (arguments, "add_megatron_arguments"),
         (arguments, "validate_args"), (yaml_arguments, "validate_yaml")]
from megatron.core.datasets import utils
names.append((utils, "compile_helpers"))
before = [getattr(*name) for name in names]
megatron_bfpp.enable(device="cpu")
from megatron_bfpp.integration import process, seams
from megatron_bfpp.integration.observe.step_log import TRAFFIC
from torch.distributed import ProcessGroup
send = ProcessGroup.send
TRAFFIC.install()
assert ProcessGroup.send is not send
first = [getattr(*name) for name in names]
megatron_bfpp.enable(device="cpu")
assert [getattr(*name) for name in names] == first
assert not any(a is b for a, b in zip(before, first))
import inspect
for a, b in zip(before[:1], first[:1]):
    assert inspect.signature(a) == inspect.signature(b)
megatron_bfpp.disable()
assert all(getattr(*name) is a for name, a in zip(names, before))
assert ProcessGroup.send is send and not seams._undo and not process.ON_END
"""
    )


@pytest.mark.slow
def test_megatrons_chooser_returns_the_breadth_first_function_for_code_without_megatron_training():
    run(
        """
import sys, megatron_bfpp
megatron_bfpp.enable("breadth-first", device="cpu")
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
ours = get_forward_backward_func(pp_size=4, vp_size=2)
assert ours is schedules.forward_backward_pipelining_with_interleaving and hasattr(ours, "__wrapped__")
assert get_forward_backward_func(pp_size=4, vp_size=None) is schedules.forward_backward_pipelining_without_interleaving
megatron_bfpp.disable()
assert get_forward_backward_func(pp_size=4, vp_size=2) is ours.__wrapped__
"""
    )


def test_a_seam_that_megatron_does_not_have_is_refused_by_name():
    from megatron_bfpp.integration.seams import Seam, SeamError

    with pytest.raises(SeamError, match=r"schedules\.get_fwd_bwd is gone; it is for a test"):
        Seam("megatron.core.pipeline_parallel.schedules", "get_fwd_bwd", "it is for a test").current()
    with pytest.raises(SeamError, match="has no parameter beam"):
        Seam("megatron.core.pipeline_parallel.schedules", "forward_step", "", ("model", "beam")).current()


def test_a_method_is_changed_in_its_class_until_that_is_undone(monkeypatch):
    import sys
    from types import ModuleType

    from megatron_bfpp.integration import seams

    class Chunk:
        def size(self):
            return 1

    made = ModuleType("made_for_a_test")
    made.Chunk, own = Chunk, Chunk.size
    monkeypatch.setitem(sys.modules, made.__name__, made)
    seam = seams.Seam(made.__name__, "Chunk.size", "it is for a test")
    for _ in range(2):
        seams.apply(seam, lambda original, self: original(self) + 1)
        assert Chunk().size() == 2
    seams.undo(seam)
    assert Chunk.size is own


def test_changes_that_belong_together_are_undone_together_also_when_one_of_them_fails():
    from types import SimpleNamespace

    from megatron_bfpp.integration import seams

    class Base:
        size = 1

    class Derived(Base):
        pass

    owner, told = SimpleNamespace(a=1), []
    with pytest.raises(KeyError), seams.together("a test") as undo:
        seams.put(undo, owner, "a", 2)
        seams.put(undo, owner, "b", 3)
        raise KeyError
    assert vars(owner) == {"a": 1} and not seams.is_applied("a test")
    with seams.together("a test") as undo:
        undo.callback(told.append, "undone")
        seams.put(undo, Derived, "size", 2)
        seams.put(undo, Derived, "size", 3)
    assert Derived.size == 3 and seams.is_applied("a test") and not told
    seams.undo("a test")
    seams.undo("a test")
    assert told == ["undone"] and "size" not in vars(Derived) and Derived.size == 1

    def answer():
        return 1

    with seams.changed(answer, __code__=(lambda: 2).__code__):
        assert answer() == 2
    assert answer() == 1
    with pytest.raises(KeyError), seams.changed(Derived, size=4):
        assert Derived.size == 4
        raise KeyError
    assert "size" not in vars(Derived)


def test_an_old_release_is_refused_in_one_sentence_and_an_unknown_one_runs_and_says_so(monkeypatch):
    import megatron.core.package_info as info

    from megatron_bfpp.console.errors import UserError
    from megatron_bfpp.integration import relied_on

    relied_on.check_release()
    relied_on.check(relied_on.PLACEMENT)
    for version, is_tested in (("0.17.0", True), ("0.19.3", True), ("0.20.0rc0+d98e8a6", False), ("1.0.0", False)):
        monkeypatch.setattr(info, "__version__", version)
        relied_on.check_release()
        said = relied_on.strange_release()
        assert len(said) == (not is_tested)
        if not is_tested:
            number = version.partition("+")[0]
            assert said[0].startswith(f"megatron-core {number} is not one of the tested releases (0.17 to 0.19); all ")
            assert said[0].endswith(" seams fit")
    monkeypatch.setattr(info, "__version__", "0.16.1")
    with pytest.raises(UserError, match=r"megatron-core 0\.16\.1 is not supported: .* 0\.17 and newer"):
        relied_on.check_release()


@pytest.mark.parametrize(
    "version, runs",
    [("2.8.0", False), ("1.13.1+cu117", False), ("2.9.0", True), ("2.10.0a0+b4e4ee8.nv25.12", True), ("3.0.0", True)],
)
def test_an_old_torch_is_refused_in_one_sentence_and_an_unknown_one_runs(version, runs, monkeypatch):
    import torch

    import megatron_bfpp
    from megatron_bfpp.console.errors import UserError
    from megatron_bfpp.integration import activation

    class Reached(Exception):
        pass

    def choose_device(_):
        raise Reached

    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr("megatron_bfpp.integration.cpu.mode.choose_device", choose_device)
    with pytest.raises(Reached if runs else UserError) as ended:
        megatron_bfpp.enable("breadth-first")
    sentence = f"torch {version} is not supported: megatron_bfpp works with 2.9 and newer."
    assert runs or str(ended.value) == sentence
    if not runs:
        with pytest.raises(UserError, match=r"2\.9 and newer"):
            activation.enable_for_dry_run(print)


def test_too_few_data_iterators_are_an_error_before_any_rank_waits():
    import torch

    from megatron_bfpp.integration.step.call import StepCall

    call = {
        "forward_step_func": None, "model": [torch.nn.Linear(1, 1)] * 2, "num_microbatches": 2, "seq_length": 1,
        "micro_batch_size": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="2 chunks, but 1 given"):
        StepCall(**call, data_iterator=[None])
    with pytest.raises(ValueError, match="2 chunks, but a NoneType given"):
        StepCall(**call, data_iterator=None)
    with pytest.raises(RuntimeError, match="adjust_tensor_shapes_fn"):
        StepCall(**call, data_iterator=[None] * 2, adjust_tensor_shapes_fn=lambda: None)


def test_a_call_has_the_parameters_and_defaults_of_megatrons_schedule():
    import inspect
    from dataclasses import MISSING, fields

    from megatron.core.pipeline_parallel import schedules

    from megatron_bfpp.integration.step.call import StepCall

    theirs = inspect.signature(inspect.unwrap(schedules.forward_backward_pipelining_with_interleaving)).parameters
    ours = {
        each.name: inspect.Parameter.empty if each.default is MISSING else each.default for each in fields(StepCall)
    }
    assert {name: each.default for name, each in theirs.items()} == {name: ours[name] for name in theirs}


def test_yaml_cfg_does_not_lose_the_flag_of_the_command_line(monkeypatch, capsys):
    # --yaml-cfg replaces the parsed command line; without our check Megatron would train its own schedule in silence.
    import sys
    from functools import partial
    from types import SimpleNamespace

    from megatron_bfpp.console.errors import UserError
    from megatron_bfpp.integration.validation import Validation

    left_alone = []
    validation = Validation("cpu", lambda: left_alone.append(True))
    wrapped = partial(validation.of_yaml, lambda args, defaults=None: args)
    file = {
        "pipeline_model_parallel_size": 4, "mock_data": True, "num_layers": 8, "rank": 0, "data_parallel_size": 1,
        "micro_batch_size": 1, "global_batch_size": 8,
    }  # fmt: skip
    monkeypatch.setattr(
        sys, "argv", ["pretrain_gpt.py", "--yaml-cfg", "gpt.yaml", "--pipeline-schedule", "breadth-first"]
    )
    placed = wrapped(SimpleNamespace(**file, virtual_pipeline_model_parallel_size=2))
    assert placed.pipeline_schedule == "breadth-first" and not left_alone
    assert "placement of 8 layers, 8 stages in order: 1*8" in capsys.readouterr().out
    with pytest.raises(UserError, match="at least 2 model chunks per rank"):
        wrapped(SimpleNamespace(**file, virtual_pipeline_model_parallel_size=None))
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--yaml-cfg", "gpt.yaml"])
    wrapped(SimpleNamespace(**file, virtual_pipeline_model_parallel_size=None))
    assert left_alone
    with pytest.raises(UserError, match="--pipeline-schedule breadth does not exist"):
        wrapped(SimpleNamespace(**file, pipeline_schedule="breadth"))


def test_megatrons_loop_gets_its_config_back_also_when_a_step_raises(monkeypatch):
    import torch
    from megatron.core import ModelParallelConfig
    from megatron.core.pipeline_parallel import schedules

    from megatron_bfpp.integration.flags.settings import Settings
    from megatron_bfpp.integration.step import forward_backward

    monkeypatch.setattr(forward_backward, "_announce", lambda *args: None)
    config = ModelParallelConfig(
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=True,
    )
    chunk = torch.nn.Linear(1, 1)
    chunk.config = config
    before, warmup, seen = dict(vars(config)), schedules.get_pp_rank_microbatches, []

    def original(**call):
        seen.append((config.microbatch_group_size_per_vp_stage, schedules.get_pp_rank_microbatches is warmup))
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        forward_backward.run_megatron(
            Settings("breadth-first", "late", engine="megatron"), original, model=[chunk] * 2, data_iterator=[None] * 2,
            forward_step_func=None, num_microbatches=12, seq_length=1, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
    assert seen == [(12, False)]
    assert vars(config) == before and schedules.get_pp_rank_microbatches is warmup


def test_the_channels_have_the_options_of_megatrons_pipeline_group(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from megatron_bfpp.integration.step import groups

    settings = tmp_path / "nccl.yaml"
    settings.write_text("pp: {max_ctas: 8}\ndp: {max_ctas: 2}\n")
    args = SimpleNamespace(nccl_communicator_config_path=str(settings), high_priority_stream_groups=["pp", "ep"])
    monkeypatch.setattr(groups, "megatron_args", lambda: args)
    options = groups._nccl_options()
    assert options.is_high_priority_stream and options.config.max_ctas == 8
    # A receive that waits must not hold the SMs of the computation, with a command line or without.
    args.nccl_communicator_config_path, args.high_priority_stream_groups = None, []
    for given in (args, None):
        monkeypatch.setattr(groups, "megatron_args", lambda given=given: given)
        options = groups._nccl_options()
        assert options.is_high_priority_stream and options.config.max_ctas == groups.MAX_CTAS
    # What the file says counts: no high priority, and at least as many CTAs as its minimum.
    settings.write_text("pp: {is_high_priority_stream: false, min_ctas: 8}\n")
    args.nccl_communicator_config_path = str(settings)
    monkeypatch.setattr(groups, "megatron_args", lambda: args)
    options = groups._nccl_options()
    assert not options.is_high_priority_stream and (options.config.min_ctas, options.config.max_ctas) == (8, 8)
