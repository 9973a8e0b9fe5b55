"""What layers of each kind leave for the backward, against torch's saved-tensor hooks. Dense ones: test_memory.py."""

import os

import measured
import pytest

from megatron_bfpp.planner.activations import Activations
from megatron_bfpp.planner.flags import gpt_of, parse
from megatron_bfpp.planner.memory import PRECISIONS

SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 255 --micro-batch-size 2 --bf16 --hidden-dropout 0 --attention-dropout 0 "
    "--position-embedding-type rope --disable-bias-linear --normalization RMSNorm --swiglu "
    "--untie-embeddings-and-output-weights"
)
EXPERTS = "--num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 48 --moe-token-dispatcher-type alltoall"
SHARED = "--moe-shared-expert-intermediate-size 80"
LATENT = (
    "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 24 --kv-channels 24 --qk-layernorm"
)
SELECTIVE = "--recompute-granularity selective --recompute-modules"
SOME = {
    "latent, experts, one shared, first dense, MTP": (
        f"{LATENT} {EXPERTS} {SHARED} --moe-layer-freq ([0]*1+[1]*3) --mtp-num-layers 1"
    ),
    "gated attention, a norm of queries and keys": "--attention-output-gate --qk-layernorm --kv-channels 24",
    "experts made again": f"{EXPERTS} {SELECTIVE} moe",
}
OTHERS = {
    "latent experts, one shared": f"{EXPERTS} {SHARED} --moe-latent-size 24",
    "experts": EXPERTS,
    "latent": LATENT,
    "MTP": "--mtp-num-layers 1",
    "the dense MLP made again": f"{SELECTIVE} mlp",
    "shared expert and core of the attention made again": f"{EXPERTS} {SHARED} {SELECTIVE} shared_experts core_attn",
    "queries, keys and values made again from the latent ones": f"{LATENT} {SELECTIVE} mla_up_proj",
}
RECURRENT = {  # behind the pattern of the layers
    "Mamba": "MMMM --mamba-state-dim 32 --mamba-head-dim 8 --mamba-num-groups 4",
    "gated delta nets with more heads of values than of keys": (
        "GGGG --linear-key-head-dim 16 --linear-value-head-dim 24 --linear-num-key-heads 2 --linear-num-value-heads 8"
    ),
    "Mamba, gated delta nets, attention, latent experts": (
        f"M-*EG- {EXPERTS} --moe-latent-size 24 --mamba-state-dim 16 --mamba-head-dim 16 --mamba-num-groups 2 "
        "--linear-key-head-dim 16 --linear-value-head-dim 24 --linear-num-key-heads 4 --linear-num-value-heads 4"
    ),
}
OTHERS |= {name: f"--hybrid-layer-pattern {flags}" for name, flags in list(RECURRENT.items())[:2]}
SOME |= {name: f"--hybrid-layer-pattern {flags}" for name, flags in list(RECURRENT.items())[2:]}
CASES = {**SOME, **(OTHERS if os.environ.get("BFPP_ALL_CASES") else {})}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_the_forward_saves_is_within_6_percent(name, tmp_path):
    own = CASES[name].split()
    sizes = SIZES.removeprefix("--num-layers 4 ") if own[0].startswith("--hybrid") else SIZES
    words = [*sizes.split(), *own]
    found, args = measured.saved(tmp_path, *words), parse(words)
    gpt, element = gpt_of(args), PRECISIONS["bf16"].element
    modules = tuple(args.recompute_modules) or ("core_attn",)
    live = Activations(gpt, 2, 1, False, element, flash_attention=False, fused_rms_norm=False, modules=modules)
    layers = [live.layer(args.recompute_granularity or "none", layer) for layer in (*gpt.layers, *gpt.predictions)]
    assert live.embedding() + sum(layers) + live.head() == pytest.approx(found, rel=0.06)


def test_what_is_recomputed_is_not_kept_and_is_made_again_a_layer_at_a_time():
    gpt = gpt_of(parse([*SIZES.split(), *LATENT.split(), *EXPERTS.split(), *SHARED.split()]))

    def kept(*modules: str, linear: int = 2) -> float:
        return Activations(gpt, 2, 4, True, 2, True, linear, modules=modules).layer("selective")

    whole, tokens = kept(), 2 * 32 / 4  # of each of 4 ranks
    assert whole - kept("layernorm") == 2 * tokens * 64 * 2
    assert whole - kept("mla_up_proj") == tokens * (2 * 96 + 96) * 2
    assert whole - kept("moe_act") == tokens * 3 * 48 * 2
    assert whole - kept("shared_experts") == tokens * (160 + 80) * 2
    assert kept("moe") < kept("moe_act", "shared_experts") and kept("mlp") == whole
    assert whole - kept(linear=1) > 0
