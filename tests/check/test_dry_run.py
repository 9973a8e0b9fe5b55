"""bfpp check of a job: every rank of a job validated, built and planned without a GPU. Small models, real processes."""

import argparse
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
import gpt
import jobs

from megatron_bfpp.check import command
from megatron_bfpp.check.answers import Chunk, Job, PlanLine, Question, Rank
from megatron_bfpp.check.job import _world_size, pp_ranks_of
from megatron_bfpp.check.placed import placed
from megatron_bfpp.check.table import report
from megatron_bfpp.check.verdict import Answer
from megatron_bfpp.cli import main
from megatron_bfpp.planner.hardware import load_gpu

# 200 words are 256 with padding, whether or not the release counts the end of a document as one more.
_FLAGS = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 200 --tokenizer-type NullTokenizer --mock-data --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 "
    "--train-iters 1 "
    "--attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --eval-interval 1000 --split 1,0,0 --log-interval 1 "
    "--pipeline-model-parallel-size 2 --pipeline-schedule breadth-first --num-virtual-stages-per-pipeline-rank 2"
)
FLAGS = _FLAGS.split()
LARGE = ["--hidden-size", "8192", "--num-attention-heads", "64", "--fp16"]
LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --group-query-attention --num-query-groups 2 "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --bf16"
)
UNTIED = ["--untie-embeddings-and-output-weights"]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "WORLD_SIZE", "DATA_PATH", "VOCAB_FILE", "MERGE_FILE"):
        monkeypatch.delenv(name, raising=False)


def check(tmp_path, *words, flags=(), gpus=2):
    """Exit code, and what --json has written."""
    path = tmp_path / "found.json"
    code = main(["check", "--gpus", str(gpus), "--json", str(path), *words, "--", *FLAGS, *flags])
    return code, json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--tensor-model-parallel-size", "2"],
        LLAMA.split(),
    ],
    ids=["tp2-tied", "llama"],
)
def test_the_parameters_are_those_of_a_model_that_trains(tmp_path, flags):
    world = 4 if "--tensor-model-parallel-size" in flags else 2
    codes, outputs = jobs.run_ranks(gpt.pretrain, world, tmp_path, str(tmp_path / "steps"), [*FLAGS, *flags])
    assert codes == [0] * world, outputs[0][-2000:]
    line = r"number of parameters on .*model parallel rank \((\d), (?:\d, )?(\d)\): (\d+)"
    built = {(int(tp), int(pp)): int(count) for tp, pp, count in re.findall(line, "\n".join(outputs))}
    code, found = check(tmp_path, flags=flags, gpus=world)
    assert code == 0
    assert [rank["parameters"] for rank in found["ranks"]] == [built[0, 0], built[0, 1]]


@pytest.mark.slow
def test_the_table_names_layers_plans_memory_and_what_was_changed(tmp_path, capsys):
    flags = ["--tokenizer-type", "GPT2BPETokenizer", "--data-path", "${DATA_PATH}", "--fp16"]
    words = [word for word in FLAGS if word != "--mock-data"]
    code = main(["check", "--gpus", "4", "--gpu", "v100-32", "--", *words, *flags])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "4 GPUs (--gpus): TP 1, PP 2 x 2 chunks, DP 2; breadth-first, 4 micro-batches of 1" in output
    rows = [line.split() for line in output.splitlines() if re.match(r" +\d", line)]
    assert [row[:3] for row in rows[:2]] == [["0", "0", "1-2"], ["1", "5-6", rows[1][2]]]
    assert [row[-1] for row in rows].count("fits") == 2
    assert "plan of training, 4 micro-batches: sound" in output and "plan of evaluation" in output
    assert "predicted for V100-32" in output
    assert "--mock-data in place of --data-path ${DATA_PATH}, which is not here" in output
    assert "NullTokenizer with its 200 words in place of GPT2BPETokenizer" in output
    assert "found nothing wrong" in output


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_found(tmp_path, capsys):
    code, found = check(tmp_path, "--gpu", "v100-32", flags=[*LARGE, "--num-layers", "16"])
    assert code == 1
    (finding,) = found["findings"]
    worst = max(rank["memory"]["total"] for rank in found["ranks"])
    assert f"2 of 2 pipeline ranks do not fit: pp_rank 0 needs {worst / 1e9:.1f} GB of 28.0 GB" in finding
    assert f"FOUND: {finding}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_model_fits_into_a_larger_gpu_and_on_more_ranks(tmp_path):
    flags = [*LARGE, "--num-layers", "16", "--pipeline-model-parallel-size", "8"]
    code, found = check(tmp_path, "--gpu", "a100-80", "--rank", "0,7", flags=flags, gpus=8)
    assert code == 0
    assert [rank["pp_rank"] for rank in found["ranks"]] == [0, 7]
    state = found["ranks"][0]["memory"]
    assert state["parameters"] == 2 * found["ranks"][0]["parameters"]


