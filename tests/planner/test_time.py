"""Durations, the formula of a step against the replay of its plan, profiles, calibration."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from profiles import PROFILE

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.planner.hardware import Link, known_gpus, load_gpu
from megatron_bfpp.planner.model import GPT, Gemm, Split
from megatron_bfpp.planner.search import Request, estimate
from megatron_bfpp.planner.steps import formula_step, replay_step
from megatron_bfpp.planner.strategy import DEFERRED, SCHEDULES, Strategy
from megatron_bfpp.planner.time import Durations, durations

BIG = GPT(64, 8192, 64, 1024, 51200, untied=True)


def cases(schedule: str, count: int) -> list[tuple[Strategy, Durations]]:
    """Random pipelines up to 16 x 8, their messages up to 0.6 forwards, collectives up to ten, a heavy last stage."""
    draw = random.Random(schedule)
    found = []
    while len(found) < count:
        pp, chunks = draw.choice([2, 3, 4, 8, 16]), 1 if schedule == "1f1b" else draw.choice([2, 3, 4, 8])
        microbatches = pp * draw.choice([1, 2, 3, 4, 6])
        group = microbatches
        if schedule == "interleaved":
            group = pp
        elif schedule.startswith("breadth-first"):
            microbatches = draw.choice([microbatches, draw.randint(3, 3 * pp)])
            group = microbatches
        if pp * chunks * microbatches > 600 or microbatches < 3:
            continue
        forward, backward = [1.0] * (pp * chunks), [draw.choice([2.0, 3.0])] * (pp * chunks)
        head = draw.choice([0.0, 0.3, 1.0])
        forward[-1], backward[-1] = forward[-1] + head, backward[-1] + 2 * head
        message, part = draw.choice([0.0, 0.05, 0.1, 0.3, 0.6]), draw.random()
        times = Durations(
            forward=forward,
            backward=backward,
            tensor_parallel=0.0,
            hop=message * part,
            transfer=message * (1 - part),
            gather=draw.choice([0.0, 0.5, 2.0, 6.0]),
            reduction=draw.choice([0.0, 1.0, 4.0, 10.0]),
            ends=draw.choice([0.0, 1.0]),
            buckets=draw.choice([1, 1, 2, 4]) if schedule.startswith("breadth-first") else 1,
            optimizer=0.5,
        )
        sharding = (
            draw.choice(["zero1", "zero1", "zero2", "zero3"]) if schedule.startswith("breadth-first") else "zero1"
        )
        found.append((Strategy(schedule, pp, 1, 8, chunks, 1, microbatches, group, sharding), times))
    return found


@pytest.mark.parametrize("schedule", sorted({*SCHEDULES[1:]} - {DEFERRED}))
def test_the_formula_agrees_with_the_replay_of_the_plan(schedule):
    for strategy, times in cases(schedule, 60):
        exact, formula = replay_step(strategy, times), formula_step(strategy, times)
        assert formula.step == pytest.approx(exact.step, rel=0.03), (strategy, times)
        assert formula.without_network == pytest.approx(exact.without_network), (strategy, times)
        assert exact.is_exact and not formula.is_exact


@pytest.mark.parametrize("schedule", ["breadth-first", "breadth-first-late"])
def test_the_formula_agrees_with_the_replay_of_groups(schedule):
    found = 0
    for strategy, times in cases(schedule, 120):
        grouped, times = replace(strategy, group=strategy.pp, sharding="zero1"), replace(times, buckets=1)
        if strategy.num_microbatches > strategy.pp and strategy.num_microbatches % strategy.pp == 0:
            found += 1
            exact = replay_step(grouped, times)
            assert formula_step(grouped, times).step == pytest.approx(exact.step, rel=0.03), (grouped, times)
    assert found > 20


def test_the_formula_agrees_on_real_durations():
    for gpu in ("v100-32", "h100-80"):
        for schedule, chunks, microbatches, group in (
            ("1f1b", 1, 16, 16), ("interleaved", 4, 16, 4), ("interleaved-grouped", 4, 16, 16),
            ("breadth-first", 4, 16, 16),
            ("breadth-first", 4, 16, 4), ("breadth-first-late", 8, 8, 8),
        ):  # fmt: skip
            for tp, micro_batch in ((2, 1), (8, 4)):
                strategy = Strategy(schedule, 4, tp, 4, chunks, micro_batch, microbatches, group)
                times = durations(BIG, strategy, load_gpu(gpu), load_gpu(gpu).precision)
                assert formula_step(strategy, times).step == pytest.approx(
                    replay_step(strategy, times).step, rel=0.03
                ), strategy


def test_without_a_pipeline_a_step_is_its_micro_batches():
    times = Durations(forward=[1.0], backward=[2.0], tensor_parallel=0.0, hop=9.0, transfer=9.0, gather=0.5,
                      reduction=0.25, ends=0.1, optimizer=0.2)  # fmt: skip
    step = replay_step(Strategy("no-pipeline", 1, 1, 8, 1, 1, 4, 4), times)
    assert step.step == pytest.approx(4 * 3 + 0.5 + 0.25 + 0.1 + 0.2)
    assert step.bubble_fraction == pytest.approx(0.0)
    assert step.exposed_communication == pytest.approx(0.85)


def test_the_last_stage_is_longer_by_the_logits_and_a_backward_by_what_is_recomputed():
    gpu, strategy = load_gpu("a100-80"), Strategy("breadth-first", 4, 8, 2, 4, 1, 8, 8)
    plain, full = (durations(BIG, replace(strategy, recompute=each), gpu, "bf16") for each in ("none", "full"))
    assert len(plain.forward) == 16 and len(set(plain.forward)) == 2
    assert plain.forward[-1] > plain.forward[0] + gpu.gemm_s(BIG.head_gemm(1, Split(8)), "bf16")
    assert full.backward[0] == pytest.approx(plain.backward[0] + plain.forward[0])
    assert full.forward == plain.forward


def test_links_follow_megatrons_order_of_ranks():
    gpu = load_gpu("h100-80")
    assert gpu.link(1, 8, 64) == gpu.link(2, 4, 64) == gpu.node_link
    assert gpu.link(8, 16, 512).bytes_per_s == gpu.network_link.bytes_per_s  # one member in each node
    assert gpu.link(2, 16, 512).bytes_per_s == 4 * gpu.network_link.bytes_per_s  # four, with a card each
    # Groups of 3 in nodes of 8: the third has its members on two nodes, one of them alone there. In one node all are
    # together.
    assert gpu.link(1, 3, 24).bytes_per_s == gpu.network_link.bytes_per_s and gpu.link(1, 3, 6) == gpu.node_link


@pytest.mark.parametrize(
    ("apart", "pp", "crossing"),
    [
        (8, 4, [0, 1, 2, 3]),
        (4, 4, [1, 3]),  # two ranks in a node
        (1, 16, [7, 15]),
        (2, 4, []),  # the whole job in one node, the last edge too
        (1, 8, []),
        (3, 8, [1, 2, 4, 5, 7]),  # GPUs 0 to 5 in a node; of 3 to 8 some are, and of 15 to 20
        (6, 2, [0, 1]),
    ],
)
def test_a_message_crosses_nodes_where_any_gpu_of_a_rank_has_its_neighbour_elsewhere(apart, pp, crossing):
    gpu = load_gpu("h100-80")  # 8 to a node
    assert [edge for edge, each in enumerate(gpu.crosses(apart, pp)) if each] == crossing


def test_messages_and_reductions_take_the_links_of_their_ranks():
    gpu = load_gpu("h100-80")
    times = durations(BIG, Strategy("breadth-first", 4, 4, 1, 4, 1, 8, 8), gpu, "bf16")
    assert times.transfer[0] < times.transfer[1] == times.transfer[3] and times.hop[0] < times.hop[1]
    assert not any(times.shared_card)  # no replicas
    wide = durations(BIG, Strategy("breadth-first", 4, 4, 4, 4, 1, 8, 8), gpu, "bf16")
    assert all(wide.shared_card) and not any(
        durations(BIG, Strategy("1f1b", 4, 2, 4, 1, 1, 8, 8), gpu, "bf16").shared_card
    )


def test_a_collective_is_a_ring():
    assert Link(10.0, 0.5).all_gather_s(40.0, 4) == pytest.approx(3 / 4 * 40 / 10 + 2 * 0.5)
    assert Link(10.0, 0.5).all_gather_s(40.0, 1) == 0.0


def test_every_profile_loads_and_small_products_are_slow():
    assert known_gpus() == ["a100-80", "h100-80", "h200", "v100-32"]
    for name in known_gpus():
        gpu = load_gpu(name)
        speeds = [
            gemm.flops / gpu.gemm_s(gemm, gpu.precision) for gemm in (Gemm(4096, 4096, 4096), Gemm(4096, 64, 4096))
        ]
        assert speeds[1] < 0.55 * speeds[0] < 0.55 * gpu.peak_flops[gpu.precision]


def test_a_profile_of_the_user(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    gpu = load_gpu(str(path))
    assert gpu.peak_flops == {"bf16": 1e14} and gpu.network_link == pytest.approx((5e9, 2e-5)) and gpu.memory == 4e10


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("memory_gb: 40", "memory: 40", "unknown key 'memory'"),
        ("memory_gb: 40", "", "memory_gb is missing"),
        ("memory_gb: 40", "memory_gb: much", "memory_gb is 'much'"),
        ("matmul: 0.5", "matmul: 1.5", "matmul is 1.5"),
        ("precision: bf16", "precision: fp8", "one for fp8"),
        ("{gb_s: 10, latency_us: 20}", "10", "network_link is no map"),
        ("name: mine", "name: [mine", "cannot be read"),
    ],
)
def test_a_mistake_in_a_profile_is_named(tmp_path: Path, old, new, named):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE.replace(old, new))
    with pytest.raises(UserError, match=named) as error:
        load_gpu(str(path))
    assert str(error.value).count("\n") <= 2


def test_blackwell_needs_no_single_hardware_queue(tmp_path: Path):
    path, strategy = tmp_path / "mine.yaml", Strategy("breadth-first", 4, 2, 8, 4, 1, 8, 8)
    path.write_text(PROFILE)
    assert strategy.connections(load_gpu(str(path)).compute_capability) == 1
    path.write_text(PROFILE + "compute_capability: 10.0\n")
    assert strategy.connections(load_gpu(str(path)).compute_capability) == 32


def test_one_hardware_queue_costs_a_plan_whose_receives_are_placed_for_shorter_messages():
    stages = [1.0] * 32, [2.0] * 32
    times = Durations(forward=stages[0], backward=stages[1], tensor_parallel=0.0, hop=0.25, ends=0.0, optimizer=0.0)
    placed = [Strategy("breadth-first", 8, 2, 1, 4, 1, 16, 16, hop=hop) for hop in (0.0, 0.25)]
    own = [replay_step(each, times).step for each in placed]
    one = [replay_step(each, times, connections=1).step for each in placed]
    assert own[0] == pytest.approx(own[1], rel=0.002) and one[0] > 1.05 * own[0]
    assert one[1] == pytest.approx(own[1], rel=0.01)
    formula = formula_step(placed[1], times)
    assert formula.step == pytest.approx(one[1], rel=0.03)


def test_calibration_makes_the_measured_step_the_predicted_one():
    strategy = Strategy("breadth-first", 4, 8, 2, 4, 1, 8, 8)
    request = Request(BIG, load_gpu("a100-80"), 64, 16, "bf16")

    def step_s(gpu):
        return estimate(replace(request, gpu=gpu), strategy, exact=True).step.step

    measured = 1.3 * step_s(request.gpu)
    calibrated = request.gpu.calibrated(measured, step_s)
    assert step_s(calibrated) == pytest.approx(measured, rel=1e-6)
    assert calibrated.matmul < request.gpu.matmul
    with pytest.raises(UserError, match="cannot be explained"):
        request.gpu.calibrated(1e-3, step_s)


def test_without_overlap_megatron_pays_for_every_message_and_breadth_first_does_not():
    gpu = load_gpu("v100-32")
    for schedule, group in (("interleaved", 4), ("breadth-first", 8)):
        strategy = Strategy(schedule, 4, 4, 16, 4, 1, 8, group)
        overlapped, blocking = (durations(BIG, strategy, gpu, "fp16", overlap) for overlap in (True, False))
        gain = replay_step(strategy, blocking).step - replay_step(strategy, overlapped).step
        if schedule == "breadth-first":
            assert overlapped == blocking
        else:
            assert gain > overlapped.gather + overlapped.reduction


def test_fp8_is_for_the_products_of_the_layers_alone():
    gpu, strategy = load_gpu("h100-80"), Strategy("breadth-first", 4, 2, 8, 4, 1, 8, 8)
    bf16, fp8, params = (durations(BIG, strategy, gpu, each) for each in ("bf16", "fp8", "fp8-params"))
    linear = 4 * sum(
        gpu.gemm_s(gemm, "bf16") for gemm in BIG.layers[0].gemms(1024, Split(2))
    )  # of the 4 layers of a stage
    saved = linear * (1 - gpu.matmul * 989 / (gpu.matmul_fp8 * 1979))
    assert bf16.forward[0] - fp8.forward[0] == pytest.approx(saved)
    assert bf16.backward[0] - fp8.backward[0] == pytest.approx(2 * saved)
    assert bf16.forward[-1] - bf16.forward[0] == pytest.approx(fp8.forward[-1] - fp8.forward[0])  # the logits
    assert (
        fp8.gather == bf16.gather
        and fp8.transfer == bf16.transfer
        and fp8.reduction == params.reduction == bf16.reduction
    )
    assert params.gather - params.hop[0] < 0.51 * bf16.gather
    assert gpu.has("fp8-params") and not load_gpu("a100-80").has("fp8") and not load_gpu("v100-32").has("fp8")
