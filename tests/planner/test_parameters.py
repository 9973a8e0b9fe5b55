"""Parameters and operations of the planner's models against Megatron's own, built on the meta device."""

import os
import tempfile
from collections.abc import Iterator

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron_bfpp.check.answers import Question, Rank
from megatron_bfpp.check.command import _PRELOAD
from megatron_bfpp.check.placed import placed
from megatron_bfpp.console.forked import Forks
from megatron_bfpp.planner.flags import gpt_of, parse, strategy_of

SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 255 --tokenizer-type NullTokenizer --mock-data --micro-batch-size 1 --global-batch-size 8 "
    "--train-iters 1 --lr 1e-3 --bf16 --transformer-impl local"
)
ROTARY = "--position-embedding-type rope --disable-bias-linear --normalization RMSNorm --swiglu"
UNTIED = "--untie-embeddings-and-output-weights"
EXPERTS = "--num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 48 --moe-router-load-balancing-type aux_loss"
LATENT = (
    "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 12 --qk-layernorm"
)
PP_2, PP_4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
JOBS = {  # GPUs, flags
    "dense, tied": (2, f"{PP_2} --group-query-attention --num-query-groups 2"),
    "rotary, gated, untied, TP": (4, f"{PP_2} {ROTARY} {UNTIED} --tensor-model-parallel-size 2 --add-qkv-bias"),
    "experts with biases": (4, f"{PP_2} {EXPERTS} --expert-model-parallel-size 2"),
    "experts, one shared, the first layer dense, ETP": (
        8,
        f"{PP_2} {ROTARY} {EXPERTS} --moe-shared-expert-intermediate-size 80 --moe-layer-freq ([0]*1+[1]*3) "
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 "
        "--expert-tensor-parallel-size 1",
    ),
    "experts in every second layer": (
        2,
        f"{PP_2} {ROTARY} {EXPERTS} --moe-layer-freq 2 --moe-shared-expert-gate "
        "--moe-shared-expert-intermediate-size 32",
    ),
    "latent attention": (4, f"{PP_2} {ROTARY} {LATENT} {UNTIED} --tensor-model-parallel-size 2"),
    "latent attention without a rank of queries": (
        2,
        f"{PP_2} {ROTARY} --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --v-head-dim 16",
    ),
    "latent attention, experts, MTP, a layout": (
        4,
        f"{PP_4} {ROTARY} {LATENT} {EXPERTS} {UNTIED} --mtp-num-layers 1 --moe-layer-freq ([0]*1+[1]*3) "
        "--pipeline-model-parallel-layout Et|t|tt|mL",
    ),
    "MTP, tied": (2, f"{PP_2} {ROTARY} --mtp-num-layers 1"),
    "context parallelism, counted ends": (
        8,
        f"{PP_2} {ROTARY} --context-parallel-size 2 --num-layers 6 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
    ),
    "chunks, first and last of their own": (
        2,
        f"{PP_2} --num-layers 6 --decoder-first-pipeline-num-layers 2 --num-virtual-stages-per-pipeline-rank 2",
    ),
    "breadth-first, layers that do not divide": (
        2,
        f"{PP_2} {ROTARY} {UNTIED} --num-layers 7 --pipeline-schedule breadth-first --global-batch-size 4",
    ),
    "breadth-first, experts in every second of layers that do not divide, MTP": (
        4,
        f"{PP_2} {ROTARY} {EXPERTS} --num-layers 11 --moe-layer-freq 2 --mtp-num-layers 1 "
        "--expert-model-parallel-size 2 --pipeline-schedule breadth-first --num-virtual-stages-per-pipeline-rank 3",
    ),
    "gated attention, a norm of queries and keys": (
        2,
        f"{PP_2} {ROTARY} --attention-output-gate --qk-layernorm --kv-channels 24 --ffn-hidden-size 96",
    ),
}


def _examine(question: Question, pp_rank: int) -> Iterator[tuple[Rank, float]]:
    from megatron_bfpp.check.rank import examine

    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        rank = examine(question, pp_rank, with_plans=False)
    from megatron.training import get_args
    from megatron.training.training import num_floating_point_operations
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    args = get_args()
    args.padded_vocab_size = calculate_padded_vocab_size(256, 128, args.tensor_model_parallel_size)
    yield rank, num_floating_point_operations(args, 8)


@pytest.mark.slow
def test_every_stage_has_the_parameters_and_the_step_has_the_operations_that_megatron_counts():
    words = {name: [*SIZES.split(), *flags.split()] for name, (_, flags) in JOBS.items()}
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    found: dict[str, list[tuple[Rank, float]]] = {name: [] for name in JOBS}
    with Forks(*_PRELOAD, at_most=2) as forks:
        for name, (gpus, _) in JOBS.items():
            question = Question(words[name], environment, gpus, 8, None)
            pp = int(words[name][words[name].index("--pipeline-model-parallel-size") + 1])
            for pp_rank in range(pp):
                forks.start(name, _examine, question, pp_rank)
        while (answer := forks.next()) is not None:
            found[answer[0]].append(answer[1])
    wrong = []
    for name, answers in found.items():
        job = answers[0][0].job
        plan = placed(words[name], JOBS[name][0], job.chunks, job.stage_layers, job.resident_chunks)
        flags = parse(words[name])
        stages = strategy_of(flags, JOBS[name][0]).stages(gpt_of(flags))
        if [stage.layers for stage in stages] != job.stage_layers:
            wrong.append(f"{name}: stages of {job.stage_layers} layers, planned are {stages}")
        for rank, flops in answers:
            for chunk in rank.chunks:
                expected = plan.parameters(chunk.stage)
                if expected != chunk.parameters:
                    wrong.append(f"{name}: stage {chunk.stage} has {chunk.parameters}, planned are {expected}")
            if plan.gpt.flops(8) != pytest.approx(flops, rel=1e-12):
                wrong.append(f"{name}: {flops} operations, planned are {plan.gpt.flops(8)}")
    assert not wrong, "\n".join(wrong)
