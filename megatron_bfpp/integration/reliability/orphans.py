"""Helper processes end with the process that started them, however that ends. Standard library only: they import it.

Python ends the helpers of a process that ends by itself. One that is killed leaves a multiprocessing manager behind,
which serves nobody for ever: 0.5 GB per rank that has saved a checkpoint with Megatron.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.managers import BaseManager
from typing import Any

from ..seams import changed


def end_with_parent() -> None:
    """Watch the parent, in the helper process at its start.

    The helper then ignores SIGTERM. torchrun sends that to a rank with all that it has started; with
    --exit-signal-handler the rank takes it as the wish to save, for which it needs its helper.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a helper has a parent"

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_after_parent, daemon=True).start()


def managers_end_with_this_process() -> AbstractContextManager[None]:
    """Let the managers that are started within end with this process."""
    return changed(BaseManager, start=functools.partialmethod(BaseManager.start, initializer=end_with_parent))


def ending(get_queue: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function that starts a manager on its first call: the manager ends with this process."""
    with managers_end_with_this_process():
        return get_queue(*args, **kwargs)
