"""Uncommon placements and batch sizes train to the bits of Megatron's default schedule with the same placement."""

import pytest
from gpt import train, validation_losses
from megatron.core import num_microbatches_calculator

from megatron_bfpp.schedule.model.layout import layers_of_stages, layout_of

pytestmark = pytest.mark.slow

BREADTH_FIRST = ("--pipeline-schedule", "breadth-first")
UNTIED = ("--untie-embeddings-and-output-weights",)
ZERO_1 = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
V, LAYOUT = "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-layout"

# 0.17 evaluates with the micro-batches of training, and its batches grow with --train-samples only.
since_018 = hasattr(num_microbatches_calculator, "StepBatchsizeNumMicroBatchesCalculator")
growing_batches = pytest.mark.skipif(not since_018, reason="this release has no --step-batch-size-schedule")


def pp(size: int, microbatches: int, *more: str) -> tuple[str, ...]:
    return ("--pipeline-model-parallel-size", str(size), "--global-batch-size", str(microbatches), *more)


def assert_same(ours: list[dict], reference: list[dict]) -> None:
    assert len(reference) == 3 and {"lm loss hex", "grad norm hex"} <= reference[0].keys()
    assert len({step["lm loss hex"] for step in reference}) == 3, "the losses do not move: nothing is compared"
    assert ours == reference


@pytest.mark.parametrize(
    "mtp_layers, placement",
    [(0, "1 2 1*4 2 1 (pp_rank 0 to 1: 5*2)"), (1, "1 2*2 1*3 2 1 (pp_rank 0 to 1: 6 5)")],
)
def test_layers_that_do_not_divide(tmp_path, mtp_layers, placement):
    mtp = ("--mtp-num-layers", str(mtp_layers), "--position-embedding-type", "rope") if mtp_layers else ()
    num_layers = 10 + mtp_layers
    flags = pp(2, 4, "--num-layers", str(num_layers), *mtp)
    ours = train(tmp_path, 2, *flags, V, "4", *BREADTH_FIRST)
    layout = layout_of(layers_of_stages(num_layers, 2, 4, mtp_layers), mtp_layers)
    first = (tmp_path / "rank0.log").read_text()
    assert f"set {LAYOUT} '{layout}' in place of {V} 4: {num_layers} layers" in first
    assert f"placement of {num_layers} layers, 8 stages in order: {placement}" in first
    assert_same(ours, train(tmp_path, 2, *flags, LAYOUT, layout))


def test_the_users_own_layout_with_embedding_and_loss_alone_and_an_empty_stage(tmp_path):
    flags = pp(4, 8, LAYOUT, "E|tt|t||tt|tt|t|L", *UNTIED, *ZERO_1)
    ours = train(tmp_path, 4, *flags, *BREADTH_FIRST)
    assert "8 stages in order: 0 2 1 0 2*2 1 0 (pp_rank 0 to 3: 2 4 2 0)" in (tmp_path / "rank0.log").read_text()
    assert_same(ours, train(tmp_path, 4, *flags))


def test_three_ranks_with_other_shares_for_the_first_and_the_last(tmp_path):
    shares = ("--decoder-first-pipeline-num-layers", "2", "--decoder-last-pipeline-num-layers", "4")
    flags = pp(3, 6, "--num-layers", "10", V, "2", *shares, *ZERO_1)
    ours = train(tmp_path, 3, *flags, *BREADTH_FIRST)
    assert "6 stages in order: 1 2*2 1 2*2 (pp_rank 0 to 2: 2 4*2)" in (tmp_path / "rank0.log").read_text()
    assert_same(ours, train(tmp_path, 3, *flags))


def test_three_ranks_of_three_chunks_of_one_layer(tmp_path):
    flags = pp(3, 3, "--num-layers", "9", V, "3")
    assert_same(train(tmp_path, 3, *flags, *BREADTH_FIRST), train(tmp_path, 3, *flags))


def test_embedding_and_loss_accounted_for_and_evaluation_with_other_numbers_of_microbatches(tmp_path):
    accounts = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
    evaluation = ("--eval-iters", "2", "--eval-interval", "2", "--split", "1,1,0")
    flags = pp(2, 4, "--num-layers", "6", V, "2", *accounts, *evaluation)
    six = ("--eval-global-batch-size", "6") if since_018 else ()

    reference = train(tmp_path, 2, *flags, *six)
    expected = validation_losses(tmp_path)
    assert len(set(expected)) == len(expected) >= 2, "the validation losses do not move"
    assert_same(train(tmp_path, 2, *flags, *six, *BREADTH_FIRST), reference)
    assert validation_losses(tmp_path) == expected
    if since_018:  # the same samples in 3 micro-batches, which Megatron's interleaved loop refuses on 2 ranks
        assert_same(train(tmp_path, 2, *flags, *six, "--eval-micro-batch-size", "2", *BREADTH_FIRST), reference)
        ours = [float(loss) for loss in validation_losses(tmp_path)]
        assert ours == pytest.approx([float(loss) for loss in expected], abs=2e-6)


@growing_batches
def test_a_batch_that_grows_between_steps(tmp_path):
    flags = ("--pipeline-model-parallel-size", "2", V, "2", "--step-batch-size-schedule")
    # By tokens: 32 a sample. Steps of 2, 4 and 8 micro-batches.
    ours = train(tmp_path, 2, *flags, "0:2 64:4 192:8", *BREADTH_FIRST)
    ran = (tmp_path / "rank0.log").read_text()
    assert all(f"stages, {count} micro-batches, eager backward" in ran for count in (2, 4, 8))
    assert_same(ours, train(tmp_path, 2, *flags, "0:2 64:4 192:8"))


@growing_batches
def test_a_batch_that_grows_over_sizes_that_megatron_refuses(tmp_path):
    flags = ("--pipeline-model-parallel-size", "2", V, "2", "--step-batch-size-schedule", "0:1 32:3 128:5")
    eager, late = (
        train(tmp_path, 2, *flags, *BREADTH_FIRST, "--breadth-first-backward", backward)
        for backward in ("eager", "late")
    )
    ran = (tmp_path / "rank0.log").read_text()
    assert all(f"stages, {count} micro-batches, late backward" in ran for count in (1, 3, 5))
    assert "WARNING: 1 micro-batches for 2 pipeline ranks while the batch is small" in ran
    assert_same(eager, late)
