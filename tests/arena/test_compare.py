"""A whole comparison by the command line: real processes, real runs, its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speed_engine import cli
from speed_engine.arena.compare import _slots
from speed_engine.arena.rehearsal import seconds_per_step
from speed_engine.arena.request import CompareCommand, within_budget
from speed_engine.arena.results import read_results
from speed_engine.arena.runs import execute
from speed_engine.config import TrainConfig

OPTIONS = (
    "--methods uniform,speed_paper+optimizer.learning_rate=1e30+optimizer.warmup_steps=0 "
    "--budget-images 320 --batch-size 16 --evaluations 2 --log-every 1 --model.dim 16 "
    "--model.depth 1 --model.num-heads 2 --evaluation.num-images 100 --evaluation.solver-steps 2 "
    "--evaluation.guidance 1 --final-solver-steps 3 --learning-rates 1e-3 4e-3"
).split()
DIVERGING = "speed_paper+optimizer.learning_rate=1e30+optimizer.warmup_steps=0"


def compare(out: Path, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "speed_engine", "compare", "digits", *OPTIONS]
    return subprocess.run(
        [*command, "--out", str(out), *map(str, options)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    done = compare(out, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_contestant_is_reported_and_the_one_that_fails_with_the_reason(finished):
    out, said = finished
    results = read_results(out / "results.json")
    names = [contestant.name for contestant in results.contestants]
    assert names == ["uniform", DIVERGING, "logit_normal@flow:velocity", "uniform@flow:velocity"]
    failures = {curve.contestant: curve.failure for curve in results.curves}
    assert [name for name, failure in failures.items() if failure] == [DIVERGING]
    assert "not finite" in str(failures[DIVERGING]) and "FAILED" in said
    assert "not finite" in (out / "report.md").read_text()
    assert (out / "report.html").stat().st_size > 50_000


def test_a_comparison_ends_with_what_the_report_begins_with(finished):
    out, said = finished
    page = (out / "report.md").read_text().replace("\\", "")
    found = [line.removeprefix("- ") for line in page.splitlines() if line.startswith("- ")]
    *lines, last = said.splitlines()
    against = [line for line in found if line.startswith(("Against ", "By "))]
    assert against[0].startswith("Against uniform ") and set(against) <= set(lines)
    assert last == f"report    {out / 'report.html'}"


def test_contestants_are_paired_and_measured_where_the_plan_says(finished):
    out, _ = finished
    results = read_results(out / "results.json")
    assert results.metric == "held_out_fid" and results.budget_images == 320
    complete = [curve for curve in results.curves if not curve.failure]
    for curve in complete:
        assert [point.images for point in curve.points] == [160, 320]
        measured = curve.points[0].values
        assert {"fid", "held_out_fid", "copied_share"} <= measured.keys()
        assert 0 <= measured["class_agreement"] <= 1
        assert list(curve.by_solver_steps) == ["3"] and len(curve.denoising) >= 5
        assert 0 < curve.points[0].seconds < curve.points[1].seconds
    configs = [json.loads((out / c.run / "config.json").read_text()) for c in complete]
    for config in configs:
        for differs in ("method", "schedule", "prediction", "optimizer"):
            config.pop(differs)
    assert configs[0] == configs[1] == configs[2]


def test_each_contestant_takes_the_best_of_the_rates_that_one_run_did_not_rule_out(finished):
    out, _ = finished
    results = read_results(out / "results.json")
    runs = {curve.contestant: curve.run for curve in results.curves}
    for contestant in results.contestants:
        rate, tried = contestant.learning_rate, contestant.tuning
        assert f"lr-{rate:g}/seed-0" in runs[contestant.name]
        if contestant.name == DIVERGING:  # it has its own
            assert rate == 1e30 and not tried
            continue
        folder = Path(runs[contestant.name]).parts[1]
        alone = {
            rate: final(out / "tuning" / folder / f"lr-{rate}" / "seed-1000") for rate in tried
        }
        assert set(tried) == {"0.001", "0.004"}
        left = {rate for rate in tried if alone[rate] <= 1.5 * min(alone.values())}
        reported = {path.parent.name[3:] for path in (out / "runs" / folder).glob("lr-*/seed-0")}
        assert reported == left
        for of in tried:
            counted = out / "runs" / folder / f"lr-{of}" / "seed-0"
            assert tried[of] == pytest.approx(final(counted) if of in left else alone[of])
        assert rate == float(min(left, key=tried.__getitem__))


def test_every_run_has_the_rate_and_the_seed_that_its_folder_is_named_after(finished):
    out, _ = finished
    seeds = set()
    for kind in ("tuning", "runs"):
        for path in (out / kind).glob("*/lr-*/seed-*/config.json"):
            config, (rate, seed) = json.loads(path.read_text()), path.parts[-3:-1]
            assert config["optimizer"]["learning_rate"] == float(rate.removeprefix("lr-")), path
            assert config["seed"] == int(seed.removeprefix("seed-")), path
            seeds.add(config["seed"])
    assert {0, 1000} <= seeds


def final(run: Path) -> float:
    """What decides, at the end of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["held_out_fid"] for r in records if "held_out_fid" in r and not r.get("evaluated")][
        -1
    ]


