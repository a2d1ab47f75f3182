"""A benchmark that nobody can run here still runs; what the documentation shows, a result has."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import bench_attacks
import bench_faults
import bench_train_step
import gpu_arena
import harness
import regression
import table_rows
import tables
import tables_of_a_gpu
import tables_of_recipes
from gpu_rows import Rows
from speed_engine import cli, ops
from speed_engine.arena.contestants import expand
from speed_engine.arena.request import CompareCommand, within_budget
from speed_engine.build import build_model

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_every_section_of_the_kernel_benchmark_passes_its_checks_in_a_dry_run():
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_kernels.py"), "--dry-run"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = ("noise", "loss", "hybrid_loss", "stored_noise", "clean_images")
    for section in (*losses, "adaln", "block", "qk_norm_rope", "group_norm", "optimizer"):
        assert f"{section}: " in done.stdout


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_of_the_documentation_are_those_of_the_results(document):
    text = document.read_text()
    assert tables.filled(text) == text, "run `python benchmarks/tables.py`"


def test_a_figure_without_a_result_cannot_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(table_rows, "RESULTS", tmp_path)
    monkeypatch.setattr(tables_of_recipes, "COMPARISONS", tmp_path)
    for name in tables.TABLES:
        block = f"<!-- table: {name} -->\n1,628 images/s\n<!-- end -->"
        assert not re.search(r"\d", tables.filled(block))


def test_a_result_is_compared_with_the_committed_one(tmp_path):
    path = tmp_path / "step.json"
    rows = [{"case": "S/2", "ms": {"median": 4.0, "p20": 1}}]
    goals = [{"ours": "a", "theirs": theirs, "ratio": 2} for theirs in ("b", "c")]
    old = {"environment": {"cores": 2}, "rows": rows, "goals": goals}
    assert regression.committed(path) is None
    path.write_text(json.dumps(old))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    rows = [{"case": "S/2", "ms": {"median": 5.0, "p20": 9}}]
    new = {"environment": {"cores": 9}, "rows": rows, "goals": goals}
    path.write_text(json.dumps(new))
    lines = list(regression.compared(regression.committed(path), new))
    assert lines == [
        "rows / S/2 / ms: 4 -> 5, ratio 1.250",
        "goals / a / b / ratio: 2 -> 2, ratio 1.000",
        "goals / a / c / ratio: 2 -> 2, ratio 1.000",
    ]


@pytest.mark.parametrize("section", ["first", "tune", "attention", "defaults", "xl", "third"])
def test_rows_that_failed_or_were_left_out_are_left_out_of_tables(section, tmp_path, monkeypatch):
    machine, name = tmp_path / tables_of_a_gpu.GPU_MACHINE, f"gpu_{section}.json"
    machine.mkdir()
    found = json.loads((table_rows.RESULTS / machine.name / name).read_text())
    monkeypatch.setattr(table_rows, "RESULTS", tmp_path)
    for row in found["rows"]:
        for lost in ({"failed": "RuntimeError: x"}, {"left_out": "needs 9 s, 2 s left"}):
            rows = found["rows"] | {row: lost | {"seconds": 0.1}}
            (machine / name).write_text(json.dumps({"rows": rows}))
            for table in tables_of_a_gpu.TABLES.values():
                assert table()


def test_a_candidate_is_compared_by_the_seeds_that_the_recipe_has(monkeypatch):
    of = lambda fid: {"held_out_fid": fid, "validation_loss": 1.0}
    found = {
        "runs": {"digits": {"recipe": {"0": of(10.0)}, "x": {"0": of(11.0), "1": of(99.0)}}},
        "step_ms": {"digits": {"x": {"median": 2.0}}},
    }
    candidate = partial(tables_of_recipes._candidate, found, "digits")
    assert candidate("x") == ["11 (+10.0 %)", "1", "–"]
    del found["runs"]["digits"]["recipe"]
    assert candidate("x") == ["–", "–", "–"]


def test_a_file_that_escapes_is_listed(tmp_path):
    place = object.__new__(bench_attacks.Place)
    place.folder = tmp_path / "here" / "place"
    own = place.folder / "own" / "1" / "out"
    own.mkdir(parents=True)
    (own / "kept.tar").touch()
    assert place.listed() == set()
    for name in place.escapes():
        planted = Path(os.path.normpath(own / name.replace("\\", "/")))
        planted.touch()
        assert len(place.listed()) == 1, name
        planted.unlink()


def test_a_restart_of_which_torchrun_has_ended_is_not_waited_for(tmp_path):
    (tmp_path / "log").write_text("no such option")
    ended = subprocess.Popen(["false"])
    ended.wait()
    with pytest.raises(RuntimeError, match="torchrun ended before step 35 of run:\nno such option"):
        bench_faults._wait_for_step(tmp_path / "run", 35, ended)


def test_a_case_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", "--cases", "DiT-S2"])
    with pytest.raises(SystemExit):
        bench_train_step._options()
    assert "invalid choice: 'DiT-S2'" in capsys.readouterr().err


def test_a_result_of_changed_code_does_not_count_as_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "result_path", lambda name: tmp_path / name)
    for recorded, counts in (("abc", True), ("other", False), ("abc-dirty", False), (None, False)):
        (tmp_path / "x").write_text(json.dumps({"environment": {"git_commit": recorded}}))
        for now in {"abc", recorded}:
            monkeypatch.setattr(harness, "describe", lambda _, now=now: {"git_commit": now})
            assert harness.measured("x") == (counts or now == recorded == "other")


def test_a_fifth_of_the_values_lies_beyond_either_end():
    assert harness.summary([5, 4, 3, 2, 1]) == (3, 2, 4)
    assert harness.summary([*range(10)]) == (4.5, 2, 7)
    assert harness.summary([7]) == (7, 7, 7)


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "machine" / "gpu.json", seconds=60)


def test_a_row_that_fails_is_kept_as_such_and_the_others_go_on(rows):
    def broken():
        raise RuntimeError("no kernel image")

    rows.row("one", 1, broken)
    rows.row("two", 1, lambda: {"ms": 2.0})
    found = json.loads(rows.path.read_text())["rows"]
    assert found["one"]["failed"] == "RuntimeError: no kernel image"
    assert found["two"]["ms"] == 2.0


def test_a_row_that_does_not_fit_is_left_out_and_a_smaller_one_is_not(rows):
    calls = []
    rows.row("large", 61, lambda: calls.append("large") or {})
    rows.row("small", 1, lambda: calls.append("small") or {})
    found = json.loads(rows.path.read_text())["rows"]
    assert calls == ["small"]
    assert re.fullmatch(r"needs 61 s, \d+ s left", found["large"]["left_out"])
    assert "left_out" not in found["small"]


def test_the_file_is_whole_after_every_row(rows):
    for count, name in enumerate(("one", "two", "three"), 1):
        rows.row(name, 1, lambda: {"ms": 1.0})
        found = json.loads(rows.path.read_text())
        assert len(found["rows"]) == count and found["environment"]["command"]
    assert [path.name for path in rows.path.parent.iterdir()] == [rows.path.name]


def test_a_kill_in_the_middle_leaves_the_rows_before_it(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from gpu_rows import Rows
rows = Rows(Path({str(tmp_path / "gpu.json")!r}), seconds=60)
rows.row("one", 1, lambda: {{"ms": 1.0}})
rows.row("two", 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert list(found) == ["one"] and found["one"]["ms"] == 1.0


def test_a_row_that_takes_longer_than_was_thought_ends_with_the_section(tmp_path, capsys):
    rows = Rows(tmp_path / "gpu.json", seconds=1)

    def slow() -> dict[str, float]:
        with contextlib.suppress(Exception):
            time.sleep(60)
        time.sleep(60)
        return {}

    rows.begin = time.monotonic()
    rows.row("slow", 0.1, slow)
    rows.row("next", 0.1, dict)
    found = json.loads(rows.path.read_text())["rows"]
    assert found["slow"]["failed"] == "OutOfTime: the seconds of the section are over"
    assert found["slow"]["seconds"] < 30 and "left_out" in found["next"]


def test_a_row_that_hears_no_interrupt_ends_with_the_process(tmp_path):
    script = f"""
