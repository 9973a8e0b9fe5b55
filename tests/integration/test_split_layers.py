"""A split backward of Megatron's own GPT on one rank: the bits of a whole one, layer by layer."""

import contextlib
import io
import logging
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from jobs import run_job
from megatron.core.tensor_parallel import layers
from one_rank import LAYERS, gpt_chunks, start, train

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.flags.arguments import refuse
from megatron_bfpp.integration.flags.settings import Settings, settings_of
from megatron_bfpp.integration.step import weight_gradients
from megatron_bfpp.runtime.weight_gradients import OwedGradients
from megatron_bfpp.schedule import PipelineShape
from megatron_bfpp.schedule.costs import EQUAL, times_of

# Per layer of the local implementation: qkv, projection and the two of the MLP.
LINEARS = 4 * LAYERS
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _trained(place, steps, zero_1, config, **choices):
    """What a rank reports, sends and accumulates in some steps, and how many gradients were owed."""
    from megatron_bfpp.integration.cpu.mode import enable_cpu

    logging.disable(logging.INFO)
    enable_cpu()
    owed, owe = [], OwedGradients.owe

    def counting(self, weight, gradient):
        owed.append(weight)
        owe(self, weight, gradient)

    OwedGradients.owe = counting
    try:
        start(*place)
        seen = train(Settings("breadth-first", **choices), gpt_chunks(place[2], "rope", zero_1, **config), steps, [])
    finally:
        OwedGradients.owe = owe
    return seen, len(owed)


def _same_bits(place, steps, zero_1=False, config=None, weight_lag=None, **choices):
    """Compare all bits of a rank with whole and with split backwards. place: P, rank, chunks."""
    whole, none = _trained(place, steps, zero_1, config or {}, **choices)
    choices |= {"weight_gradients": "deferred", "weight_lag": weight_lag}
    split, owed = _trained(place, steps, zero_1, config or {}, **choices)
    is_last = place[1] == place[0] - 1
    per_microbatch = LINEARS * place[2] + is_last  # the output layer
    assert none == 0 and owed == per_microbatch * sum(each for each in steps if each > 0), (none, owed)
    assert all(len(one) == len(other) > 0 for one, other in zip(whole, split, strict=True))
    assert all(all(map(torch.equal, one, other)) for one, other in zip(whole, split))


STEPS = [4, -2, 4, 3]  # micro-batches; the second is an evaluation, which splits nothing


@pytest.mark.parametrize("rank", [0, 1])
def test_every_gradient_has_the_bits_of_a_whole_backward(rank, tmp_path):
    run_job(_every_gradient, 1, tmp_path, rank)


def _every_gradient(rank):
    _same_bits((2, rank, 2), STEPS)
    _same_bits((2, rank, 2), STEPS, zero_1=True, weight_lag=0)
    _same_bits((2, rank, 2), STEPS, config=FULL, weight_lag=5)
    _same_bits((2, rank, 2), STEPS, config={"add_bias_linear": False}, backward="late", group_size=2)


@pytest.mark.slow
def test_of_more_ranks_and_chunks_too(tmp_path):
    run_job(_more_ranks, 1, tmp_path)


def _more_ranks():
    for rank in range(4):
        _same_bits((4, rank, 3), [4, 6])
        _same_bits((4, rank, 1), [1, 3], weight_lag=2)


def test_with_the_fused_kernel_the_gradient_is_added_by_it(tmp_path):
    run_job(_fused, 1, tmp_path)


def _fused():
    calls = []

    def accumulate(inputs, grad, main_grad):
        calls.append((inputs.dim(), grad.dim()))
        main_grad.add_(grad.t() @ inputs)

    layers.fused_weight_gradient_mlp_cuda = kernels = ModuleType("fused_weight_gradient_mlp_cuda")
    kernels.wgrad_gemm_accum_fp32 = accumulate
    layers._grad_accum_fusion_available = True
    for rank in range(2):
        _same_bits((2, rank, 2), [4, 3], config={"gradient_accumulation_fusion": True})
    assert set(calls) == {(2, 2)}


def test_the_layers_that_stay_whole_are_named(tmp_path):
    run_job(_whole_layers, 1, tmp_path)


def _whole_layers():
    from megatron_bfpp.integration.cpu.mode import enable_cpu

    enable_cpu()
    start(2, 1, 2)
    first, last = gpt_chunks(2, "rope")
    weights, whole = weight_gradients.splittable(last)
    assert len(weights) == LINEARS + 1 and whole == []
    # Two that are one weight, as an embedding's and an output layer's, and a matrix of an unknown layer.
    mlp = first.module.decoder.layers[0].mlp
    first.module.other = torch.nn.Linear(2, 2)
    first.module.tied = torch.nn.Embedding(2, 2)
    first.module.tied.weight = mlp.linear_fc1.weight
    mlp.linear_fc2.weight.requires_grad = False
    weights, whole = weight_gradients.splittable(first)
    assert len(weights) == LINEARS - 2
    assert whole == ["module.decoder.layers.0.mlp.linear_fc1", "module.other"]


