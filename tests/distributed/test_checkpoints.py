"""A checkpoint of Megatron's default schedule goes on under breadth-first, and the other way round, bit for bit."""

import functools
import tempfile
from pathlib import Path

import pytest
from jobs import train

BREADTH_FIRST = ("--pipeline-schedule", "breadth-first")
DEFAULT = ("--pipeline-schedule", "1f1b")
ZERO_1 = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
RESHARDABLE = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
# Saved after step 2 of 4. The learning rate decays over the 4 steps, so a scheduler that is not restored shows.
STEPS = ("--train-iters", "4", "--save-interval", "2")


def placement(pp: int, chunks: int, dp: int = 1) -> tuple[str, ...]:
    return ("--pipeline-model-parallel-size", str(pp), "--num-virtual-stages-per-pipeline-rank", str(chunks),
            "--global-batch-size", str(4 * dp))  # fmt: skip


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="bfpp-checkpoints-")


@functools.cache
def uninterrupted(ranks: int, *flags: str) -> tuple[list[dict], Path]:
    """Losses and gradient norms of steps 1 to 4, and the checkpoint of step 2."""
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    steps = train(folder, ranks, *flags, *STEPS, "--save", str(folder / "saved"))
    assert len(steps) == 4 and {"lm loss hex", "grad norm hex"} <= steps[0].keys()
    assert len({step["lm loss hex"] for step in steps}) == 4, "the losses do not move: nothing is compared"
    return steps, folder / "saved"


def resumed(folder: Path, saved: Path, ranks: int, *flags: str) -> list[dict]:
    """Losses and gradient norms of steps 3 and 4, from the checkpoint of step 2."""
    return train(folder, ranks, *flags, "--train-iters", "4", "--load", str(saved), "--ckpt-step", "2")


@pytest.mark.parametrize("first, then", [(DEFAULT, BREADTH_FIRST), (BREADTH_FIRST, DEFAULT)])
@pytest.mark.parametrize(
    "ranks, flags", [(4, placement(2, 2, dp=2) + ZERO_1), (2, placement(2, 4))], ids=["zero-1", "replicated"]
)
def test_switching_the_schedule_changes_no_bit(first, then, ranks, flags, tmp_path):
    steps, saved = uninterrupted(ranks, *flags, *first)
    assert resumed(tmp_path, saved, ranks, *flags, *then) == steps[2:]


@pytest.mark.parametrize("ranks, pp, chunks", [(2, 2, 2), (2, 2, 4)])
def test_another_placement(ranks, pp, chunks, tmp_path):
    steps, saved = uninterrupted(4, *placement(4, 2), *RESHARDABLE, *DEFAULT)
    got = resumed(tmp_path, saved, ranks, *placement(pp, chunks), *RESHARDABLE, *BREADTH_FIRST)
    print(steps[2:], got)
    assert got == steps[2:]
