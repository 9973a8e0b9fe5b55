"""Two arms that log to the real W&B, offline, and the run of their report, read back from W&B's own files."""

import json
import os
import sys
from functools import partial
from types import ModuleType

import pytest
from gpt import flags_of, train

from megatron_bfpp.cli import main
from megatron_bfpp.compare.text import COLUMNS

pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed")
from offline_wandb import OfflineRun

pytestmark = pytest.mark.slow

EVERY_STEP = {
    "bfpp/peak_memory_gib_max_rank", "bfpp/bubble_fraction_predicted",
    "lm loss", "grad-norm", "learning-rate", "batch-size",
}  # fmt: skip
TRACED = {"bfpp/bubble_fraction_measured", "bfpp/exposed_dp_s"}  # in steps 2 and 3
AFTER_THE_FIRST = {"bfpp/tokens_per_s_per_gpu", "iteration-time"}


class TensorBoard(ModuleType):
    """Megatron gives W&B its own metrics only beside a TensorBoard, which need not be installed here."""

    class SummaryWriter:
        def __init__(self, *_, **__): ...

        def __getattr__(self, name):
            return lambda *_, **__: None


def offline(folder, arm) -> None:
    sys.modules["torch.utils.tensorboard"] = TensorBoard("torch.utils.tensorboard")
    os.environ.update(settings_of(folder), BFPP_ARM=arm, BFPP_ROUND="1")


def settings_of(folder) -> dict[str, str]:
    places = {f"WANDB_{name}": str(folder / "wandb-own") for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR")}
    return places | {
        "WANDB_MODE": "offline",
        "WANDB_RUN_GROUP": "tiny",
        "WANDB_TAGS": "bfpp,ab",
        "WANDB_SILENT": "true",
    }


def run_arm(folder, arm, *flags) -> OfflineRun:
    run, saved = folder / f"{arm}.1", folder / f"wandb {arm}"
    logging = (
        "--train-iters", "6", "--bfpp-run-dir", str(run), "--bfpp-trace-steps", "2-3",
        "--tensorboard-dir", str(folder / "tensorboard"), "--tensorboard-log-interval", "1",
        "--log-timers-to-tensorboard",
        "--wandb-project", "ab", "--wandb-exp-name", f"{arm}.1", "--wandb-save-dir", str(saved),
    )  # fmt: skip
    train(folder, 2, *flags_of(2, 2, 1, 1, 4), *logging, *flags, prepare=partial(offline, folder, arm))
    (found,) = saved.glob("wandb/offline-run-*")
    return OfflineRun(found)


def test_runs_and_their_report_are_whole_in_wandbs_own_files(tmp_path, monkeypatch):
    schedules = {"interleaved": "1f1b", "breadth-first": "breadth-first"}
    for arm, schedule in schedules.items():
        found = run_arm(tmp_path, arm, "--pipeline-schedule", schedule)
        assert (found.run.project, found.run.display_name, found.run.run_group) == ("ab", f"{arm}.1", "tiny")
        assert list(found.run.tags) == ["bfpp", "ab"] and found.is_ended
        assert found.config["pipeline_schedule"] == schedule and found.config["pipeline_model_parallel_size"] == 2
        _check_history(found, tmp_path / f"{arm}.1")
    for name, value in (settings_of(tmp_path) | {"WANDB_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    assert main(["compare", *(str(tmp_path / f"{arm}.1") for arm in schedules), "--wandb-project", "ab",
                 "--json", str(tmp_path / "report.json")]) == 0  # fmt: skip
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    _check_report(OfflineRun(folder), tmp_path)


def _check_history(found, folder) -> None:
    """Ours stand beside Megatron's own, and are the numbers of the run's files."""
    steps = {step["step"]: step for step in map(json.loads, (folder / "steps.jsonl").read_text().splitlines())}
    assert steps.keys() == set(range(1, 7)) and found.history.keys() >= steps.keys()
    for number, step in steps.items():
        told = found.history[number]
        expected = EVERY_STEP | (AFTER_THE_FIRST if number > 1 else set()) | (TRACED if number in (2, 3) else set())
        assert told.keys() & (EVERY_STEP | AFTER_THE_FIRST | TRACED) == expected
        assert told["bfpp/peak_memory_gib_max_rank"] == pytest.approx(step["peak_memory_gib_max_rank"])
        assert told["lm loss"] == pytest.approx(step["lm loss"])
        if number in (2, 3):
            assert told["bfpp/bubble_fraction_measured"] == pytest.approx(step["bubble_fraction_measured"])
            assert told["bfpp/exposed_dp_s"] == pytest.approx(max(step["exposed_dp_s"]))


def _check_report(found, folder) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert (found.run.project, found.run.run_group, found.run.job_type) == ("ab", "tiny", "report") and found.is_ended
    assert found.config["arms"] == ["interleaved", "breadth-first"] and list(found.run.tags) == ["bfpp", "ab"]
    table = found.table("comparison")
    assert table["columns"] == list(COLUMNS) and [row[0] for row in table["data"]] == found.config["arms"]
    second = report["arms"][1]
    assert table["data"][1][list(COLUMNS).index("time / first arm")] == f"{second['ratio']:.4f}"
    assert found.summary["ratio/breadth-first"] == pytest.approx(second["ratio"])
    files = found.artifact_of("report")
    traces = {
        f"{place:02d} {arm}.1/{name}"
        for place, arm in enumerate(found.config["arms"], 1)
        for name in ("trace.json", "timeline.svg")
    }
    assert files.keys() == {"report.html", "report.md", "report.json"} | traces
    assert json.loads(files["report.json"]) == report
    assert files["02 breadth-first.1/trace.json"] == (folder / "breadth-first.1" / "trace.json").read_bytes()
