"""What launches the reductions and gathers of replicated and ZeRO-1 parameters, seen on Megatron's bucket groups."""

import json
from functools import partial
from pathlib import Path

import pytest
from gpt import UNTIED, ZERO_1, assert_same, flags_of, train

pytestmark = pytest.mark.slow

# Small enough that Megatron makes several buckets of the first chunk of the first rank.
BUCKETS = ("--ddp-bucket-size", "20000")


@pytest.mark.parametrize(
    "features", [(), UNTIED, ("--no-align-param-gather",), ("--no-align-grad-reduce", "--no-align-param-gather")]
)
def test_buckets_and_unaligned_collectives_keep_the_bits(features):
    assert_same(4, flags_of(2, 2, 1, 2, 4) + ZERO_1 + BUCKETS + features)


def record(folder: Path) -> None:
    """Have each rank note, per step, in which phase of the schedule each bucket group's collective was launched."""
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.pipeline_parallel import schedules

    phase, seen = "outside", []

    def within(owner, name, during):
        real = getattr(owner, name)

        def wrapper(*args, **kwargs):
            nonlocal phase
            before, phase = phase, during
            try:
                return real(*args, **kwargs)
            finally:
                phase = before

        setattr(owner, name, wrapper)

    def launches(name, kind):
        real = getattr(_ParamAndGradBucketGroup, name)

        def wrapper(group, *args, **kwargs):
            if kind == "gather" or group.grad_reduce_handle is None:  # Megatron may ask twice, and launches once
                seen.append((kind, phase, min(bucket.bucket_id for bucket in group.buckets)))
            return real(group, *args, **kwargs)

        setattr(_ParamAndGradBucketGroup, name, wrapper)

    def zero_grad_buffer(chunk, real=DistributedDataParallel.zero_grad_buffer):
        (folder / f"seen{dist.get_rank()}.json").write_text(json.dumps(seen))  # of all steps so far
        seen.append(("step", "begins", len(chunk.bucket_groups)))
        real(chunk)

    within(schedules, "forward_step", "forward")
    within(schedules, "backward_step", "backward")
    launches("start_grad_sync", "reduction")
    launches("start_param_sync", "gather")
    DistributedDataParallel.zero_grad_buffer = zero_grad_buffer


def last_step(folder: Path, rank: int) -> list:
    """What a rank launched in the second of three steps, and before it the numbers of its chunks' bucket groups."""
    seen = json.loads((folder / f"seen{rank}.json").read_text())
    begins = [index for index, each in enumerate(seen) if each[0] == "step"]
    second = [each for each in seen[begins[2] : begins[4]] if each[0] != "step"]
    return [seen[begins[2]][2], seen[begins[3]][2], *map(tuple, second)]


@pytest.mark.parametrize("aligned", [True, False])
def test_the_first_chunk_of_the_first_rank_is_reduced_in_its_last_backward_and_no_other_gather_waits(tmp_path, aligned):
    more = () if aligned else ("--no-align-param-gather",)
    flags = flags_of(2, 2, 1, 2, 4) + ZERO_1 + BUCKETS + UNTIED + more
    train(tmp_path, 4, *flags, "--pipeline-schedule", "breadth-first", prepare=partial(record, tmp_path))
    first, second, *launched = last_step(tmp_path, 0)
    assert first > 1 and second == 1
    reductions = [each[1:] for each in launched if each[0] == "reduction"]
    # The second chunk's by the plan, then the first one's buckets by Megatron's hooks, as the backward reaches them.
    assert reductions == [("outside", 0), *(("backward", bucket) for bucket in range(first))]
    gathers = [each[1:] for each in launched if each[0] == "gather"]
    assert [bucket for _, bucket in gathers] == [*reversed(range(first)), 0] if aligned else True
    assert ("outside", 0) in gathers, "the second chunk's gather is the plan's"
    assert gathers.count(("forward", 0)) == (0 if aligned else 1), (
        "only the first chunk's last bucket may wait for its forward"
    )


def test_other_ranks_reduce_each_chunk_as_a_whole(tmp_path):
    flags = flags_of(2, 2, 1, 2, 4) + ZERO_1 + BUCKETS + UNTIED
    train(tmp_path, 4, *flags, "--pipeline-schedule", "breadth-first", prepare=partial(record, tmp_path))
    assert last_step(tmp_path, 3)[:2] == [1, 1]
    assert [each for each in last_step(tmp_path, 3)[2:] if each[0] == "reduction"] == [("reduction", "outside", 0)] * 2
