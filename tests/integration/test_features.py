"""The features of Megatron's trainer work under breadth-first as under the interleaved schedule: same bits, same log.

Real processes train the real GPT on the CPU. The tests compare all bits of every loss and gradient norm, and everything
else that Megatron prints of a step: zeros in the gradients, loss scale, skipped steps, auxiliary and validation losses.
One line per feature: docs/reference/megatron_features.md. Features share a job where they do not hide each other.
"""

import copy
import functools
import itertools
import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from gpt import train

pytestmark = pytest.mark.slow

PP_2 = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
PP_4 = ("--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2")
TP_2 = ("--tensor-model-parallel-size", "2")
ROPE = ("--position-embedding-type", "rope")
UNTIED = ("--untie-embeddings-and-output-weights",)
EXPERTS = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "1e-2"),
    *("--moe-router-load-balancing-type", "aux_loss"),
)
GATED = ("--swiglu", "--disable-bias-linear")
EXPERT_PARALLEL = ("--expert-model-parallel-size", "2", "--moe-token-dispatcher-type")
SHARED_EXPERT = ("--moe-shared-expert-intermediate-size", "32")
ZERO_1 = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
# A scale that overflows in the first step and not in the last; each step without an overflow doubles it.
FP16 = ("--fp16", "--initial-loss-scale", str(2**20), "--loss-scale-window", "2", "--hysteresis", "1")
EVALUATION = ("--eval-iters", "2", "--eval-interval", "2", "--split", "8,1,1")
# Some results of steps after the first are declared wrong; the step is then run again on the same data.
RERUN = (
    *("--rerun-mode", "validate_results", "--check-for-spiky-loss", "--no-check-for-nan-in-loss-and-grad"),
    *("--error-injection-rate", "3", "--error-injection-type", "transient_error", "--train-iters", "5"),
)
OVERLAP = ("--overlap-p2p-communication-warmup-flush",)
DEFERRED = ("--defer-embedding-wgrad-compute", "--wgrad-deferral-limit", "2")
_TRAINING = Path(find_spec("megatron.training").submodule_search_locations[0])
_CAN_EVALUATE_OTHERWISE = "eval_global_batch_size" in (_TRAINING / "training.py").read_text()  # 0.18 and later
OTHER_BATCH = ("--eval-global-batch-size", "6") if _CAN_EVALUATE_OTHERWISE else ()
BLOCK = ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1")

# name: ranks, micro-batches, words that the log must have for the feature to be on, flags
SOME_CASES = {
    "experts_by_all_to_all": (
        *(4, 4, ["load_balancing_loss"]),
        (*PP_2, *EXPERTS, *GATED, *EXPERT_PARALLEL, "alltoall", *SHARED_EXPERT, *ZERO_1),
    ),
    "sequence_parallel": (
        *(4, 4, []),
        (*PP_2, *TP_2, *ROPE, "--sequence-parallel", "--recompute-granularity", "selective"),
    ),
    "context_parallel": (
        *(4, 4, ["validation loss"]),
        (*PP_2, *ROPE, "--context-parallel-size", "2", *BLOCK, *EVALUATION, *OTHER_BATCH),
    ),
    "fp16": (2, 4, ["num zeros"], (*PP_2, *FP16, "--log-num-zeros-in-grad", "--train-iters", "6")),
    "mtp": (2, 4, ["mtp_1 loss"], (*PP_2, *ROPE, "--mtp-num-layers", "1", "--bf16")),
    "batched_p2p": (4, 8, [], (*PP_4, "--no-overlap-p2p-communication", *UNTIED)),
    "rerun": (
        *(2, 4, ["First rerun: unexpected result is not reproducible"]),
        (*PP_2, *RERUN, *OVERLAP, "--calculate-per-token-loss", "--timing-log-level", "2"),
    ),
    "deferred_embedding_gradients": (2, 4, ["drained 2 "], (*PP_2, *UNTIED, *DEFERRED)),
}
MORE_CASES = {
    "experts_by_all_gather": (
        *(4, 4, ["load_balancing_loss"]),
        (*PP_2, *EXPERTS, *GATED, *EXPERT_PARALLEL, "allgather"),
    ),
    "experts_with_biases": (2, 4, ["load_balancing_loss"], (*PP_2, *EXPERTS, "--no-bias-gelu-fusion")),
    "experts_with_router_bias": (
        *(2, 4, ["load_balancing_loss"]),
        (*PP_2, *EXPERTS, *GATED, "--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"),
    ),
    "experts_and_tensor_parallel": (
        *(4, 4, ["load_balancing_loss"]),
        (*PP_2, *TP_2, "--sequence-parallel", *EXPERTS, *GATED, *EXPERT_PARALLEL, "alltoall",
         "--expert-tensor-parallel-size", "1"),
    ),
    "experts_and_mtp_per_token": (
        *(2, 4, ["load_balancing_loss", "mtp_1 loss"]),
        (*PP_2, *ROPE, *EXPERTS, *GATED, "--mtp-num-layers", "1", "--calculate-per-token-loss"),
    ),
    "rms_norm": (4, 4, [], (*PP_2, *TP_2, "--sequence-parallel", "--normalization", "RMSNorm", *ROPE)),
    "untied_mtp": (2, 4, ["mtp_1 loss"], (*PP_2, *ROPE, "--mtp-num-layers", "1", *UNTIED)),
    "context_parallel_groups": (
        *(4, 4, []),
        (*PP_2, *ROPE, "--context-parallel-size", "2", "--group-query-attention", "--num-query-groups", "2",
         "--calculate-per-token-loss", "--bf16"),
    ),
}  # fmt: skip
CASES = SOME_CASES | MORE_CASES if os.environ.get("BFPP_ALL_CASES") else SOME_CASES


