"""Measured steps beside the planner's estimates: the published ones, their split, the fit, and mistakes in a file."""

from pathlib import Path

import pytest

from megatron_bfpp.cli import main
from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.rows import compare, fit, read_rows, summary, table

PUBLISHED = Path(__file__).parents[2] / "docs" / "evidence" / "published.yaml"
EVIDENCE = PUBLISHED.with_name("planner.md")
FILE = """
common: --num-layers 8 --hidden-size 1024 --num-attention-heads 8 --seq-length 1024 --vocab-size 32000 --bf16
rows:
  - {name: mine, family: dense, gpu: h100-80, gpus: 8, flags: --global-batch-size 64, MEASURED}
"""


@pytest.fixture(scope="module")
def rows():
    return read_rows(str(PUBLISHED))


def row_of(folder: Path, measured: str):
    path = folder / "rows.yaml"
    path.write_text(FILE.replace("MEASURED", measured))
    return read_rows(str(path))


def test_the_evidence_is_what_the_planner_says_of_the_published_rows(rows):
    compared, text = compare(rows), EVIDENCE.read_text(encoding="utf-8")
    assert summary(compared) in text and table(compared) in text


def test_half_of_the_rows_of_each_gpu_and_family_judge_by_a_rule(rows):
    assert len(rows) == 55 and len({(row.gpu, row.name) for row in rows}) == 55
    for gpu in ("a100-80", "h100-80"):
        for family in {row.family for row in rows if row.gpu == gpu}:
            own = [row for row in rows if (row.gpu, row.family) == (gpu, family)]
            assert [row.name for row in own] == sorted(row.name for row in own)
            assert [row.is_judge for row in own] == [place % 2 == 1 for place in range(len(own))]
    assert all(row.is_judge for row in rows if row.gpu == "v100-32")


def test_the_profile_of_the_a100_has_what_the_fit_finds(rows):
    found = fit([row for row in rows if row.gpu == "a100-80"], ["matmul"])
    assert found["matmul"] == pytest.approx(load_gpu("a100-80").matmul, rel=0.01)


@pytest.mark.slow
def test_the_profile_of_the_h100_has_what_the_fit_finds(rows):
    own, gpu = [row for row in rows if row.gpu == "h100-80"], load_gpu("h100-80")
    for name, found in fit(own).items():
        assert found == pytest.approx(getattr(gpu, name), rel=0.05), name


def test_a_step_a_speed_and_operations_are_the_same_measurement(tmp_path):
    (step,) = row_of(tmp_path, "step_s: 2.0")
    request = step.cases[0].request
    (speed,) = row_of(tmp_path, f"tokens_per_s_per_gpu: {64 * 1024 / 2.0 / 8}")
    (operations,) = row_of(tmp_path, f"tflops_per_gpu: {request.gpt.flops(64) / 2.0 / 8 / 1e12}")
    assert step.measured_s == 2.0 == pytest.approx(speed.measured_s) == pytest.approx(operations.measured_s)
    (whole,) = row_of(tmp_path, f"tflops_per_gpu: {request.gpt.flops(64) / 16 / 1e12}, attention: whole")
    assert whole.measured_s == pytest.approx(2.0 + 6 * 64 * 1024**2 * 1024 * 8 / (8e12 * request.gpt.flops(64) / 16e12))


def test_of_open_choices_the_fastest_counts(tmp_path):
    (one,) = row_of(tmp_path, "step_s: 1")
    (best,) = row_of(tmp_path, "step_s: 1, choices: [--micro-batch-size 1, --micro-batch-size 8]")
    assert len(best.cases) == 2 and best.estimate().step.step < one.estimate().step.step


@pytest.mark.parametrize(
    ("measured", "named"),
    [
        ("source: nowhere", "not one measured figure"),
        ("step_s: 1, tflops_per_gpu: 2", "not one measured figure"),
        ("step_s: 1, gpus_per_node: 4", "row mine has gpus_per_node"),
    ],
)
def test_a_mistake_in_a_row_is_named(tmp_path, capsys, measured, named):
    path = tmp_path / "rows.yaml"
    path.write_text(FILE.replace("MEASURED", measured))
    assert main(["plan", str(path), "--rows"]) == 2
    error = capsys.readouterr().err
    assert named in error and error.strip().count("\n") <= 2


def test_a_file_without_rows_and_a_fit_without_them_are_refused(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "nothing.yaml"), "--rows"]) == 2
    assert "has no rows to compare" in capsys.readouterr().err
    assert main(["plan", str(PUBLISHED), "--fit"]) == 2
    assert "--fit is for measured steps" in capsys.readouterr().err