@pytest.mark.slow
def test_uneven_layers_are_counted_where_the_plugin_puts_them(tmp_path):
    code, found = check(tmp_path, "--gpu", "a100-80", flags=["--num-layers", "7", *UNTIED])
    assert code == 0
    chunks = {chunk["stage"]: sorted(map(int, chunk["layers"])) for rank in found["ranks"] for chunk in rank["chunks"]}
    assert [len(chunks[stage]) for stage in range(4)] == found["job"]["stage_layers"]
    assert sum(found["job"]["stage_layers"]) == 7 and len(set(found["job"]["stage_layers"])) > 1
    assert sorted(layer for layers in chunks.values() for layer in layers) == list(range(1, 8))
    assert found["predicted"]["is_bound"]
    assert found["ranks"][0]["memory"]["parameters"] == pytest.approx(4 * found["ranks"][0]["parameters"])


@pytest.mark.slow
def test_sharded_parameters_have_a_plan_that_gathers(tmp_path):
    flags = [*UNTIED, "--bf16", "--use-torch-fsdp2", "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist"]
    code, found = check(tmp_path, "--gpu", "a100-80", flags=flags, gpus=4)
    assert code == 0
    assert found["job"]["resident_chunks"] == 2
    _, replicated = check(tmp_path, flags=UNTIED, gpus=4)
    assert found["plans"][0]["digest"] != replicated["plans"][0]["digest"]
    assert found["ranks"][0]["parameters"] == replicated["ranks"][0]["parameters"]


@pytest.mark.slow
def test_a_split_backward_is_proved_and_what_waits_is_counted(tmp_path, capsys):
    words = ["--breadth-first-weight-gradients", "deferred", "--bf16", *UNTIED]
    code, found = check(tmp_path, "--gpu", "h100-80", flags=words)
    output = capsys.readouterr().out
    assert code == 0 and found["job"]["schedule"] == "breadth-first-deferred"
    assert [plan["owed"] for plan in found["plans"]] == [[1, 3], []]  # training, evaluation
    assert "weights' gradients of 1 to 3 micro-batches wait on a rank" in output
    assert re.search(r"exposed communication .*; owed weights' gradients keep up to \S+ GB", output)
    assert found["ranks"][1]["memory"]["owed"] > found["ranks"][0]["memory"]["owed"]
    whole = check(tmp_path, "--gpu", "h100-80", flags=words[2:])[1]
    assert whole["ranks"][1]["memory"]["owed"] == 0 and "owed" not in capsys.readouterr().out
    assert found["predicted"]["bubble_fraction"] < whole["predicted"]["bubble_fraction"]
    assert check(tmp_path, flags=["--breadth-first-weight-gradients", "auto"])[1]["plans"][0]["owed"] == [1, 3]
    assert check(tmp_path, flags=["--breadth-first-weight-gradients", "deferred", "--breadth-first-weight-lag", "0"])[
        1
    ]["plans"][0]["owed"] == [1, 1]


def test_what_waits_in_a_plan_of_a_file_is_said(tmp_path, capsys):
    path = str(tmp_path / "plan.csv")
    shape = ["--pp", "4", "--chunks", "2", "--microbatches", "4"]
    assert main(["show", *shape, "--order", "breadth-first-deferred", "--plan", "--csv", path]) == 0
    capsys.readouterr()
    assert main(["check", path]) == 0
    assert capsys.readouterr().out.endswith("; weights' gradients of up to 4 micro-batches wait on a rank\n")


@pytest.mark.slow
def test_megatrons_own_schedule_is_checked_too(tmp_path):
    code, found = check(tmp_path, flags=["--pipeline-schedule", "1f1b"])
    assert code == 0
    assert [(plan["what"], plan["num_microbatches"]) for plan in found["plans"]] == [("Megatron's", 8)]


