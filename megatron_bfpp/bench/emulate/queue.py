"""One hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1), in which an operation that cannot start blocks all behind it.

An operation of a communicator cannot start before the previous one there is complete. With a queue for each stream only
the communicator waits for that. With one queue everything waits that the rank launches later, so its compute stream
stops at a launch until the previous operation of that communicator is complete. The communicators are those of torch on
NCCL, initialized lazily as Megatron does it:
  - a send or a receive by itself: one for each group and pair of ranks, for both directions;
  - a batch of them, which is one operation, and a collective: one for each group.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager


class HardwareQueue:
    """The one queue of a rank. wait_until: has its compute stream wait until a moment."""

    def __init__(self, wait_until: Callable[[float], None]):
        self._wait_until = wait_until
        self._ends: dict[Hashable, list[Callable[[], float]]] = {}  # communicator -> ends of its last operation
        self._batch: Hashable = None  # the group of the batch that is being launched

    def begin(self, communicator: Hashable) -> None:
        """Stop before the launch of an operation; within a batch nothing waits."""
        if self._batch is None:
            for end_s in self._ends.pop(communicator, ()):
                self._wait_until(end_s())

    def launched(self, communicator: Hashable, end_s: Callable[[], float]) -> None:
        """Note a launched operation. end_s: waits until its end is known, and returns it."""
        self._ends.setdefault(self._batch or communicator, []).append(end_s)

    @contextmanager
    def batch(self, group: Hashable) -> Iterator[None]:
        """Launch several sends and receives as one operation."""
        self.begin(group)
        self._batch = group
        try:
            yield
        finally:
            self._batch = None
