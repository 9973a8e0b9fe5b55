"""How many micro-batches a job's steps have, and what they are predicted to cost."""

from itertools import product
from types import SimpleNamespace

import pytest

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.flags.batches import batch_sizes, microbatch_counts
from megatron_bfpp.schedule import PipelineShape, breadth_first, simulate
from megatron_bfpp.schedule.model.chunks import predicted_bubble


def test_the_predicted_bubble_is_the_simulators():
    for shape in (PipelineShape(*sizes) for sizes in product((2, 3, 6), (2, 4), (1, 3, 6, 13))):
        assert predicted_bubble(shape) == pytest.approx(simulate(breadth_first(shape), shape).bubble_fraction)


def test_micro_batches_of_every_batch_size():
    args = SimpleNamespace(
        step_batch_size_schedule="0:2 1K:4,2K:8", global_batch_size=None, micro_batch_size=1, world_size=4,
        tensor_model_parallel_size=1, pipeline_model_parallel_size=4,
    )  # fmt: skip
    assert microbatch_counts(args) == [2, 4, 8]
    ramp = SimpleNamespace(
        rampup_batch_size=["2", "4", "100"], global_batch_size=12, micro_batch_size=1, data_parallel_size=2,
    )  # fmt: skip
    assert batch_sizes(ramp) == ([2, 6, 10, 12], "--rampup-batch-size") and microbatch_counts(ramp) == [1, 3, 5, 6]


def test_a_schedule_of_batch_sizes_that_cannot_be_read_is_named():
    with pytest.raises(UserError, match="--step-batch-size-schedule 0:many"):
        microbatch_counts(
            SimpleNamespace(
                step_batch_size_schedule="0:many", global_batch_size=8, micro_batch_size=1, data_parallel_size=1
            )
        )