def test_the_line_at_start_says_what_waits_and_what_auto_has_come_to(tmp_path):
    run_job(_lines_at_start, 1, tmp_path)


def _lines_at_start():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _trained((2, 0, 2), [2, 60], False, {}, weight_gradients="auto")
    lines = [line for line in printed.getvalue().splitlines() if "breadth-first" in line]
    # Per token of 4 bytes and layer of 16: inputs of 16, 16, 16, 64 and outputs of 48, 16, 64, 16; 2 layers, 12 tokens.
    assert "weights' gradients of 1 to 2 micro-batches wait on a rank (0.0234 MiB each), which gains" in lines[0]
    assert "weights' gradients with the backward (auto: to defer them gains 0.6%)" in lines[1]


def test_auto_splits_where_a_simulation_gains_enough():
    settings = Settings("breadth-first", weight_gradients="auto")
    for microbatches, is_split in ((1, True), (8, True), (16, True), (200, False)):
        plan = settings.plan_of(PipelineShape(8, 4, microbatches))
        assert plan.is_split == is_split
        assert not settings.plan_of(PipelineShape(8, 4, microbatches), evaluation=True).is_split
    whole = Settings("breadth-first").plan_of(PipelineShape(8, 4, 200))
    assert settings.plan_of(PipelineShape(8, 4, 200)).digest == whole.digest
    # i twice as long and w half as long as f: less of a backward can wait.
    gains = [replace(settings, times=times).weight_lags_of(PipelineShape(8, 4, 8))[1] for times in (EQUAL, (1, 2, 0.5))]
    assert gains[0] > 0.11 and 0 < gains[1] < gains[0]


def test_times_are_counted_from_the_sizes_of_a_model():
    assert times_of(SimpleNamespace()) == EQUAL
    sizes = {"hidden_size": 64, "seq_length": 128, "num_attention_heads": 4}
    linear, attention = 24 * 64 * 64, 2 * 128 * 64
    forward = linear + attention
    expected = (1.0, (linear + 2 * attention) / forward, linear / forward)
    assert times_of(SimpleNamespace(**sizes)) == pytest.approx(expected)
    full = times_of(SimpleNamespace(**sizes, recompute_granularity="full"))
    assert full == pytest.approx((1.0, expected[1] + 1, expected[2]))
    # Megatron's default width of a gated MLP: 2/3 of 4 x hidden, down to a multiple of 64.
    grouped = times_of(SimpleNamespace(**sizes, group_query_attention=True, num_query_groups=1, swiglu=True))
    assert grouped[2] == pytest.approx(1 / (1 + attention / (2 * 64 * (2 * 64 + 2 * 16 + 3 * 128))))
    experts = SimpleNamespace(**sizes, num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=32)
    assert times_of(experts)[2] == pytest.approx(1 / (1 + attention / (2 * 64 * (4 * 64 + 2 * 64))))


@pytest.mark.parametrize(
    "schedule, choices, wrong",
    [
        ("breadth-first", {"weight_gradients": "later"}, "--breadth-first-weight-gradients later does not exist"),
        ("breadth-first", {"weight_gradients": "deferred", "weight_lag": -1}, "--breadth-first-weight-lag is -1"),
        ("breadth-first", {"weight_lag": 2}, "Use it with --breadth-first-weight-gradients deferred"),
        ("1f1b", {"weight_gradients": "deferred"}, "Use --pipeline-schedule breadth-first"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_sentence(schedule, choices, wrong):
    args = {f"breadth_first_{name}": value for name, value in choices.items()}
    with pytest.raises(UserError, match=wrong) as error:
        settings_of(SimpleNamespace(pipeline_schedule=schedule, **args))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "choices, args, wrong",
    [
        ({"engine": "megatron"}, {}, "whole backwards.*\\n.*--breadth-first-engine plan"),
        ({}, {"cuda_graph_impl": "local"}, "graph.*\\n.*--breadth-first-weight-gradients with-backward"),
        ({}, {"delay_wgrad_compute": True}, "--delay-wgrad-compute does not work"),
    ],
)
def test_what_cannot_split_a_backward_is_refused(choices, args, wrong):
    settings = Settings("breadth-first", weight_gradients="deferred", **choices)
    given = SimpleNamespace(pipeline_model_parallel_size=2, cuda_graph_modules=[], **args)
    with pytest.raises(UserError, match=wrong):
        refuse(given, settings)
