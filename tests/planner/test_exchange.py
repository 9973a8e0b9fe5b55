"""What the ranks of a layer exchange: with tensor, context and expert parallelism, overlapped or not."""

from dataclasses import replace

import pytest

from megatron_bfpp.planner.activations import Activations
from megatron_bfpp.planner.exchange import Exchange
from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.layer_time import LayerTime
from megatron_bfpp.planner.model import GPT, Experts
from megatron_bfpp.planner.strategy import Strategy

SPARSE = Experts(2048, 64, 8, 1024, is_gated=True, bias=False)
MODEL = GPT(8, 2048, 16, 8192, 32000, num_query_groups=4, untied=True, hidden_dropout=0, attention_dropout=0,
            experts=SPARSE)  # fmt: skip
DENSE = replace(MODEL, experts=None)
GPU = replace(load_gpu("h100-80"), experts_s=0.0)
NODE, NETWORK = GPU.node_link, GPU.network_link


def strategy(**changes) -> Strategy:
    return replace(Strategy("no-pipeline", 1, 1, 64, 1, 1, 1, 1, ep=8), **changes)


def live(gpt: GPT, s: Strategy) -> Activations:
    return Activations(gpt, s.micro_batch, s.tp, s.is_split_along_sequence, 2, True, cp=s.cp, ep=s.ep)


def exchange(gpt: GPT = MODEL, **changes) -> Exchange:
    s = strategy(**changes)
    return Exchange(gpt, s, GPU, live(gpt, s))


def layer(gpt: GPT = MODEL, **changes) -> LayerTime:
    s = strategy(**changes)
    return LayerTime(gpt, s, GPU, "bf16", live(gpt, s), gpt.layers[0])


def test_experts_in_a_node_send_each_copy_of_a_token_over_its_links_there_and_back():
    copies = 8192 * 8 * 2048 * 2  # bytes
    expected = 2 * (copies * 7 / 8 / NODE.bytes_per_s + NODE.latency_s)
    assert exchange().experts(SPARSE) == pytest.approx(expected)
    assert exchange(ep=1).experts(SPARSE) == 0.0
    assert exchange(tp=2, dp=32, etp=1).experts(SPARSE) == pytest.approx(expected / 2, rel=0.01)


def test_experts_on_several_nodes_take_the_network_and_flex_sends_a_token_to_a_node_once():
    copies = 8192 * 8 * 2048 * 2
    plain = exchange(ep=32).experts(SPARSE)
    assert plain == pytest.approx(2 * (copies * 24 / 32 / NETWORK.bytes_per_s + NETWORK.latency_s))
    nodes = 4 * (1 - (3 / 4) ** 8)  # of four, for eight experts at random
    flex = exchange(ep=32, dispatcher="flex").experts(SPARSE)
    assert flex == pytest.approx(2 * (copies / 8 * nodes * 3 / 4 / NETWORK.bytes_per_s + NETWORK.latency_s))
    assert flex < 0.5 * plain
    gathered = exchange(ep=32, dispatcher="allgather").experts(SPARSE)
    assert gathered == pytest.approx(2 * GPU.link(1, 32, 64).all_gather_s(32 * 8192 * 2048 * 2, 32))


def test_exchanges_with_experts_are_hidden_as_far_as_there_is_work():
    exposed, hidden = layer(ep=32), layer(ep=32, overlaps_experts=True)
    once = exchange(ep=32).experts(SPARSE)
    assert exposed.exchanged == pytest.approx(2 * once)
    assert exposed.forward - hidden.forward == pytest.approx(min(once, exposed.forward - once))
    shared = replace(MODEL, experts=replace(SPARSE, shared_ffn=4096))
    beside = layer(shared, ep=32, overlaps_shared=True)
    assert 0 < beside.exchanged < layer(shared, ep=32).exchanged


def test_the_host_bounds_a_layer_with_experts():
    s, slow = strategy(), replace(GPU, experts_s=1.0)
    found = LayerTime(MODEL, s, slow, "bf16", live(MODEL, s), MODEL.layers[0])
    assert (found.forward, found.backward) == (1.0, 2.0)
    s = strategy(ep=1)
    dense = LayerTime(DENSE, s, slow, "bf16", live(DENSE, s), DENSE.layers[0])
    assert dense.forward < 1.0


def test_keys_and_values_go_around_a_ring_behind_the_attention():
    ring = exchange(DENSE, ep=1, cp=4, dp=16).ring(DENSE.attention)
    size = 2048 * 2 * 4 * 128 * 2  # tokens of a rank, keys and values of four groups
    assert ring == pytest.approx(3 * (size / NODE.bytes_per_s + NODE.latency_s))
    near, alone = layer(DENSE, ep=1, cp=4, dp=16), layer(replace(DENSE, seq_length=2048), ep=1, dp=64)
    assert near.exchanged == 0.0  # hidden, in a node
    assert near.forward > alone.forward  # each rank attends to four times as many positions
    short = replace(DENSE, seq_length=512)
    assert layer(short, ep=1, tp=8, cp=8, dp=1).exchanged > layer(short, ep=1, tp=8, cp=1, dp=8).exchanged / 8


def test_heads_are_exchanged_before_and_behind_the_attention():
    found = exchange(DENSE, ep=1, cp=4, dp=16, cp_exchange="a2a")
    size = 2048 * (2 * 2048 + 2 * 4 * 128) * 2
    assert found.context(DENSE.attention) == pytest.approx(size * 3 / 4 / NODE.bytes_per_s + NODE.latency_s)
    assert found.ring(DENSE.attention) == 0.0
    gathered = exchange(DENSE, ep=1, cp=4, dp=16, cp_exchange="all_gather").context(DENSE.attention)
    assert gathered == pytest.approx(NODE.all_gather_s(8192 * 2 * 4 * 128 * 2, 4))


def test_overlapped_tensor_parallelism_exposes_one_piece_for_each_end_of_a_block():
    wide = replace(DENSE, hidden_size=8192, num_attention_heads=64, num_query_groups=64)
    plain, overlapped = (layer(wide, ep=1, tp=4, dp=16, overlaps_tensor=each) for each in (False, True))
    each = exchange(wide, ep=1, tp=4, dp=16).tensor(wide.attention)
    assert plain.exchanged == pytest.approx(8 * each)
    assert overlapped.exchanged == pytest.approx(2 * each)
    narrow = [layer(DENSE, ep=1, tp=4, dp=16, overlaps_tensor=each).exchanged for each in (False, True)]
    assert narrow[0] > narrow[1] > narrow[0] / 4  # its products are too short to hide all
