import signal
import subprocess
import sys

import pytest

from speed_engine.runtime.files import replacing, write_durably

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from speed_engine.runtime import files

os.{place} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_durably(Path(sys.argv[1]), b"after, and longer")
"""


@pytest.mark.parametrize("place", ["fsync", "rename"])
def test_a_process_killed_while_it_writes_leaves_what_was_there(tmp_path, place):
    path = tmp_path / "config.json"
    path.write_bytes(b"before")
    script = KILLED_WHILE_WRITING.format(place=place)
    done = subprocess.run([sys.executable, "-c", script, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    write_durably(path, b"after")
    assert path.read_bytes() == b"after"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_processes_that_share_a_cache_write_under_names_of_their_own(tmp_path):
    path = tmp_path / "classifier.safetensors"
    with replacing(path, shared=True) as first, replacing(path, shared=True) as second:
        assert first != second
        first.write_bytes(b"the same")
        second.write_bytes(b"the same")
    assert path.read_bytes() == b"the same"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "images.npz"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
