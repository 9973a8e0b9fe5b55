"""The search over strategies: what fits, in what order, and why the rest was rejected."""

from dataclasses import replace
from itertools import product

import pytest

from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.model import GPT, Experts, Mamba
from megatron_bfpp.planner.model.layouts import balanced, placings
from megatron_bfpp.planner.noise_scale import trade_off
from megatron_bfpp.planner.search import Request, estimate, search
from megatron_bfpp.planner.strategy import BREADTH_FIRST, DEFERRED
from megatron_bfpp.planner.table import ranking, without_slower_twins
from megatron_bfpp.schedule.model.layout import layout_of

GPT_52B = GPT(64, 8192, 64, 1024, 51200, untied=True)
HYBRID = replace(GPT_52B, pattern="M-*-" * 16, mamba=Mamba(8192, heads=128))
REQUEST = Request(GPT_52B, load_gpu("v100-32"), 64, 64, "fp16")


@pytest.mark.slow
def test_all_that_is_considered_fits_or_has_a_reason_and_the_fastest_comes_first():
    found = search(REQUEST)
    assert len(found.estimates) + sum(found.rejected.values()) == found.considered
    times = [each.step.step for each in found.estimates]
    assert times == pytest.approx(sorted(times), abs=1e-6)
    assert found.estimates[0].step.is_exact
    for each in found.estimates:
        strategy = each.strategy
        assert each.memory.total <= REQUEST.gpu.memory - REQUEST.reserve
        assert strategy.num_gpus == 64 and strategy.global_batch == 64
        stages = strategy.pp * strategy.chunks
        if 64 % stages:
            assert (
                strategy.schedule.startswith("breadth-first") or "--pipeline-model-parallel-layout" in strategy.placing
            )
        assert len(strategy.stages(GPT_52B)) == stages and sum(each.layers for each in strategy.stages(GPT_52B)) == 64


@pytest.mark.slow
def test_megatrons_limits_are_kept_unless_the_question_is_hypothetical():
    request = replace(REQUEST, pp=(8,), tp=(4,), micro_batch=(1,))
    plain, hypothetical = search(request), search(replace(request, hypothetical=True))
    assert {each.strategy.sharding for each in plain.estimates} <= {"replicated", "zero1"}
    sharded = [each.strategy for each in hypothetical.estimates if each.strategy.sharding in ("zero2", "zero3")]
    assert sharded and all(each.schedule.startswith("breadth-first") for each in sharded)
    assert all(each.group == each.num_microbatches for each in sharded)  # else chunks are gathered for each group
    assert any("fp16" in reason for reason in plain.rejected)


def test_only_what_is_asked_for():
    found = search(replace(REQUEST, pp=(8,), tp=(8,), schedule=("breadth-first",), recompute=("full",), chunks=(2, 4)))
    assert {(each.strategy.pp, each.strategy.tp, each.strategy.recompute) for each in found.estimates} == {
        (8, 8, "full")
    }
    assert {each.strategy.chunks for each in found.estimates} == {2, 4}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_gpus": 63}, "global batch is no multiple of DP"),
        ({"pp": (3,)}, "GPUs are no multiple of PP x TP"),
        ({"tp": (16,)}, "TP: more ranks than GPUs in a node"),
        ({"gpt": replace(GPT_52B, num_query_groups=2), "tp": (8,)}, "TP: heads, query groups"),
        ({"pp": (32,), "tp": (2,), "global_batch": 8}, "Megatron's interleaved schedule refuses so few micro-batches"),
        ({"pp": (1,)}, "memory: more than a GPU has"),
        ({"gpt": HYBRID, "precision": "bf16", "pp": (4,), "sharding": ("zero3",), "schedule": ("breadth-first",)},
         "zero3: Megatron's checkpoints cannot hold it with Mamba layers"),
    ],
)  # fmt: skip
def test_rejections_say_why(changes, reason):
    found = search(replace(REQUEST, **changes))
    assert any(text.startswith(reason) for text in found.rejected), found.rejected


