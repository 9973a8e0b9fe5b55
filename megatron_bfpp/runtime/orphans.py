"""Helper processes end with the process that started them, however that ends. Standard library only: they import it.

Python ends the helpers of a process that ends by itself. One that is killed leaves a multiprocessing manager behind, which
serves nobody for ever: 0.5 GB per rank that has saved a checkpoint with Megatron.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import BaseManager
from typing import Any


def end_with_parent() -> None:
    """In the helper process, at its start."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def managers_end_with_this_process() -> Iterator[None]:
    """Those that are started within."""
    start = BaseManager.start
    BaseManager.start = functools.partialmethod(start, initializer=end_with_parent)  # type: ignore[method-assign]
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
