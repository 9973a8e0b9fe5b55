"""Which layers go where: what becomes of a command line, the line that tells it, the warnings, the refusals.

The command lines go through Megatron's own parser and validate_args, wrapped as enable() wraps it; no model is built.
"""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import arguments

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.flags import stages as placed
from megatron_bfpp.integration.flags.settings import add_flags
from megatron_bfpp.schedule.model.layout import layers_of_stages

MODEL = [
    "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "32", "--max-position-embeddings", "32",
    "--micro-batch-size", "1", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "128", "--lr",
    "1e-2",
    "--pipeline-schedule", "breadth-first",
]  # fmt: skip


# --- the command line, through Megatron's validate_args


@pytest.fixture
def command(validated):
    return lambda *flags, world_size=4: validated([*MODEL, *flags], world_size)


def pp(size, *more):
    return ("--train-iters", "3", "--global-batch-size", "8", "--pipeline-model-parallel-size", str(size), *more)


V, K, LAYOUT = (
    "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage",
    "--pipeline-model-parallel-layout",
)
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EMBEDDING, LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"


@pytest.mark.parametrize(
    "flags, chunks, layout, placement",
    [
        # even: nothing is touched but what was left open
        (("--num-layers", "16"), 4, None, "16 stages in order: 1*16 (pp_rank 0 to 3: 4*4)"),
        (("--num-layers", "16", V, "2"), 2, None, "8 stages in order: 2*8 (pp_rank 0 to 3: 4*4)"),
        (("--num-layers", "16", K, "2"), 2, None, "8 stages in order: 2*8 (pp_rank 0 to 3: 4*4)"),
        # uneven: a layout
        (("--num-layers", "62", V, "4"), 4, "Et*3|(t*4|)*14t*3L", "3 4*14 3 (pp_rank 0 to 3: 15 16*2 15)"),
        (("--num-layers", "62", K, "4"), 4, "Et*3|(t*4|)*14t*3L", "3 4*14 3 (pp_rank 0 to 3: 15 16*2 15)"),
        (("--num-layers", "62"), 8, "Et|(t*2|)*30tL", "1 2*30 1 (pp_rank 0 to 3: 15 16*2 15)"),
        (("--num-layers", "63", K, "4"), 4, "Et*4|(t*4|)*14t*3L", "4*15 3 (pp_rank 0 to 3: 16*3 15)"),
        (("--num-layers", "9"), 2, "Et|t*2|(t|)*5tL", "1 2 1*6 (pp_rank 0 to 3: 2 3 2*2)"),
        # the user's own say
        (
            ("--num-layers", "10", LAYOUT, "Ett|t|t|t|t|t|t|ttL"),
            2,
            "Ett|t|t|t|t|t|t|ttL",
            "2 1*6 2 (pp_rank 0 to 3: 3 2*2 3)",
        ),
        (("--num-layers", "30", EMBEDDING, LOSS), 8, None, "0 1*30 0 (pp_rank 0 to 3: 7 8*2 7)"),
        (("--num-layers", "30", EMBEDDING, LOSS, V, "2"), 2, None, "3 4*6 3 (pp_rank 0 to 3: 7 8*2 7)"),
        (("--num-layers", "30", EMBEDDING, LOSS, K, "4"), 2, None, "3 4*6 3 (pp_rank 0 to 3: 7 8*2 7)"),
        (("--num-layers", "10", FIRST, "2", LAST, "4"), 2, None, "1*3 2 1*3 2 (pp_rank 0 to 3: 2*3 4)"),
        (("--num-layers", "10", FIRST, "4"), 2, None, "2 1*3 2 1*3 (pp_rank 0 to 3: 4 2*3)"),
    ],
)
def test_what_becomes_of_a_command_line(command, flags, chunks, layout, placement):
    args, lines = command(*pp(4, *flags))
    assert args.virtual_pipeline_model_parallel_size == chunks and args.pipeline_model_parallel_layout == layout
    (line,) = [line for line in lines if line.startswith("placement of")]
    assert line.startswith(f"placement of {flags[1]} layers, {4 * chunks} stages in order: ")
    assert line.strip().endswith(placement)
    made = layout is not None and LAYOUT not in flags
    assert any(line.startswith(f"set {LAYOUT} '{layout}'") for line in lines) == made