import ctypes, time
from pathlib import Path
import gpu_rows
def waits():
    mutex = ctypes.create_string_buffer(256)
    while True:  # from the second time on for ever, whatever signals come
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
gpu_rows.GRACE = 0.5
rows = gpu_rows.Rows(Path({str(tmp_path / "gpu.json")!r}), seconds=60)
rows.row("one", 1, lambda: {{"ms": 1.0}})
rows.begin = time.monotonic() - 58
rows.row("two", 0.1, waits)
"""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert list(rows) == ["one", "two"]
    assert rows["two"]["failed"] == "OutOfTime: it heard no interrupt"


def test_a_comparison_without_a_pace_says_so(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_arena, "compared", lambda *inputs: {"printed": "3 runs rehearse"})
    with pytest.raises(TimeoutError, match="a pace: 3 runs rehearse"):
        gpu_arena.pace(tmp_path, rows)


def test_the_comparison_on_a_gpu_is_one_that_the_command_accepts(monkeypatch, tmp_path):
    asked: list[CompareCommand] = []
    run = lambda command, *others: asked.append(command)
    monkeypatch.setattr("speed_engine.arena.compare.compare", run)
    options = ("--device", "cpu", "--compile", "off")
    for_methods = partial(gpu_arena.command, tmp_path, options=options)
    pace = for_methods([*gpu_arena.METHODS, *gpu_arena.FILLERS], 1, 1000, 1)
    for command in (pace, for_methods(gpu_arena.METHODS, 3, 4000, 10)):
        cli.main(command[3:])
    paced, found = asked
    assert (found.seeds, found.evaluations, found.budget_images) == (3, 10, 4000 * 512)
    assert found.config.batch_size == 512 and found.config.optimizer.learning_rate == 0.016
    assert found.config.evaluation.metrics == ("fid", "loss")
    for of, names in (
        (found, gpu_arena.METHODS),
        (paced, (*gpu_arena.METHODS, *gpu_arena.FILLERS)),
    ):
        assert expand(of.contestants, within_budget(of)) == names
    assert len(paced.contestants) == found.slots  # as busy as the comparison will be


def test_a_comparison_on_a_gpu_has_the_steps_that_its_time_holds():
    assert gpu_arena.ROUNDS == 2
    steps = gpu_arena.steps_that_fit(225, seconds_per_step=0.01, beside=62.5)
    assert steps == 4340  # (225 / 2 - 62.5) / (1.15 * 0.01) = 4347, whole evaluations
    with pytest.raises(TimeoutError, match="take 120 s beside their steps, and 100 s are left"):
        gpu_arena.steps_that_fit(100, seconds_per_step=0.01, beside=60)


def test_a_comparison_on_a_gpu_that_takes_too_long_is_interrupted_and_says_what_it_found(
    rows, tmp_path, monkeypatch
):
    begun = tmp_path / "begun"
    slow = [sys.executable, "-c", f"""
