"""FSDP2 under breadth-first has the losses of replicated parameters, the plan's collectives, and little memory."""

import copy
import functools
import json
import os
import tempfile
from pathlib import Path

import pytest
from gpt import refused, train, validation_losses
from jobs import run_job
from sharded_job import Watch
from torch.distributed.fsdp import FSDPModule

from megatron_bfpp.integration import relied_on
from megatron_bfpp.schedule import PipelineShape, breadth_first, lower
from megatron_bfpp.schedule.sharding import ParameterBytes, peak_parameter_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(seam.misfit() for seam in relied_on.SHARDED.seams if seam.module.startswith("torch")),
        reason="this torch's FSDP2 is refused, before 2.12",
    ),
]

ALL_CASES = bool(os.environ.get("BFPP_ALL_CASES"))
BREADTH_FIRST = ("--pipeline-schedule", "breadth-first", "--untie-embeddings-and-output-weights")
SHARDED = ("--use-torch-fsdp2",)
LAYERS = 8  # of gpt.MODEL


def flags_of(pp: int, chunks: int, dp: int, microbatches: int) -> tuple[str, ...]:
    return (
        "--pipeline-model-parallel-size", str(pp), "--num-virtual-stages-per-pipeline-rank", str(chunks),
        "--global-batch-size", str(microbatches * dp), *BREADTH_FIRST,
    )  # fmt: skip


