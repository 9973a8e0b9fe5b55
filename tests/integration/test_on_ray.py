"""Ranks that are actors of Ray run breadth-first by the environment variable and the launcher of the driver alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bfpp.console.processes import free_port

BESIDE = sorted(Path(sys.prefix).glob("beside-ray-*[0-9]"))[-1:]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BESIDE and importlib.util.find_spec("ray") is None,
                       reason="Ray is not installed: bash scripts/test.sh --all puts it beside the environment"),
]  # fmt: skip
SUPPORT = Path(__file__).parents[1] / "support"


def run(ranks: int, path: Path, **variables: str) -> dict:
    search = os.pathsep.join(map(str, [*BESIDE, SUPPORT.parents[1], SUPPORT, os.environ.get("PYTHONPATH", "")]))
    words = str(ranks), str(free_port()), str(path)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bfpp.run", str(SUPPORT / "ray_ranks.py"), *words],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "BFPP_DEVICE": "cpu", "PYTHONPATH": search, "RAY_USAGE_STATS_ENABLED": "0", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.skipif(
    not os.environ.get("BFPP_ALL_CASES"), reason="a second pipeline; with BFPP_ALL_CASES=1"))])  # fmt: skip
def test_actors_take_the_schedule_from_the_environment(ranks, tmp_path):
    seen = run(ranks, tmp_path / "seen.json", BFPP_PIPELINE_SCHEDULE="breadth-first")
    assert seen["other"] == [[], True], "a worker without Megatron has the hook and imports neither torch nor Megatron"
    assert seen["driver"] == []
    printed = [rank.pop("printed") for rank in seen["ranks"]]
    assert len(printed) == ranks
    for rank, each in enumerate(seen["ranks"]):
        is_last = rank >= ranks // 2
        assert each == {"order": [0] * 4 + [1] * 4, "gradients": 2, "same": True, "reports": 4 * is_last}, (rank, each)
    assert [text.count("breadth-first, PP 2 x 2 chunks") for text in printed] == [1] + [0] * (ranks - 1)