@pytest.mark.parametrize("mtp_layers", [1, 2])
def test_mtp_layers_stand_with_the_loss_and_count(command, mtp_layers):
    args, _ = command(
        *pp(4, "--num-layers", "30", V, "2", "--mtp-num-layers", str(mtp_layers), "--position-embedding-type", "rope")
    )
    assert args.pipeline_model_parallel_layout == {1: "Et*4|(t*4|)*6t*2mL", 2: "Et*4|t*5|(t*4|)*5tm*2L"}[mtp_layers]


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ("--num-layers", "4"),
            ("4 x 2 stages", "--num-layers is 4", "--num-layers 8", "--pipeline-model-parallel-size 2"),
        ),
        (("--num-layers", "15", V, "4"), ("4 x 4 stages", f"{V} 3 or less", "--pipeline-model-parallel-size 3")),
        (("--num-layers", "8", V, "1"), (f"{V} is 1",)),
        (("--num-layers", "8", K, "0"), (f"{K} is 0",)),
        (("--num-layers", "8", K, "2"), (f"{K} 2 are 1", f"{V} 2 instead")),
        (("--num-layers", "7", LOSS, K, "2"), (f"{K} 2 are 1",)),
        (("--num-layers", "7", K, "2"), ("are 1", f"{V} 2")),
        (("--num-layers", "9", K, "1"), ("stages of 1 to 1 layers", f"{K} 2")),
        (("--num-layers", "8", K, "1", V, "2"), (f"{V} and {K}", "Give one")),
        (("--num-layers", "8", V, "2", LAYOUT, "Et|" + "t|" * 6 + "tL"), (f"{V} and {LAYOUT}",)),
        (("--num-layers", "8", FIRST, "2", LAYOUT, "Et|" + "t|" * 6 + "tL"), (f"{LAYOUT} and {FIRST}",)),
        (("--num-layers", "8", LAYOUT, "Et|tL"), ("multiple of 4 stages", LAYOUT)),
        (("--num-layers", "8", LAYOUT, "Et|x|t|tL"), ("Invalid layer character: x", LAYOUT)),
        (("--num-layers", "9", LAYOUT, "Et|" + "t|" * 6 + "tL"), ("hold 8 layers", "--num-layers is 9", LAYOUT)),
        (("--num-layers", "8", LAYOUT, "t|" * 7 + "tL"), ("first layer must be embedding", LAYOUT)),
        (("--num-layers", "8", LAYOUT, "Et|t|t|ttttL|"[:-1]), ("at least 2 model chunks", "8 or more stages")),
        (("--num-layers", "62", EMBEDDING), ("62 layers", EMBEDDING, LAYOUT)),
        (("--num-layers", "30", EMBEDDING, LOSS, V, "3"), ("leave 8 per rank", f"{V} 3 does not divide", LAYOUT)),
        (("--num-layers", "10", FIRST, "4", K, "1"), (K, FIRST, V)),
        (("--num-layers", "5", EMBEDDING), ("Use --num-layers 8 or more without", EMBEDDING, LAYOUT)),
        (("--num-layers", "9", LOSS, V, "3"), ("Use --num-layers 12 or more without", LOSS, LAYOUT)),
        (("--num-layers", "32", FIRST, "8", LOSS), (f"{FIRST} does not go with {LOSS}", "Leave out one", LAYOUT)),
        (("--num-layers", "32", LAST, "8", EMBEDDING, V, "2"), (f"{LAST} does not go with {EMBEDDING}",)),
        (("--num-layers", "10", FIRST, "3"), ("10 layers", FIRST, LAYOUT)),
    ],
)
def test_what_cannot_be_placed_is_refused_in_three_lines_with_the_flag_to_change(command, flags, words):
    with pytest.raises(UserError) as refusal:
        command(*pp(4, *flags))
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 3 and max(map(len, message.splitlines())) < 260


