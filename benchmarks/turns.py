"""Providers in processes of their own, which take turns.

So what holds for a whole process, such as its allocator's thresholds, can be compared, too. Only
the one whose turn it is runs; its threads and caches come back in a call before those timed.
"""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

from harness import Timing, summary

Build = Callable[[], Callable[[], object]]  # run in the process; may be sent there
SETTLE = 0.02  # seconds in which the threads of the one before fall asleep


def in_turn(
    providers: Mapping[str, Build], warmup: int, turns: int, calls: int
) -> dict[str, Timing]:
    """Time each provider ``turns`` times ``calls`` calls, in turn, after ``warmup`` calls."""
    samples: dict[str, list[float]] = {name: [] for name in providers}
    with ExitStack() as stack:
        ends = {n: stack.enter_context(_process(b, warmup)) for n, b in providers.items()}
        for _ in range(turns):
            for name, end in ends.items():
                end.send(calls)
                samples[name] += end.recv()
    return {name: summary(values) for name, values in samples.items()}


@contextmanager
def _process(build: Build, warmup: int) -> Generator[Connection]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, build, warmup))
    process.start()
    there.close()  # else a child that died would leave us waiting for it
    try:
        here.recv()
        yield here
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, build: Build, warmup: int) -> None:
    call = build()
    for _ in range(warmup):
        call()
    connection.send("ready")
    while True:
        try:
            calls = connection.recv()
        except EOFError:
            return
        time.sleep(SETTLE)
        call()
        connection.send([_milliseconds(call) for _ in range(calls)])


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)
