"""A rank of a case: its process groups, and the arms' steps with their times. Runs in a process of its own."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..console.errors import UserError
from ..integration.cpu.mode import enable_cpu
from .arms import Arms
from .case import ATTEMPTS, FREE, Case, Memory
from .emulate.network import Network, sleep_until
from .emulate.transport import installed

_LEAD_S = 0.05  # between the agreement on a step's start and the start, for the slowest rank to hear of it
_LATE = 1.01  # of the emulated step; one that really took longer was held up by the machine


def answers(rank: int, case: Case, memory: Memory) -> Iterator[tuple[str, Any]]:
    """Run the steps; rank 0 yields the plans of torch's arms, then each arm with its step time and how often it ran."""
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it lists its buckets, chunk by chunk
    torch.set_num_threads(1)
    arm = "the set-up"
    try:
        with _process_groups(rank, case, memory.port):
            for arm, answer in _steps(rank, case, memory):
                if rank == 0:
                    yield arm, answer
    except Exception as error:
        raise UserError(f"rank {rank} failed in {arm}: {type(error).__name__}: {error}") from error


@contextmanager
def _process_groups(rank: int, case: Case, port: Any) -> Iterator[None]:
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
    os.environ.update({name: str(value) for name, value in local.items()})
    enable_cpu()
    dist.init_process_group("gloo", store=_store(rank, port), rank=rank, world_size=case.ranks)
    parallel_state.initialize_model_parallel(1, case.shape.pp_size, case.shape.num_chunks)
    yield
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


def _store(rank: int, port: Any) -> Any:
    """Return rank 0's store, whose port the system chooses."""
    c10d: Any = dist
    if rank == 0:
        store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.value = store.port
        return store
    while not port.value:
        time.sleep(0.01)
    return c10d.TCPStore("127.0.0.1", port.value, is_master=False)


def _steps(rank: int, case: Case, memory: Memory) -> Iterator[tuple[str, Any]]:
    network = Network(case, memory.cards, memory.shared, scale=0.0)
    network.random.seed(rank)
    arms = Arms(network)
    with installed(network):
        # Plans and process groups are made in the first step; Megatron's hooks work from the second.
        for arm in 2 * case.arms:
            arms.steps[arm]()
        network.scale = 1.0
        yield "plans", arms.plans
        for _ in range(case.repeat):
            for arm in case.arms:
                for variant in case.variants:
                    if arms.collectives is not None:
                        arms.collectives.are_free = variant == FREE
                    yield arm + variant, _undisturbed(arms.steps[arm], network)


def _undisturbed(step: Callable[[], None], network: Network) -> tuple[float, int]:
    """Return the time of a step, and how often it was run.

    Of disturbed ones the shortest counts: what holds a rank up adds to the time.
    """
    shortest_s = float("inf")
    for attempt in range(1, ATTEMPTS + 1):
        step_s, emulated_s, late_s = _timed(step, network)
        shortest_s = min(shortest_s, step_s)
        if step_s + late_s <= _LATE * emulated_s:
            return step_s, attempt
    return shortest_s, ATTEMPTS


def _timed(step: Callable[[], None], network: Network) -> tuple[float, float, float]:
    """Return the seconds from a start that all ranks agree on to the end of the last rank, real and emulated.

    The third number: by how much a transfer on a shared card began late.
    """
    start = torch.tensor([time.monotonic() + _LEAD_S], dtype=torch.float64)
    dist.broadcast(start, 0)
    network.stream_s = float(start)
    if network.shared is not None:
        network.shared.late_s = 0.0
    sleep_until(network.stream_s)
    step()
    sleep_until(network.stream_s)
    late_s = 0.0 if network.shared is None else network.shared.late_s
    ends = torch.tensor([time.monotonic() - float(start), network.stream_s - float(start), late_s], dtype=torch.float64)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    real, emulated, late = ends.tolist()
    return real, emulated, late
