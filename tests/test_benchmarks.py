"""A benchmark that nobody can run here still runs; what the documentation shows, a result has."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import gpu_arena
import regression
import table_rows
import tables
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
    with pytest.raises(RuntimeError, match="take 120 s beside their steps, and 100 s are left"):
        gpu_arena.steps_that_fit(100, seconds_per_step=0.01, beside=60)


def test_a_comparison_on_a_gpu_that_takes_too_long_is_interrupted_and_says_what_it_found(rows):
    slow = [sys.executable, "-c", """
import time
try:
    print("running", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("the report is written")
    raise SystemExit(2)
"""]  # fmt: skip
    rows.seconds = gpu_arena.STOPPING + 1
    found = gpu_arena.compared(slow, rows)
    assert found["interrupted"] and found["printed"] == "running\nthe report is written\n"
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
