"""Text and CSV: they bring every plan back, and torch.distributed.pipelining loads them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import shapes

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.schedule import PipelineShape, breadth_first, formats, lower
from megatron_bfpp.schedule.names import order_of
from megatron_bfpp.schedule.orders import weight_lags


@given(shapes, st.booleans(), st.sampled_from([None, 1, 2]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_text_and_csv_bring_every_plan_back(shape, eager, resident, is_split):
    lags = weight_lags(shape) if is_split else None
    plan = lower(breadth_first(shape, None, eager, lags), shape, resident_chunks=resident)
    assert formats.from_text(formats.to_text(plan)) == plan
    assert formats.from_csv(formats.to_csv(plan)) == plan


def test_torchs_idle_cells_are_skipped():
    assert formats.from_csv(",0F0, ,0B0\n1F0,,1B0,\n") == formats.from_text("0F0 0B0\n1F0 1B0\n")


@pytest.mark.parametrize("word", ["9Q1", "F0", "0F", "0UNSHARD1", "-1F0", "0f0", "٣F0", "0F0;", "x" * 100_000])
def test_a_word_that_is_no_action_is_named_with_its_line_and_rank(word):
    for read in (formats.from_text, formats.from_csv):
        with pytest.raises(UserError, match=r"^line 2 \(pp_rank 1\): ") as error:
            read(f"0F0\n{word}\n")
        assert word[:30] in str(error.value) and len(str(error.value)) < 150


def test_a_file_that_is_no_csv_is_a_value_error():
    with pytest.raises(UserError, match="not a CSV"):
        formats.from_csv("0F0," + "x" * 200_000)


def test_the_digest_tells_plans_apart():
    shape = PipelineShape(2, 2, 2)
    eager, late = (lower(breadth_first(shape, eager_backward=eager), shape) for eager in (True, False))
    assert formats.digest(eager) == formats.digest(formats.from_csv(formats.to_csv(eager)))
    assert formats.digest(eager) != formats.digest(late)


@pytest.mark.parametrize("resident", [None, 1])
@pytest.mark.parametrize("is_plan", [False, True])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 2, 3), (4, 2, 8), (3, 4, 2)])
def test_torchs_own_loader_reads_the_csv_as_the_same_actions(sizes, is_split, is_plan, resident, tmp_path):
    shape = PipelineShape(*sizes)
    order = breadth_first(shape, weight_lag=weight_lags(shape) if is_split else None)
    schedule = lower(order, shape, resident_chunks=resident) if is_plan else order
    runtime = loaded_by_torch(schedule, shape, is_plan, tmp_path)
    loaded = runtime.pipeline_order_with_comms if is_plan else runtime.pipeline_order
    assert [[str(action) for action in loaded[rank]] for rank in sorted(loaded)] == [
        [str(action) for action in actions] for actions in schedule
    ]
    assert runtime.stage_index_to_group_rank == {stage: stage % sizes[0] for stage in range(shape.num_stages)}


def loaded_by_torch(schedule, shape, is_plan, tmp_path):
    """Return torch's runtime of a schedule once it has read and validated the CSV."""
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules", reason="needs torch")
    if not hasattr(pipelining._ComputationType, "REDUCE_GRAD") and is_plan:
        pytest.skip("this torch knows no REDUCE_GRAD")
    path = tmp_path / "schedule.csv"
    path.write_text(formats.to_csv(schedule))
    # Its constructor wants stages in a process group; its loader needs only these.
    runtime = object.__new__(pipelining._PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages = shape.pp_size, shape.num_stages
    runtime._n_microbatches = shape.num_microbatches
    runtime._stages, runtime._defer_pp_recv, runtime.pipeline_order = [], False, {}
    runtime._load_csv(str(path), format="compute_comms" if is_plan else "compute_only")
    return runtime


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 4, 4), (3, 2, 8)])
def test_torchs_own_simulator_runs_a_split_order_to_its_end(sizes, tmp_path):
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules", reason="needs torch")
    shape = PipelineShape(*sizes)
    order = order_of("breadth-first-deferred", shape)
    late = lower(order, shape, hop=None)  # its receives wait where they stand, so none may be posted ahead
    plans = [loaded_by_torch(order, shape, False, tmp_path), loaded_by_torch(late, shape, True, tmp_path)]
    for runtime in plans:
        plan = {  # its simulator knows no gather and no reduction
            rank: [each for each in actions if each.microbatch_index is not None]
            for rank, actions in runtime.pipeline_order_with_comms.items()
        }
        done = pipelining._simulate_comms_compute(plan, shape.rank_of, shape.num_stages)
        assert {rank: [each for each in steps if each is not None] for rank, steps in done.items()} == plan
