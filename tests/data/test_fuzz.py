"""A short run of fuzz.py; the long one is on record in benchmarks/results."""

import importlib.util
import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_hostile_bytes_meet_only_the_documented_error():
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec and spec.loader
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    outcome = fuzz.run(inputs=1300, start=1)
    assert outcome["crashes"] == []
    assert all(count["inputs"] >= 100 for count in outcome["targets"].values())
    assert all(
        count["refused"] for name, count in outcome["targets"].items() if name != "description"
    )


def test_the_long_run_is_on_record():
    (path,) = RESULTS.glob("*/fuzz.json")
    report = json.loads(path.read_text())
    assert report["inputs"] >= 100_000 and report["crashes"] == []
