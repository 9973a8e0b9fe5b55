"""Stages with unequal numbers of layers: the formula against the replay, the memory of each, and what is searched."""

import random
from dataclasses import replace
from math import inf

import pytest

from megatron_bfpp.planner.flags import gpt_of, parse, strategy_of
from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.memory import PRECISIONS, memory
from megatron_bfpp.planner.model import GPT
from megatron_bfpp.planner.search import Request, estimate, search
from megatron_bfpp.planner.steps import formula_step, replay_step
from megatron_bfpp.planner.steps.flow import computing_time
from megatron_bfpp.planner.strategy import Strategy
from megatron_bfpp.planner.time import Durations
from megatron_bfpp.schedule.model.layout import layers_of_stages, other_layers
from megatron_bfpp.schedule.model.pattern import place_pattern

SIZES = (
    "--hidden-size 4096 --num-attention-heads 32 --seq-length 4096 --vocab-size 32000 --bf16 --micro-batch-size 1 "
    "--global-batch-size 64 --pipeline-schedule breadth-first --tensor-model-parallel-size 4 "
    "--pipeline-model-parallel-size 4 --use-distributed-optimizer"
)
PATTERN = "--hybrid-layer-pattern M-M*M-M*M-M*M-M*-M"
V = "--num-virtual-stages-per-pipeline-rank"


def plan_of(flags: str, gpus: int = 32):
    args = parse(f"{SIZES} {flags}".split())
    return gpt_of(args), strategy_of(args, gpus), args.notes


def cases(schedule: str, count: int, is_random: bool = False) -> list[tuple[Strategy, Durations]]:
    """Pipelines with the stages that the plugin makes, or random ones; a heavy last stage; no data parallelism."""
    draw, found = random.Random(f"{schedule} {is_random}"), []
    while len(found) < count:
        pp, chunks, per_rank = draw.choice([2, 3, 4, 8, 16]), draw.choice([2, 3, 4, 6]), draw.choice([1, 2, 3, 4, 6])
        microbatches, layers = pp * per_rank, draw.randint(pp * chunks, 5 * pp * chunks)
        if pp * chunks * microbatches > 600 or layers % (pp * chunks) == 0:
            continue
        stages = [draw.randint(1, 5) for _ in range(pp * chunks)] if is_random else None
        stages = stages or layers_of_stages(layers, pp, chunks)
        forward, again = [float(count) for count in stages], draw.choice([2.0, 3.0])
        backward = [again * each for each in forward]
        head, message = draw.choice([0.3, 1.0]), draw.choice([0, 0.1, 0.3])
        forward[-1], backward[-1] = forward[-1] + head, backward[-1] + 2 * head
        times = Durations(forward=forward, backward=backward, weights=forward, tensor_parallel=0.0, hop=message / 2,
                          transfer=message / 2, gather=0.0, reduction=0.0, ends=0.0, optimizer=0.0)  # fmt: skip
        group = pp if schedule == "interleaved" else microbatches
        found.append((Strategy(schedule, pp, 1, 2, chunks, 1, microbatches, group, stage_layers=tuple(stages)), times))
    return found


@pytest.mark.parametrize("is_random", [False, True])
def test_the_longest_path_through_the_late_order_is_the_replay(is_random):
    for strategy, times in cases("breadth-first-late", 40, is_random):
        found = computing_time(strategy, times.forward, times.backward, [0.0] * strategy.pp, lead=inf)
        assert found == pytest.approx(replay_step(strategy, times).without_network), strategy


@pytest.mark.parametrize(
    ("schedule", "least", "most", "mean"),
    [
        ("breadth-first", -0.03, 0.001, 0.003),
        ("breadth-first-late", -0.003, 0.001, 0.001),
        ("interleaved-grouped", -0.05, 0.001, 0.005),
        ("interleaved", -0.07, 0.13, 0.015),
        ("breadth-first-deferred", -0.08, 0.1, 0.02),
    ],
)
def test_the_formula_follows_the_stages_that_the_plugin_makes(schedule, least, most, mean):
    errors = [formula_step(*each).step / replay_step(*each).step - 1 for each in cases(schedule, 60)]
    assert least < min(errors) and max(errors) < most, (min(errors), max(errors))
    assert sum(map(abs, errors)) / len(errors) < mean