@functools.cache
def trained(ranks: int, *flags: str) -> tuple[list[dict], list[str]]:
    """(losses and gradient norms of every step, the lines that Megatron printed of steps and evaluations)."""
    with tempfile.TemporaryDirectory() as folder:
        steps = train(Path(folder), ranks, *flags, prepare=with_fusion if DEFERRED[0] in flags else None)
        log = (Path(folder) / f"rank{ranks - 1}.log").read_text()
    lines = re.findall(r"(?: iteration +\d+/| validation loss at |First rerun: |drained ).*", log)
    return steps, [re.sub(r"elapsed time per iteration \(ms\): [0-9.]+ ", "", line) for line in lines]


def with_fusion() -> None:
    """Gradient accumulation fusion, which the deferral needs: its kernel of Apex, in torch's words."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import layers

    from megatron_bfpp.integration.cpu import arguments as cpu_arguments

    def accumulate(inputs, grad_output, main_grad):
        main_grad.add_(grad_output.t() @ inputs)

    kernels = ModuleType("fused_weight_gradient_mlp_cuda")
    kernels.wgrad_gemm_accum_fp32 = accumulate
    sys.modules[kernels.__name__] = layers.fused_weight_gradient_mlp_cuda = kernels
    layers._grad_accum_fusion_available = True
    changes = cpu_arguments._CHANGES
    cpu_arguments._CHANGES = tuple(change for change in changes if change[0] != "gradient_accumulation_fusion")
    drain = schedules.drain_embedding_wgrad_compute

    def told(config, activations, *more):
        print(f"drained {len(activations)} micro-batches of the output layer", flush=True)
        drain(config, activations, *more)

    schedules.drain_embedding_wgrad_compute = told
    # With Transformer Engine the output layer is the only layer of this class, and Megatron counts on that.
    linear, forward = layers.ColumnParallelLinear, layers.ColumnParallelLinear.forward

    def deferring_in_the_output_layer_only(self, *args, **kwargs):
        if self.embedding_activation_buffer is None and self.config.defer_embedding_wgrad_compute:
            self.config = copy.copy(self.config)
            self.config.defer_embedding_wgrad_compute = False
        return forward(self, *args, **kwargs)

    linear.forward = deferring_in_the_output_layer_only


def arms(ranks: int, microbatches: int, *flags: str, ours: tuple[str, ...] = ()) -> tuple[tuple, tuple]:
    model_ranks = 1
    for name in ("pipeline-model", "tensor-model", "context"):
        flag = f"--{name}-parallel-size"
        model_ranks *= int(flags[flags.index(flag) + 1]) if flag in flags else 1
    flags += ("--global-batch-size", str(microbatches * (ranks // model_ranks)))
    return trained(ranks, *flags), trained(ranks, *flags, "--pipeline-schedule", "breadth-first", *ours)


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_and_the_same_log(case):
    assert_same_bits_and_log(case)


SPLIT = ("--breadth-first-weight-gradients", "deferred")
SOME_SPLIT = ("experts_by_all_to_all", "sequence_parallel", "fp16", "mtp", "deferred_embedding_gradients")


@pytest.mark.parametrize("case", CASES if len(CASES) > len(SOME_CASES) else SOME_SPLIT)
def test_split_backwards_too(case):
    assert_same_bits_and_log(case, SPLIT)


def assert_same_bits_and_log(case: str, flags_of_ours: tuple[str, ...] = ()) -> None:
    ranks, microbatches, words, flags = CASES[case]
    (steps, lines), ours = arms(ranks, microbatches, *flags, ours=flags_of_ours)
    assert len({step["lm loss hex"] for step in steps}) == len(steps) >= 3, (
        "the losses do not move: nothing is compared"
    )
    assert len(lines) >= len(steps)
    assert all(any(word in line for line in lines) for word in words), lines
    assert ours == (steps, lines)


def test_steps_of_fp16_that_overflow_are_skipped_and_others_are_not():
    ranks, microbatches, _, flags = SOME_CASES["fp16"]
    (steps, lines), _ = arms(ranks, microbatches, *flags)
    assert {"grad norm hex" in step for step in steps} == {True, False}, "a skipped step has no norm"
    scales = [float(re.search(r"loss scale: ([0-9.]+)", line)[1]) for line in lines]
    changes = {after / before for before, after in itertools.pairwise(scales)}
    assert changes == {0.5, 1.0, 2.0}, "the scale falls, stays and rises"


@pytest.mark.parametrize(
    ("case", "without"),
    [("context_parallel", ("--context-parallel-size", "2")), ("sequence_parallel", ("--sequence-parallel",))],
)
def test_a_sequence_cut_into_parts_has_the_losses_of_a_whole_one(case, without):
    """Of the CPU mode's attention and norms: the sums are in another order, so not to the bit."""
    ranks, microbatches, _, flags = SOME_CASES[case]
    (parts, _), _ = arms(ranks, microbatches, *flags)
    position = flags.index(without[0])
    whole = flags[:position] + flags[position + len(without) :]
    ranks //= 2 if case == "context_parallel" else 1
    expected, _ = trained(ranks, *whole, "--global-batch-size", str(microbatches))
    for part, step in zip(parts, expected, strict=True):
        for name in ("lm loss hex", "grad norm hex"):
            assert float.fromhex(part[name]) == pytest.approx(float.fromhex(step[name]), rel=2e-5), (parts, expected)
