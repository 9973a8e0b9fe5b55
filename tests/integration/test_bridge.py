"""Megatron-Bridge's own pretrain(), unmodified, on the CPU; scripts/test.sh --all installs it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trainers.bridge_ranks import Case

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix, "beside-megatron-bridge-0.6.2")
pytestmark = pytest.mark.slow
ALL = bool(os.environ.get("BFPP_ALL_CASES"))
OF_FOUR_RANKS = [("1f1b of 4", "1f1b"), ("breadth-first of 4", "breadth-first")] * ALL


def cases_in(folder: Path) -> list[Case]:
    """Every job of this file, in the order of running: jobs that load stand behind those that save."""
    two = Case("default", str(folder), "1f1b", save=str(folder / "default"))
    plain = replace(two, name="chunkless", save=str(folder / "chunkless"), chunks=None, is_reshardable=True, clip=0.0)
    four = replace(plain, name="four", save=str(folder / "four"), chunks=4, schedule="breadth-first")
    bf = {"schedule": "breadth-first", "chunks": 2, "save": None}

    def resumed(case: Case, name: str, **changes) -> Case:
        return replace(case, name=name, load=f"{case.save}/iter_0000002", **{"save": None} | changes)

    return [
        *(two, replace(two, name="breadth-first", **bf)),
        *(replace(two, name=name, ranks=4, schedule=each, save=None) for name, each in OF_FOUR_RANKS),
        *(plain, four),
        *(resumed(two, "switched", **bf), resumed(plain, "chunkless to 2", **bf), resumed(four, "4 to 2", **bf)),
        resumed(four, "4 to chunkless", schedule="1f1b", chunks=None),
    ]


@pytest.fixture(scope="module")
def steps_of(tmp_path_factory):
    """What the steps of each case report on each rank; all cases run in one process that imports Bridge once."""
    if not BESIDE.is_dir():
        pytest.skip("Megatron-Bridge 0.6.2 is not beside this environment: bash scripts/test.sh --all installs it")
    folder = tmp_path_factory.mktemp("bridge")
    cases = folder / "cases.json"
    cases.write_text(json.dumps([vars(case) for case in cases_in(folder)]), encoding="utf-8")
    script = ROOT / "tests" / "support" / "trainers" / "bridge_ranks.py"
    environment = os.environ | {"PYTHONPATH": f"{BESIDE}{os.pathsep}{ROOT}"}
    words = [sys.executable, "-W", "ignore", str(script), str(cases)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return lambda name: [json.loads(each.read_text()) for each in sorted(folder.glob(f"{name}-[0-9].json"))]


@pytest.mark.parametrize(
    ("default", "ours", "ranks"),
    [("default", "breadth-first", 2), *[("1f1b of 4", "breadth-first of 4", 4)] * ALL],
)
def test_every_loss_and_norm_has_the_bits_of_the_default_schedule(default, ours, ranks, steps_of):
    expected, got = steps_of(default), steps_of(ours)
    assert len(expected) == ranks and all(len(steps) == 4 for steps in expected)
    assert len({losses["lm loss"] for losses, _ in expected[-1]}) == 4, "the losses do not move"
    assert got == expected


def test_a_checkpoint_of_the_default_schedule_goes_on_bit_for_bit(steps_of):
    assert steps_of("switched") == [steps[2:] for steps in steps_of("default")]


@pytest.mark.parametrize(
    ("saved", "loaded"), [("chunkless", "chunkless to 2"), ("four", "4 to 2"), ("four", "4 to chunkless")]
)
def test_another_number_of_chunks_changes_no_loss(saved, loaded, steps_of):
    expected, got = ([steps[-2:] for steps in steps_of(name)] for name in (saved, loaded))
    assert len(got[1]) == 2
    for (losses, norms), (their_losses, their_norms) in zip(got[1], expected[1]):
        assert losses == their_losses and losses
        assert [*map(float.fromhex, norms)] == pytest.approx([*map(float.fromhex, their_norms)], rel=1e-6)