def test_layers_that_do_not_divide_are_placed_by_a_layout():
    request = replace(REQUEST, gpu=load_gpu("h200"), num_gpus=24, global_batch=24, precision="bf16", pp=(3,), tp=(8,),
                      micro_batch=(1,), schedule=("1f1b", "interleaved"), chunks=(1, 2),
                      sharding=("replicated",))  # fmt: skip
    found = search(request).estimates
    assert {each.strategy.schedule for each in found} == {"1f1b", "interleaved"}
    for each in found:
        layers, flags = each.strategy.stage_layers, each.strategy.flags()
        assert sum(layers) == 64 and len(layers) == 3 * each.strategy.chunks and layers[0] <= min(layers[1:-1])
        layout = flags[flags.index("--pipeline-model-parallel-layout") + 1]
        assert layout.startswith("Et*") and layout.endswith(f"t*{layers[-1]}L")


@pytest.mark.parametrize(
    ("sizes", "layers", "text"),
    [
        ((61, 32, 3.4), (1, *[2] * 30, 0), "Et|(t*2|)*30mL"),
        ((8, 4, 0.4), (2, 2, 2, 2), "Et*2|(t*2|)*2t*2mL"),
        ((64, 3, 0.5), (21, 21, 22), "Et*21|t*21|t*22mL"),
        ((2, 4, 2.0), None, None),
    ],
)
def test_a_layout_spares_the_stage_with_the_loss(sizes, layers, text):
    assert balanced(*sizes) == layers
    assert text is None or layout_of(layers, 1) == text


SPARSE = replace(GPT_52B, num_layers=16, hidden_size=2048, num_attention_heads=16, num_query_groups=4, swiglu=True,
                 experts=Experts(2048, 64, 4, 1024, is_gated=True, bias=False))  # fmt: skip


def test_experts_are_divided_in_every_way_that_fits_and_context_parallelism_is_for_long_sequences():
    request = Request(SPARSE, load_gpu("h100-80"), 32, 64, "bf16", pp=(2,), tp=(1, 2), micro_batch=(1,),
                      schedule=("interleaved",), chunks=(2,), sharding=("zero1",))  # fmt: skip
    found = search(request)
    sizes = {(each.strategy.tp, each.strategy.ep, each.strategy.etp) for each in found.estimates}
    assert {(1, 8, 1), (1, 16, 1), (2, 8, 1), (2, 8, 2)} <= sizes
    assert {each.strategy.cp for each in found.estimates} == {1}
    assert any(reason.startswith("experts: ranks") for reason in found.rejected)
    long = search(replace(request, gpt=replace(SPARSE, seq_length=8192), tp=(1,), ep=(8,), etp=(1,)))
    assert {each.strategy.cp for each in long.estimates} == {1, 2}
    assert all(each.strategy.num_gpus == 32 for each in long.estimates)
    title, *rows = ranking(long.estimates).splitlines()
    assert "  EP  ETP" not in title and title.split()[:5] == ["schedule", "PP", "TP", "CP", "EP"]
    assert len(rows) == len({*rows}), "two rows of the table cannot be told apart"
    assert "CP" not in ranking(found.estimates).splitlines()[0].split() and "ETP" in ranking(found.estimates)


