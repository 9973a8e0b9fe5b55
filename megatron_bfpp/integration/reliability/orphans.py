"""Helper processes end with the process that started them, however that ends. Standard library only: they import it.

Python ends the helpers of a process that ends by itself. One that is killed leaves a multiprocessing manager behind, which
serves nobody for ever: 0.5 GB per rank that has saved a checkpoint with Megatron.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import BaseManager
from typing import Any


def end_with_parent() -> None:
    """In the helper process, at its start.

    It then leaves SIGTERM alone. torchrun sends that to a rank with all that it has started; with --exit-signal-handler the rank
    takes it as the wish to save, for which it needs its helper.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_outlive_it_not, daemon=True).start()


def _outlive_it_not() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a helper has a parent"
    parent.join()
    os._exit(1)


@contextmanager
def managers_end_with_this_process() -> Iterator[None]:
    """Those that are started within."""
    start = BaseManager.start
    BaseManager.start = functools.partialmethod(start, initializer=end_with_parent)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        BaseManager.start = start  # type: ignore[method-assign]


def ending(get_queue: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of a function that starts a manager on its first call."""

    @functools.wraps(get_queue)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with managers_end_with_this_process():
            return get_queue(*args, **kwargs)

    return wrapper
