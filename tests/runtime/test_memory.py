"""Freed memory is kept: a process that uses as much again meets no page faults."""

import platform
import subprocess
import sys

import pytest

from speed_engine.runtime import memory
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.machine import choose_host_memory
from speed_engine.runtime.memory import check_memory, keep_freed_memory

FAULTS = """
import resource, sys
from speed_engine.runtime.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import torch
def step():
    kept = [torch.ones(3 * 2**22) for _ in range(4)]  # 48 MiB each
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4)
"""


def faults(how: str) -> float:
    command = [sys.executable, "-c", FAULTS, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
def test_large_tensors_are_made_of_memory_that_was_freed_before():
    kept, returned = faults("kept"), faults("returned")
    assert returned > 50  # else there is nothing to gain; many more where pages are small
    assert kept < returned / 10
    assert choose_host_memory().value == "kept"


def test_an_older_glibc_is_asked_for_less(monkeypatch):
    asked = []

    def mallopt(threshold, size):
        asked.append((threshold, size))
        return int(threshold != memory._MMAP_THRESHOLD or size <= 2**25)

    monkeypatch.setattr(memory, "_mallopt", lambda: mallopt)
    assert keep_freed_memory()
    assert asked == [(-3, 2**30), (-3, 2**25), (-1, 2**30)]


def test_another_c_library_keeps_nothing(monkeypatch):
    monkeypatch.setattr("speed_engine.runtime.memory._mallopt", lambda: None)
    assert not keep_freed_memory()
    assert choose_host_memory().value == "returned"


def test_what_this_machine_cannot_hold_is_refused_with_a_remedy():
    check_memory("two numbers", 16, "forget one")
    with pytest.raises(UserError, match=r"numbers take 1,000,000,000\.0 GB, .* forget some\.$"):
        check_memory("many numbers", 10**18, "forget some")
