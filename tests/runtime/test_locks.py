"""A folder is written by one command at a time, whatever becomes of that command."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from speed_engine.runtime.checks import UserError
from speed_engine.runtime.locks import held

HOLDER = """
import os, sys, time
from pathlib import Path
from speed_engine.runtime.locks import held

with held(Path(sys.argv[1]), "trained"):
    if os.fork() == 0:  # a child that outlives its parent
        os.setsid()
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_a_folder_is_refused_while_a_process_holds_it_and_free_when_it_was_killed(tmp_path):
    """Even if a child of it lives on."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match="is being trained by another command"):
                with held(tmp_path, "trained"):
                    pass
            holder.kill()
            holder.wait()
            with held(tmp_path, "trained"):
                pass
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_a_folder_is_free_when_the_block_has_ended(tmp_path):
    with held(tmp_path, "trained"):
        pass
    ask = "import sys; from pathlib import Path; from speed_engine.runtime.locks import held\n"
    ask += "with held(Path(sys.argv[1]), 'trained'): pass"
    assert subprocess.run([sys.executable, "-c", ask, str(tmp_path)]).returncode == 0


def test_a_file_system_without_locks_is_no_obstacle_and_is_told(tmp_path, monkeypatch, caplog):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with held(tmp_path, "trained"):
        assert "cannot be locked here" in caplog.text