def test_one_long_stage_holds_up_its_chunk():
    """Busy for as long, the ranks wait for each other where different ones are long in different chunks."""
    times = Durations(forward=[1.0] * 8, backward=[2.0] * 8, tensor_parallel=0.0, ends=0.0, optimizer=0.0)
    shared = [2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    apart = [2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    steps = {}
    for name, forward in (("shared", shared), ("apart", apart)):
        strategy = Strategy("breadth-first", 4, 1, 1, 2, 1, 16, 16, stage_layers=tuple(map(int, forward)))
        both = replace(times, forward=forward, backward=[2 * each for each in forward])
        steps[name] = formula_step(strategy, both).step
        assert steps[name] == pytest.approx(replay_step(strategy, both).step, rel=0.02)
    assert steps["apart"] > 1.15 * steps["shared"]


def test_the_rank_that_needs_most_is_found_among_all():
    gpt = GPT(22, 4096, 32, 4096, 32000, untied=True)
    layers = (1, 1, 2, 8, 1, 1, 1, 7)
    request = Request(gpt, load_gpu("h200"), 16, 32, "bf16")
    for schedule in ("breadth-first", "breadth-first-deferred"):
        strategy = Strategy(schedule, 4, 2, 2, 2, 1, 16, 16, stage_layers=layers)
        fixed = (gpt, strategy, PRECISIONS["bf16"], True)
        needs = [memory(*fixed, rank).total for rank in range(4)]
        assert needs.index(max(needs)) == 3
        assert estimate(request, strategy, False).memory.total == max(needs)
    middle = replace(strategy, stage_layers=(1, 1, 8, 2, 1, 1, 7, 1))
    assert estimate(request, middle, False).memory.pp_rank == 2


@pytest.mark.parametrize(
    ("flags", "layers", "says"),
    [
        (f"--num-layers 62 {V} 4", (3, *[4] * 14, 3), f"in place of {V} 4: 62 layers do not divide evenly"),
        ("--num-layers 62", (7, *[8] * 6, 7), "62 layers do not divide evenly"),
        ("--num-layers 64", (), f"the plugin chose {V} 2: the fewest with a predicted bubble below 5%"),
        (f"--num-layers 10 {V} 2", (1, 2, 2, *[1] * 5), "10 layers do not divide evenly"),
        (f"--num-layers 62 {V} 4 --mtp-num-layers 1", (*[4] * 15, 2), "t*2mL"),
    ],
)
def test_a_job_whose_layers_do_not_divide_is_planned(flags, layers, says):
    gpt, strategy, notes = plan_of(flags)
    assert strategy.stage_layers == layers
    assert any(says in note for note in notes), notes
    assert estimate(Request(gpt, load_gpu("h200"), 32, 64, "bf16"), strategy, True).step.is_exact


def test_megatrons_own_schedule_keeps_its_rules():
    from megatron_bfpp.console.errors import UserError

    for flags, says in (
        ("--num-layers 62", "62 is no multiple of PP 4 x 1 chunks"),
        (f"{PATTERN} {V} 2", f"{V} does not go with --hybrid-layer-pattern under Megatron's own schedule"),
    ):
        with pytest.raises(UserError, match=says):
            plan_of(f"{flags} --pipeline-schedule 1f1b")


def test_a_pattern_is_cut_and_shown_as_the_plugin_cuts_it():
    gpt, strategy, notes = plan_of(PATTERN)
    (line,) = [note for note in notes if note.startswith("the plugin set --hybrid-layer-pattern '")]
    text = line.split("'")[1]
    assert tuple(map(len, text.split("|"))) == strategy.stage_layers and text.replace("|", "") == gpt.pattern
    assert strategy.placing == ("--hybrid-layer-pattern", text) and V not in strategy.flags()


def test_the_search_has_the_plugins_stages_and_says_so_in_its_flags():
    gpt = GPT(62, 4096, 32, 4096, 32000, untied=True)
    request = Request(gpt, load_gpu("h200"), 32, 64, "bf16", pp=(4,), tp=(2,), micro_batch=(1,), chunks=(4,),
                      schedule=("breadth-first", "interleaved"), sharding=("zero1",))  # fmt: skip
    plain = [each.strategy for each in search(request).estimates if not each.strategy.placing]
    assert {each.schedule for each in plain} == {"breadth-first"}
    for each in plain:
        assert each.stage_layers == tuple(layers_of_stages(62, 4, 4)) and each.flags().count(V) == 1
        assert plan_of(f"--num-layers 62 {V} 4")[1].stage_layers == each.stage_layers
    few = search(replace(request, chunks=(16,)))
    assert not few.estimates and few.rejected["layers: fewer than stages"]


def test_the_search_cuts_a_pattern_for_every_schedule_with_chunks():
    gpt, _, _ = plan_of(PATTERN)
    request = Request(gpt, load_gpu("h200"), 32, 64, "bf16", pp=(4,), tp=(2,), micro_batch=(1,), chunks=(1, 2),
                      schedule=("1f1b", "breadth-first", "interleaved"), sharding=("zero1",))  # fmt: skip
    found = [each.strategy for each in search(request).estimates]
    args = parse(f"{SIZES} {PATTERN} {V} 2".split())
    place_pattern(args, 8)
    for each in found:
        assert sum(each.stage_layers) == 18
        if each.chunks == 2:
            assert each.placing == ("--hybrid-layer-pattern", args.hybrid_layer_pattern)
    assert {each.schedule for each in found} == {"1f1b", "breadth-first", "interleaved"}


def test_loads_of_the_plugins_stages_differ_by_a_layer_at_most():
    layers = layers_of_stages(62, 4, 4, 1)
    loads = [count + other for count, other in zip(layers, other_layers(16, 1), strict=True)]
    assert max(loads) - min(loads) <= 1
