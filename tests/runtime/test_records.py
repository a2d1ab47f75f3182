import time

from speed_engine.runtime.records import TrainingClock


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
