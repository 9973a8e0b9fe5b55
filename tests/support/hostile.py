"""A transport as unkind as NCCL may be, over gloo.

Training that keeps its bits on it waits wherever it must, and reuses nothing early. `hostile()` replaces
torch.distributed's isend and irecv as runtime/p2p.py sees them, so the runtime's own code is what runs.
  - Each process group is one stream: its operations on a rank start in the order of their launch, each after the one
    before it is complete. A message that waits behind another one waits; a plan that relies on more hangs.
  - A send completes only after its receive was launched and has reached the head of its stream (rendezvous).
  - A received buffer is NaN (or a huge integer) until its wait() returns.
  - A sent tensor is read as late as allowed: when the sender waits for it, or after a random time. The object given to
    isend is read, not a copy of it, and after its wait() a deallocated or reused tensor does no harm any more.
  - Deliveries are delayed at random.
  - With one hardware queue a rank that launches a send or receive stops there until the one before it on the same
    process group is complete.
Headers, which travel over gloo in earnest, are sent late and one after the other; nothing else is done to them.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

MOST_DELAY_S = 0.02
READY = 1  # gloo's tag of the message that says "my receive has started"; data has tag 0


class Stream:
    """The operations of one rank on one process group, one after the other, in a thread."""

    def __init__(self, seed: int, has_own_queue: bool = True):
        self.random = random.Random(seed)
        self._has_own_queue, self._last = has_own_queue, Work()
        self._last.done.set()
        self._operations: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def launch(self, operation) -> Work:
        if not self._has_own_queue:
            self._last.done.wait()
        self._last = work = Work()
        self._operations.put((operation, work))
        return work

    def _work(self) -> None:
        while True:
            operation, work = self._operations.get()
            try:
                operation(work)
            except BaseException as error:  # raised again by wait(), in the thread that can report it
                work.error = error
            work.done.set()


class Work:
    """What isend and irecv return."""

    def __init__(self) -> None:
        self.done, self.is_waited_for = threading.Event(), threading.Event()
        self.arrived: tuple[torch.Tensor, torch.Tensor] | None = None
        self.sent: dist.Work | None = None  # of a header
        self.error: BaseException | None = None

    def wait(self) -> bool:
        self.is_waited_for.set()
        self.done.wait()
        if self.error is not None:
            raise self.error
        if self.arrived is not None:
            buffer, data = self.arrived
            with torch.no_grad():
                buffer.copy_(data)
            self.arrived = None
        if self.sent is not None:
            self.sent.wait()
        return True


def hostile(seed: int, one_queue: bool = False) -> SimpleNamespace:
    """What stands for torch.distributed in runtime/p2p.py."""
    streams: dict[dist.ProcessGroup, Stream] = {}

    def stream(group: dist.ProcessGroup) -> Stream:
        if group not in streams:
            streams[group] = Stream(1000 * seed + len(streams), not one_queue)
        return streams[group]

    def isend(tensor: torch.Tensor, dst: int, group: dist.ProcessGroup) -> Work:
        own = stream(group)

        def operation(work: Work) -> None:
            dist.recv(torch.zeros(1), dst, group=group, tag=READY)
            work.is_waited_for.wait(own.random.uniform(0, MOST_DELAY_S))
            dist.send(tensor.clone(), dst, group=group)

        return own.launch(operation)

    def irecv(buffer: torch.Tensor, src: int, group: dist.ProcessGroup) -> Work:
        own = stream(group)
        with torch.no_grad():
            buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)
        data = torch.empty_like(buffer, requires_grad=False)

        def operation(work: Work) -> None:
            dist.send(torch.zeros(1), src, group=group, tag=READY)
            dist.recv(data, src, group=group)
            time.sleep(own.random.uniform(0, MOST_DELAY_S / 4))
            work.arrived = buffer, data

        return own.launch(operation)

    return SimpleNamespace(**{**vars(dist), "isend": isend, "irecv": irecv})


def late_headers(seed: int) -> SimpleNamespace:
    """What stands for torch.distributed in runtime/headers.py."""
    stream = Stream(seed)

    def isend(numbers: torch.Tensor, dst: int, group: dist.ProcessGroup, tag: int) -> Work:
        assert numbers.device.type == "cpu" and dist.get_backend(group) == "gloo"

        def operation(work: Work) -> None:
            time.sleep(stream.random.uniform(0, MOST_DELAY_S / 4))
            work.sent = dist.isend(numbers, dst, group, tag)

        return stream.launch(operation)

    return SimpleNamespace(**{**vars(dist), "isend": isend})