@functools.cache
def job(ranks: int, *flags: str) -> tuple[list[dict], list[dict], list[str]]:
    """Losses and norms of every step; per rank what a `Watch` saw; the validation losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = train(folder, ranks, *flags, prepare=Watch(folder))
        seen = [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(ranks)]
        return steps, seen, validation_losses(folder)


def values(name: str, steps: list[dict]) -> list[float]:
    return [float.fromhex(step[name]) for step in steps]


def assert_close(steps: list[dict], reference: list[dict], rel: float) -> None:
    assert len(steps) == len(reference) > 1
    assert len({step["lm loss hex"] for step in reference}) == len(reference), "the losses do not move"
    assert values("lm loss hex", steps) == pytest.approx(values("lm loss hex", reference), rel=rel)
    # The rounding of a norm comes back, where it clips, in all later gradients.
    assert values("grad norm hex", steps) == pytest.approx(values("grad norm hex", reference), rel=10 * rel)


# Losses

SHAPES = [(2, 2, 2), (2, 2, 4), (4, 2, 2), (2, 4, 2), (2, 4, 4)]  # pipeline ranks, chunks, replicas: up to 8 processes


@pytest.mark.parametrize("pp, chunks, dp", SHAPES if ALL_CASES else [(2, 2, 2)])
def test_20_steps_have_the_losses_of_replicated_parameters(pp, chunks, dp):
    flags = (*flags_of(pp, chunks, dp, 4 if ALL_CASES else 2), "--train-iters", "20")
    assert_close(job(pp * dp, *flags, *SHARDED)[0], job(pp * dp, *flags)[0], rel=1e-6)


def test_without_clipping_every_loss_has_the_same_bits():
    # The norm sums the same squares grouped by replicas. Where it exceeds --clip-grad, its last bits scale the
    # gradients. In groups of 2, with 1 resident chunk: every chunk is gathered and given up with gradients unreduced.
    flags = (*flags_of(2, 2, 2, 5), "--breadth-first-group-size", "2", "--clip-grad", "0", "--calculate-per-token-loss",
             "--log-num-zeros-in-grad", "--eval-iters", "2", "--eval-interval", "2", "--split", "8,1,1")  # fmt: skip
    steps, _, validation = job(4, *flags, *SHARDED, "--breadth-first-resident-chunks", "1")
    reference, _, wanted = job(4, *flags)
    assert values("lm loss hex", steps) == values("lm loss hex", reference)
    assert values("grad norm hex", steps) == pytest.approx(values("grad norm hex", reference), rel=1e-6)
    assert len(wanted) > 1 and validation == wanted


def test_in_bf16_every_loss_has_the_same_bits():
    # Gradients are summed and handed over in fp32, like those of Megatron's DDP. FSDP2 would hand them over in bf16.
    flags = (*flags_of(2, 2, 2, 16 if ALL_CASES else 4), "--bf16", "--clip-grad", "0")
    steps, reference = job(4, *flags, *SHARDED)[0], job(4, *flags)[0]
    assert values("lm loss hex", steps) == values("lm loss hex", reference)


MORE = {
    "groups": (4, flags_of(2, 4, 2, 8), ("--breadth-first-group-size", "3")),
    "late": (4, flags_of(2, 2, 2, 4), ("--breadth-first-backward", "late")),
    "sequence_parallel": (8, flags_of(2, 2, 2, 4), ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "context_parallel": (8, flags_of(2, 2, 2, 4), ("--context-parallel-size", "2", "--calculate-per-token-loss")),
    "recompute": (4, (*flags_of(2, 4, 2, 4), "--swiglu", "--normalization", "RMSNorm"),
                  ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")),
    "experts": (4, flags_of(2, 2, 2, 4), ("--num-experts", "2", "--no-bias-gelu-fusion")),
}  # fmt: skip


@pytest.mark.skipif(not ALL_CASES, reason="with BFPP_ALL_CASES=1")
@pytest.mark.parametrize("case", MORE)
def test_with_other_features_too(case):
    ranks, flags, more = MORE[case]
    assert_close(job(ranks, *flags, *more, *SHARDED)[0], job(ranks, *flags, *more)[0], rel=1e-6)


# Collectives and bytes


def units_of(stage: int, num_stages: int) -> int:
    """FSDP units of a chunk: its layers, the embedding, the final norm with the output layer."""
    return LAYERS // num_stages + (stage == 0) + (stage == num_stages - 1)


def assert_collectives(seen: list[dict], pp: int, chunks: int, dp: int, resident: int, steps: int) -> None:
    for rank, found in enumerate(seen):
        pp_rank = rank // dp
        units = [units_of(stage, pp * chunks) for stage in range(pp_rank, pp * chunks, pp)]
        kept = units[chunks - resident :]  # gathered once; the others for their forwards and again for their backwards
        assert found["gathers"] == steps * (2 * sum(units) - sum(kept))
        assert found["reductions"] == steps * sum(units)


TWO_STEPS = ("--train-iters", "2")


@pytest.mark.parametrize("microbatches", [2, 4, 16] if ALL_CASES else [2, 16])  # P, 2P, 8P
def test_2v_minus_2_gathers_and_v_reductions_of_chunks_whatever_the_number_of_microbatches(microbatches):
    steps = 2
    seen = job(4, *flags_of(2, 4, 2, microbatches), *TWO_STEPS, *SHARDED)[1]
    assert_collectives(seen, 2, 4, 2, resident=2, steps=steps)
    for found in seen:
        parameters = found["parameters"]  # of each chunk
        gathered = 4 * (2 * sum(parameters) - sum(parameters[2:]))
        assert found["gathered bytes"] == pytest.approx(steps * gathered / 2, rel=0.01)  # x (DP - 1) / DP
        assert found["reduced bytes"] == pytest.approx(steps * 4 * sum(parameters) / 2, rel=0.01)
        # One communicator for the reductions of all chunks, beside the gathers where torch can.
        assert found["groups"] == [1, 0 if hasattr(FSDPModule, "set_separate_reduce_scatter_group") else 1]


@pytest.mark.parametrize("pp, chunks, dp", SHAPES if ALL_CASES else [(2, 4, 2)])
def test_the_peak_of_parameters_gradients_and_optimizer_is_the_formulas(pp, chunks, dp):
    shape = PipelineShape(pp, chunks, 2)
    plan = lower(breadth_first(shape), shape, resident_chunks=2)
    for rank, found in enumerate(job(pp * dp, *flags_of(pp, chunks, dp, 2), *TWO_STEPS, *SHARDED)[1]):
        formula = peak_parameter_bytes(plan[rank // dp], shape, found["parameters"], dp, ParameterBytes())
        assert found["peak bytes"] == pytest.approx(formula, rel=0.05)


@pytest.mark.skipif(not ALL_CASES, reason="with BFPP_ALL_CASES=1")
@pytest.mark.parametrize("resident", [1, 3, 4])
def test_resident_chunks_change_the_number_of_gathers_and_no_bit(resident):
    flags = (*flags_of(2, 4, 2, 4), *TWO_STEPS, *SHARDED)
    steps, seen, _ = job(4, *flags, "--breadth-first-resident-chunks", str(resident))
    assert steps == job(4, *flags)[0]
    assert_collectives(seen, 2, 4, 2, resident, steps=2)


# The runtime by itself


def _two_steps_without_zeroing():
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from megatron_bfpp.runtime.fully_sharded import FullySharded

    dist.init_process_group("gloo")
    torch.manual_seed(1)
    plain = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)) for _ in range(3)]
    sharded = [copy.deepcopy(chunk) for chunk in plain]
    for chunk in sharded:
        for layer in (chunk[0], chunk[2], chunk):
            fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    data = torch.randn(2, 2, 4)  # [replica, micro-batch, width]
    for _ in range(2):
        for replica in data:
            for x in replica:
                (plain[2](plain[1](plain[0](x[None]))).square().sum() / 2).backward()
        with FullySharded(sharded) as step:
            for chunk in range(3):
                step.unshard(chunk)
            outputs = [sharded[2](sharded[1](sharded[0](x[None]))) for x in data[dist.get_rank()]]
            step.reshard(0)
            step.unshard(0)
            for output in outputs:
                if output is outputs[-1]:
                    for chunk in range(3):
                        step.before_last_backward(chunk)
                output.square().sum().backward()
            for chunk in range(3):
                step.reduce_grad(chunk)
                step.reshard(chunk)
    for expected, found in zip(plain, sharded, strict=True):
        for one, other in zip(expected.parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(other.grad.full_tensor(), one.grad)


def test_gradients_that_were_not_zeroed_are_added_to(tmp_path):
    # By a caller that accumulates over calls of the schedule. On a CPU the reduction must then be waited for.
    run_job(_two_steps_without_zeroing, 2, tmp_path)


# Checkpoints

STEPS = ("--train-iters", "6", "--save-interval", "2", "--clip-grad", "0")


def test_a_checkpoint_goes_on_sharded_and_then_replicated_again(tmp_path):
    flags = (*flags_of(2, 2, 2, 2), *STEPS)
    folders = [tmp_path / name for name in ("replicated", "sharded", "again")]
    for folder in folders:
        folder.mkdir()
    steps = train(folders[0], 4, *flags, "--save", str(folders[0]))
    load = ("--load", str(folders[0]), "--ckpt-step", "2", "--exit-interval", "4", "--save", str(folders[1]))
    sharded = train(folders[1], 4, *flags, *SHARDED, *load)
    load = ("--load", str(folders[1]), "--ckpt-step", "4")
    again = train(folders[2], 4, *flags, *load)
    assert values("lm loss hex", [*sharded, *again]) == values("lm loss hex", steps[2:])
    assert values("grad norm hex", [*sharded, *again]) == pytest.approx(values("grad norm hex", steps[2:]), rel=1e-6)


@pytest.mark.skipif(not ALL_CASES, reason="with BFPP_ALL_CASES=1")
@pytest.mark.parametrize("more", [(), ("--bf16", "--swiglu"), ("--async-save",)], ids=["fp32", "bf16", "async"])
def test_a_sharded_run_goes_on_bit_for_bit(more, tmp_path):
    flags = (*flags_of(2, 2, 2, 2), *STEPS[:4], *SHARDED, *more)
    (tmp_path / "resumed").mkdir()
    steps = train(tmp_path, 4, *flags, "--save", str(tmp_path / "saved"))
    assert train(tmp_path / "resumed", 4, *flags, "--load", str(tmp_path / "saved"), "--ckpt-step", "2") == steps[2:]


# Refusals


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--pipeline-schedule", "1f1b", *SHARDED), ("--use-torch-fsdp2", "--pipeline-schedule breadth-first")),
        ((*BREADTH_FIRST, "--use-megatron-fsdp"), ("--use-megatron-fsdp", "--use-torch-fsdp2")),
        ((*BREADTH_FIRST, *SHARDED, "--breadth-first-resident-chunks", "3"), ("3, but a rank has 2", "Use 1 to 2")),
    ],
)  # fmt: skip
def test_refusals(flags, words, tmp_path):
    size = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
    codes, outputs = refused(tmp_path, 2, *size, "--global-batch-size", "4", *flags)
    assert codes == [2] * 2, outputs[0][-2000:]
    text = outputs[0][outputs[0].index("megatron_bfpp: error:") :]
    assert all(word in text for word in words) and len(text.strip().splitlines()) <= 3, text
    assert not any("Traceback" in output or "building GPT model" in output for output in outputs)


@pytest.mark.parametrize("flag", ["--use-distributed-optimizer", "--fp16"])
def test_what_megatron_refuses_with_fsdp2_stays_refused(flag, tmp_path):
    _, outputs = refused(tmp_path, 2, *flags_of(2, 2, 1, 4), *SHARDED, flag)
    assert "AssertionError: --use-torch-fsdp2" in outputs[0] or "AssertionError: --use-torch-fsdp2 not" in outputs[0]
