"""A job that dies before its first step leaves what it was and why, for bfpp compare."""

import json

import pytest
from gpt import MODEL, flags_of, pretrain
from jobs import run_ranks

from megatron_bfpp.compare.runs import read

pytestmark = pytest.mark.slow


def without_room() -> None:
    from megatron.core.models.gpt import GPTModel

    def init(*_, **__):
        raise MemoryError("no room for the model")

    GPTModel.__init__ = init


def without_data() -> None:
    from megatron.core.datasets.gpt_dataset import MockGPTDataset

    def init(*_, **__):
        raise OSError("no data")

    MockGPTDataset.__init__ = init


@pytest.mark.parametrize(
    "prepare, reason", [(without_room, "MemoryError: no room for the model"), (without_data, "failed to build")]
)
def test_a_job_that_dies_before_it_trains_leaves_its_configuration_and_the_reason(prepare, reason, tmp_path):
    run = tmp_path / "breadth-first.2"
    flags = [*MODEL, *flags_of(2, 2, 1, 1, 4), "--pipeline-schedule", "breadth-first", "--bfpp-run-dir", str(run)]
    codes, outputs = run_ranks(pretrain, 2, tmp_path, str(tmp_path / "steps.jsonl"), flags, prepare)
    assert any(codes) and any(reason in output for output in outputs)
    header = json.loads((run / "run.json").read_text())
    assert header["arm"] == "breadth-first" and header["shape"]["pp"] == 2 and header["args"]["num_layers"] == 8
    found = read(run)
    assert not found.is_finished and reason in found.reason and found.round == 2 and found.steps == []
