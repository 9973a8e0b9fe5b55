"""Wrong input is refused before a model is built, on every rank, in at most three lines that name what to change."""

import pytest
from gpt import refused

pytestmark = pytest.mark.slow

BREADTH_FIRST = ("--pipeline-schedule", "breadth-first", "--global-batch-size", "8")
PP_4 = ("--pipeline-model-parallel-size", "4")


@pytest.fixture
def refusal(tmp_path):
    def message(*flags: str) -> str:
        codes, outputs = refused(tmp_path, 4, *BREADTH_FIRST, *flags)
        assert codes == [2] * 4, outputs[0][-2000:]
        for output in outputs:
            assert "Traceback" not in output and "building GPT model" not in output
            assert "initializing torch distributed" not in output
        # The first rank of a node speaks for the others.
        assert not any("megatron_bfpp: error:" in output for output in outputs[1:])
        text = outputs[0][outputs[0].index("megatron_bfpp: error:") :]
        assert len(text.strip().splitlines()) <= 3
        return text

    return message


def test_no_pipeline_ranks(refusal):
    assert "--pipeline-model-parallel-size is 1" in refusal()


def test_layers_that_leave_one_per_rank(refusal):
    message = refusal(*PP_4, "--num-layers", "4")
    assert "4 x 2 stages" in message and "--num-layers is 4" in message and "--num-layers 8" in message


def test_a_layout_with_another_number_of_layers_found_after_megatron_has_read_the_flags(refusal):
    message = refusal(*PP_4, "--num-layers", "9", "--pipeline-model-parallel-layout", "Et|" + "t|" * 6 + "tL")
    assert "hold 8 layers, but --num-layers is 9" in message and "--pipeline-model-parallel-layout" in message


def test_a_data_file_that_is_missing_is_named(refusal):
    message = refusal(*PP_4, "--data-path", "/nowhere/text")
    assert "--data-path" in message and "/nowhere/text.idx" in message


def test_cuda_where_there_is_none():
    import torch

    from megatron_bfpp import run

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stop:
        run.launch(["--device", "cuda"], lambda: None)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--pipeline-schedule", "breadth"), ("--pipeline-schedule breadth does not exist", "breadth-first")),
        (("--breadth-first-backward", "soon"), ("--breadth-first-backward soon", "late")),
        (("--breadth-first-group-size", "0"), ("--breadth-first-group-size is 0",)),
        (("--num-virtual-stages-per-pipeline-rank", "1"), ("--num-virtual-stages-per-pipeline-rank is 1",)),
        (("--overlap-moe-expert-parallel-comm",), ("--overlap-moe-expert-parallel-comm",)),
        (("--sft",), ("--sft", "megatron_bfpp.run")),
    ],
)
def test_flags(refusal, flags, words):
    message = refusal(*PP_4, *flags)
    assert all(word in message for word in words), message
