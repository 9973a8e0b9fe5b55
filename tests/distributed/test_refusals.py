"""Wrong input is refused before a model is built, on every rank, in at most three lines that name what to change."""

import os
import subprocess
import sys

import pytest

RUN = [sys.executable, "-m", "megatron_bfpp.pretrain_gpt"]
GPT = (
    "--device cpu --num-layers 8 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 8 --tokenizer-type NullTokenizer --vocab-size 128 --train-iters 1 --lr 1e-3 "
    "--pipeline-schedule breadth-first"
).split()


def refusal(*flags: str, rank: int = 0, mock: bool = True) -> str:
    """What rank `rank` of 4 prints when it is refused: alone, so nothing that waits for other ranks has begun."""
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "4"}
    data = ["--mock-data"] if mock else []
    done = subprocess.run([*RUN, *GPT, *data, *flags], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "building GPT model" not in done.stdout
    start = done.stderr.find("megatron_bfpp: error:")
    message = done.stderr[start:] if start >= 0 else ""
    assert len(message.strip().splitlines()) <= 3
    return message


def test_no_pipeline_ranks():
    assert "--pipeline-model-parallel-size is 1" in refusal()


def test_layers_that_leave_one_per_rank():
    message = refusal("--pipeline-model-parallel-size", "4", "--num-layers", "4")
    assert "4 layers on 4 pipeline ranks leave 1 per rank" in message and "--num-layers 8" in message


def test_layers_that_cannot_be_shared_out():
    message = refusal("--pipeline-model-parallel-size", "4", "--num-layers", "62")
    assert "62 layers" in message and "--pipeline-model-parallel-layout" in message


def test_a_data_file_that_is_missing_is_named():
    message = refusal("--pipeline-model-parallel-size", "4", "--data-path", "/nowhere/text", mock=False)
    assert "--data-path" in message and "/nowhere/text.idx" in message


def test_other_ranks_of_a_node_end_with_the_same_code_and_leave_the_message_to_the_first():
    assert refusal(rank=2) == ""


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--device", "cuda"), ("--device cuda", "0 CUDA device(s) for 4 rank(s)")),
        (("--pipeline-schedule", "breadth"), ("--pipeline-schedule breadth does not exist", "breadth-first")),
        (("--breadth-first-backward", "soon"), ("--breadth-first-backward soon", "late")),
        (("--breadth-first-group-size", "0"), ("--breadth-first-group-size is 0",)),
        (("--num-virtual-stages-per-pipeline-rank", "1"), ("--num-virtual-stages-per-pipeline-rank is 1",)),
        (("--overlap-moe-expert-parallel-comm",), ("--overlap-moe-expert-parallel-comm",)),
        (("--sft",), ("--sft", "megatron_bfpp.run")),
    ],
)
def test_flags(flags, words):
    message = refusal("--pipeline-model-parallel-size", "4", *flags)
    assert all(word in message for word in words), message