@pytest.mark.slow
def test_what_the_estimate_does_not_know_is_built_and_not_compared(tmp_path, capsys):
    flags = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"]
    code, found = check(tmp_path, flags=flags)
    assert code == 0
    assert "full recomputation" in found["not_compared"] and "parameters" not in found
    assert "parameters not compared with those that bfpp plan counts" in capsys.readouterr().out
    assert main(["check", "--gpus", "2", "--gpu", "a100-80", "--", *FLAGS, *flags]) == 2


BAD_JOBS = {  # Megatron's words or ours
    "--frobnicate 3": "does not take this command line: unrecognized arguments: --frobnicate 3",
    "--num-layers eight": "argument --num-layers: invalid int value: 'eight'",
    "--num-attention-heads 5": "Megatron refuses this configuration: ",
    "--pipeline-model-parallel-size 3": "world size (4) is not divisible by",
    "--global-batch-size 7 --micro-batch-size 2": "divisible by",
    "--tensor-model-parallel-size 2": "CUDA_DEVICE_MAX_CONNECTIONS",
    "--use-torch-fsdp2 --no-gradient-accumulation-fusion": (
        "--use-torch-fsdp2 requires --untie-embeddings-and-output-weights"
    ),
    "--use-megatron-fsdp": "--use-megatron-fsdp does not work with --pipeline-schedule breadth-first",
    "--pipeline-schedule 1f1b --global-batch-size 6": (
        "the last group has 1 microbatches; Megatron needs 0 or at least 2"
    ),
    "--group-query-attention --num-query-groups 3": "is no multiple of --num-query-groups 3",
    "--sft": "--sft is not plain GPT pretraining",
    "--bf16": "V100-32, DGX-1 with InfiniBand has no bf16",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", BAD_JOBS)
def test_a_refused_job_is_one_sentence_and_exit_code_2(tmp_path, capsys, flags):
    path = tmp_path / "found.json"
    words = ["--gpus", "4", "--gpu", "v100-32", "--rank", "0", "--json", str(path)]
    assert main(["check", *words, "--", *FLAGS, *flags.split()]) == 2
    output = capsys.readouterr()
    assert BAD_JOBS[flags] in output.err
    assert "Traceback" not in output.err and len(output.err.splitlines()) <= 3 and output.out == ""
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("check", "nothing to check is named"),
        ("check plan.csv --gpus 4 --fit-batch", "--gpus, --fit-batch has no meaning for the plan in plan.csv"),
        ("check plan.csv --config FILE", "one thing is checked at a time"),
        ("check --config FILE --gpus 2 --gpu v200", "--gpu v200 does not exist"),
        ("check --config FILE", "the number of GPUs is not known"),
        ("check --config FILE --gpus 0", "--gpus: '0' is not a whole number"),
        ("check --config FILE --gpus 2 --rank 2", "--rank 2: the pipeline ranks are 0 to 1"),
        ("check --config FILE --gpus 2 --gpu v100-32 --reserve-gb 40", "--reserve-gb 40 leaves nothing"),
        ("check --config absent.yaml --gpus 2", "absent.yaml: cannot be read"),
        ("check --config WRONG --gpus 2", "unknown key 'MODEL'"),
    ],
)
def test_bad_input_is_refused_before_megatron_is_started(tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.setattr(command, "Forks", lambda *given, **named: pytest.fail("Megatron is started"))
    (tmp_path / "FILE").write_text("MODEL_ARGS: {--pipeline-model-parallel-size: 2}")
    (tmp_path / "WRONG").write_text("MODEL: {--num-layers: 2}")
    words = [str(tmp_path / word) if word in ("FILE", "WRONG") else word for word in words.split()]
    try:
        code = main(words)
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_a_configuration_that_lacks_the_vocabulary_has_that_of_its_tokenizer(tmp_path, capsys):
    path = tmp_path / "model.yaml"
    words = " ".join(FLAGS).replace("--vocab-size 200 ", "").replace("NullTokenizer", "GPT2BPETokenizer").split()
    path.write_text("MODEL_ARGS:\n" + "".join(_yaml(words)) + "ENV_VARS: {WORLD_SIZE: 2}\n")
    assert main(["check", "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "NullTokenizer with its 50257 words (as of GPT-2; -- --vocab-size N behind the file gives another)" in shown
    assert "parameters of all 4 chunks: as bfpp plan counts them" in shown


def _yaml(words):
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            yield f"  {word}: {'true' if following.startswith('--') else following}\n"


def test_the_cluster_of_a_configuration_names_its_gpus(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("cluster: {gpu: v100-32, gpus: 64}\nMODEL_ARGS: {}\n")
    assert _world_size(_arguments(config=str(path)), {})[0] == 64
    assert _world_size(_arguments(config=str(path)), {"WORLD_SIZE": "3"})[0] == 3
    assert _world_size(_arguments(config=str(path), gpus=5), {"WORLD_SIZE": "3"})[0] == 5


def test_the_number_of_gpus_must_come_from_somewhere(tmp_path, capsys):
    path = tmp_path / "model.yaml"
    path.write_text("MODEL_ARGS: {--pipeline-model-parallel-size: 2}\n")
    assert main(["check", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "--gpus N" in error and "cluster: {gpus: N}" in error


def _arguments(**values):
    return argparse.Namespace(**{"config": None, "gpus": None} | values)


def test_the_pipeline_ranks_are_the_last_ones_named():
    assert pp_ranks_of(None, ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-size=3"]) == [0, 1, 2]


def _answer(**changes):
    """The answer for a model that Megatron would build, put together by hand."""
    words = [*FLAGS, *UNTIED]
    job = Job(1, 2, 1, 2, 1, 8, 8, "breadth-first", "eager", None, None, [2, 2, 2, 2], [""] * 4, [], [])
    model = placed(words, 2, 2, job.stage_layers, None)
    ranks = [
        Rank(
            pp_rank,
            job,
            [
                Chunk(stage, dict.fromkeys(range(2 * stage + 1, 2 * stage + 3), 1), model.parameters(stage))
                for stage in (pp_rank, 2 + pp_rank)
            ],
            [PlanLine("training", 8, "0" * 12, 0.1)],
        )
        for pp_rank in range(2)
    ]
    answer = Answer(ranks, Question(words, {}, 2, 8, None), None, 4e9, model, "")
    return replace(answer, **changes)


def test_a_model_as_estimated_has_no_findings():
    assert _answer().findings() == []
    assert _answer(gpu=load_gpu("a100-80")).findings() == []


@pytest.mark.parametrize("difference", [-1, 1, 4096])
def test_parameters_that_differ_are_found_with_both_numbers(difference):
    answer = _answer()
    chunk = answer.ranks[1].chunks[0]
    answer.ranks[1].chunks[0] = replace(chunk, parameters=chunk.parameters + difference)
    (finding,) = answer.findings()
    numbers = f"Megatron builds {chunk.parameters + difference:,} parameters, bfpp plan counts {chunk.parameters:,}"
    assert finding == f"stage 1 (pp_rank 1): {numbers} ({difference:+,})"
    shown = report(answer.as_dict(), "--gpus")
    assert "parameters of 1 of 4 chunks are not those that bfpp plan counts" in shown
    assert f"{chunk.parameters + difference:,}  planned {chunk.parameters:,}\n" in shown


def test_a_layer_that_is_built_elsewhere_is_found():
    answer = _answer()
    answer.ranks[0].chunks[1] = replace(answer.ranks[0].chunks[1], layers={3: 1, 4: 1})
    (finding,) = answer.findings()
    assert finding == "stage 2 (pp_rank 0) was built with layers [3, 4], and the placement gives it [5, 6]"


def test_an_unsound_plan_is_found():
    answer = _answer()
    answer.ranks[0].plans[:] = [PlanLine("evaluation", 8, unsound="no rank can run its next action")]
    assert answer.findings() == ["the evaluation plan of 8 micro-batches is unsound: no rank can run its next action"]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("BFPP_ALL_CASES"), reason="takes half a minute; with BFPP_ALL_CASES=1")
@pytest.mark.parametrize(
    ("name", "gpu", "pp"), [("gpt_52b_64_v100", "v100-32", 8), ("gpt_52b_64_a100_h100", "a100-80", 4)]
)
def test_every_rank_of_the_52b_model_is_checked_in_three_minutes(tmp_path, name, gpu, pp):
    path, began = tmp_path / "found.json", time.monotonic()
    assert main(["check", "--config", str(CONFIGS / f"{name}.yaml"), "--gpu", gpu, "--json", str(path)]) == 0
    assert time.monotonic() - began < 180
    found = json.loads(path.read_text())
    assert len(found["ranks"]) == pp
    assert sum(rank["parameters"] for rank in found["ranks"]) * 8 == pytest.approx(52.4e9, rel=0.01)
