"""What a person sees while work is done."""

import io
import logging
import sys
import time
import types
from collections.abc import Callable

import pytest
from rich.console import Console

from speed_engine.runtime import progress
from speed_engine.runtime.progress import SampleProgress, TrainingProgress, announced, announcing


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def plain() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def wait_until(condition: Callable[[], object]) -> None:
    """However long a busy machine takes."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("silence, lines", [(3600.0, []), (0.01, ["training a classifier"])])
def test_what_takes_long_is_said_and_what_does_not_is_not(monkeypatch, caplog, silence, lines):
    monkeypatch.setattr(progress, "SILENCE", silence)
    caplog.set_level(logging.INFO, logger="speed_engine.runtime.progress")
    with announced("training a classifier"):
        wait_until(lambda: len(caplog.messages) == len(lines))
    assert caplog.messages == lines


def test_what_takes_long_is_printed_where_the_log_is_not_shown(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SILENCE", 0.01)
    # Tests of the command line may have set another.
    caplog.set_level(logging.WARNING, logger="speed_engine.runtime.progress")
    console = plain()
    with announcing(console):
        with announced("training a classifier"):
            wait_until(lambda: said(console))
    with announced("something else"):
        time.sleep(0.1)
    assert said(console) == ["training a classifier ..."] and caplog.messages == []
    with caplog.at_level(logging.INFO, logger="speed_engine.runtime.progress"):
        with announcing(console), announced("shown by the log"):
            wait_until(lambda: caplog.messages)
    assert caplog.messages == ["shown by the log"] and len(said(console)) == 1


def test_the_remaining_time_follows_from_the_newest_interval(clock):
    console = plain()
    with TrainingProgress(console, 0, 1000) as shown:
        clock[0] += 900  # an evaluation, and a first interval that compiled
        shown.figures(100, 0.5, 10.0, 9.0)
        clock[0] += 10
        shown.figures(200, 0.5, 800.0, 0.1)
        shown.figures(201, 0.5, 0.4403, 0.1)
    assert said(console)[-2:] == [
        "step 200/1000  loss 0.5000  800 images/s  ETA 1:20",
        "step 201/1000  loss 0.5000  0.44 images/s  ETA 1:20",
    ]


def test_slow_steps_say_once_how_slow_they_are_before_the_first_figures(clock):
    console = plain()
    with TrainingProgress(console, 10, 1010) as shown:
        for step in (11, 12, 13, 14):
            clock[0] += 20
            shown.step(step)
    assert said(console) == ["step 12/1010  20.0 s a step  ETA 5:32:40"]
    console = plain()
    with TrainingProgress(console, 0, 100) as shown:
        clock[0] += 20
        shown.figures(1, 0.5, 1.0, 20.0)
        clock[0] += 20
        shown.step(2)
    assert len(said(console)) == 1


def test_an_evaluation_says_how_far_it_is(clock):
    console = plain()
    with TrainingProgress(console, 0, 1000) as shown:
        advance = shown.evaluating(500, 2000)
        clock[0] += 1
        advance(20.5)
        assert said(console) == []
        for _ in range(7):
            clock[0] += 10
            advance(100)
    assert said(console) == [
        f"step 500/1000  evaluating: {images}/2,000 images" for images in (120, 520)
    ]


def test_the_rate_counts_what_was_done_since_the_start_even_in_one_part(clock):
    console = plain()
    with SampleProgress(console, 500, interval=1) as shown:
        shown.advance(0)
        clock[0] += 50
        shown.advance(500)
    assert said(console) == ["500/500 samples  10/s  ETA 0:00"]


def test_the_rate_leaves_out_what_was_there(clock):
    console = plain()
    with SampleProgress(console, 500, interval=1) as shown:
        shown.advance(400)
        clock[0] += 50
        shown.advance(50)
    assert said(console) == ["450/500 samples  1/s  ETA 0:50"]


@pytest.fixture
def notebook(monkeypatch) -> list[list[str]]:
    """A notebook's outputs, each with all that it showed in turn."""
    outputs: list[list[str]] = []

    class Handle:
        def __init__(self, texts: list[str]) -> None:
            self.texts = texts

        def update(self, content, raw):
            self.texts.append(content["text/plain"])

    def display(content, raw=False, display_id=False):
        outputs.append([content["text/plain"] if raw else content.text.rstrip()])
        return Handle(outputs[-1]) if display_id else None

    module = types.ModuleType("IPython.display")
    module.__dict__["display"] = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return outputs


def test_a_notebook_has_one_line_that_changes_and_what_is_said_below_it(notebook, clock):
    console = Console(force_jupyter=True)
    with TrainingProgress(console, 0, 300) as shown:
        for step in (1, 2, 3):
            clock[0] += 0.6
            shown.step(step)
        shown.figures(100, 0.5, 10.0, 1.0)
        clock[0] += 1.1
        shown.step(101)
        advance = shown.evaluating(100, 200)
        for _ in range(4):
            clock[0] += 0.6
            advance(50)
        shown.say("step 100/300  FID 3.2")
        shown.figures(200, 0.25, 10.0, 1.0)
    live, said = notebook
    assert live == [
        "step 2/300",
        "step 100/300  loss 0.5000  10 images/s  ETA 3:20",
        "step 101/300  loss 0.5000  10 images/s  ETA 3:20",
        "step 100/300  evaluating: 100/200 images",
        "step 100/300  evaluating: 200/200 images",
        "step 200/300  loss 0.2500  10 images/s  ETA 1:40",
    ]
    assert said == ["step 100/300  FID 3.2"]


def test_a_notebook_counts_samples_in_one_line(notebook, clock):
    with SampleProgress(Console(force_jupyter=True), 30) as shown:
        for _ in range(3):
            shown.advance(10)
            clock[0] += 1
    assert notebook == [[
        "10/30 samples", "20/30 samples  10/s  ETA 0:01",
        "30/30 samples  10/s  ETA 0:00",
    ]]  # fmt: skip