import time
try:
    print("running", flush=True)
    open({str(begun)!r}, "w").close()
    time.sleep(60)
except KeyboardInterrupt:
    print("the report is written")
    raise SystemExit(2)
"""]  # fmt: skip

    def left() -> float:
        """None, once the child is at it."""
        while not begun.exists():
            time.sleep(0.01)
        return 0.0

    monkeypatch.setattr(rows, "left", left)
    found = gpu_arena.compared(slow, rows)
    assert found["interrupted"] and found["printed"] == "running\nthe report is written\n"
    monkeypatch.setattr(rows, "left", lambda: gpu_arena.STOPPING + 600)
    broken = [sys.executable, "-c", "raise SystemExit('no such data')"]
    with pytest.raises(RuntimeError, match="no such data"):
        gpu_arena.compared(broken, rows)


@pytest.mark.long
def test_the_cpus_training_step_runs_in_a_dry_run():
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    script = str(ROOT / "benchmarks" / "bench_train_step.py")
    done = subprocess.run(
        [sys.executable, script, "--dry-run", "--sections", "step", "--cases", "DiT-S/2"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" images/s") == 5


def test_providers_take_turns_in_processes_of_their_own(tmp_path):
    import turns

    log = tmp_path / "log"
    build = partial(partial, subprocess.call, ["sh", "-c", f"sleep 0.005; echo $PPID >> {log}"])
    providers = {"one": build, "other": build}
    timings = turns.in_turn(providers, warmup=1, turns=2, calls=3)
    assert all(5 <= timing.p20 <= timing.median for timing in timings.values())
    first, second, *rest = log.read_text().split()
    assert first != second and str(os.getpid()) not in (first, second)
    assert rest == [*[first] * 4, *[second] * 4] * 2  # each turn, one call that is not timed


@pytest.mark.parametrize("case", ["digits", "cifar16", "DiT-S/2", "unet"])
def test_the_other_loop_trains_a_network_of_equal_work(case):
    import diffusers_step
    import train_cases

    config = train_cases.cpu_cases()[case]
    with torch.device("meta"):
        ours, theirs = build_model(config), diffusers_step.build(config)
    flops = train_cases.training_flops(ours, train_cases.model_inputs(config))
    other = train_cases.training_flops(theirs, diffusers_step.inputs(config))
    assert flops == pytest.approx(other, rel=0.03)


class Named(Rows):
    """Rows that are named and not measured."""

    def __init__(self) -> None:
        self.named: list[tuple[str, float]] = []

    def row(self, name, needs, measure):
        self.named.append((name, needs))


def test_the_ladder_begins_with_what_every_change_must_show_and_that_takes_two_minutes():
    import gpu_xl

    rows = Named()
    gpu_xl.measure(rows)
    first = rows.named[:5]
    assert [name for name, _ in first] == [
        "XL/2: default",
        "XL/2: bf16 stream, one sweep",
        "XL/2: kernel table",
        "S/2: whole, CUDA graphs",
        "XL/2: kernels off",
    ]
    assert sum(needs for _, needs in first) <= 120
    assert len(rows.named) == len({name for name, _ in rows.named})
    assert len(rows.named) == len(gpu_xl.XL) + len(gpu_xl.SMALL) + 1


def test_every_small_network_whose_graphs_are_measured_can_be_built():
    import gpu_defaults

    for config in gpu_defaults.FAMILIES.values():
        with torch.device("meta"):
            assert build_model(config)


def test_without_kernels_a_benchmark_runs_the_definitions_and_then_kernels_again():
    import train_cases

    cuda = torch.device("cuda")
    before = ops.kernels_on(cuda)
    with train_cases.kernels(False):
        assert ops.operators_for(cuda) is ops.REFERENCE
        assert ops.block_operators_for(cuda) is ops.BLOCK_REFERENCE
        assert ops.kernels_on(cuda) == ops.NO_KERNELS._replace(random=before.random)
    with train_cases.kernels(True):
        assert ops.kernels_on(cuda) == before
    assert ops.kernels_on(cuda) == before
