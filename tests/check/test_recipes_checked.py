"""bfpp check of recipes as they are written: every rank built, its parameters those that bfpp plan counts."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron_bfpp.cli import main
from megatron_bfpp.integration.relied_on import release

IS_OLD = tuple(map(int, release().split(".")[:2])) < (0, 19)  # the entry point builds plain GPTs alone
RECIPES = yaml.safe_load((Path(__file__).parents[1] / "planner" / "recipes.yaml").read_text())
SIZES = {
    "--num-layers": 4, "--hidden-size": 64, "--num-attention-heads": 4, "--seq-length": 32, "--micro-batch-size": 2,
    "--max-position-embeddings": 32, "--lr": 1e-3, "--train-iters": 1, "--bf16": True,
}  # fmt: skip


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Write a file of a job and return its path."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)

    def write(flags, **keys):
        path = tmp_path / "model_config.yaml"
        path.write_text(yaml.safe_dump({"ENV_VARS": {"CUDA_DEVICE_MAX_CONNECTIONS": 1}, "MODEL_ARGS": flags, **keys}))
        return str(path)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus", "flags", "chunks"),
    [
        ("dense, vocabulary of a GPT-2 tokenizer", 64, [], 2),
        ("dense, 22 layers and both ends counted as layers, the ends of 4 ranks", 32, [], 8),
        ("Mixtral 8x7B with chunks", 64, ["--pipeline-schedule", "breadth-first"], 32),
        ("DeepSeek-V3, a part of its layers, with a layout and one predicted token more", 256,
         ["--tensor-model-parallel-size", "2", "--sequence-parallel"], 8),
        ("hybrid with Mamba, attention and experts at a latent width, in two stages", 16, [], 2),
        pytest.param(
            "linear attention in three of four layers, experts with a gated shared one", 16, [], 1,
            marks=pytest.mark.skipif(IS_OLD, reason="no plain GPT, refused before 0.19"),
        ),
    ],
    ids=["dense", "counted ends", "experts, breadth-first", "latent attention, MTP, TP", "hybrid", "linear attention"],
)  # fmt: skip
def test_a_recipe_is_built_with_the_parameters_that_are_planned(job, capsys, name, gpus, flags, chunks):
    needed = {"--lr": 1e-4, "--train-iters": 10, "--save-interval": 10, "--micro-batch-size": 1}
    given = needed | RECIPES[name]["file"]["MODEL_ARGS"]
    given |= {"--moe-grouped-gemm": True} if "--num-experts" in given else {}  # which moe_act of a recipe needs
    words = ["check", job(given), "--gpus", str(gpus), "--fit-batch", "--", *flags]
    code, output = main(words), capsys.readouterr()
    assert code == 0, output.err + output.out
    assert f"parameters of all {chunks} chunks: as bfpp plan counts them" in output.out
    assert output.out.splitlines()[-2] == "found nothing wrong"


@pytest.mark.slow
def test_a_batch_that_megatron_refuses_is_raised_on_demand_alone(job, capsys):
    words = ["check", job({**SIZES, "--global-batch-size": 12}), "--gpus", "8"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "divisible" in error and error.endswith("  --fit-batch makes the batch of these GPUs 16.\n")
    assert main([*words, "--fit-batch"]) == 0
    shown = capsys.readouterr().out
    assert "read from the file: --global-batch-size 12 is too small for this, or does not divide: 16, 1 micro" in shown
    assert main([*words, "--fit-batch", "--", "--global-batch-size", "12"]) == 2


@pytest.mark.slow
def test_inference_and_a_checkpoint_are_left_out_and_named(job, capsys):
    flags = {"--num-tokens-to-generate": 30, "--prompts": ["a", "b"], "--use-checkpoint-args": True, "--load": "gone"}
    assert main(["check", job(SIZES | flags, MODE="inference", MODEL_ARGS_2={}), "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert "read from the file: of the several runs in the file, the first: MODEL_ARGS, and not MODEL_ARGS_2" in shown
    assert "passed over --num-tokens-to-generate, --prompts: flags of inference, which this job does" in shown
    assert "no --use-checkpoint-args: the model is that of the flags" in shown
    assert main(["check", job(SIZES | {"--prompts": "a"}), "--gpus", "2"]) == 2
    assert "unrecognized arguments: --prompts a" in capsys.readouterr().err


@pytest.mark.slow
def test_a_spec_in_one_word_is_read_and_sparse_attention_refused(job, capsys):
    spec = "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
    flags = SIZES | {"--hybrid-layer-pattern": "*-*-", "--spec": spec}
    assert main(["check", job({name: flags[name] for name in flags if name != "--num-layers"}), "--gpus", "2"]) == 0
    assert f"changed for the dry run: --spec {spec} as two words" in capsys.readouterr().out
    assert main(["check", job(SIZES | {"--experimental-attention-variant": "dsa"}), "--gpus", "2"]) == 2
    error = capsys.readouterr().err
    of_old = "--experimental-attention-variant is not plain GPT pretraining"
    assert (of_old if IS_OLD else "dsa has layers of Transformer Engine alone") in error
    assert IS_OLD or len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_flags_of_a_script_are_checked_and_those_of_its_launcher_named(tmp_path, capsys):
    path = tmp_path / "train.sbatch"
    flags = " ".join(f"{flag} {'' if value is True else value}" for flag, value in SIZES.items())
    path.write_text(f"srun --nodes=1 torchrun --nproc-per-node=8 pretrain_gpt.py {flags}\n")
    assert main(["check", str(path), "--gpus", "8"]) == 0
    shown = capsys.readouterr().out
    assert "passed over --nodes, --nproc-per-node: what Megatron does not know, as flags of the launcher" in shown
    assert "parameters of all 1 chunks: as bfpp plan counts them" in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"--encoder-num-layers": 4}, "--encoder-num-layers trains an encoder beside the decoder (T5)"),
        ({"--vocab-file": "${DATA}/bert-large-cased-vocab.txt"}, "the data or the vocabulary are BERT's"),
        ({"trainer.num_nodes": 1}, "'trainer.num_nodes' is not a flag"),
    ],
)
def test_what_is_no_decoder_of_text_is_refused_before_megatron_is_started(job, capsys, flags, says):
    assert main(["check", job(SIZES | flags), "--gpus", "8"]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
