"""The operations of each kind of layer, against counts by hand: a matrix of m x n takes a token 2 m n operations."""

from types import SimpleNamespace

import pytest

from megatron_bfpp.schedule.costs import EQUAL, times_of
from megatron_bfpp.schedule.model.layers import LAYER_KINDS, layer_flops

H, S = 64, 128
GPT = {"hidden_size": H, "seq_length": S, "num_attention_heads": 4}


def count(kind, **sizes):
    return layer_flops(SimpleNamespace(**GPT, **sizes), kind)


@pytest.mark.parametrize(
    "kind, sizes, linear, other",
    [
        # queries, keys, values and projection; a token looks at S / 2 others, twice (keys, values)
        ("*", {}, 4 * H * H, S / 2 * 2 * H),
        ("*", {"kv_channels": 8}, 4 * H * 32, S / 2 * 2 * 32),
        ("*", {"num_query_groups": 2}, 4 * H * H, S / 2 * 2 * H),  # without --group-query-attention: no groups
        ("*", {"num_query_groups": 2, "group_query_attention": True}, 2 * H * H + 2 * H * 32, S / 2 * 2 * H),
        ("*", {"attention_output_gate": True}, 5 * H * H, S / 2 * 2 * H),
        ("-", {}, 2 * H * 256, 0),
        ("-", {"ffn_hidden_size": 96}, 2 * H * 96, 0),
        ("-", {"ffn_hidden_size": 96, "swiglu": True}, 3 * H * 96, 0),
        ("-", {"swiglu": True}, 3 * H * 128, 0),  # Megatron's default: 2/3 of 256, down to a multiple of 64
        ("E", {"moe_router_topk": 2, "moe_ffn_hidden_size": 32, "num_experts": 8}, 2 * H * 2 * 32, 0),
        ("E", {"moe_router_topk": 2, "num_experts": 8, "ffn_hidden_size": 96, "swiglu": True}, 3 * H * 2 * 96, 0),
        (
            "E",
            {"moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 48},
            2 * H * 2 * 32 + 2 * H * 48,
            0,
        ),
        # into a width of 16 and back, experts of that width, a shared one of the whole width
        (
            "E",
            {"moe_ffn_hidden_size": 32, "moe_latent_size": 16, "moe_shared_expert_intermediate_size": 48},
            2 * H * 16 + 2 * 16 * 32 + 2 * H * 48,
            0,
        ),
        # 2 heads of 64 (twice the hidden size), in: x and z of 128, B and C of 8 x 128, a step for each head
        ("M", {}, H * (2 * 128 + 2 * 8 * 128 + 2) + 128 * H, 4 * (128 + 2 * 8 * 128) + 3.5 * 128 * 128),
        (
            "M",
            {"mamba_num_heads": 3, "mamba_head_dim": 32, "mamba_state_dim": 16, "mamba_num_groups": 1},
            H * (2 * 96 + 2 * 16 + 3) + 96 * H,
            4 * (96 + 2 * 16) + 3.5 * 96 * 16,
        ),
        (
            "G",
            {"linear_num_value_heads": 4, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
             "linear_key_head_dim": 16, "linear_conv_kernel_dim": 3},
            H * (2 * 32 + 2 * 32 + 2 * 4) + 32 * H,
            3 * (2 * 32 + 32) + 4 * 4 * 8 * 8,
        ),
        # queries 4 x (16 + 8); keys and values from 32, a position of 8; back from 4 x 16
        (
            "+",
            {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32},
            H * 96 + H * (32 + 8) + 32 * 4 * 32 + 64 * H,
            S / 2 * 4 * (16 + 8 + 16),
        ),
        (
            "D",
            {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 24,
             "dsa_indexer_n_heads": 2, "dsa_indexer_head_dim": 8, "dsa_indexer_topk": 10},
            24 * (H + 96) + H * (32 + 8) + 32 * 4 * 32 + 64 * H + 24 * 16 + H * (8 + 2),
            S / 2 * 16 + 10 * 4 * (16 + 8 + 16),
        ),
    ],
)  # fmt: skip
def test_operations_of_a_layer(kind, sizes, linear, other):
    assert count(kind, **sizes) == pytest.approx((2 * linear, 2 * other))


def test_the_times_of_a_hybrid_are_those_of_its_layers_together():
    args = SimpleNamespace(**GPT, hybrid_layer_pattern="M*|-M/*-", mamba_state_dim=16, mamba_num_groups=1)
    linear, other = map(sum, zip(*(layer_flops(args, kind) for kind in "M*-M"), strict=True))
    assert times_of(args) == pytest.approx((1.0, (linear + 2 * other) / (linear + other), linear / (linear + other)))
    assert times_of(SimpleNamespace(**GPT, hybrid_layer_pattern="*-")) == times_of(SimpleNamespace(**GPT))
    assert times_of(SimpleNamespace(**GPT, hybrid_layer_pattern="??")) == EQUAL


def test_every_kind_needs_no_more_than_the_sizes_of_a_gpt():
    assert all(min(count(kind)) >= 0 and sum(count(kind)) > 0 for kind in LAYER_KINDS)
