"""Train the small GPT of the tests with this package's entry point, and compare the bits of two runs."""

import functools
import json
import os
import re
import tempfile
from pathlib import Path

from jobs import run_job, run_ranks

MODEL = [
    "--num-layers", "8", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32",
    "--max-position-embeddings", "32", "--micro-batch-size", "1", "--mock-data",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", "128", "--lr", "1e-2", "--train-iters", "3",
    "--attention-dropout", "0", "--hidden-dropout", "0", "--log-interval", "1", "--eval-iters", "0",
    "--eval-interval", "1000", "--split", "1,0,0",
]  # fmt: skip
UNTIED = ("--untie-embeddings-and-output-weights",)
ZERO_1 = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


def flags_of(pp: int, chunks: int, tp: int, dp: int, microbatches: int) -> tuple[str, ...]:
    """Return Megatron's flags of a shape; `microbatches` are those of one replica."""
    return (
        "--pipeline-model-parallel-size", str(pp), "--tensor-model-parallel-size", str(tp),
        "--num-virtual-stages-per-pipeline-rank", str(chunks), "--global-batch-size", str(microbatches * dp),
    )  # fmt: skip


def train(folder: Path, ranks: int, *flags: str, prepare=None) -> list[dict]:
    """Train and return, for each step, every loss and gradient norm: all bits, as hexadecimal text.

    prepare: called in every rank before anything else; may return more flags.
    """
    log = folder / "steps.jsonl"
    log.unlink(missing_ok=True)
    run_job(pretrain, ranks, folder, str(log), [*MODEL, *flags], prepare)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in step.items() if name.endswith(" hex")} for step in steps]


def validation_losses(folder: Path) -> list[str]:
    """Return the validation losses that the last job in `folder` printed, in order, with six digits after the point."""
    logs = [log.read_text() for log in sorted(folder.glob("rank*.log"))]
    return [loss for log in logs for loss in re.findall(r"validation loss at .*?lm loss value: (\S+)", log)]


def refused(folder: Path, ranks: int, *flags: str) -> tuple[list[int | None], list[str]]:
    """Start a job with flags that it should refuse; return every rank's exit code and output."""
    model = [flag for flag in MODEL if not ("--data-path" in flags and flag == "--mock-data")]
    return run_ranks(pretrain, ranks, folder, str(folder / "steps.jsonl"), [*model, *flags])


def pretrain(log: str, flags: list[str], prepare=None) -> None:
    """Train in this rank: the target of run_job. log: the file for the bits of each step."""
    from megatron_bfpp import pretrain_gpt, pretrain_hybrid
    from megatron_bfpp.run import launch

    more = (prepare() or []) if prepare is not None else []
    os.environ["BFPP_STEP_LOG"] = log
    entry = pretrain_hybrid if "--hybrid-layer-pattern" in flags else pretrain_gpt
    launch(["--device", "cpu", *flags, *more], entry.main)


@functools.cache
def losses(ranks: int, *flags: str) -> list[dict]:
    """Train once per set of flags; as train()."""
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder), ranks, *flags)


def assert_same(ranks: int, flags: tuple[str, ...], *ours: str) -> None:
    """Assert that breadth-first has the bits of Megatron's default schedule, and that these move."""
    reference = losses(ranks, *flags)
    assert len(reference) == 3 and {"lm loss hex", "grad norm hex"} <= reference[0].keys()
    assert len({step["lm loss hex"] for step in reference}) == 3, "the losses do not move: nothing is compared"
    assert losses(ranks, *flags, "--pipeline-schedule", "breadth-first", *ours) == reference