@pytest.mark.parametrize(("layers", "words"), [(32, 51200), (32, 128256), (30, 128256), (61, 51200), (64, 512000)])
def test_no_placement_is_considered_twice(layers, words):
    gpt = replace(GPT_52B, num_layers=layers, vocab_size=words)
    for pp, chunks in product((2, 4, 8), (2, 3, 4, 8)):
        stages = pp * chunks
        found = [each.layers or (layers // stages,) * stages for each in placings(gpt, pp, chunks, True)]
        assert len(found) == len({*found}) and all(sum(each) == layers for each in found)


def test_the_late_backward_is_considered_where_it_is_asked_for_alone():
    request = replace(REQUEST, pp=(8,), tp=(8,), micro_batch=(1,), chunks=(2,), sharding=("replicated",))
    assert "breadth-first-late" not in {each.strategy.schedule for each in search(request).estimates}
    asked = search(replace(request, schedule=("breadth-first-late",))).estimates
    assert {each.strategy.schedule for each in asked} == {"breadth-first-late"}


def test_of_recomputations_the_least_that_fits_is_estimated():
    request = replace(REQUEST, gpu=load_gpu("h200"), precision="bf16", pp=(8,), tp=(8,), micro_batch=(1,), chunks=(2,),
                      schedule=("breadth-first",), sharding=("replicated",))  # fmt: skip
    assert {each.strategy.recompute for each in search(request).estimates} == {"none"}
    asked = search(replace(request, recompute=("full",))).estimates
    assert {each.strategy.recompute for each in asked} == {"full"}


def test_fewer_micro_batches_than_ranks_run_breadth_first_only():
    found = search(replace(REQUEST, pp=(8,), tp=(8,), global_batch=4))
    assert {each.strategy.schedule for each in found.estimates} <= {"1f1b", *BREADTH_FIRST}
    assert found.estimates[0].strategy.schedule == DEFERRED


DEFERRED_ONLY = replace(REQUEST, schedule=(DEFERRED,), pp=(8,), tp=(8,), chunks=(8,), micro_batch=(4,), group=(16,),
                        global_batch=64, sharding=("replicated",), recompute=("full",))  # fmt: skip


def test_a_smaller_dial_where_memory_demands_it():
    (free,) = search(DEFERRED_ONLY).estimates
    assert free.strategy.weight_lag is None and free.memory.owed > 0
    assert "--breadth-first-weight-lag" not in free.strategy.flags()
    less = replace(DEFERRED_ONLY, reserve=REQUEST.gpu.memory - free.memory.total + 1e9)
    (tight,) = search(less).estimates
    lag = tight.strategy.weight_lag
    assert 0 <= lag < max(free.strategy.most_lags) and max(tight.strategy.chosen_lags()) == lag
    assert tight.memory.total <= REQUEST.gpu.memory - less.reserve
    flags = tight.strategy.flags()
    assert flags[flags.index("--breadth-first-weight-lag") + 1] == str(lag)
    more = replace(tight.strategy, weight_lag=lag + 1)
    assert estimate(less, more, exact=False).memory.total > REQUEST.gpu.memory - less.reserve
    assert tight.step.step > free.step.step


def test_a_deferred_strategy_is_shown_where_it_is_faster_than_its_twin():
    request = replace(DEFERRED_ONLY, schedule=("breadth-first", DEFERRED))
    found = search(request).estimates
    assert [each.strategy.schedule for each in found] == [DEFERRED, "breadth-first"]
    assert without_slower_twins(found) == found
    slower = replace(found[0], step=replace(found[1].step, step=found[1].step.step))
    assert without_slower_twins([found[1], slower]) == [found[1]]


def test_a_larger_cluster_trains_faster_and_dearer():
    # Twice the time for a sequence with a quarter of the batch per GPU: the small batch wins on large clusters only.
    curve = trade_off({0.25: 2.0, 1.0: 1.0}, seq_length=1000, critical_batch=1000)
    assert [each.days for each in curve] == sorted((each.days for each in curve), reverse=True)
    assert [each.gpu_days for each in curve] == sorted(each.gpu_days for each in curve)
    assert curve[0].batch_per_gpu == 1.0 and curve[-1].batch_per_gpu == 0.25
    assert curve[0].gpu_days == pytest.approx((1 + 32 / 1000) * 1.0 * 1e6 / 86400)


@pytest.mark.slow
def test_what_is_shown_as_the_fastest_of_a_schedule_was_replayed():
    found = search(
        Request(
            GPT(64, 8192, 64, 1024, 50257, untied=True),
            load_gpu("v100-32"),
            1024,
            256,
            "fp16",
            tp=(8,),
            recompute=("none",),
        )
    )
    for schedule in ("1f1b", "interleaved", "breadth-first"):
        best = next(each for each in found.estimates if each.strategy.schedule == schedule)
        assert best.step.is_exact  # though the card is shared, of which the formula knows nothing