def test_two_ranks_cannot_have_both_ends_fixed(command):
    # Megatron divides by the number of ranks in between.
    with pytest.raises(UserError, match=f"{FIRST} with {LAST}"):
        command(*pp(2, "--num-layers", "8", FIRST, "2", LAST, "6"))


# --- the check after validate_args


def test_the_namespace_answers_as_megatrons_real_configuration():
    for extra in (
        {
            "pipeline_model_parallel_layout": "Et*3|(t*4|)*14t*3L",
            "num_layers": 62,
            "virtual_pipeline_model_parallel_size": 4,
        },
        {"num_layers": 30, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        {"num_layers": 10, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 4},
    ):
        sizes = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2, **extra}
        import torch

        config = TransformerConfig(hidden_size=32, num_attention_heads=4, pipeline_dtype=torch.float32, **sizes)
        for number, stage in enumerate(placed.stages_of(SimpleNamespace(**sizes))):
            chunk, pp_rank = divmod(number, 4)
            with placed._as_rank(pp_rank, config.virtual_pipeline_model_parallel_size):
                assert get_num_layers_to_build(config, vp_stage=chunk, pp_rank=pp_rank) == stage.layers
    assert parallel_state.get_virtual_pipeline_model_parallel_world_size() is None
    assert parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK is None


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"layers": lambda stage, layers: layers - (stage == 5)}, "hold 7 layers, but --num-layers is 8"),
        (
            {"offset": lambda stage, offset: offset + (stage == 5)},
            "stage 5 begins with layer 6, but 5 layers stand before it",
        ),
    ],
)
def test_a_layer_that_megatron_would_drop_is_an_error(monkeypatch, wrong, words):
    import megatron.core.transformer.transformer_block as block
    import megatron.core.transformer.transformer_layer as layer

    for module, name, kind in (
        (block, "get_num_layers_to_build", "layers"),
        (layer, "get_transformer_layer_offset", "offset"),
    ):
        original, change = getattr(module, name), wrong.get(kind, lambda stage, value: value)

        def broken(config, vp_stage, pp_rank, original=original, change=change):
            return change(vp_stage * 4 + pp_rank, original(config, vp_stage=vp_stage, pp_rank=pp_rank))

        monkeypatch.setattr(module, name, broken)
    sizes = {"num_layers": 8, "pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    with pytest.raises(UserError, match=words):
        placed.check_placement(SimpleNamespace(**sizes))


def test_the_line_stays_short():
    layers = layers_of_stages(1500, 64, 8)
    assert len(placed.placement_line(layers, 64)) < 200
    assert len(placed.placement_line([1, 2] * 256, 64)) < 300


def test_a_yaml_files_model_is_placed_as_its_configuration_says():
    described = SimpleNamespace(
        num_layers=30, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    )
    sizes = {"num_layers": 30, "pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    assert placed.check_placement(SimpleNamespace(**sizes, language_model=described)).endswith(
        "3 4*6 3 (pp_rank 0 to 3: 7 8*2 7)"
    )


# --- micro-batches


def test_too_few_microbatches_are_told_with_what_they_cost_and_what_to_change(command):
    few = ("--train-iters", "3", "--pipeline-model-parallel-size", "6", "--num-layers", "24", V, "4")
    _, lines = command(*few, "--global-batch-size", "24", "--micro-batch-size", "2", world_size=24)
    (warning,) = [line for line in lines if line.startswith("WARNING")]
    assert (
        "3 micro-batches for 6 pipeline ranks: predicted bubble 54% of the step (17% with 6 micro-batches)" in warning
    )
    assert "3 = global batch 24 / (micro batch 2 x data parallel 4). Raise --global-batch-size to 48" in warning
    assert "lower --micro-batch-size to 1" in warning
    assert not [line for line in command(*pp(4, "--num-layers", "8"))[1] if line.startswith("WARNING")]


def test_a_growing_batch_is_told_as_one(command):
    if not hasattr(command(*pp(4, "--num-layers", "8"))[0], "step_batch_size_schedule"):
        pytest.skip("this release grows the batch with --rampup-batch-size")
    growing = ("--step-batch-size-schedule", "0:2 1K:8", "--pipeline-model-parallel-size", "4", "--num-layers", "8")
    _, lines = command("--train-iters", "3", *growing)
    (warning,) = [line for line in lines if line.startswith("WARNING")]
    assert "2 micro-batches for 4 pipeline ranks while the batch is small" in warning
    assert "2 to 8 micro-batches a step" in warning and "Begin --step-batch-size-schedule with 4 or more" in warning


# --- other refusals


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--overlap-moe-expert-parallel-comm",), ("1F1B",)),
        (("--delay-wgrad-compute",), ("--overlap-moe-expert-parallel-comm",)),
        (("--hybrid-context-parallel",), ("without pipeline ranks", "--context-parallel-size")),
        (("--use-megatron-fsdp",), ("cannot be built with pipeline ranks", "--use-torch-fsdp2")),
        (("--use-torch-fsdp2", "--breadth-first-engine", "megatron"), ("once per micro-batch", "engine plan")),
        (("--external-cuda-graph",), ("1F1B's order", "--cuda-graph-impl local")),
        (("--cuda-graph-impl", "transformer_engine"), ("Leave out --cuda-graph-impl,", "1F1B's order")),
        (("--breadth-first-engine", "megatron", "--enable-cuda-graph"), ("--breadth-first-engine plan",)),
        (("--use-torch-fsdp2", "--cuda-graph-impl", "local"), ("stay where they are",)),
        (("--transformer-impl", "local", "--cuda-graph-impl", "local"), ("--transformer-impl transformer_engine",)),
        (("--fp8-format", "hybrid", "--cuda-graph-impl", "local"), ("--fp8-format",)),
        (
            ("--cuda-graph-scope", "full_iteration", "--cuda-graph-impl", "local"),
            ("a capture forbids", "--cuda-graph-impl local"),
        ),
        (("--no-overlap-p2p-communication",), ("2 pipeline ranks",)),
        (("--breadth-first-engine", "megatron", "--breadth-first-group-size", "4"), ("--breadth-first-engine plan",)),
        (("--lr-warmup-iters", "3"), ("--lr-warmup-iters is 3", "after 3 (--train-iters)", "--lr-warmup-iters 2")),
        (("--lr-warmup-iters", "2", "--lr-decay-iters", "2"), ("after 2 (--lr-decay-iters)",)),
        (("--lr-warmup-fraction", "1.0"), ("--lr-warmup-fraction is 1.0",)),
    ],
)
def test_refusals_name_the_flag_and_the_reason(monkeypatch, flags, words):
    from megatron_bfpp.integration.flags.arguments import refuse
    from megatron_bfpp.integration.flags.settings import settings_of

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL, *pp(2, "--num-layers", "8"), *flags])
    args = arguments.parse_args(lambda parser: add_flags(parser, default="1f1b") or parser)
    with pytest.raises(UserError) as refusal:
        refuse(args, settings_of(args))
    message = str(refusal.value)
    assert flags[-1] in message or flags[0] in message
    assert all(word in message for word in words) and len(message.splitlines()) <= 3, message


def test_warmup_in_samples_is_refused_too_and_an_evaluation_is_not(command):
    shape = ("--pipeline-model-parallel-size", "4", "--global-batch-size", "8", "--num-layers", "8")
    with pytest.raises(UserError, match=r"--lr-warmup-samples is 16, .* after 16 \(--train-samples\)"):
        command(*shape, "--train-samples", "16", "--lr-warmup-samples", "16")
    command(*shape, "--train-samples", "16", "--lr-warmup-samples", "15")
    command(*shape, "--train-iters", "3", "--lr-warmup-iters", "3", "--skip-train")
