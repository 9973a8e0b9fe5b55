"""Breadth-first trains to the very bits of Megatron's default schedule: fp32 and bf16, on real processes."""

import os

import pytest
from gpt import UNTIED, ZERO_1, assert_same, flags_of, train
from jobs import JobError

pytestmark = pytest.mark.slow

SHAPES = [
    (2, 2, 1, 1),
    (2, 2, 1, 2),
    (2, 2, 2, 1),
    (4, 2, 1, 1),
    (4, 2, 1, 2),
    (2, 4, 1, 1),
    (2, 4, 1, 2),
    (2, 4, 2, 1),
]
ALL_CASES = [
    (*shape, times, zero + tied)
    for shape in SHAPES
    for times in (1, 2)
    for zero in ((), ("--use-distributed-optimizer",))
    for tied in ((), UNTIED)
]
# pp, chunks, tp, dp, M / P and what else. These are in every run: each feature with each shape at least once.
# BFPP_ALL_CASES=1 runs the whole product, 64 cases, in about 4 minutes on 2 cores.
SOME_CASES = [
    (2, 2, 1, 1, 1, ()),
    (2, 2, 1, 1, 2, (*ZERO_1[:1], *UNTIED)),
    (2, 2, 1, 2, 1, ("--use-distributed-optimizer",)),
    (2, 2, 1, 2, 2, (*ZERO_1, *UNTIED)),
    (2, 2, 2, 1, 1, UNTIED),
    (2, 2, 2, 1, 2, ("--use-distributed-optimizer",)),
    (4, 2, 1, 1, 1, ("--use-distributed-optimizer", *UNTIED)),
    (4, 2, 1, 1, 2, ()),
    (4, 2, 1, 2, 1, ZERO_1),
    (4, 2, 1, 2, 2, UNTIED),
    (2, 4, 1, 1, 1, UNTIED),
    (2, 4, 1, 1, 2, ("--use-distributed-optimizer",)),
    (2, 4, 1, 2, 1, ("--overlap-grad-reduce", *UNTIED)),
    (2, 4, 1, 2, 2, (*ZERO_1, "--no-align-grad-reduce")),
    (2, 4, 2, 1, 1, ("--use-distributed-optimizer", *UNTIED)),
    (2, 4, 2, 1, 2, ()),
]
SPLIT = ("--breadth-first-weight-gradients", "deferred")
CASES = ALL_CASES if os.environ.get("BFPP_ALL_CASES") else SOME_CASES


@pytest.mark.parametrize("pp, chunks, tp, dp, times, features", CASES)
def test_losses_and_gradient_norms_are_bit_identical_to_megatrons_default(pp, chunks, tp, dp, times, features):
    assert_same(pp * tp * dp, flags_of(pp, chunks, tp, dp, times * pp) + tuple(features))


@pytest.mark.parametrize("pp, chunks, tp, dp, times, features", CASES if len(CASES) > 16 else SOME_CASES[3:14:5])
def test_split_backwards_keep_the_bits(pp, chunks, tp, dp, times, features):
    assert_same(pp * tp * dp, flags_of(pp, chunks, tp, dp, times * pp) + tuple(features), *SPLIT)


@pytest.mark.parametrize(
    "ours",
    [
        ("--breadth-first-backward", "late"),
        ("--breadth-first-group-size", "5"),
        ("--breadth-first-backward", "late", *SPLIT, "--breadth-first-weight-lag", "1"),
        ("--breadth-first-group-size", "5", *SPLIT),
        ("--breadth-first-engine", "megatron"),
        ("--breadth-first-engine", "megatron", "--breadth-first-backward", "late"),
    ],
)
def test_every_order_and_engine_gives_the_same_bits(ours):
    assert_same(4, flags_of(4, 2, 1, 1, 8), *ours)


@pytest.mark.parametrize("features", [("--bf16",), ("--recompute-granularity", "full", "--recompute-method", "uniform",
                                                    "--recompute-num-layers", "1"),
                                                    ("--calculate-per-token-loss",)])  # fmt: skip
def test_precision_and_recomputation_keep_the_bits(features):
    assert_same(2, flags_of(2, 2, 1, 1, 4) + features)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return the folder of a checkpoint of four ranks after three steps."""
    folder = tmp_path_factory.mktemp("start")
    saving = ("--save", str(folder / "saved"), "--save-interval", "3", "--no-save-optim", "--no-save-rng")
    train(folder, 4, *flags_of(4, 2, 1, 1, 4), *UNTIED, *saving, "--pipeline-schedule", "breadth-first")
    return folder / "saved"


@pytest.mark.parametrize("microbatches", [1, 3, 5])
def test_shapes_that_megatron_refuses_train_to_the_bits_of_a_run_without_pipeline(microbatches, start, tmp_path):
    # M < P, and M not a multiple of P. The reference starts from the same checkpoint on one rank. Gradients are not
    # clipped: the norm sums in another order there, and would scale the gradients by other bits.
    loading = ("--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng")
    more = (*loading, "--clip-grad", "0", *UNTIED)
    reference = train(tmp_path, 1, "--global-batch-size", str(microbatches), *more)
    ours = train(tmp_path, 4, *flags_of(4, 2, 1, 1, microbatches), *more, "--pipeline-schedule", "breadth-first")
    assert [step["lm loss hex"] for step in ours] == [step["lm loss hex"] for step in reference]
    assert len({step["lm loss hex"] for step in ours}) == 3


def test_megatrons_own_loop_names_the_engine_to_use_where_it_has_too_few_microbatches(tmp_path):
    ours = ("--pipeline-schedule", "breadth-first", "--breadth-first-engine", "megatron")
    with pytest.raises(JobError, match=r"3 for 4\.\n\S* *Use --breadth-first-engine plan"):
        train(tmp_path, 4, *flags_of(4, 2, 1, 1, 3), *ours)
