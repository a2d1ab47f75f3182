"""Worker processes end with what they work for."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from speed_engine.runtime.workers import worker_processes

ROOT = Path(__file__).parents[2]


def test_workers_of_what_is_interrupted_are_not_waited_for():
    """They take 600 seconds; they are ended, also while they are starting."""
    others = set(active_children())
    for started in (True, False):
        workers = set()
        with pytest.raises(KeyboardInterrupt), worker_processes(1) as pool:
            if started:
                pool.submit(os.getpid).result()
            pool.submit(time.sleep, 600)
            workers |= set(active_children()) - others
            raise KeyboardInterrupt
        assert [worker.exitcode for worker in workers] == [-signal.SIGKILL]


def test_each_worker_is_set_up(tmp_path):
    with worker_processes(1, os.chdir, tmp_path) as pool:
        assert pool.submit(os.getcwd).result() == str(tmp_path)


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    code = (
        "import os, sys, time; from speed_engine.runtime.workers import worker_processes\n"
        "with worker_processes(1) as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        if "Z (zombie)" in Path(f"/proc/{worker}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()
