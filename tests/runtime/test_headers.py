"""Headers over gloo in earnest: every rank of a pipeline is a thread of this process."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_bfpp.integration.flags.settings import Settings
from megatron_bfpp.runtime import headers, p2p
from megatron_bfpp.runtime.channels import ChannelGroups
from megatron_bfpp.runtime.data_parallel import DataParallel
from megatron_bfpp.runtime.executor import Executor
from megatron_bfpp.schedule import Op, PipelineShape


class Compute:
    """An output is its input plus one, as long as its micro-batch says."""

    def __init__(self, is_variable):
        self.is_variable, self.seen = is_variable, []

    def forward(self, chunk, microbatch, received):
        if received is None:
            received = torch.zeros(1 + microbatch % 3 if self.is_variable else 2, 1, 1)
        self.seen.append((chunk, microbatch, received.shape[0], received.sum().item()))
        return received.detach() + 1

    def backward(self, received, output, grad):
        assert grad is None or grad.shape == output.shape
        return None if received is None else torch.ones_like(output)

    def release(self, output):
        pass


@pytest.fixture
def gloo(monkeypatch):
    """Return what makes a group of gloo for every thread. p2p and headers use the group that they are given."""
    names = iter(range(100))

    def make(size):
        store, name = dist.HashStore(), next(names)
        with ThreadPoolExecutor(size) as threads:
            return list(
                threads.map(
                    lambda rank: dist.ProcessGroupGloo(dist.PrefixStore(str(name), store), rank, size), range(size)
                )
            )

    transport = SimpleNamespace(
        isend=lambda tensor, target, group, tag=0: group.send([tensor], target, tag),
        irecv=lambda tensor, source, group, tag=0: group.recv([tensor.detach()], source, tag),
    )
    for module in (p2p, headers):
        monkeypatch.setattr(module, "dist", transport)
    return make


@pytest.mark.parametrize("is_variable", [False, True])
@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 3, 5), (2, 2, 1), (3, 2, 4)])
def test_every_message_meets_its_header(sizes, is_variable, gloo):
    shape = PipelineShape(*sizes)
    plan = Settings().plan_of(shape, is_ahead=not is_variable).actions
    channels = {(kind, colour): gloo(shape.pp_size) for kind in (Op.SEND_F, Op.SEND_B) for colour in range(3)}
    carriers = gloo(shape.pp_size)

    def run(rank):
        groups = ChannelGroups.__new__(
            ChannelGroups
        )  # without its rendezvous, for which torch has one world per process
        groups.ranks, groups.pp_rank, groups._routes = list(range(shape.pp_size)), rank, {}
        groups._groups = {key: of_ranks[rank] for key, of_ranks in channels.items()}
        cpu, compute = torch.device("cpu"), Compute(is_variable)
        messages = p2p.Messages(groups, shape, (2, 1, 1), torch.float32, cpu, carriers[rank], is_variable)
        gates = DataParallel(None, None, None, [torch.nn.Identity()] * shape.num_chunks)
        with gates:
            Executor(shape, compute, messages, gates).run(plan[rank])
        return compute.seen

    with ThreadPoolExecutor(shape.pp_size) as threads:
        seen = list(threads.map(run, range(shape.pp_size)))
    for rank, of_rank in enumerate(seen):
        for chunk, microbatch, length, total in of_rank:
            assert length == (1 + microbatch % 3 if is_variable else 2)
            assert total == length * (chunk * shape.pp_size + rank), "the sum of another stage's output"
