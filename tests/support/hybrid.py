"""Small hybrid models for tests: patterns of every kind of layer that a CPU has, cut unevenly, and their flags."""

from itertools import cycle, islice, pairwise

ROTARY = ("--position-embedding-type", "rope")
EXPERTS = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32", "--moe-aux-loss-coeff", "1e-2"),
    *("--moe-token-dispatcher-type", "alltoall", "--swiglu", "--disable-bias-linear"),
)
MAMBA = ("--mamba-state-dim", "8", "--mamba-head-dim", "8", "--mamba-num-groups", "2")
DELTA = (
    *("--linear-key-head-dim", "8", "--linear-value-head-dim", "8"),
    *("--linear-num-key-heads", "4", "--linear-num-value-heads", "4"),
)
# The layers of a model, repeated as often as it has room for; what follows them; their flags.
KINDS = {
    "attention": ("*-", "", ROTARY),
    "experts": ("*E", "", (*ROTARY, *EXPERTS)),
    "mtp": ("*-", "/*-/*-", ROTARY),
    "mamba": ("M-M*-", "", ("--position-embedding-type", "none", *MAMBA)),
    "all": ("M-*EG-", "/*E", (*ROTARY, *EXPERTS, *MAMBA, *DELTA)),
}


def segments(layers: str, num_layers: int, stages: int) -> str:
    """Repeat `layers` and cut them into stages of uneven length: the first ones one longer than the last ones."""
    word = "".join(islice(cycle(layers), num_layers))
    ends = [-(-num_layers * stage // stages) for stage in range(stages + 1)]
    return "|".join(word[begin:end] for begin, end in pairwise(ends))


def flags_of(kind: str, num_layers: int, pp: int, chunks: int, dp: int, microbatches: int) -> tuple[str, ...]:
    """Return Megatron's flags of a model and a shape; `microbatches` are those of one replica."""
    layers, mtp, more = KINDS[kind]
    stages = segments(layers, num_layers, pp * chunks)
    by_rank = ["".join(stages.split("|")[rank::pp]) for rank in range(pp)]
    # Megatron's log of that loss hangs where a rank has no experts, before 0.20, and fails for those of MTP in 0.20.
    if "E" in mtp or not all("E" in letters for letters in by_rank):
        more = (*more, "--moe-aux-loss-coeff", "0")
    expert_parallel = ("--expert-model-parallel-size", "2") if dp == 2 and "E" in layers else ()
    return (
        *("--hybrid-layer-pattern", stages + mtp),
        *("--pipeline-model-parallel-size", str(pp), "--global-batch-size", str(microbatches * dp)),
        *(*more, *expert_parallel),
    )
