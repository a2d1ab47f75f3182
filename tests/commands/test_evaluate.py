"""``speed-engine evaluate``: records that are kept, found again, and separable from training's."""

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from speed_engine import cli
from speed_engine.api.loading import load
from speed_engine.build import build_evaluator, build_process, build_validation
from speed_engine.commands import evaluate as commands
from speed_engine.commands.evaluate import show
from speed_engine.config import TrainConfig, to_json
from speed_engine.data.config import DataConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.models.config import DiTConfig
from speed_engine.run.averages import load_average
from speed_engine.run.folder import read_config
from speed_engine.run.starting import resume, start
from speed_engine.runtime import locks, machine
from speed_engine.runtime.choice import Choice
from speed_engine.runtime.records import append_record, read_records
from speed_engine.training.config import OptimizerConfig

BY_BLOCKS = Choice("blocks", "")
ROOT = Path(__file__).parents[2]
TINY = TrainConfig(
    steps=4,
    batch_size=16,
    log_every=2,
    checkpoint_every=2,
    device="cpu",
    data=DataConfig(held_out=0.2),
    optimizer=OptimizerConfig(averages=("power=1",)),
    model=DiTConfig(dim=16, depth=1, num_heads=2),
    evaluation=EvaluationConfig(
        every=1000, num_images=100, solver_steps=2, metrics=("fid", "kid", "isc", "prc", "copies")
    ),
)
FIELDS = {
    "fid", "kid", "isc", "precision", "recall", "held_out_fid", "held_out_kid",
    "held_out_precision", "held_out_recall", "copied_share", "extractor", "weights_sha256",
    "feature_dim", "num_generated", "num_reference", "num_held_out", "solver", "solver_steps",
    "guidance",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    start(TINY, run, Console(file=io.StringIO()))
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may change."""
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    return tmp_path / "run"


def evaluate(run, capsys, *options):
    cli.main(["evaluate", str(run), *map(str, options)])
    return capsys.readouterr()


def launch_and_stop_after_one_part(run, *options):
    """A process that draws a first part and then waits to be killed."""
    code = (
        "import time; from speed_engine.cli import main\n"
        "from speed_engine.evaluation.evaluator import Evaluator\n"
        "def one(*a, f=Evaluator.generate_some, left=[1]):\n"
        "    left.pop() if left else time.sleep(1000); return f(*a)\n"
        f"Evaluator.generate_some = one; main({['evaluate', str(run), *options]})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_training_records_both_parts_with_their_circumstances(trained):
    (record,) = [r for r in read_records(trained) if "fid" in r]
    assert record.keys() >= FIELDS and "evaluated" not in record
    assert record["num_reference"] + record["num_held_out"] == 1797
    assert 0.15 < record["num_held_out"] / 1797 < 0.25
    assert record["fid"] != record["held_out_fid"] and 0 <= record["copied_share"] <= 1
    assert (record["solver_steps"], record["guidance"], record["num_generated"]) == (2, 1, 100)


def test_what_training_measured_is_found_and_not_generated_again(run, capsys, monkeypatch):
    monkeypatch.setattr("speed_engine.commands.evaluate.load_average", None)
    before = (run / "metrics.jsonl").read_bytes()
    shown = evaluate(run, capsys, "--json")
    assert "measured before, at step 4" in shown.err
    assert json.loads(shown.out) == read_records(run)[-1]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_measured_once_and_survive_a_resumption(run, capsys):
    training = read_records(run)
    shown = evaluate(run, capsys, "--solver-steps", 3, "--metrics", "fid", "copies", "--json")
    record = json.loads(shown.out)
    assert record["solver_steps"] == 3 and "kid" not in record and "held_out_fid" in record
    assert read_records(run) == [*training, {**record, "evaluated": True}]
    picture = run / "samples" / "step-00000004-copies.png"
    assert str(picture) in shown.err and picture.read_bytes().startswith(b"\x89PNG")
    again = evaluate(run, capsys, "--solver-steps", 3, "--metrics", "fid", "--json")
    assert "measured before" in again.err and json.loads(again.out)["fid"] == record["fid"]
    resume(run, Console(file=io.StringIO()), steps=6)
    assert {**record, "evaluated": True} in read_records(run)
    assert [r["step"] for r in read_records(run) if "evaluated" in r] == [4]


def test_an_earlier_checkpoint_is_measured_by_its_step(run, capsys):
    options = "--checkpoint", 2, "--metrics", "fid", "--json"
    record = json.loads(evaluate(run, capsys, *options).out)
    (of_newest,) = [r for r in read_records(run) if "fid" in r and r["step"] == 4]
    assert (record["step"], record["images"]) == (2, 32) and record["fid"] != of_newest["fid"]
    again = evaluate(run, capsys, *options)
    assert (
        "measured before, at step 2" in again.err and json.loads(again.out)["fid"] == record["fid"]
    )
    assert read_records(run)[-1]["step"] == 2
    assert load(run).facts.figures["fid"] == of_newest["fid"]  # of the model that is loaded
    with pytest.raises(SystemExit):
        evaluate(run, capsys, "--checkpoint", 3)
    assert "has no checkpoint of step 3; it keeps those of: 2, 4" in capsys.readouterr().err


def test_the_validation_loss_alone_needs_no_images(run, capsys, monkeypatch):
    monkeypatch.setattr(Evaluator, "generate_some", None)
    shown = evaluate(run, capsys, "--metrics", "loss", "--json")
    record, config = json.loads(shown.out), read_config(run)
    validation = build_validation(config, build_process(config))
    model, _ = load_average(run, config, torch.device("cpu"))
    assert record == {"step": 4, "images": 64, "validation_loss": pytest.approx(validation(model))}
    shown = evaluate(run, capsys, "--metrics", "loss", "--solver-steps", 7)
    assert "measured before, at step 4" in shown.err
    assert "step 4, no images generated" in shown.out and "validation loss" in shown.out


def test_another_average_is_measured_by_its_name(run, capsys):
    record = json.loads(evaluate(run, capsys, "--average", "power=1", "--json").out)
    (trained,) = [r for r in read_records(run) if "fid" in r and "evaluated" not in r]
    assert record["average"] == "power=1" and record["fid"] != trained["fid"]
    again = evaluate(run, capsys, "--average", "power=1", "--json")
    assert "measured before" in again.err and json.loads(again.out)["fid"] == record["fid"]
    first = evaluate(run, capsys, "--json")
    assert "measured before" in first.err and json.loads(first.out) == trained


def test_images_are_generated_as_the_run_and_the_device_choose_to_compile(run, capsys, monkeypatch):
    asked, parts = [], []
    monkeypatch.setattr(
        machine, "choose_generation", lambda *asked_for: asked.append(asked_for) or BY_BLOCKS
    )
    monkeypatch.setattr(commands, "compiled", lambda model, how: asked.append(how) or model)
    generate_in_parts = commands.generate_in_parts

    def in_parts(generate, total, size, folder, settings, *others):
        parts.append(settings)
        return generate_in_parts(generate, total, size, folder, settings, *others)

    monkeypatch.setattr(commands, "generate_in_parts", in_parts)
    evaluate(run, capsys, "--solver-steps", 3, "--metrics", "fid")
    assert asked == [("off", "cpu"), "blocks"] and parts[0]["compile"] == "blocks"
    monkeypatch.setattr(machine, "choose_generation", lambda *_: Choice("off", ""))
    evaluate(run, capsys, "--solver-steps", 4, "--metrics", "fid")
    assert "compile" not in parts[1]  # parts that an earlier release left are gone on with


def test_as_many_images_are_generated_at_a_time_as_asked_for(run, capsys, monkeypatch):
    sizes = []
    generate_some = Evaluator.generate_some

    def counted(self, model, ids):
        sizes.append(len(ids))
        return generate_some(self, model, ids)

    monkeypatch.setattr(Evaluator, "generate_some", counted)
    evaluate(run, capsys, "--solver-steps", 3, "--metrics", "fid", "--batch-size", 40)
    assert sizes == [40, 40, 20]


def test_a_folder_of_parts_that_another_command_fills_is_left_alone(run, capsys, monkeypatch):
    monkeypatch.setattr(locks, "_locked", lambda file: False)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        evaluate(run, capsys, "--solver-steps", 3, "--metrics", "fid")
    assert "step-00000004.parts is being filled by another command" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_interval_without_an_upper_end_is_recorded_and_found_again(run, capsys):
    options = "--guidance-interval", 0.5, "inf", "--metrics", "fid", "--json"
    record = json.loads(evaluate(run, capsys, *options).out)
    assert record["guidance_interval"] == [0.5, None]
    assert read_records(run)[-1] == {**record, "evaluated": True}
    assert "measured before, at step 4" in evaluate(run, capsys, *options).err


def test_a_killed_evaluation_goes_on_where_it_stopped(run, capsys, monkeypatch):
    options = ("--num-images", "1600", "--solver-steps", "4", "--metrics", "fid", "--json")
    before = (run / "metrics.jsonl").read_bytes()
    first = run / "samples" / "step-00000004.parts" / "00000000.npy"
    process = launch_and_stop_after_one_part(run, *options)
    while not first.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "metrics.jsonl").write_bytes(before + b'{"step": 4, "fi')  # killed while writing

    generated = []
    generate_some = Evaluator.generate_some

    def counted(self, model, ids):
        generated.extend(ids.tolist())
        return generate_some(self, model, ids)

    monkeypatch.setattr(Evaluator, "generate_some", counted)
    record = json.loads(evaluate(run, capsys, *options).out)
    assert len(generated) == 1100 and min(generated) == 500
    assert read_records(run)[-1] == {**record, "evaluated": True}
    assert (run / "metrics.jsonl").read_bytes().startswith(before + b'{"step": 4, "images"')
    assert not first.parent.exists()
    (run / "metrics.jsonl").write_bytes(before)
    assert json.loads(evaluate(run, capsys, *options).out) == record  # as if it had not been killed


def test_the_table_has_a_column_for_each_part(run, capsys):
    shown = evaluate(run, capsys).out
    for words in ("training", "held-out", "FID", "recall", "copied share", "2 steps", "guidance 1"):
        assert words in shown
    record = read_records(run)[-1]
    assert f"{record['held_out_fid']:.3f}" in shown and "FID (classifier features)" in shown
    note = f"two random sets of 100 training images have {record['fid_within']:.3f}"
    assert f"fewer than 10,000 images bias FID upwards: {note}" in " ".join(shown.split())


@pytest.mark.long
def test_two_processes_measure_as_one(run, capsys):
    known = read_records(run)[-1]
    (run / "metrics.jsonl").unlink()
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m --"
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), "speed_engine", "evaluate", str(run), "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (record,) = read_records(run)
    assert json.loads(done.stdout)["fid"] == record["fid"] == pytest.approx(known["fid"], rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--metrics", "fod"], "evaluation.metrics=fod: name one or more of fid, kid, isc, prc"),
        (["--num-images", "64"], "needs 65 images or more"),
        (["--features", "inception", "--inception-weights", "/no"], "/no"),
        (["--metrics", "clip"], "clip needs evaluation.clip_model"),
        (["--metrics", "clip", "--clip-model", "x"], "needs a model that is conditioned on texts"),
    ],
)
def test_bad_input_is_one_message(run, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate(run, capsys, *options)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_of_which_nothing_can_be_measured_is_refused(run, capsys):
    config = read_config(run)
    none = dataclasses.replace(config.evaluation, features="none")
    (run / "config.json").write_text(to_json(dataclasses.replace(config, evaluation=none)))
    with pytest.raises(SystemExit):
        evaluate(run, capsys)
    said = " ".join(capsys.readouterr().err.split())
    assert "evaluation.features=none measures nothing of evaluation.metrics=fid kid isc prc" in said


def test_a_split_that_leaves_too_little_is_refused_before_training(tmp_path):
    def refused(held_out, message, metrics=("fid",)):
        data = dataclasses.replace(TINY.data, held_out=held_out)
        settings = dataclasses.replace(TINY.evaluation, metrics=metrics)
        with pytest.raises(ValueError, match=message):
            config = dataclasses.replace(TINY, data=data, evaluation=settings)
            start(config, tmp_path / "run", Console(file=io.StringIO()))
        assert not (tmp_path / "run").exists()

    refused(0.01, "needs 65 images or more on both sides.*100 generated")
    refused(0.0, "copies needs images that were never trained on", ("copies",))


def test_the_extractor_is_one_whatever_is_held_out():
    extractors = set()
    for share in (0.0, 0.2):
        data = dataclasses.replace(TINY.data, held_out=share)
        settings = dataclasses.replace(TINY.evaluation, metrics=("fid",))
        config = dataclasses.replace(TINY, data=data, evaluation=settings)
        evaluator = build_evaluator(config, build_process(config))
        assert evaluator.extractor is not None and evaluator.training is not None
        extractors.add(evaluator.extractor.weights_sha256)
        assert (evaluator.held_out is None) == (share == 0)
    assert len(extractors) == 1


def test_a_record_of_one_extractor_shows_no_figure_of_another(capsys):
    show({"step": 1, "num_generated": 5, "solver": "ddim", "solver_steps": 2, "guidance": 1.0,
          "extractor": "inception", "fid": 3.25, "num_reference": 9}, Console())  # fmt: skip
    shown = capsys.readouterr().out
    assert "features of inception" in shown and "3.25" in shown and "held-out" not in shown
    assert "bias FID upwards" in shown  # a record of version 0.1 does not say how far


def test_half_a_record_does_not_spoil_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    append_record(tmp_path, {"step": 2})
    append_record(tmp_path, {"step": 3})
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]


def test_a_full_disk_costs_no_image_that_was_generated(run, capsys, monkeypatch):
    options = ("--solver-steps", "4", "--metrics", "fid", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(commands, "append_record", full_disk)
        with pytest.raises(SystemExit):
            evaluate(run, capsys, *options)
    assert "No space left" in capsys.readouterr().err
    monkeypatch.setattr(Evaluator, "generate_some", full_disk)  # all images are there
    record = json.loads(evaluate(run, capsys, *options).out)
    assert read_records(run)[-1] == {**record, "evaluated": True}


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_half_a_record_that_a_full_disk_takes_is_cut_off_again(tmp_path, monkeypatch):
    append_record(tmp_path, {"step": 1})
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from speed_engine.runtime.records import append_record\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "append_record(Path(sys.argv[1]), {'step': 2})"
    )
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert "OSError" in ended.stderr and str(tmp_path / "metrics.jsonl") in ended.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_nothing_is_measured_of_images_that_are_not_finite(run, capsys, monkeypatch):
    load = commands.load_average

    def broken(*given):
        model, step = load(*given)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        return model, step

    before = (run / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(commands, "load_average", broken)
    with pytest.raises(SystemExit) as stopped:
        evaluate(run, capsys, "--solver-steps", "4")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "100 of 100 generated images are not finite" in said
    assert "Nothing is measured of them." in said
    assert (run / "metrics.jsonl").read_bytes() == before
