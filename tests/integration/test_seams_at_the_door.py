"""A job whose Megatron has a damaged seam ends before a model is built: code 2 and one line on each rank."""

import json
import os

import pytest
from damage import damage, gone, kinds
from gpt import MODEL, flags_of, pretrain
from jobs import run_ranks

from megatron_bfpp.integration import relied_on

pytestmark = pytest.mark.slow

SHAPE = (*flags_of(2, 2, 1, 1, 2), "--pipeline-schedule", "breadth-first")
# What makes a job need a part, beside being breadth-first on a CPU by the GPT entry point.
FLAGS = {
    "engine megatron": ("--breadth-first-engine", "megatron"),
    "hybrid patterns": ("--hybrid-layer-pattern", "*-*-*-*-"),
    "hybrid models on a CPU": ("--hybrid-layer-pattern", "*-*-*-*-"),
    "logs and charts": ("--tensorboard-dir", "/nowhere"),
    "traces": ("--bfpp-trace-steps", "1"),
    "split backwards": ("--breadth-first-weight-gradients", "deferred"),
    "FSDP2": ("--use-torch-fsdp2",),
    "the entry point of hybrid models": ("--hybrid-layer-pattern", "*-*-*-*-"),
    "CUDA graphs": ("--cuda-graph-impl", "local", "--transformer-impl", "transformer_engine"),
}
# Without the module of its configuration Megatron fails by itself, and without megatron.core it is not installed.
THEIRS = ("megatron.core", "megatron.core.model_parallel_config")
EVERY = [
    (part.name, seam.path, kind)
    for part in relied_on.PARTS
    for seam in part.seams
    for kind in kinds(seam)
    if kind != "moved module" or seam.module not in THEIRS
]
# One damage of each part, and each kind of damage; BFPP_ALL_CASES=1 runs all, 500 cases.
FIRST = {part: case for case in reversed(EVERY) for part in (case[0], case[2])}
CASES = EVERY if os.environ.get("BFPP_ALL_CASES") else sorted(set(FIRST.values()))


def pretrain_damaged(log: str, words: list[str], part: str, path: str, kind: str) -> None:
    """Damage a seam in this rank before the launcher does anything, and say in its log what its line must say."""

    def patch(owner, name, value):
        if isinstance(owner, dict):
            owner[name] = value
        elif gone(value):
            delattr(owner, name)
        else:
            setattr(owner, name, value)

    seams = next(each for each in relied_on.PARTS if each.name == part).seams
    seam = next(seam for seam in seams if seam.path == path and kind in kinds(seam))
    needed = seam.only_if is None or seam.only_if[0]._knows(seam.only_if[1])
    said = [damage(seam, kind, patch)] if needed else []
    if needed and kind != "moved module":  # another part's row of the same place may be looked at first
        said += [each.misfit() for other in relied_on.PARTS for each in other.seams if each.path == path]
    print(f"EXPECTED {json.dumps([each for each in said if each])}" if needed else "NO SUCH PLACE", flush=True)
    pretrain(log, words)


@pytest.mark.parametrize("part, path, kind", CASES)
def test_a_job_with_a_damaged_seam_ends_in_one_line_on_each_rank(part, path, kind, tmp_path):
    words = [*MODEL, *SHAPE, *FLAGS.get(part, ())]
    codes, outputs = run_ranks(pretrain_damaged, 2, tmp_path, str(tmp_path / "log"), words, part, path, kind)
    if "NO SUCH PLACE" in outputs[0]:
        pytest.skip("this release has no such place")
    assert codes == [2, 2], outputs[0][-3000:]
    said = json.loads(outputs[0].partition("EXPECTED ")[2].splitlines()[0])
    for output, start in zip(outputs, ("megatron_bfpp: error: ", "megatron_bfpp: rank 1 is refused: ")):
        assert "Traceback" not in output and "building GPT model" not in output
        line = output[output.index(start) :].strip()
        assert "\n" not in line and "does not fit" in line
        assert any(each in line for each in said), said
