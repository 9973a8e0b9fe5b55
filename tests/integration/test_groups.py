"""Process groups of a pipeline are made by its ranks alone, whatever groups each of them has made before."""

import pytest
from jobs import run_job


def make_channels_after_different_groups():
    """For pipelines of 2 and 4 ranks, in either order of Megatron's, with groups of single ranks before and between."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    import megatron_bfpp

    megatron_bfpp.enable("breadth-first", device="cpu")
    from megatron_bfpp.integration.step.groups import channel_groups, local_group

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    pp_groups = []  # of which Megatron makes all: it counts the groups itself, and needs them equal
    for pp, order in ((2, "tp-cp-ep-dp-pp"), (2, "tp-cp-ep-pp-dp"), (4, "tp-cp-ep-dp-pp")):
        parallel_state.initialize_model_parallel(1, pp, 2, order=order)
        pp_groups.append(parallel_state.get_pipeline_model_parallel_group())
        parallel_state.destroy_model_parallel()
    for index, pp_group in enumerate(pp_groups):
        for _ in range((rank + index) % 4):  # torch counts them, before 2.14 those of a rank, since 2.14 those it made
            dist.new_group([rank], use_local_synchronization=True)
        channels = channel_groups(pp_group, torch.device("cpu"))
        assert channels is channel_groups(pp_group, torch.device("cpu"))
        again = [local_group(channels.ranks, "CLOCKS", backend="gloo") for _ in range(2)]  # of the same ranks
        for group in again:
            total = torch.tensor([rank])
            dist.all_reduce(total, group=group)
            assert total.item() == sum(channels.ranks)
        assert len({group.group_name for group in again}) == 2
    assert [len(dist.get_process_group_ranks(group)) for group in pp_groups] == [2, 2, 4]


@pytest.mark.slow
def test_ranks_with_different_groups_before_make_their_channels(tmp_path):
    # Without a name of its own the group is waited for under another name on each rank, until the test's time is up.
    run_job(make_channels_after_different_groups, 4, tmp_path)
