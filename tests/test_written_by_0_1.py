"""Shards, checkpoints and run folders of version 0.1 are read, and its runs continue."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from speed_engine.run.starting import resume

WRITTEN = Path(__file__).with_name("written_by_0_1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy, in which the run's relative path of its shards holds."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_of_0_1_continues_as_0_1_itself_continued_it(folder):
    resume(folder / "run", Console(file=io.StringIO()), steps=20)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines) if "loss" in record}
    then = json.loads((folder / "continued.json").read_text())
    assert len(then) == 10
    for record in then:
        now = records[record["step"]]
        # Bit for bit on the machine that wrote them; another processor sums in another order.
        assert {name: now[name] for name in record} == pytest.approx(record, rel=1e-5)
