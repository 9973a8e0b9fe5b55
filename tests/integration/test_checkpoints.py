"""A checkpoint of Megatron's default schedule goes on under breadth-first, and the other way round, bit for bit."""

import functools
import tempfile
from pathlib import Path

import pytest
from gpt import ZERO_1, train

pytestmark = pytest.mark.slow

BREADTH_FIRST = ("--pipeline-schedule", "breadth-first")
DEFAULT = ("--pipeline-schedule", "1f1b")
# Saved after step 2 of 4. The learning rate decays over the 4 steps, so a scheduler that is not restored shows.
STEPS = ("--train-iters", "4", "--save-interval", "2")


def placement(pp: int, chunks: int | None, dp: int = 1) -> tuple[str, ...]:
    """chunks: None for a job without them, under plain 1F1B."""
    virtual = () if chunks is None else ("--num-virtual-stages-per-pipeline-rank", str(chunks))
    return ("--pipeline-model-parallel-size", str(pp), *virtual, "--global-batch-size", str(4 * dp))


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


def values(name: str, steps: list[dict]) -> list[float]:
    return [float.fromhex(step[name]) for step in steps]


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


def test_another_number_of_chunks_changes_no_loss_until_a_norm_is_used(tmp_path):
    # The norm sums the same squares in another order. Clipping then scales the gradients by other bits.
    steps, saved = uninterrupted(2, *placement(2, 4), *DEFAULT)
    got = resumed(tmp_path, saved, 2, *placement(2, 2), *BREADTH_FIRST)
    assert got[0]["lm loss hex"] == steps[2]["lm loss hex"]
    for name in ("lm loss hex", "grad norm hex"):
        assert values(name, got) == pytest.approx(values(name, steps[2:]), rel=1e-5)


@pytest.mark.parametrize("pp, chunks", [(2, 4), (2, 2)])
def test_fewer_pipeline_ranks_change_no_loss_without_clipping(pp, chunks, tmp_path):
    flags = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", "--clip-grad", "0")
    steps, saved = uninterrupted(4, *placement(4, 2), *flags, *DEFAULT)
    got = resumed(tmp_path, saved, 2, *placement(pp, chunks), *flags, *BREADTH_FIRST)
    assert values("lm loss hex", got) == values("lm loss hex", steps[2:])
    assert values("grad norm hex", got) == pytest.approx(values("grad norm hex", steps[2:]), rel=1e-6)


@pytest.mark.parametrize("first, then", [((None, DEFAULT), (2, BREADTH_FIRST)), ((2, BREADTH_FIRST), (None, DEFAULT))])
def test_a_job_without_chunks_takes_them_up_and_gives_them_up(first, then, tmp_path):
    flags = (*ZERO_1, "--dist-ckpt-optim-fully-reshardable", "--clip-grad", "0")
    (chunks, schedule), (other_chunks, other_schedule) = first, then
    steps, saved = uninterrupted(2, *placement(2, chunks), *flags, *schedule)
    got = resumed(tmp_path, saved, 2, *placement(2, other_chunks), *flags, *other_schedule)
    assert values("lm loss hex", got) == values("lm loss hex", steps[2:])
    assert values("grad norm hex", got) == pytest.approx(values("grad norm hex", steps[2:]), rel=1e-6)
