"""A hybrid pattern cut into stages: what becomes of a command line, Megatron's own view of it, and the refusals.

The command lines go through Megatron's own parser and validate_args, wrapped as enable() wraps it; no model is built.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron.training.training import num_floating_point_operations, training_log

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.flags import stages as placed
from megatron_bfpp.integration.flags.hybrid import allocation
from megatron_bfpp.integration.flags.settings import settings_of
from megatron_bfpp.integration.reliability import agreement
from megatron_bfpp.integration.seams import names_read
from megatron_bfpp.schedule.model.layers import layer_flops

MODEL = [
    "--hidden-size", "256", "--num-attention-heads", "8", "--seq-length", "512", "--max-position-embeddings", "512",
    "--micro-batch-size", "1", "--global-batch-size", "16", "--train-iters", "3", "--mock-data",
    "--tokenizer-type", "NullTokenizer", "--lr", "1e-2", "--position-embedding-type", "none",
    "--pipeline-schedule", "breadth-first",
]  # fmt: skip
WORDS = ("--vocab-size", "4096")
PATTERN, OLDER = "--hybrid-layer-pattern", "--hybrid-override-pattern"
V = "--num-virtual-stages-per-pipeline-rank"
OWN = "--spec", "a.module.of.ones.own", "LAYERS"  # the local layers of the CPU mode are of five kinds
ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(validated):
    return lambda *flags: validated([*MODEL, *flags], 8)


def pp(size, *more):
    return ("--pipeline-model-parallel-size", str(size), *WORDS, *more)


@pytest.mark.parametrize("pp_size, chunks", [(2, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("pattern", ["*-" * 4, "M*-" * 3, "*-*-*-*-*", "*E" * 5 + "/*E", "M-M*" * 4, "MMM*-" * 6])
def test_every_layer_has_its_place_in_megatrons_eyes(command, pattern, pp_size, chunks):
    args, lines = command(*pp(pp_size, PATTERN, pattern, V, str(chunks)))
    main, *mtp = pattern.split("/")
    segments, *same = args.hybrid_layer_pattern.split("/")
    assert segments.replace("|", "") == main and same == mtp and all(segments.split("|"))
    assert args.virtual_pipeline_model_parallel_size == chunks and args.num_layers == len(main)
    stages = placed.stages_of(args)
    assert [stage.kinds for stage in stages] == segments.split("|") and len(stages) == pp_size * chunks
    chose, says = (line for line in lines if line.startswith(("set ", "placement ")))
    assert chose.startswith(f"set {PATTERN} '{args.hybrid_layer_pattern}' in place of {V} {chunks}: ")
    assert says.startswith(f"placement of {len(main)} layers, {len(stages)} stages") and says.endswith(segments)


def test_seven_layers_on_two_ranks(command):
    args, _ = command(*pp(2, PATTERN, "*-*-*-*"))
    assert args.hybrid_layer_pattern.count("|") == 3 and args.num_layers == 7


def test_the_stages_are_what_megatron_takes(command):
    args, _ = command(*pp(4, PATTERN, "M*-M*-M*-M*-"))
    megatron, segments = allocation(), args.hybrid_layer_pattern.split("|")
    assert [(stage.layers, stage.offset) for stage in placed.stages_of(args)] == [
        (len(segment), sum(map(len, segments[:number]))) for number, segment in enumerate(segments)
    ]
    assert megatron.get_hybrid_total_pipeline_segment_count(args.hybrid_layer_pattern) == len(segments)
    assert megatron.torch.distributed.is_available, "the module has its own torch back"


def test_layers_weigh_by_their_cost(command):
    # A Mamba layer has 4.2 times the operations of an attention here. By number the first rank would get both.
    args, _ = command(*pp(2, PATTERN, "M***M***", V, "2", "--seq-length", "64", "--vocab-size", "16"))
    assert args.hybrid_layer_pattern == "M**|*M*|*|*"


def test_a_heavy_output_layer_leaves_the_last_stage_a_layer(command):
    light, _ = command(*pp(2, PATTERN, "*-" * 8, V, "2", "--vocab-size", "16"))
    heavy, lines = command(*pp(2, PATTERN, "*-" * 8, V, "2", "--vocab-size", "65536"))
    assert light.hybrid_layer_pattern == "|".join(["*-*-"] * 4)
    assert heavy.hybrid_layer_pattern.endswith("|-") and "output 69.57% of the model's" in lines[0]


def test_the_guide_shows_what_is_printed(command):
    guide = (ROOT / "docs" / "guide" / "hybrid.md").read_text(encoding="utf-8")
    shown = [line.split(": ", 1)[1] for line in guide.splitlines() if line.startswith("megatron_bfpp 0.1.0: ")]
    pattern = "M-*-M-M-M-*-M-M-M-M*-M-M-M-*-M-M-"
    sizes = ("--hidden-size", "4096", "--num-attention-heads", "32", "--vocab-size", "32000", "--seq-length", "4096")
    _, lines = command(
        *pp(4, PATTERN, pattern, *sizes, "--max-position-embeddings", "4096", "--global-batch-size", "64")
    )
    assert lines[:2] == shown


def test_mtp_layers_weigh_with_the_last_stage(command):
    last = [
        len(command(*pp(2, PATTERN, "*-" * 12 + mtp, V, "2", "--vocab-size", "256"))[0].hybrid_layer_pattern
            .split("/")[0].split("|")[-1])
        for mtp in ("", "/*-*-", "/*-*-/*-*-")
    ]  # fmt: skip
    assert last[0] > last[1] > last[2] >= 1


def test_the_vocabulary_of_a_tokenizer_is_counted_and_said(command):
    for tokenizer, says in (
        (("HuggingFaceTokenizer", "--tokenizer-model", "somewhere"), "128256 words, assumed, as of Llama 3"),
        (("GPT2BPETokenizer", "--vocab-file", "v", "--merge-file", "m"), "50257 words, as of GPT-2"),
    ):
        words = ("--pipeline-model-parallel-size", "2", "--tokenizer-type", *tokenizer)
        assert f"% of the model's with {says}" in command(*words, PATTERN, "*-" * 4)[1][0]
    assert " words" not in command(*pp(2, PATTERN, "*-" * 4))[1][0]


def test_the_number_of_chunks_is_the_first_that_meets_the_goal(command):
    args, lines = command(*pp(2, PATTERN, "*-" * 16, "--vocab-size", "16", "--global-batch-size", "256"))
    assert args.virtual_pipeline_model_parallel_size == 2
    assert re.search(r"idle \d\.\d% of the step with 64 micro-batches, the fewest chunks below 5%$", lines[0])
    args, lines = command(*pp(2, PATTERN, "*-" * 16, "--vocab-size", "16", "--global-batch-size", "8"))
    assert args.virtual_pipeline_model_parallel_size == 8 and "the least there is; goal: 5%" in lines[0]


def test_the_older_name_is_cut_too(command):
    args, lines = command(*pp(2, OLDER, "*-" * 4, "--vocab-size", "16"))
    assert args.hybrid_layer_pattern == "*-|*-|*-|*-" and lines[0].startswith(f"set {OLDER} '*-|*-|*-|*-'")


def test_the_older_pattern_of_mtp_layers_counts(command):
    older = ("--mtp-hybrid-override-pattern", "*-", "--mtp-num-layers", "2")
    args, lines = command(*pp(2, PATTERN, "*-" * 8, *older))
    main, *mtp = args.hybrid_layer_pattern.split("/")
    assert mtp == ["*-", "*-"] and main.count("|") >= 3 and "MTP and output" in lines[0]


def test_ones_own_segments_stay(command):
    own = "M*|M-|M*|M-|M|*|-|M"
    args, lines = command(*pp(4, PATTERN, own))
    assert args.hybrid_layer_pattern == own and args.virtual_pipeline_model_parallel_size == 2
    assert not any(line.startswith("set") for line in lines)
    says = "placement of 12 layers, 8 stages in order: 2*4 1*4 (pp_rank 0 to 3: 3*4): M*|M-|M*|M-|M|*|-|M"
    assert says in lines
    assert agreement.record(args, settings_of(args))["the placement"] == says


def test_an_empty_segment_of_ones_own_stays(command):
    args, _ = command(*pp(2, PATTERN, "*-||*-|*-"))
    assert [stage.kinds for stage in placed.stages_of(args)] == ["*-", "", "*-", "*-"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ((4, PATTERN, "*-|*-|*-|*-"), ("has 4 segments for 4 pipeline ranks", "Use 8 or 12 segments")),
        ((4, PATTERN, "*|-|*|-|*|-|*|-|*|-"), ("has 10 segments for 4 pipeline ranks", "leave out the |")),
        ((4, PATTERN, "*-*-*-*"), ("a layer in each of 4 x 2 stages", "has 7", "8 layers or more", "-size 3 or less")),
        ((2, PATTERN, "*-*-*-*", V, "4"), ("each of 2 x 4 stages", "has 7", f"{V} 3 or less")),
        ((2, PATTERN, "*-" * 4, V, "1"), (f"{V} is 1", "leave it out")),
        ((2, PATTERN, "*-|*-|*-|*-", V, "2"), (f"{V} 2 and the | of {PATTERN}", f"Leave out {V}")),
        ((2, PATTERN, "*-" * 4, "--num-layers-per-virtual-pipeline-stage", "2"), ("--num-layers-per-virtual", "put |")),
        ((2, PATTERN, "*-" * 4, "--pipeline-model-parallel-layout", "Et|t|t|tL"), ("--pipeline-model-parallel-la",)),
        ((2, PATTERN, "*-" * 4, "--decoder-first-pipeline-num-layers", "2"), ("--decoder-first-pipeline", "put |")),
        ((2, PATTERN, "*-" * 4, "--account-for-loss-in-pipeline-split"), ("--account-for-loss", "put |")),
        ((2, PATTERN, "*-" * 4, OLDER, "*-" * 4), ("both name the layers", f"Leave out {OLDER}")),
        ((2, PATTERN, "*-x-*-", *OWN), ("'x' is not a valid layer symbol", "Change the pattern")),
        ((2, PATTERN, "*-*-/*/-"), ("must be identical", "Change the pattern")),
        ((2, PATTERN, "/*"), ("has 0",)),
        ((2, PATTERN, "*-" * 4, "--seq-length", "0"), ("--seq-length of", "Add them")),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused_before_a_model_is_built(command, flags, words):
    with pytest.raises(UserError) as refused:
        command(*pp(*flags))
    for word in words:
        assert word in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


EXPERTS = ("--num-experts", "4", "--moe-ffn-hidden-size", "64", "--swiglu", "--disable-bias-linear")
AUX, Z = ("--moe-aux-loss-coeff", "1e-2"), ("--moe-z-loss-coeff", "1e-3")
NO_LOSS = (*AUX, "--moe-router-load-balancing-type", "none")


@pytest.mark.parametrize(
    "pattern, flags, hangs",
    [
        ("*|E|*|E", AUX, True),
        ("*-*E", AUX, True),  # the plugin's own cut
        ("*|E|*|E", Z, True),
        ("*|E|E|*", AUX, False),
        ("*|E|*|*/*E", AUX, True),
        ("E|*|*|*/*E", AUX, False),
        ("E|*|*|*", (*AUX, "--mtp-hybrid-override-pattern", "*E", "--mtp-num-layers", "1"), False),
        ("*|E|*|E", (), False),
        ("*|E|*|E", NO_LOSS, False),
        ("*|*|*|*", AUX, False),
    ],
)
def test_a_rank_without_experts_is_refused_where_megatrons_log_would_hang(command, pattern, flags, hangs):
    hangs &= "get_hybrid_layer_counts" in names_read(training_log)  # before 0.20
    if not hangs:
        assert command(*pp(2, PATTERN, pattern, *EXPERTS, *flags))
        return
    with pytest.raises(UserError, match=r"leaves pipeline ranks 0 of 2 without a layer E: .* logs the routers' losses"):
        command(*pp(2, PATTERN, pattern, *EXPERTS, *flags))


def test_a_kind_of_a_later_release_needs_ones_own_segments(command, monkeypatch):
    monkeypatch.setattr(allocation().Symbols, "VALID_LAYERS", {*allocation().Symbols.VALID_LAYERS, "Q"})
    with pytest.raises(UserError, match=r"has layers 'Q', whose cost the plugin does not know"):
        command(*pp(2, PATTERN, "*Q*Q*Q", *OWN))
    args, _ = command(*pp(2, PATTERN, "*Q|*|Q*|Q", *OWN))
    assert args.virtual_pipeline_model_parallel_size == 2


def test_a_stage_that_megatron_takes_elsewhere_is_refused(command, monkeypatch):
    args, _ = command(*pp(2, PATTERN, "*-*-*-*-"))
    monkeypatch.setattr(allocation(), "select_pipeline_segment", lambda *_: (["*", "-"], 0))
    with pytest.raises(UserError, match="skipped or built twice"):
        placed.check_placement(args)
    monkeypatch.setattr(allocation(), "select_pipeline_segment", lambda *_: (["*"], 0))
    with pytest.raises(UserError, match="the stages hold 4 layers"):
        placed.check_placement(args)


@pytest.mark.parametrize("pattern", ["*", "-", "E", "M", "G"])
def test_megatron_counts_the_same_operations(pattern):
    """Its count of a whole hybrid step, with one layer of a kind. Its convolution of Mamba is left out: 0.1%."""
    args = SimpleNamespace(
        hybrid_layer_pattern=pattern, hidden_size=2048, seq_length=4096, num_attention_heads=16, kv_channels=128,
        group_query_attention=True, num_query_groups=4, ffn_hidden_size=8192, swiglu=True, padded_vocab_size=0,
        moe_router_topk=2, moe_ffn_hidden_size=1024, moe_shared_expert_intermediate_size=512, moe_latent_size=None,
        mamba_state_dim=128, mamba_head_dim=64, mamba_num_groups=8, mamba_num_heads=None, mtp_num_layers=None,
        linear_key_head_dim=None, linear_value_head_dim=None, linear_num_key_heads=None, linear_num_value_heads=None,
        linear_conv_kernel_dim=None, experimental_attention_variant=None, gdp_num_householder=None, spec=None,
        num_layers=1, hybrid_override_pattern=None, is_hybrid_model=True,
    )  # fmt: skip
    if pattern not in allocation().Symbols.VALID_LAYERS:
        pytest.skip("not a layer of this release")
    step = num_floating_point_operations(args, batch_size=2)
    assert 3 * 2 * 4096 * sum(layer_flops(args, pattern)) == pytest.approx(step, rel=0.002)
