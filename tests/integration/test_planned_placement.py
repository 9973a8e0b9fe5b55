"""The planner places the layers of a breadth-first job where the plugin places them, and refuses what it refuses.

Random command lines go through Megatron's own parser and validate_args, wrapped as enable() wraps it, and beside that
through the planner's parser; no model is built.
"""

import random

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.flags.stages import stages_of
from megatron_bfpp.planner.flags import gpt_of, parse, strategy_of

MODEL = [
    "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64", "--max-position-embeddings", "64",
    "--micro-batch-size", "1", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "512", "--lr",
    "1e-2", "--train-iters", "3", "--position-embedding-type", "none", "--pipeline-schedule", "breadth-first",
]  # fmt: skip
V, K = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EXPERTS = "--num-experts 4 --moe-router-topk 1 --moe-ffn-hidden-size 32"
SIZES = (
    "", "--group-query-attention", "--group-query-attention --num-query-groups 2 --swiglu", "--ffn-hidden-size 96",
    "--mamba-num-heads 4 --mamba-head-dim 32 --mamba-num-groups 2 --mamba-state-dim 16",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
)  # fmt: skip


def drawn_gpt(draw: random.Random, pp: int) -> list[str]:
    chunks, mtp = draw.choice([0, 2, 3, 4]), draw.choice([0, 0, 1, 2])
    layers = draw.randint(2 * pp, 5 * pp * (chunks or 3))
    words = ["--num-layers", str(layers)]
    words += draw.choice([[V, str(chunks)], [K, str(draw.randint(1, 3))]]) if chunks else []
    words += ["--mtp-num-layers", str(mtp)] if mtp else []
    words += [*EXPERTS.split(), "--moe-layer-freq", draw.choice(["1", "2"])] if draw.random() < 0.3 else []
    ends = draw.choice([(), (), (), (), (), (), (FIRST,), (LAST,), (FIRST, LAST)])
    for flag in ends:
        words += [flag, str(draw.randint(1, 4))]
    if not ends:
        words += [f"--account-for-{end}-in-pipeline-split" for end in ("embedding", "loss") if draw.random() < 0.1]
    return words


def drawn_hybrid(draw: random.Random, pp: int) -> list[str]:
    pattern = "".join(draw.choice("M*-E") for _ in range(draw.randint(pp, 8 * pp)))
    mtp = draw.choice(["", "", "/*-", "/ME/ME"])
    words = [f"--hybrid-layer-pattern={pattern}{mtp}", *EXPERTS.split(), *draw.choice(SIZES).split()]
    words += ["--spec", "a.module.of.ones.own", "LAYERS"]
    chunks = draw.choice([0, 0, 2, 3])
    return words + ([V, str(chunks)] if chunks else [])


def megatrons(validated, words: list[str], world: int) -> list[tuple[int, int]] | str | None:
    """Return (layers, layers before) of each stage in Megatron's eyes; or the plugin's refusal; or None."""
    try:
        args, _ = validated(words, world)
        return [stage[:2] for stage in stages_of(args)]
    except UserError as error:
        return str(error)
    except AssertionError:  # Megatron refuses it, whatever the schedule
        return None


def planners(words: list[str], world: int) -> list[tuple[int, int]] | str:
    args = parse([word for word in words if word not in ("--spec", "a.module.of.ones.own", "LAYERS")])
    try:
        found = strategy_of(args, world).stages(gpt_of(args))
    except UserError as error:
        return str(error)
    return [(stage.layers, stage.first) for stage in found]


@pytest.mark.parametrize(("drawn", "count", "most"), [(drawn_gpt, 40, 20), (drawn_hybrid, 24, 12)])
def test_random_jobs_have_the_stages_that_the_plugin_gives_them(validated, drawn, count, most):
    draw, placed, refused, uneven = random.Random(7), 0, 0, 0
    for _ in range(count):
        pp = draw.choice([2, 3, 4])
        words = [*MODEL, "--pipeline-model-parallel-size", str(pp), "--global-batch-size", str(draw.choice([4, 8, 24]))]
        words += drawn(draw, pp)
        told, planned = megatrons(validated, words, pp), planners(words, pp)
        if isinstance(told, str):
            refused += 1
            assert planned == told, words
        elif told is not None:
            placed += 1
            uneven += len({layers for layers, _ in told}) > 1
            # Megatron names no place for a stage without layers.
            assert [each[0] for each in planned] == [each[0] for each in told], words
            assert all(ours == theirs for ours, theirs in zip(planned, told, strict=True) if theirs[0]), words
    assert placed > most and uneven > most // 3 and refused > 2, (placed, uneven, refused)
