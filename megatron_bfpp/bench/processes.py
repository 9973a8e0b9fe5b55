"""Run the arms of a benchmark case in real processes, one per rank, and time their steps. The processes are forked from one
that has imported Megatron once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..console.errors import UserError
from ..schedule import PipelineShape, Schedule
from .data_parallel import ALONE, ReplicaTimes
from .emulate.network import NUMBERS_PER_CARD, Link, Network, sleep_until
from .emulate.shared_card import SharedCards
from .emulate.stages import StageTimes

SHARDED = "breadth-first-sharded"  # fully, which takes data parallelism
ARMS = (
    "1f1b",
    "interleaved",
    "interleaved-grouped",
    "breadth-first",
    "breadth-first-late",
    "breadth-first-megatron",
    SHARDED,
    "torch-interleaved",
    "torch-looped-bfs",
)

FREE = ", free collectives"

_LEAD_S = 0.05  # between the agreement on a step's start and the start, for the slowest rank to hear of it
_LATE = 1.01  # of the emulated step; one that really took longer was held up by the machine
_BEHIND = 0.7  # of a forward: how late a rank may tell of a transfer on a shared card
_ATTEMPTS = 4  # at such a step; a host that is always too slow for the stages is part of what is measured
_PATIENCE_S = 120.0  # beyond the expected duration; then a rank hangs

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["megatron_bfpp.bench.arms", "megatron_bfpp.integration.cpu.mode"])


@dataclass(frozen=True)
class Case:
    """One shape on one network. message_bytes: of a message between stages. replicas: of the pipeline, with their traffic."""

    shape: PipelineShape
    times: StageTimes
    link: Link
    message_bytes: float = 0.0
    replicas: ReplicaTimes = ALONE
    arms: tuple[str, ...] = ARMS
    repeat: int = 3

    @property
    def variants(self) -> tuple[str, ...]:
        """How each arm runs: also with collectives that take no time, which shows what they cost it."""
        return ("", FREE) if self.replicas.size > 1 else ("",)


@dataclass(frozen=True)
class Measured:
    """step_times_s: per arm; with data parallelism also, with FREE behind its name, with collectives that took no time.
    plans: of torch's arms, as torch made them, without its actions for sharded parameters.
    repeated: how many steps were run again, since the machine did not run the ranks when their work was due.
    """

    step_times_s: dict[str, list[float]]
    plans: dict[str, Schedule]
    repeated: int


def run_case(case: Case, on_step: Callable[[str, float], None] = lambda arm, step_s: None) -> Measured:
    """Run steps that alternate between the arms. on_step: called after each with its arm and step time in seconds.

    Raises UserError where a rank fails or hangs, with its last words.
    """
    size, results = case.shape.pp_size * case.replicas.size, _context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cards = _context.Array("d", NUMBERS_PER_CARD * size)
    shared = (
        SharedCards(_context, size, case.link.full_duplex, _BEHIND * case.times.forward_s)
        if case.link.collectives_share_card
        else None
    )
    ranks = [
        _context.Process(target=_rank, args=(rank, store.port, case, cards, shared, results)) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    found: dict[str, list[float]] = {arm + variant: [] for arm in case.arms for variant in case.variants}
    repeated = 0
    try:
        _, plans = _next(results, _expected_s(case))
        for _ in range(case.repeat * len(found)):
            arm, (step_s, attempts) = _next(results, _ATTEMPTS * _expected_s(case))
            found[arm].append(step_s)
            repeated += attempts - 1
            on_step(arm, step_s)
        for rank in ranks:
            rank.join(_PATIENCE_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return Measured(found, plans, repeated)


def _expected_s(case: Case) -> float:
    shape = case.shape
    slots = (shape.num_chunks - 1) * max(shape.num_microbatches, shape.pp_size) + shape.num_microbatches + shape.pp_size
    collectives_s = 2 * shape.num_chunks * (case.replicas.reduction_s + case.replicas.gather_s)
    return (
        4 * slots * (case.times.forward_s + case.times.backward_s + 2 * case.link.latency_s)
        + collectives_s
        + _PATIENCE_S
    )


def _next(results: Any, timeout_s: float) -> tuple[str, Any]:
    try:
        arm, answer = results.get(timeout=timeout_s)
    except queue.Empty:
        raise UserError(f"no rank has finished a step for {timeout_s:.0f} s: a rank hangs or was killed.") from None
    if isinstance(answer, str):
        raise UserError(f"{arm} failed: {answer}")
    return arm, answer


def _rank(rank: int, port: int, case: Case, cards: Any, shared: SharedCards | None, results: Any) -> None:
    size = case.shape.pp_size * case.replicas.size
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), OMP_NUM_THREADS="1"
    )
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it lists its buckets, chunk by chunk
    arm = "the set-up"
    try:
        with _process_group(rank, port, size, case.shape):
            for arm, answer in _answers(rank, case, cards, shared):
                if rank == 0:
                    results.put((arm, answer))
    except BaseException as error:
        results.put((f"rank {rank}", f"{type(error).__name__} in {arm}: {error}\n{traceback.format_exc(limit=-3)}"))
        raise


@contextmanager
def _process_group(rank: int, port: int, size: int, shape: PipelineShape) -> Iterator[None]:
    from megatron.core import parallel_state

    from ..integration.cpu.mode import enable_cpu

    enable_cpu()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(1, shape.pp_size, shape.num_chunks)
    yield
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


def _answers(rank: int, case: Case, cards: Any, shared: SharedCards | None) -> Iterator[tuple[str, Any]]:
    """The plans, then each step with its time and how often it was run."""
    from .arms import Arms

    network = Network(case.link, case.message_bytes, cards, scale=0.0, shared=shared, replicas=case.replicas.size)
    network.random.seed(rank)
    arms = Arms(case.shape, case.times, network, case.replicas)
    with network.installed():
        for arm in (
            2 * case.arms
        ):  # plans and process groups are made in the first step; Megatron's hooks work from the second
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
    """The time of a step, and how often it was run. Of disturbed ones the shortest counts: what holds a rank up adds to the time."""
    shortest_s = float("inf")
    for attempt in range(1, _ATTEMPTS + 1):
        step_s, emulated_s, late_s = _timed(step, network)
        shortest_s = min(shortest_s, step_s)
        if step_s + late_s <= _LATE * emulated_s:
            return step_s, attempt
    return shortest_s, attempt


def _timed(step: Callable[[], None], network: Network) -> tuple[float, float, float]:
    """Seconds from a start that all ranks agree on to the end of the last rank: real ones, and those of the emulated streams. And
    by how much a transfer on a shared card began late.
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
