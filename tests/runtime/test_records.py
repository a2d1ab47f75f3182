import errno
import json
import math
import threading
import time

import pytest
import torch
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from tensorboard.summary.writer.record_writer import RecordWriter

from speed_engine.runtime.loggers import open_loggers
from speed_engine.runtime.records import (
    RunLog,
    SkippedSteps,
    TrainingClock,
    append_record,
    read_records,
)


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

    before = threading.enumerate()
    loggers = open_loggers(["tensorboard"], tmp_path, {}, 0)
    records = RunLog(tmp_path, 0, loggers)
    (thread,) = (
        each
        for each in threading.enumerate()
        if isinstance(each, _AsyncWriterThread) and each not in before
    )
    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    for step in range(steps):
        records.write(step, {"loss": 0.5})
        full.set()
        thread.join()
    records.close()
    assert read_records(tmp_path) == [{"step": step, "loss": 0.5} for step in range(steps)]
    (message,) = caplog.messages
    assert "what the logger tensorboard shows ends" in message and "No space left" in message


def test_what_depends_on_no_step_is_recorded_and_is_no_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = RunLog(tmp_path, 0, open_loggers(["tensorboard"], tmp_path, {}, 0))
    records.write(3, {"images": 24, "fid": 0.5, "solver": "ddim", "solver_steps": 25})
    records.write(3, {"images": 24, "guidance_interval": [0.1, 2.0], "learning_rate": 1e-4})
    records.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert set(curves.Tags()["scalars"]) == {"fid", "learning_rate"}
    assert read_records(tmp_path)[0]["solver_steps"] == 25


def strict(line: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    figures = {"loss": math.nan, "grad_norm": math.inf, "rate": 2.5, "images": 3, "solver": "ddim"}
    records = RunLog(tmp_path, resume_step=0)
    records.write(1, figures)
    records.close()
    append_record(tmp_path, {"step": 2, "kid": -math.inf})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(first) == {"step": 1, **figures, "loss": None, "grad_norm": None}
    assert strict(second) == {"step": 2, "kid": None}
    assert read_records(tmp_path) == [strict(first), strict(second)]


def test_records_with_nan_of_older_versions_are_read_and_kept(tmp_path):
    old = '{"step": 1, "loss": NaN, "grad_norm": Infinity, "images": 64}\n'
    (tmp_path / "metrics.jsonl").write_text(old)
    assert read_records(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "images": 64}]
    RunLog(tmp_path, resume_step=1).close()
    assert len(read_records(tmp_path)) == 1
    RunLog(tmp_path, resume_step=0).close()
    assert not read_records(tmp_path)


def test_a_resumed_run_may_limit_the_skipped_steps_in_a_row_anew():
    skipped, resumed = (SkippedSteps(torch.device("cpu")) for _ in range(2))
    for bad in (1.0, 1.0, 1.0, 0.0, 1.0):
        skipped.add(torch.tensor(bad))
    assert skipped.may_have(3, wait=False)
    resumed.load_state(skipped.state())
    assert not resumed.may_have(3, wait=False) and resumed.read() == (4, 1)
