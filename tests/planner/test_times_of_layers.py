"""The planner splits a backward as the plugin does, whatever the layers are: from the same sizes, the same times."""

from types import SimpleNamespace

import pytest

from megatron_bfpp.planner.flags import gpt_of, parse
from megatron_bfpp.schedule.costs import times_of
from megatron_bfpp.schedule.model.layers import layer_flops

SIZES = "--hidden-size 2048 --num-attention-heads 16 --seq-length 4096 --vocab-size 32000"
EXPERTS = "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 1024 --moe-shared-expert-intermediate-size 512"
LATENT = (
    "--multi-latent-attention --q-lora-rank 768 --kv-lora-rank 256 --qk-head-dim 64 --qk-pos-emb-head-dim 32"
    " --v-head-dim 96"
)


@pytest.mark.parametrize(
    "model",
    [
        "--num-layers 8",
        "--num-layers 8 --swiglu --group-query-attention --num-query-groups 4 --ffn-hidden-size 5632",
        f"--num-layers 8 {EXPERTS}",
        f"--num-layers 8 {EXPERTS} {LATENT}",
        "--hybrid-layer-pattern M-M*-M-M*-",
        f"--hybrid-layer-pattern ME*EME*E {EXPERTS} --mamba-num-heads 48 --mamba-state-dim 64",
    ],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_same_times_from_the_same_sizes(model, recompute):
    args = parse([*SIZES.split(), *model.split()])
    args.recompute_granularity = recompute
    assert gpt_of(args).times(recompute) == pytest.approx(times_of(args))


@pytest.mark.parametrize("kind", ["*", "-", "E", "M"])
def test_the_same_operations_of_a_layer(kind):
    words = f"{SIZES} {EXPERTS} --hybrid-layer-pattern *{kind} --group-query-attention --num-query-groups 4"
    args = parse(words.split())
    layer = gpt_of(args).layers[1]
    # The planner counts as Megatron does, without the convolution of Mamba.
    assert layer.operations(4096) == pytest.approx(sum(layer_flops(SimpleNamespace(**vars(args)), kind)), rel=0.002)
