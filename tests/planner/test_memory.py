"""The estimate of memory against what Megatron allocates on a CPU."""

from dataclasses import replace

import measured
import pytest

from megatron_bfpp.planner.activations import Activations
from megatron_bfpp.planner.memory import PRECISIONS, memory
from megatron_bfpp.planner.model import GPT
from megatron_bfpp.planner.strategy import BREADTH_FIRST, DEFERRED, SCHEDULES, Strategy
from megatron_bfpp.schedule import lower, simulate
from megatron_bfpp.schedule.plan import most_messages
from megatron_bfpp.schedule.sharding import ParameterBytes, peak_parameter_bytes

# A vocabulary of 255: the NullTokenizer of 0.17 adds one word, and both are padded to 256.
SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 255"
)
PLAIN = GPT(4, 64, 4, 32, 255, hidden_dropout=0, attention_dropout=0)
MODELS = {
    "tied": (PLAIN, ""),
    "untied": (replace(PLAIN, untied=True), "--untie-embeddings-and-output-weights"),
    "swiglu, grouped queries, RMSNorm, rotary": (
        replace(
            PLAIN,
            untied=True,
            swiglu=True,
            num_query_groups=2,
            rms_norm=True,
            linear_bias=False,
            learned_positions=False,
        ),
        "--untie-embeddings-and-output-weights --swiglu --group-query-attention --num-query-groups 2 "
        + "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope",
    ),
    "learned positions": (
        replace(PLAIN, max_position_embeddings=512, ffn_hidden_size=192),
        "--max-position-embeddings 512 --ffn-hidden-size 192",
    ),
}
CASES = [  # every model replicated and with the distributed optimizer, in every precision, whole and divided each way
    ("tied", "fp32", "replicated", 1, 2, 1),
    ("tied", "bf16", "zero1", 1, 1, 2),
    ("untied", "fp16", "replicated", 2, 1, 1),
    ("untied", "bf16", "zero1", 1, 2, 1),
    ("swiglu, grouped queries, RMSNorm, rotary", "bf16", "replicated", 1, 2, 1),
    ("swiglu, grouped queries, RMSNorm, rotary", "fp32", "zero1", 2, 1, 1),
    ("learned positions", "bf16", "replicated", 2, 1, 1),
    ("learned positions", "fp16", "zero1", 1, 1, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision", "sharding", "tp", "pp", "dp"), CASES)
def test_state_is_what_megatron_allocates(tmp_path, name, precision, sharding, tp, pp, dp):
    gpt, flags = MODELS[name]
    schedule = "1f1b" if pp > 1 else "no-pipeline"
    strategy = Strategy(schedule, pp, tp, dp, 1, 1, 4 // dp, 4 // dp, sharding)
    words = [*SIZES.split(), *flags.split(), *strategy.flags()]
    words += [f"--{precision}"] * (precision != "fp32") + ["--initial-loss-scale", "1"] * (precision == "fp16")
    found = measured.measure(tmp_path, tp * pp * dp, *words)
    for rank, bytes_of in enumerate(found):
        expected = memory(gpt, strategy, PRECISIONS[precision], flash_attention=False, pp_rank=rank // (tp * dp))
        for kind in ("parameters", "gradients", "optimizer"):
            assert getattr(expected, kind) == pytest.approx(bytes_of[kind], rel=0.01), (rank, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("tied", "bf16"),
        ("untied", "fp32"),
        ("swiglu, grouped queries, RMSNorm, rotary", "bf16"),
        ("learned positions", "bf16"),
    ],
)
def test_activations_and_operations_are_what_megatron_counts(tmp_path, name, precision):
    gpt, flags = MODELS[name]
    words = [*SIZES.split(), *flags.split(), "--micro-batch-size", "2", *[f"--{precision}"] * (precision != "fp32")]
    (found,) = measured.measure(tmp_path, 1, *words)
    # Tested without dropout, whose masks a CPU keeps in the model's precision and a GPU in one byte.
    live = Activations(gpt, 2, 1, False, PRECISIONS[precision].element, flash_attention=False, fused_rms_norm=False)
    for recompute in ("none", "selective", "full"):
        expected = live.embedding() + gpt.num_layers * live.layer(recompute) + live.head()
        assert expected == pytest.approx(found[recompute], rel=0.1), recompute
    assert gpt.flops(4) == pytest.approx(found["flops"], rel=1e-9)
    assert gpt.parameters * PRECISIONS[precision].element == found["parameters"]


@pytest.mark.parametrize("schedule", sorted({*SCHEDULES[1:]} - {DEFERRED}))
@pytest.mark.parametrize(
    ("pp", "chunks", "microbatches", "group"),
    [(2, 2, 4, 2), (4, 2, 8, 4), (4, 4, 8, 8), (4, 1, 2, 2), (4, 3, 2, 2), (2, 3, 12, 12), (8, 2, 32, 16)],
)
def test_the_peaks_of_live_activations_and_messages_are_those_of_the_schedule(
    schedule, pp, chunks, microbatches, group
):
    if schedule == "1f1b":
        chunks = 1
    if schedule in ("1f1b", "interleaved-grouped"):
        group = microbatches
    strategy = Strategy(schedule, pp, 1, 1, chunks, 1, microbatches, group)
    if schedule not in (*BREADTH_FIRST, "1f1b") and microbatches < pp:
        with pytest.raises(ValueError):
            strategy.order()
        return
    order, ranks = strategy.order(), range(pp)
    peaks = simulate(order, strategy.shape).peak_live_activations()
    assert [strategy.peak_live(rank) for rank in ranks] == peaks
    messages = [most_messages(actions, strategy.shape) for actions in lower(order, strategy.shape)]
    # Receives are placed for a hop of 1/4: a message around the ring is asked for up to pp / 4 actions later.
    assert all(
        most <= strategy.peak_messages(rank) <= most + 4 + max(1, pp // 4) for rank, most in zip(ranks, messages)
    )


def test_messages_take_memory_of_their_own_beside_the_activations():
    gpt = GPT(64, 8192, 64, 1024, 50257, untied=True)
    for pp, sequence_parallel, bytes_of_one in (
        (4, True, 2 * 1024 * 8192 / 2),
        (4, False, 2 * 1024 * 8192),
        (1, True, 0),
    ):
        schedule = "breadth-first" if pp > 1 else "no-pipeline"
        strategy = Strategy(schedule, pp, 2, 1, 4, 1, 12, 12, "replicated", sequence_parallel=sequence_parallel)
        found = memory(gpt, strategy, PRECISIONS["bf16"], True, 0)
        assert found.messages == strategy.peak_messages(0) * bytes_of_one
        state = found.parameters + found.gradients + found.optimizer
        assert found.total == state + found.activations + found.messages + found.working


@pytest.mark.parametrize(("sharding", "chunks"), [("zero2", 2), ("zero2", 4), ("zero3", 2), ("zero3", 4), ("zero3", 8)])
def test_fully_sharded_state_is_what_its_plan_holds(sharding, chunks):
    gpt = GPT(64, 8192, 64, 1024, 50257, untied=True)
    strategy = Strategy("breadth-first", 4, 2, 8, chunks, 1, 8, 8, sharding)
    found = memory(gpt, strategy, PRECISIONS["bf16"], True, 1)
    plan = lower(strategy.order(), strategy.shape, resident_chunks=strategy.resident_chunks)
    of_chunk = 16 // chunks * gpt.layers[0].parameters(2)
    each = ParameterBytes(gathered=2, summed=4, shard=14, reduced=4)
    peak = peak_parameter_bytes(plan[1], strategy.shape, [of_chunk] * chunks, 8, each)
    # At the peak, not all chunks are reduced yet.
    assert found.parameters + found.gradients + found.optimizer == pytest.approx(peak, rel=0.05)


def test_replicated_and_zero1_state():
    gpt = GPT(64, 8192, 64, 1024, 50257, untied=True)
    layers_of_rank = 16 * gpt.layers[0].parameters(2)
    for sharding, expected in (("replicated", 18 * layers_of_rank), ("zero1", (6 + 12 / 8) * layers_of_rank)):
        found = memory(gpt, Strategy("breadth-first", 4, 2, 8, 4, 1, 8, 8, sharding), PRECISIONS["bf16"], True, 1)
        assert found.parameters + found.gradients + found.optimizer == expected


def test_fp8_saves_the_inputs_of_products_in_a_byte_and_keeps_weights_twice():
    gpt = GPT(64, 8192, 64, 1024, 50257, untied=True, hidden_dropout=0, attention_dropout=0)
    strategy, layers = Strategy("breadth-first", 4, 2, 8, 4, 1, 8, 8), 16 * gpt.layers[0].parameters(2)
    bf16, fp8, params = (memory(gpt, strategy, PRECISIONS[each], True, 1) for each in ("bf16", "fp8", "fp8-params"))
    assert (bf16.parameters, fp8.parameters, params.parameters) == (2 * layers, 4 * layers, 2 * layers)
    assert (fp8.gradients, fp8.optimizer) == (bf16.gradients, bf16.optimizer)
    # Per token and layer, of h = 8192, on each of 2 tensor ranks, split along the sequence: norms' inputs and outputs,
    # queries, keys, values and attention's output, fc1's output, fc2's input.
    h, at_once = 8192, strategy.peak_live(1) * 4
    assert bf16.activations == at_once * 1024 * h / 2 * (2 * (2 + 2) + 2 * (3 + 1) + 2 * 4 + 2 * 4)
    assert fp8.activations == at_once * 1024 * h / 2 * (2 * (2 + 1) + 2 * (3 + 1) + 1 + 2 * 4 + 1 * 4)
