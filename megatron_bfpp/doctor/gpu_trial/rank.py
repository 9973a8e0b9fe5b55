"""A rank of the GPU trial: Megatron's trainer under one or more of the observers below.

place.py starts it by the product's launcher, -m megatron_bfpp.run, with a script that calls `train`. It wraps what the
executor and the messages offer, in this process, so that the product carries no hook for it. What an observer has seen
goes to its folder.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function

from ...console.files import append_line
from ...integration import seams
from ...integration.flags.settings import settings_of
from ...integration.process import megatron_args
from ...runtime.executor import Executor
from ...runtime.p2p import Messages
from ...schedule.ir import Action, Op
from .shapes import QUIET_STEPS, flags_of, positions_of, turns_of

Span = Callable[[Action], AbstractContextManager[object]]


def _around_steps(name: str, around: Callable[[Executor, list[Action]], AbstractContextManager[None]]) -> None:
    """Run every step of the executor within a context that gets it and its actions."""
    run = Executor.run

    def wrapped(self: Executor, actions: list[Action]) -> None:
        with around(self, actions):
            run(self, actions)

    with seams.together(f"the trial's {name}") as undo:
        seams.put(undo, Executor, "run", wrapped)


def walk(folder: Path) -> None:
    """Wait for the whole device before one action of one rank, in each step before another one."""
    steps = 0
    positions: list[tuple[int, int]] = []

    @contextmanager
    def around(executor: Executor, actions: list[Action]) -> Iterator[None]:
        nonlocal steps, positions
        shape, pp_rank = executor.shape, executor.shape.rank_of(actions[0].stage)
        positions = positions or positions_of(settings_of(megatron_args()).plan_of(shape).actions)
        now, steps = steps - QUIET_STEPS, steps + 1
        rank, place = positions[now] if 0 <= now < len(positions) else (pp_rank, -1)
        if dist.get_rank() == 0 and place >= 0:
            append_line(folder / "walk.jsonl", {"pp_rank": rank, "position": place, "positions": len(positions)})
        if rank == pp_rank and place >= 0:
            executor.span = _around(executor.span, _synchronizing(place))
        yield

    _around_steps("walk", around)


def _synchronizing(place: int) -> Span:
    actions = count()

    def span(action: Action) -> AbstractContextManager[object]:
        if next(actions) == place:
            torch.cuda.synchronize()
        return nullcontext()

    return span


def _around(inner: Span | None, outer: Span) -> Span:
    @contextmanager
    def span(action: Action) -> Iterator[None]:
        with outer(action), nullcontext() if inner is None else inner(action):
            yield

    return span


def observe(folder: Path) -> None:
    """Time the host in every step, count messages that outlive it, and profile the last step."""
    host_s: list[float] = []
    alive: list[int] = []
    storages: list[StorageWeakRef] = []
    _collect_messages(storages)

    @contextmanager
    def around(executor: Executor, actions: list[Action]) -> Iterator[None]:
        args, rank = megatron_args(), dist.get_rank()
        storages.clear()
        is_last = args.curr_iteration == args.train_iters - 1
        if is_last:
            executor.span = _around(executor.span, _named)
        with _profiled(folder / f"rank{rank}.trace.json") if is_last else nullcontext():
            started = time.perf_counter()
            yield
            spent = time.perf_counter() - started
        alive.append(sum(not storage.expired() for storage in storages))  # type: ignore[no-untyped-call]
        if not is_last:
            host_s.append(spent)
            return
        found = {
            "pp_rank": executor.shape.rank_of(actions[0].stage), "chunks": executor.shape.num_chunks,
            "actions": len(actions), "messages": len(storages), "alive": max(alive),
            "host_s": statistics.median(host_s[len(host_s) // 2 :]),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }  # fmt: skip
        (folder / f"rank{rank}.json").write_text(json.dumps(found))

    _around_steps("observation", around)


def _collect_messages(storages: list[StorageWeakRef]) -> None:
    receive, send = Messages.receive, Messages.send

    def received(self: Messages, action: Any) -> torch.Tensor:
        tensor = receive(self, action)
        storages.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        return tensor

    def sent(self: Messages, action: Action, tensor: torch.Tensor, *more: Any, **named: Any) -> None:
        storages.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        send(self, action, tensor, *more, **named)

    with seams.together("the trial's messages") as undo:
        seams.put(undo, Messages, "receive", received)
        seams.put(undo, Messages, "send", sent)


@contextmanager
def _profiled(path: Path) -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        yield
        if on_gpu:
            torch.cuda.synchronize()
    found.export_chrome_trace(str(path))


def _named(action: Action) -> AbstractContextManager[object]:
    return record_function(f"PP:{action}")


def silent(folder: Path) -> None:
    """Send nothing, and receive random numbers at once: the same products of matrices, without messages."""

    def receive(self: Messages, action: Any) -> torch.Tensor:
        # Random: a GPU multiplies zeros faster, for want of power.
        made = torch.randn(self.tensor_shape, dtype=self.dtype, device=self.device)
        return made.requires_grad_(action[1] is Op.RECV_F)

    def send(self: Messages, action: Action, tensor: torch.Tensor, release: Any = None) -> None:
        if release is not None:
            release(tensor)

    def nothing(self: Messages, *_: Any) -> None:
        pass

    silenced = dict.fromkeys(("post_receive", "before_compute", "finish_send", "assert_finished"), nothing)
    with seams.together("the trial's silence") as undo:
        for name, method in {**silenced, "receive": receive, "send": send}.items():
            seams.put(undo, Messages, name, method)


def variable(folder: Path) -> None:
    """Send sizes ahead of every tensor: a flag of Megatron's configuration that no command line sets."""
    from megatron.core.utils import get_model_config

    def switch(call: dict[str, Any]) -> None:
        get_model_config(call["model"][0]).variable_seq_lengths = True

    _before_schedules(switch)


def arms(folder: Path) -> None:
    """Run each step under another schedule or with another number of micro-batches, in turn."""
    turns: Iterator[tuple[str, int]] | None = None

    def choose(call: dict[str, Any]) -> None:
        nonlocal turns
        args = megatron_args()
        if turns is None:
            chunks = args.virtual_pipeline_model_parallel_size or 1
            turns = cycle(turns_of(chunks, args.pipeline_model_parallel_size))
        arm, call["num_microbatches"] = next(turns)
        args.pipeline_schedule, args.breadth_first_engine = flags_of(arm)
        if dist.get_rank() == 0:
            step = args.curr_iteration + 1
            append_line(folder / "arms.jsonl", {"step": step, "arm": arm, "microbatches": call["num_microbatches"]})

    _before_schedules(choose)


def _before_schedules(change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` change the arguments of every call of Megatron's two pipeline schedules."""

    def changing(schedule: Callable[..., Any], **call: Any) -> Any:
        change(call)
        return schedule(**call)

    for name in ("with", "without"):
        whole = f"forward_backward_pipelining_{name}_interleaving"
        place = "megatron.core.pipeline_parallel.schedules", whole
        seams.apply(seams.Seam(*place, "the trial changes its calls", ("num_microbatches",)), changing)


OBSERVERS = {each.__name__: each for each in (walk, observe, silent, variable, arms)}


def train(observers: str, folder: str) -> None:
    """Train as sys.argv says, under the observers. Called when enable() has changed Megatron."""
    from ...integration.gpt import releases

    for name in observers.split(","):
        OBSERVERS[name](Path(folder))
    releases.train()