@pytest.mark.long
def test_seeds_can_be_added_and_what_is_there_is_kept(finished):
    out, _ = finished
    before = read_results(out / "results.json").curves
    done = compare(out, "--seeds", 2)
    assert done.returncode == 0, done.stderr
    after = read_results(out / "results.json")
    assert after.seeds == (0, 1)
    assert {c for c in map(repr, before) if "failure=None" in c} <= set(map(repr, after.curves))


def test_an_interruption_reports_the_runs_that_are_complete(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def only_the_first(runs, slots, threads, done):
        execute(runs[:1], slots, threads, done)
        raise KeyboardInterrupt

    monkeypatch.setattr("speed_engine.arena.compare.execute", only_the_first)
    options = [*OPTIONS, "--methods", "uniform", "--learning-rates", "1e-3", "--seeds", "1"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "digits", *options, "--out", str(out)])
    assert stopped.value.code == 2
    curves = {c.contestant: c for c in read_results(out / "results.json").curves}
    assert curves["uniform"].failure is None and len(curves["uniform"].points) == 2
    assert curves["uniform@flow:velocity"].failure == "it has not begun"
    said = capsys.readouterr()
    assert "report" in said.out and (out / "report.html").exists()
    assert "interrupted; run the same command again" in said.err and "--resume" not in said.err


@pytest.mark.parametrize(
    "name, named, compared",
    [
        ("mine.toml", [], ("uniform", "min_snr+gamma=3")),
        ("digits.toml", [], ("uniform", "min_snr+gamma=3")),
        ("mine.toml", ["--methods", "clts"], ("clts",)),
    ],
)
def test_the_method_of_a_file_is_compared_unless_others_are_named(
    tmp_path, monkeypatch, name, named, compared
):
    """Nothing that a file says is left out silently."""
    (tmp_path / name).write_text('method = "min_snr+gamma=3"\nsteps = 100\n')
    asked: list[CompareCommand] = []
    monkeypatch.setattr("speed_engine.arena.compare.compare", lambda of, *others: asked.append(of))
    cli.main(["compare", str(tmp_path / name), *named])
    assert asked[0].contestants == compared


def test_a_second_command_on_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    """By another process, as a lock is no obstacle to the process that holds it."""
    out = tmp_path / "out"
    again: list[subprocess.CompletedProcess] = []
    options = [*OPTIONS, "--methods", "uniform", "--learning-rates", "1e-3", "--seeds", "1"]
    command = [sys.executable, "-m", "speed_engine", "compare", "digits", *options, "--out", out]

    def meanwhile(*ignored):
        again.append(subprocess.run(list(map(str, command)), capture_output=True, text=True))

    monkeypatch.setattr("speed_engine.arena.compare.measure_references", lambda config: {})
    monkeypatch.setattr("speed_engine.arena.compare.execute", meanwhile)
    cli.main(["compare", "digits", *options, "--out", str(out)])
    assert again[0].returncode == 2 and "is being filled by another command" in again[0].stderr


