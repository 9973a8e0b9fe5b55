"""Recipes as they are written: read, completed and planned, or refused in one sentence."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_bfpp.cli import main
from megatron_bfpp.planner.flags import gpt_of, parse, strategy_of
from megatron_bfpp.planner.flags.layers import marked
from megatron_bfpp.planner.flags.words import _misspelt, _parser
from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.memory import PRECISIONS, memory
from megatron_bfpp.planner.steps import replay_step
from megatron_bfpp.planner.time import durations

RECIPES = yaml.safe_load((Path(__file__).parent / "recipes.yaml").read_text())
SIZES = "--num-layers 8 --hidden-size 1024 --num-attention-heads 8 --seq-length 4096 --vocab-size 32000 --bf16"
BATCH = "--global-batch-size 64 --micro-batch-size 1"
EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 512 --swiglu --disable-bias-linear"
LAYOUT = "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout"


def words(*texts: str) -> list[str]:
    return [word for text in texts for word in text.split()]


def plan_of(flags: str, gpus: int = 16):
    """Return the model and the strategy of flags beside the sizes."""
    args = parse(words(SIZES, BATCH, flags))
    return gpt_of(args), strategy_of(args, gpus)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_as_it_is_written(name, tmp_path, capsys):
    recipe, path = RECIPES[name], tmp_path / "model_config.yaml"
    path.write_text(yaml.safe_dump(recipe["file"]))
    assert main(["plan", str(path), "--gpu", "h200", "--gpus", str(recipe["gpus"]), "--as-configured"]) == 0
    shown = capsys.readouterr().out
    for said in recipe["says"]:
        assert said in shown
    title = shown.splitlines()[0]
    kind, _, number = title.split()[:3]
    assert kind == ("hybrid" if "--hybrid-layer-pattern" in str(recipe["file"]) else "GPT")
    found = float(number[:-1]) * {"B": 1, "M": 1e-3}[number[-1]]
    assert found == pytest.approx(recipe["parameters"], rel=0.03), title


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (f"--expert-model-parallel-size 3 {EXPERTS}",
         "--num-experts 8 is no multiple of --expert-model-parallel-size 3"),
        ("--expert-model-parallel-size 2", "--expert-model-parallel-size 2 needs experts"),
        (f"{EXPERTS} --moe-router-topk 9", "--moe-router-topk 9 is more than --num-experts 8"),
        (f"{EXPERTS} --expert-model-parallel-size 8 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2",
         "the 8 ranks of TP 4 x CP 1 x DP 2 are no multiple of --expert-model-parallel-size 8 x"
         " --expert-tensor-parallel-size 4"),
        (f"{EXPERTS} --moe-ffn-hidden-size 510 --tensor-model-parallel-size 4",
         "--moe-ffn-hidden-size 510 is no multiple of --expert-tensor-parallel-size 4"),
        (f"{EXPERTS} --moe-layer-freq ([0]*1+[1]*6)", "names 7 layers, and the model has 8"),
        (f"{EXPERTS} --moe-layer-freq __import__", "--moe-layer-freq __import__ is neither a number nor a list"),
        ("--context-parallel-size 16 --seq-length 4104", "--seq-length 4104 is no multiple of 32, twice"),
        ("--context-parallel-size 4 --cp-comm-type a2a --num-attention-heads 6 --hidden-size 768",
         "divides heads over --context-parallel-size 4, but a rank of TP 1 has 6 of queries and 6 of keys"),
        ("--context-parallel-size 3", "16 GPUs are no multiple of TP 1 x CP 3 x PP 1 = 3."),
        ("--cp-comm-type ring", "--cp-comm-type ring does not exist"),
        ("--tensor-model-parallel-size 16",
         "--num-attention-heads 8 is no multiple of --tensor-model-parallel-size 16"),
        (f"{LAYOUT} Et|tt|tt|ttL", "has 7 layers (t), and --num-layers is 8"),
        (f"{LAYOUT} Ett|tt|tt|tt", "must begin with the one E (embedding) and end with the one L (loss)"),
        (f"{LAYOUT} Ett|tt|ttttL", "has 3 stages, no multiple of PP 4"),
        (f"{LAYOUT} Ett|tt|tt|ttmL", "has 1 MTP layers (m), and --mtp-num-layers is 0"),
        (f"{LAYOUT} Exx|tt|tt|ttL", "is not a layout; write it with E, t, m, L and |"),
        (f"{LAYOUT} E(t*99999|)*99999L", "has more than 100,000 layers and stages"),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 3",
         "--num-layers 8 without 3 on the first and 0 on the last rank leaves 5, which 3 ranks cannot share evenly"),
        ("--pipeline-model-parallel-size 4 --account-for-loss-in-pipeline-split",
         "--num-layers 8 + 1 ends is no multiple of PP 4 x 1 chunks"),
        ("--hybrid-layer-pattern M-X*", "has a layer 'X', which bfpp plan does not know"),
        ("--hybrid-layer-pattern M-E*", "has a layer E, whose sizes are not given"),
        ("--hybrid-layer-pattern M-|M*|M- --pipeline-model-parallel-size 2", "has 3 stages, no multiple of PP 2"),
        ("--recompute-granularity selective --recompute-modules everything",
         "--recompute-modules everything does not exist"),
        ("--experimental-attention-variant dsa", "--experimental-attention-variant dsa is not in the model"),
        ("--img-h 336", "--img-h trains a model that sees images"),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "optim_grads is not in the model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence_with_its_numbers_and_the_flag(flags, says, capsys):
    gpus = ["plan", "--gpu", "h200", "--gpus", "16", "--as-configured", "--"]
    assert main([*gpus, *words(SIZES, BATCH, flags)]) == 2
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") <= 3


def test_the_longest_stage_rules():
    gpu = load_gpu("h200")
    even, uneven = (plan_of(f"{LAYOUT} {layout} --vocab-size 1000") for layout in ("Ett|tt|tt|ttL", "Ett|t|tttt|tL"))
    times = [durations(*each, gpu, "bf16") for each in (even, uneven)]
    assert times[1].forward[2] == pytest.approx(2 * times[0].forward[2])
    steps = [replay_step(strategy, each) for (_, strategy), each in zip((even, uneven), times, strict=True)]
    longest = uneven[1].num_microbatches * (times[1].forward[2] + times[1].backward[2])
    assert longest < steps[1].step and steps[0].step < 0.75 * steps[1].step
    assert "--pipeline-model-parallel-layout" in uneven[1].flags()


def test_ranks_share_what_their_flags_say():
    """Context parallelism divides activations, expert parallelism experts, and both are paid for in time."""
    gpu, bf16 = replace(load_gpu("h200"), experts_s=0.0), PRECISIONS["bf16"]

    def both(flags: str):
        gpt, strategy = plan_of(flags)
        return memory(gpt, strategy, bf16, True, 0), durations(gpt, strategy, gpu, "bf16")

    whole, part = both(""), both("--context-parallel-size 4")
    assert part[0].activations == pytest.approx(whole[0].activations / 4)
    assert part[0].parameters == whole[0].parameters
    assert whole[1].forward[0] / 4 < part[1].forward[0] < whole[1].forward[0]
    ring, exchanged = (both(f"--context-parallel-size 4 --cp-comm-type {kind}")[1] for kind in ("p2p", "a2a"))
    assert exchanged.tensor_parallel > 0 and ring.forward != exchanged.forward
    alone, divided = both(EXPERTS), both(f"{EXPERTS} --expert-model-parallel-size 8")
    experts = 8 * 8 * 3 * 1024 * 512  # layers, experts, matrices
    assert alone[0].parameters - divided[0].parameters == 2 * experts * 7 / 8
    assert divided[1].tensor_parallel > alone[1].tensor_parallel == 0
    hidden = both(f"{EXPERTS} --expert-model-parallel-size 8 --overlap-moe-expert-parallel-comm")
    assert hidden[1].forward[0] < divided[1].forward[0]


def test_the_experts_state_is_divided_among_fewer_ranks():
    gpt, strategy = plan_of(f"{EXPERTS} --expert-model-parallel-size 4 --use-distributed-optimizer")
    assert (strategy.replicas, strategy.expert_replicas) == (16, 4)
    (stage,) = strategy.stages(gpt)
    dense, experts = gpt.stage_parameters(stage), gpt.stage_expert_parameters(stage, strategy.split)
    found = memory(gpt, strategy, PRECISIONS["bf16"], True, 0)
    assert found.optimizer == pytest.approx(12 * (dense / 16 + experts / 4))
    small = plan_of("--use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype bf16 "
                    "--exp-avg-sq-dtype bf16 --main-grads-dtype bf16")  # fmt: skip
    found = memory(*small, PRECISIONS["bf16"], True, 0)
    count = small[0].parameters
    assert (found.optimizer, found.gradients) == (pytest.approx(6 * count / 16), 2 * count)


def test_megatrons_fsdp_holds_a_share_and_two_layers():
    gpt, strategy = plan_of("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params")
    found = memory(gpt, strategy, PRECISIONS["bf16"], True, 0)
    ends = gpt.embedding_parameters() + gpt.head_parameters(alone=True)
    gathered = 2 * gpt.layers[0].parameters() + ends
    assert found.parameters == pytest.approx(2 * (gathered + gpt.parameters / 16))
    assert found.optimizer == pytest.approx(12 * gpt.parameters / 16)
    slow = replace(load_gpu("h200"), network_link=load_gpu("h200").network_link._replace(bytes_per_s=1e8))
    assert (
        durations(gpt, strategy, slow, "bf16").forward[0]
        > 3 * durations(gpt, strategy, load_gpu("h200"), "bf16").forward[0]
    )


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1", "1111"), ("2", "1010"), ("([0]*1+[1]*3)", "0111"), ("[0, 1, 1, 0]", "0110"), ("([1]*2+[0,1])", "1101")],
)
def test_layers_with_experts_are_named_by_a_number_or_a_list(text, layers):
    assert marked("--moe-layer-freq", text, 4, False) == tuple(map(int, layers))


def test_three_of_four_layers_have_linear_attention():
    assert marked("--linear-attention-freq", "4", 8, True) == (1, 1, 1, 0, 1, 1, 1, 0)


def test_flags_behind_a_file_replace_its_own(tmp_path, capsys):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(RECIPES["dense, vocabulary of a GPT-2 tokenizer"]["file"]))
    on = ["--gpu", "h200", "--gpus", "64", "--as-configured"]
    for before in ([*on, str(path)], [str(path), *on], [*on[:2], str(path), *on[2:]]):
        assert main(["plan", *before, "--", "--vocab-size", "100000"]) == 0
        assert "vocabulary" not in capsys.readouterr().out
    assert main(["plan", *on]) == 2
    assert "no model is given" in capsys.readouterr().err


def test_a_spec_is_a_module_and_a_name(capsys):
    pattern, on = "--hybrid-layer-pattern M*-M*-M* --seq-length 4096", ["--gpu", "h200", "--gpus", "16"]
    sizes = f"--hidden-size 1024 --num-attention-heads 8 --vocab-size 32000 {BATCH} {pattern} --spec"
    spec = "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
    assert main(["plan", *on, "--as-configured", "--", *words(sizes, spec)]) == 0
    assert main(["plan", *on, "--as-configured", "--", *words(sizes, "mine of_my_own")]) == 2
    assert "--spec mine of_my_own builds layers that bfpp plan does not know" in capsys.readouterr().err


def test_a_shell_script_is_read_and_not_run(tmp_path, capsys):
    path = tmp_path / "train.sbatch"
    path.write_text(
        "#!/bin/bash\n#SBATCH --nodes=4 --ntasks-per-node=8\nTP=2\nexport HIDDEN=${HIDDEN:-1024}  # width\n"
        'MODEL=(\n    --num-layers 8 --hidden-size "$HIDDEN"   # --hidden-size 7\n    --num-attention-heads 8\n)\n'
        'OTHERS="\n    --seq-length 2048\n    --max-position-embeddings 2048\n    --bf16\n"\n'
        "srun torchrun --nproc-per-node=8 pretrain_gpt.py ${MODEL[@]} $OTHERS \\\n"
        "    --tensor-model-parallel-size ${TP} --global-batch-size=64 --lr 1e-4 && echo done\n"
    )
    assert main(["plan", str(path), "--gpu", "h200", "--gpus", "32", "--as-configured"]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("no-pipeline ")]
    assert line.split()[1:7] == ["1", "2", "16", "1", "1", "4"]
    assert "vocabulary: 128,256 words, assumed" in shown


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--num-tokens-to-generate 30",
         "this job runs inference: what is planned is a training step of its model (--num-tokens-to-generate)"),
        ("--inference-dynamic-batching", "this job runs inference"),
        ("--perform-rl-step", "this job is reinforcement learning: what is planned is its training step, without"),
    ],
)  # fmt: skip
def test_what_is_no_training_is_said_in_a_line_of_the_output_and_of_the_json(flags, says, tmp_path, capsys):
    path = tmp_path / "plan.json"
    on = ["plan", "--gpu", "h200", "--gpus", "16", "--as-configured", "--json", str(path), "--"]
    assert main([*on, *words(SIZES, BATCH, flags)]) == 0
    assert sum(line.startswith(says) for line in capsys.readouterr().out.splitlines()) == 1
    assert any(note.startswith(says) for note in json.loads(path.read_text())["notes"])


def test_options_stand_before_or_behind_the_file_and_megatrons_flags_behind_the_dashes(tmp_path, capsys):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(RECIPES["dense, vocabulary of a GPT-2 tokenizer"]["file"]))
    options, flags = ["--gpu", "h200", "--gpus", "64", "--as-configured"], ["--", "--vocab-size", "100000"]
    shown = []
    for front in ([*options, str(path)], [str(path), *options], [*options[:2], str(path), *options[2:]]):
        assert main(["plan", *front, *flags]) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    assert main(["plan"]) == 2
    assert "no model is given" in capsys.readouterr().err


def test_mxfp8_needs_blackwell(capsys):
    on = ["plan", "--gpu", "h200", "--gpus", "16", "--as-configured", "--"]
    assert main([*on, *words(SIZES, BATCH, "--fp8-format e4m3 --fp8-recipe mxfp8")]) == 2
    assert "--fp8-recipe mxfp8 needs compute capability 10, and H200" in capsys.readouterr().err


def test_a_flag_that_is_nearly_spelt_as_one_that_is_read_is_named_in_a_line_of_its_own(capsys):
    typed = words(SIZES, BATCH, "--mirco-batch-size 2 --fp4-recipe nvfp4 --eval-micro-batch-size 1 --zero-flag")
    assert main(["plan", "--gpu", "h200", "--gpus", "16", "--as-configured", "--", *typed]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "meant?" in line] == [
        "passed over: --mirco-batch-size, which has no effect here; is --micro-batch-size meant?"
    ]
    assert not any("--mirco" in line for line in lines if line.startswith("passed over, as"))


def test_no_flag_of_megatron_is_taken_for_a_slip_of_the_keyboard():
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    known = [flag for action in _parser()._actions for flag in action.option_strings]
    assert len(flags) > 500 and _misspelt([flag for flag in flags if flag not in known], known) == {}
