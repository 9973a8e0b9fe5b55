"""bfpp bench with a split backward: its lower bound, its times on the command line, and what an I and a W take."""

import multiprocessing
from types import SimpleNamespace

import pytest
from test_bench import parsed

from megatron_bfpp.bench.case import NUMBERS_PER_CARD, Case
from megatron_bfpp.bench.results import Result, as_json, lower_bound_s, markdown, table
from megatron_bfpp.bench.settings import settings
from megatron_bfpp.cli import main
from megatron_bfpp.schedule import Op, PipelineShape, breadth_first, lower
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.lower import add_send_recv
from megatron_bfpp.schedule.orders import weight_lags
from megatron_bfpp.schedule.replay import replay

DEFERRED, ZERO_BUBBLE = "breadth-first-deferred", "torch-zero-bubble"


@pytest.mark.parametrize("sizes", [(2, 2, 4), (4, 4, 4), (4, 2, 8), (8, 4, 8), (8, 4, 16), (3, 4, 9)])
def test_the_bubble_of_the_bound_is_a_third_with_equal_times(sizes):
    shape, costs = PipelineShape(*sizes), Costs(1, 2)
    bound = lower_bound_s(shape, costs, is_split=True)
    assert bound == 3 * shape.num_microbatches * shape.num_chunks + shape.pp_size - 1
    assert Result(DEFERRED, Case(shape, costs), [1.0]).predicted_s == pytest.approx(bound)


@pytest.mark.parametrize("sizes, hop", [((8, 4, 8), 0.2), ((4, 4, 4), 0.2), ((4, 4, 4), 0.5)])
def test_with_as_many_microbatches_as_ranks_every_chunk_waits_for_the_ring(sizes, hop):
    """V-1 times, beside fill and drain: a chunk's outputs come round in P (f + L), its forwards take M f meanwhile."""
    shape, costs = PipelineShape(*sizes), Costs(1, 2, hop=hop)
    ways = 2 * (shape.pp_size - 1) * hop + (shape.num_chunks - 1) * shape.pp_size * hop
    bound = lower_bound_s(shape, costs, is_split=True)
    assert bound == pytest.approx(3 * shape.num_microbatches * shape.num_chunks + shape.pp_size - 1 + ways)
    assert Result(DEFERRED, Case(shape, costs), [1.0]).predicted_s == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (4, 2, 1), (4, 3, 3), (8, 2, 5), (3, 2, 9), (4, 4, 8)])
@pytest.mark.parametrize("weights", [0.3, 1.0, 1.7])
def test_no_split_plan_is_faster_than_its_bound(sizes, weights):
    shape = PipelineShape(*sizes)
    for hop in (0.0, 0.5, 2.0):
        costs = Costs(1, 2, weights=weights, hop=hop, transfer=hop / 4, reduction=3, gather=2)
        for lag in (None, 0, 1, 1000):
            lags = weight_lags(shape) if lag is None else [lag] * shape.pp_size
            plan = lower(breadth_first(shape, weight_lag=lags), shape)
            assert replay(plan, shape, costs).step_time >= lower_bound_s(shape, costs, is_split=True) - 1e-9


def test_a_split_step_stands_beside_both_bounds():
    shape, costs = PipelineShape(8, 4, 8), Costs(1.0, 2.0)
    results = [Result(arm, Case(shape, costs, "free"), [time]) for arm, time in (("interleaved", 117), (DEFERRED, 104))]
    lines = table(results).splitlines()
    assert lines[3].split() == [DEFERRED, "104.000", "s", "0.0%", "0.889", "0.889", "-1.0%"]
    assert lines[4] == "  bound of a split backward: 0.880 of that of a whole one"
    assert "bound of a split" not in table(results[:1])
    assert markdown(results).splitlines() == [
        f"| P x V, M | network | interleaved | {DEFERRED} | split bound |",
        "|---|---|---|---|---|",
        "| 8 x 4, 8 | free | 1.000 | 0.889 | 0.880 |",
    ]
    whole, split = as_json(results)["results"]
    assert (whole["lower_bound_s"], split["lower_bound_s"], split["weights_s"]) == (117, 103, 1)


def test_on_torchs_first_stage_the_weights_gradients_take_the_whole_backward():
    shape = PipelineShape(2, 1, 1)
    plan = add_send_recv(breadth_first(shape, weight_lag=[0, 0]), shape)
    costs = Costs(1, 4, reduction=2, buckets=2)
    # Both forwards and the I of stage 1; then 4 for all of stage 0. Its first half is reduced after 2, and the second,
    # another 2 later, is waited for.
    assert Result(ZERO_BUBBLE, Case(shape, costs), [1.0], plan=plan).predicted_s == 1 + 1 + 2 + 4 + 1