def test_what_no_network_made_is_measured_once(tmp_path, monkeypatch):
    out = tmp_path / "out"
    calls = []

    def measure(config):
        calls.append(config)
        return {"a Gaussian": {"held_out_fid": 3.5}}

    monkeypatch.setattr("speed_engine.arena.compare.measure_references", measure)
    monkeypatch.setattr("speed_engine.arena.compare.execute", lambda *ignored: None)
    options = [*OPTIONS, "--learning-rates", "1e-3", "--out", str(out)]
    for seeds in ("1", "2"):
        cli.main(["compare", "digits", *options, "--seeds", seeds])
        assert read_results(out / "results.json").references == measure(None)
    assert len([call for call in calls if call is not None]) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--seeds", 1, "--batch-size", 8), "config.batch_size was 16, is 8"),
        (("--seeds", 1, "--budget-images", 8), "raise --budget-images"),
        (("--seeds", 1, "--methods", "uniform,nonsense"), "'nonsense'"),
        (
            ("--seeds", 1, "--methods", "uniform+budget=0.5", "--budget-seconds", 5),
            "uniform+budget=0.5: a share of the budget is one of images",
        ),
    ],
)
def test_another_plan_or_an_impossible_one_is_refused(finished, options, complaint, capsys):
    out, _ = finished
    command = ["compare", "digits", *OPTIONS, "--out", str(out), *map(str, options)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--methods", ",", "methods=,: name one or more"),
        ("--seeds", "0", "seeds=0: must be at least 1"),
        ("--seeds", "1000000", "seeds=1000000: must be at most 10,000"),
        ("--evaluations", "0", "evaluations=0: must be at least 1"),
        ("--budget-images", "-5", "budget_images=-5: must be at least 1"),
        ("--budget-images", "64", "0 steps of 128 images are fewer than the 10 evaluations"),
        ("--budget-seconds", "nan", "budget_seconds=nan: must be positive"),
        ("--budget-seconds", "0", "budget_seconds=0.0: must be positive"),
        ("--learning-rates", "-1", "learning_rates=-1.0: must be positive"),
        ("--learning-rates", "inf", "learning_rates=inf: must be positive and finite"),
        ("--final-solver-steps", "0", "final_solver_steps=0: must be at least 1"),
        ("--slots", "0", "slots=0: must be at least 1"),
        ("--num-timesteps", "40", "final_solver_steps=50: must be at most num_timesteps=40"),
        ("--evaluation.metrics", "loss", "a comparison decides by fid"),
        ("--evaluation.features", "none", "a comparison decides by fid"),
        ("--method", "p2", "method=p2: has no effect in a comparison; --methods names"),
        ("--evaluation.every", "7", "evaluation.every=7: has no effect in a comparison"),
        ("--checkpoint-every", "3", "checkpoint_every=3: has no effect in a comparison"),
    ],
)
def test_what_a_comparison_cannot_do_is_refused_before_any_work(
    option, value, complaint, tmp_path, capsys
):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "digits", option, value, "--out", str(out)])
    assert stopped.value.code == 2 and not out.exists()
    assert complaint in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["digits.toml", "mine.toml"])
def test_what_has_no_effect_beside_a_file_is_refused(tmp_path, capsys, name):
    (tmp_path / name).write_text('preset = "digits"\nmethod = "p2"\n')
    command = ["compare", str(tmp_path / name), "--method", "clts"]
    with pytest.raises(SystemExit):
        cli.main([*command, "--out", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().err.split())
    assert "method=clts: has no effect in a comparison" in said and not (tmp_path / "out").exists()


def test_an_option_may_correct_what_a_file_does_not_measure(tmp_path, monkeypatch):
    """As for data without classes, of which there is no classifier."""
    (tmp_path / "mine.toml").write_text('preset = "digits"\n[evaluation]\nfeatures = "none"\n')
    asked: list[CompareCommand] = []
    monkeypatch.setattr("speed_engine.arena.compare.compare", lambda of, *others: asked.append(of))
    cli.main(["compare", str(tmp_path / "mine.toml"), "--evaluation.features", "inception"])
    assert within_budget(asked[0]).evaluation.features == "inception"


@pytest.mark.long
def test_runs_are_rehearsed_as_they_will_compile(tmp_path):
    out = tmp_path / "out"
    model = "--model.dim 16 --model.depth 1 --model.num-heads 2 --batch-size 16"
    cheap = "--evaluation.num-images 100 --evaluation.solver-steps 2 --final-solver-steps 3"
    options = "--methods uniform --seeds 1 --compile blocks --budget-seconds 20 --evaluations 10"
    command = f"compare digits {options} {model} {cheap} --evaluation.guidance 1".split()
    said = subprocess.check_output(
        [sys.executable, "-m", "speed_engine", *command, "--out", str(out)], text=True
    )
    assert said.count("ms a step") == 3  # of uniform and the two other baselines
    assert not [curve for curve in read_results(out / "results.json").curves if curve.failure]
    for config in sorted(out.glob("*/**/config.json")):
        written = json.loads(config.read_text())
        assert written["compile"] == "blocks"
        if "runs" in config.parts:
            pace = seconds_per_step(out / "paces" / config.parts[-4])
            assert 20 - 10 * pace <= written["steps"] * pace <= 20


@pytest.mark.parametrize(
    "gpus, device, asked, slots, threads",
    [
        (0, "auto", None, 8, 1),
        (2, "auto", None, 2, 4),
        (2, "cpu", None, 8, 1),
        (2, "auto", 3, 3, 2),
        (0, "auto", 20, 20, 1),
    ],
)
def test_there_is_a_run_per_gpu_or_else_per_core_unless_another_number_is_asked_for(
    monkeypatch, gpus, device, asked, slots, threads
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    command = CompareCommand(preset="digits", config=TrainConfig(device=device), slots=asked)
    assert _slots(command) == (slots, threads)
