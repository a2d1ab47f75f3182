"""Finds the process that hangs, names it, and ends the run so that a launcher can start it again.

Processes wait for each other in every step: if one hangs, all do, and none can say whose fault it
is. So a thread beside each training loop reports to a store what its process is doing:

    rank 1: step 35, waiting for data, since 10:07:31, heard of at 10:12:40

A stopped process is not heard of; a stuck one is, but has been in the same place for long. Whoever
waits longer than the limit reads all reports, prints the verdict and exits with status EXIT_HUNG.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any, Self

from speed_engine.runtime.world import World, rendezvous_store

EXIT_HUNG = 75  # EX_TEMPFAIL: trying again may help
# What may take long without anything being wrong, as long as the process is heard of.
PATIENT = ("evaluating", "saving", "reading the data set")


class Watchdog:
    """A context manager around a training loop.

    Args:
        world: the processes; alone there is nobody to wait for, and nothing is watched.
        limit: seconds without progress after which the run ends.
    """

    def __init__(self, world: World, limit: float) -> None:
        self._world, self._limit = world, limit
        self._interval = min(1.0, limit / 4)
        self._doing: tuple[int, str, float] = 0, "starting", time.time()
        self._ended = threading.Event()

    def doing(self, step: int, what: str) -> None:
        """Say what this process is about to do; cheap."""
        self._doing = step, what, time.time()

    def __enter__(self) -> Self:
        if self._world.size > 1:
            # A connection of its own: the main thread's is busy while it waits.
            self._store = rendezvous_store(keeper=False, timeout=timedelta(seconds=10))
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._world.size > 1:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            step, what, since = self._doing
            try:
                self._report(step, what, since)
                waited = time.time() - since
                if waited > self._limit and what not in PATIENT:
                    verdict = self._verdict()
                    if verdict is not None:
                        self._end(verdict)
            except Exception as error:  # the store is gone: with it the process that keeps it
                if not self._ended.is_set() and time.time() - self._doing[2] > self._limit:
                    self._end(f"the process that keeps the rendezvous does not answer ({error})")

    def _report(self, step: int, what: str, since: float) -> None:
        report = {
            "step": step, "doing": what, "since": since, "heard": time.time(), "pid": os.getpid(),
            "host": socket.gethostname(),
        }  # fmt: skip
        self._store.set(f"watchdog/{self._world.rank}", json.dumps(report))

    def _verdict(self) -> str | None:
        """Who hangs; None if somebody is busy with what may take long."""
        reports = {rank: self._read(rank) for rank in range(self._world.size)}
        now = time.time()
        silent = [r for r, report in reports.items() if now - report["heard"] > self._limit / 2]
        if silent:
            return _name(reports, silent, "has stopped answering")
        if any(report["doing"] in PATIENT for report in reports.values()):
            return None
        # In a collective all stand at "training"; the one that never came is elsewhere, or behind.
        place = {rank: (r["step"], r["doing"] == "training") for rank, r in reports.items()}
        last = min(place.values())
        behind = [rank for rank, at in place.items() if at == last]
        if len(behind) == self._world.size:
            return f"every process has been at step {reports[0]['step']} for {self._limit:.0f} s"
        return _name(reports, behind, "is where the others have left")

    def _read(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(f"watchdog/{rank}"))

    def _end(self, verdict: str) -> None:
        text = (
            f"rank {self._world.rank} waited {self._limit:.0f} s for the others: {verdict}. The "
            "run ends here; the checkpoints that it has are intact. Longer waits: --hang-timeout."
        )
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_HUNG)  # a collective that waits cannot be interrupted otherwise


def _name(reports: dict[int, dict[str, Any]], ranks: list[int], what: str) -> str:
    """Which ranks, where they run, and what they were doing."""
    now = time.time()
    described = [
        f"rank {rank} {what} (process {report['pid']} on {report['host']}; {report['doing']} "
        f"at step {report['step']} for {now - report['since']:.0f} s, heard of "
        f"{now - report['heard']:.0f} s ago)"
        for rank, report in reports.items()
        if rank in ranks
    ]
    return "; ".join(described)