def test_the_part_of_the_weights_gradients_is_set_in_forwards():
    (half,), (given,) = (
        [each.case(args, [DEFERRED]).costs for each in settings(args)]
        for args in (parsed("--shape", "4,2,8", *words) for words in ([], ["--weights-time", "0.5"]))
    )
    assert half.weights is None and given.weights == pytest.approx(0.0075)
    assert [each.shape.num_microbatches for each in settings(parsed("--set", "split"))] == [8, 8, 4, 4, 16, 8, 16, 16]


@pytest.mark.parametrize("most, bubble", [(0, 6), (1, 5), (2, 4), (3, 3)])
def test_a_rank_that_may_owe_less_hides_less(most, bubble):
    """(P-1)(f + i) - K w, down to (P-1) f."""
    args = parsed("--shape", "4,4,4", "--hop", "0", "--forward-ms", "1000", "--breadth-first-weight-lag", str(most))
    (setting,) = settings(args)
    result = Result(DEFERRED, setting.case(args, [DEFERRED]), [1.0])
    assert result.predicted_s == pytest.approx(48 + bubble)
    assert as_json([result])["results"][0]["breadth_first_weight_lag"] == most


def test_weights_gradients_that_leave_no_time_are_refused(capsys):
    assert main(["bench", "--shape", "2,2,4", "--weights-time", "2"]) == 2
    message = capsys.readouterr().err
    assert "--weights-time is 2 forwards, but a whole backward takes 2." in message
    assert len(message.strip().splitlines()) <= 3


def test_an_emulated_layer_sleeps_for_the_part_that_runs():
    """torch's two passes over one graph, and the plugin's I with an owed W: the same times and the same gradient."""
    torch = pytest.importorskip("torch", minversion="2.13")  # that of 2.9 refuses functions of Python
    pytest.importorskip("megatron.core")
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    from megatron_bfpp.bench.emulate.network import Network
    from megatron_bfpp.bench.emulate.stages import EmulatedChunk
    from megatron_bfpp.integration.seams import changed
    from megatron_bfpp.runtime.weight_gradients import OwedGradients

    case = Case(PipelineShape(2, 1, 1), Costs(1, 5, weights=2, buckets=2))
    network = Network(case, multiprocessing.Array("d", NUMBERS_PER_CARD * 2))
    chunk, grad = EmulatedChunk(None, 0, network), torch.tensor([[[3.0, 9.0]]], dtype=torch.float64)
    weights, gradients = list(chunk.parameters()), []

    def taken(work):
        before = network.stream_s
        answer = work()
        return network.stream_s - before, answer

    def forward():
        received = torch.full((1, 1, 2), 2.0, dtype=torch.float64, requires_grad=True)
        return received, chunk(received)

    def end_of_pass():
        gradients.append(([each.grad.item() for each in weights], received.grad[0, 0, 0].item()))
        chunk.zero_grad()

    received, output = forward()
    assert taken(lambda: output.backward(grad))[0] == 5
    end_of_pass()

    received, output = forward()
    with changed(network, backward=Op.I):
        time, (_, groups) = taken(lambda: stage_backward_input([output], [grad], [received], iter(weights)))
    with changed(network, backward=Op.W):
        assert (time, taken(lambda: stage_backward_weight(iter(weights), groups))[0]) == (3, 2)
    end_of_pass()

    received, output = forward()
    owed = OwedGradients()
    with changed(network, owed=owed), owed.deferring(0, 0):
        assert taken(lambda: output.backward(grad))[0] == 3
    assert all(each.grad is None for each in weights)
    assert taken(lambda: owed.pay(0, 0))[0] == 2
    end_of_pass()
    assert gradients == [([6.0, 6.0], 3.0)] * 3


def test_torchs_stage_tells_its_chunk_what_runs(monkeypatch):
    pytest.importorskip("megatron.core")
    from torch.distributed.pipelining import PipelineStage

    from megatron_bfpp.bench.torch_stage import EmulatedStage

    network, seen = SimpleNamespace(backward=Op.B), []
    monkeypatch.setattr(PipelineStage, "__init__", lambda *_: None)
    monkeypatch.setattr(PipelineStage, "backward_maybe_with_nosync", lambda *_: seen.append(network.backward))
    stage = EmulatedStage(SimpleNamespace(network=network), None)
    for kind in ("input", "weight", "full"):
        stage.backward_maybe_with_nosync(kind, {})
    assert seen == [Op.I, Op.W, Op.B] and network.backward is Op.B
