"""bfpp check builds every rank of a hybrid model."""

import json
import re

import gpt
import jobs
import pytest
from hybrid import flags_of

from megatron_bfpp.cli import main


@pytest.mark.slow
def test_the_parameters_of_every_stage_are_those_of_a_hybrid_model_that_trains(tmp_path):
    flags = [*gpt.MODEL, *flags_of("all", 13, 2, 2, 1, 4), "--pipeline-schedule", "breadth-first"]
    codes, outputs = jobs.run_ranks(gpt.pretrain, 2, tmp_path, str(tmp_path / "steps"), flags)
    assert codes == [0, 0], outputs[0][-2000:]
    line = r"number of parameters on .*model parallel rank \((?:\d, )+?(\d)\): (\d+)"
    built = {int(pp): int(count) for pp, count in re.findall(line, "\n".join(outputs))}
    path = tmp_path / "found.json"
    assert main(["check", "--gpus", "2", "--json", str(path), "--", *flags]) == 0  # and as many as the planner counts
    found = json.loads(path.read_text())
    assert [rank["parameters"] for rank in found["ranks"]] == [built[0], built[1]]
    layers = [len(chunk["layers"]) for rank in found["ranks"] for chunk in rank["chunks"]]
    assert layers == [4, 3, 3, 3] and not found["not_compared"]
