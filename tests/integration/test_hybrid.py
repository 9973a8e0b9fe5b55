"""Hybrid models train to the very bits of Megatron's default schedule with the same segments of their pattern."""

import os
from itertools import cycle

import pytest
from gpt import ZERO_1, assert_same, train
from hybrid import KINDS, flags_of

from megatron_bfpp.integration import relied_on

pytestmark = pytest.mark.slow

SPLIT = ("--breadth-first-weight-gradients", "deferred")
IS_ALL = bool(os.environ.get("BFPP_ALL_CASES"))
# kind, layers, pp, chunks, dp, M, what else. BFPP_ALL_CASES=1 runs every kind on every shape, and every length.
SOME_CASES = [
    ("attention", 7, 2, 2, 1, 4, ()),
    ("experts", 9, 2, 2, 2, 2, ZERO_1),
    ("mtp", 11, 4, 2, 1, 4, ()),
    ("mamba", 15, 2, 4, 1, 4, ("--bf16",)),
    ("all", 13, 2, 2, 1, 4, ("--use-distributed-optimizer",)),
]
SHAPES = [(2, 2, 1), (2, 2, 2), (4, 2, 1), (4, 2, 2), (2, 4, 1), (2, 4, 2)]
ALL_CASES = [(kind, 12, *shape, 2 * shape[0], ZERO_1[: shape[2] - 1]) for kind in KINDS for shape in SHAPES]
ALL_CASES += [(kind, length, 2, 3 if length > 12 else 2, 1, 4, ()) for kind, length in zip(cycle(KINDS), range(7, 31))]


@pytest.mark.parametrize(
    "kind, num_layers, pp, chunks, dp, microbatches, features", SOME_CASES + ALL_CASES if IS_ALL else SOME_CASES
)
def test_losses_and_gradient_norms_are_bit_identical_to_megatrons_default(
    kind, num_layers, pp, chunks, dp, microbatches, features
):
    assert_same(pp * dp, flags_of(kind, num_layers, pp, chunks, dp, microbatches) + tuple(features))


@pytest.mark.parametrize("kind", list(KINDS) if IS_ALL else ["all"])
def test_split_backwards_keep_the_bits(kind):
    assert_same(2, flags_of(kind, 13, 2, 2, 1, 4) + ("--use-distributed-optimizer",) * (kind == "all"), *SPLIT)


SHARDED = ("--use-torch-fsdp2",)
NO_SHARDED = pytest.mark.skipif(
    any(seam.misfit() for seam in relied_on.SHARDED.seams if seam.module.startswith("torch")),
    reason="this torch's FSDP2 is refused, before 2.12",
)


def sharded_flags(kind: str) -> tuple[str, ...]:
    """2 x 2 chunks on 4 ranks; Megatron shards no parameters of experts that are divided."""
    more = ("--expert-model-parallel-size", "1") if "E" in KINDS[kind][0] else ()
    first = ("--pipeline-schedule", "breadth-first", "--untie-embeddings-and-output-weights", "--clip-grad", "0")
    return (*flags_of(kind, 9, 2, 2, 2, 4), *more, *first)


@NO_SHARDED
@pytest.mark.parametrize("kind", list(KINDS) if IS_ALL else ["mamba"])
def test_sharded_parameters_have_the_losses_and_norms_of_replicated_ones(kind, tmp_path):
    steps = []
    for name, more in (("replicated", ()), ("sharded", SHARDED)):
        (tmp_path / name).mkdir()
        steps.append(train(tmp_path / name, 4, *sharded_flags(kind), *more))
    assert len(steps[0]) == len(steps[1]) > 1
    for reference, found in zip(*steps, strict=True):
        for value in ("lm loss hex", "grad norm hex"):
            assert float.fromhex(found[value]) == pytest.approx(float.fromhex(reference[value]), rel=1e-6)
