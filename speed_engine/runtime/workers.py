"""Processes that work for this one, and end with it: when it is stopped, and when it is killed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any


@contextmanager
def worker_processes(
    count: int, start: Callable[..., object] | None = None, *given: Any
) -> Iterator[ProcessPoolExecutor]:
    """So many processes, which are not waited for if the body ends in an exception.

    What they write must be whole or invisible wherever they are ended.

    Args:
        count: of the processes.
        start: what each calls once, with ``given``.
        given: what can be pickled.
    """
    # Spawned, not forked: the caller may have threads, such as those of PyTorch.
    others = set(active_children())
    pool = ProcessPoolExecutor(count, get_context("spawn"), _start, (start, given))
    try:
        yield pool
    except BaseException:
        for process in set(active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., object] | None, given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    end_with_parent(signal.SIGKILL)
    if start is not None:
        start(*given)


def end_with_parent(number: signal.Signals) -> None:
    """Send this process a signal once the one that started it is gone, however that ended.

    A worker of a killed parent would wait for tasks for ever, and a run would train on.
    """
    threading.Thread(target=_signal_without_parent, args=(number,), daemon=True).start()


def _signal_without_parent(number: signal.Signals) -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), number)
