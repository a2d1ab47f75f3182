import errno
import threading
import time

import pytest
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from tensorboard.summary.writer.record_writer import RecordWriter

from speed_engine.runtime.records import RunLog, TrainingClock, read_records


def test_the_clock_counts_training_only_and_goes_on_from_where_it_was(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = TrainingClock(before=7.0)
    now[0] += 50
    assert clock.seconds == 7  # not started
    clock.start()
    now[0] += 3
    with clock.paused():
        now[0] += 20
        assert clock.seconds == 10
    now[0] += 2
    assert clock.seconds == 12


@pytest.mark.parametrize("steps", [1, 3], ids=["at the end", "at a later write"])
def test_a_full_disk_costs_the_curves_and_neither_records_nor_the_end(
    tmp_path, monkeypatch, caplog, steps
):
    """TensorBoard writes in a thread, whose death shows at the next write or at the end."""
    full = threading.Event()

    def write(*_):
        full.wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    records = RunLog(tmp_path, resume_step=0)
    (thread,) = (each for each in threading.enumerate() if isinstance(each, _AsyncWriterThread))
    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    for step in range(steps):
        records.write(step, {"loss": 0.5})
        full.set()
        thread.join()
    records.close()
    assert read_records(tmp_path) == [{"step": step, "loss": 0.5} for step in range(steps)]
    (message,) = caplog.messages
    assert "TensorBoard's curves end" in message and "No space left" in message
