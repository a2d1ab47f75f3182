import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from speed_engine.runtime.files import in_words, naming, new_folder, replacing, write_durably

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


WRITES = {
    "bytes": "files.write_durably(path, b'x' * 5000)",
    "tensors": "files.save_tensors({'x': torch.ones(5000)}, path)",
    "folder": """
    with files.new_folder(path) as partial:
        (partial / "a").write_bytes(b"short")
        (partial / "b").write_bytes(b"x" * 5000)""",
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_file_that_cannot_grow_is_named_with_a_remedy_and_nothing_is_left(tmp_path, kind):
    path = tmp_path / "made"
    script = f"""
import resource, sys
from pathlib import Path
import torch
from speed_engine.runtime import files

path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    {WRITES[kind]}
except OSError as error:
    print(files.in_words(error))
"""
    command = [sys.executable, "-c", script, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"[Errno 27] File too large: '{path}'. Raise the limit")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_answered_with_what_to_do_and_an_unnamed_one_is_not():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError) as caught, naming(Path("/data/x.tar")):
        raise full
    assert "'/data/x.tar'. Make room there; what is finished is kept." in in_words(caught.value)
    output = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # standard output has no path
    assert in_words(output) == "[Errno 28] No space left on device"


def test_a_folder_that_a_kill_left_half_written_is_made_anew(tmp_path):
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "half").write_bytes(b"")
    with new_folder(tmp_path / "made") as partial:
        (partial / "whole").write_bytes(b"")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "whole"]
