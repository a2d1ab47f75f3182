"""A run and its folder: what a failed start leaves, and what a resumption may change."""

import dataclasses
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from speed_engine import cli
from speed_engine.config import TrainConfig, to_json
from speed_engine.data.preparing.sources.digits import write_digits
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.planning.cost import estimate
from speed_engine.planning.memory import USED_SHARE, fitting_images
from speed_engine.presets import PRESETS
from speed_engine.run import changes, starting
from speed_engine.run.averages import load_average
from speed_engine.run.folder import read_config
from speed_engine.run.starting import build_trainer, images_that_fit, machine_choices, resume, start
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.choice import Choice
from speed_engine.runtime.world import World
from speed_engine.training.engine import Engine
from speed_engine.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = TrainConfig(
    steps=4,
    batch_size=8,
    log_every=2,
    checkpoint_every=2,
    device="cpu",
    model=DiTConfig(dim=16, depth=1, num_heads=2),
    evaluation=EvaluationConfig(every=1000, num_images=4, solver_steps=2, features="none"),
)


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def run(tmp_path) -> Path:
    start(TINY, tmp_path / "run", quiet())
    return tmp_path / "run"


def test_a_run_begins_by_saying_what_it_trains(tmp_path):
    said = io.StringIO()
    config = dataclasses.replace(TINY, method="uniform", schedule="flow")
    start(config, tmp_path / "run", Console(file=said))
    spelled = "uniform@flow:velocity+optimizer.name=adamw+optimizer.schedule=constant"
    assert f"method    {spelled}\n" in said.getvalue()


def test_a_run_that_fails_in_its_first_step_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            start(TINY, tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()
    start(TINY, tmp_path / "run", quiet())


def test_a_run_that_fails_later_keeps_its_folder(tmp_path, monkeypatch):
    step = Engine.step

    def fails(engine, batch):
        if engine.steps_done == 3:
            raise RuntimeError("out of memory")
        return step(engine, batch)

    monkeypatch.setattr(Engine, "step", fails)
    with pytest.raises(RuntimeError):
        start(TINY, tmp_path / "run", quiet())
    monkeypatch.undo()
    resume(tmp_path / "run", quiet())
    assert (tmp_path / "run/ema.safetensors").exists()


def test_a_disk_that_is_full_at_the_start_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("speed_engine.run.starting.write_durably", full)
    with pytest.raises(OSError, match="No space"):
        start(TINY, tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_made_longer_is_complete_at_its_new_end_only(run, monkeypatch):
    monkeypatch.setattr(Trainer, "_finish", lambda trainer: None)  # as if it was killed before
    resume(run, quiet(), steps=6)
    assert not (run / "ema.safetensors").exists()
    monkeypatch.undo()
    resume(run, quiet())
    assert (run / "ema.safetensors").exists()


def test_a_run_by_cuda_graphs_goes_on_where_there_are_none(run):
    config = dataclasses.replace(read_config(run), compile="graphs")
    (run / "config.json").write_text(to_json(config))
    said = io.StringIO()
    resume(run, Console(file=said), steps=6)
    assert "CUDA graphs are of one process on a GPU" in said.getvalue()
    assert read_config(run).compile == "off"


def test_a_run_trains_in_a_thread(tmp_path):
    """Which gets no signals."""
    thread = threading.Thread(target=start, args=(TINY, tmp_path / "run", quiet()))
    thread.start()
    thread.join()
    assert (tmp_path / "run/ema.safetensors").exists()


def test_a_folder_that_is_no_run_is_not_advised_to_be_continued(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="exists and is no run; name another folder with --run"):
        start(TINY, tmp_path / "run", quiet())


def test_a_resumed_run_says_from_which_step_and_takes_what_may_change(run, capsys):
    options = "--steps 6 --log-every 3 --evaluation.every 5 --data.workers 1".split()
    cli.main(["train", "--resume", str(run), *options])
    assert "resumed   from step 4 of 6" in capsys.readouterr().out
    config = read_config(run)
    assert (config.steps, config.log_every, config.data.workers) == (6, 3, 1)
    assert (run / "samples/step-00000005.png").exists()
    (line,) = (run / "changes.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 4,
        "changes": {
            "data.workers": [0, 1],
            "evaluation.every": [1000, 5],
            "log_every": [2, 3],
            "steps": [4, 6],
        },
    }


def test_a_run_that_another_process_trains_is_not_resumed(run, capsys):
    hold = "import sys; from pathlib import Path; from speed_engine.runtime.locks import held\n"
    hold += "with held(Path(sys.argv[1]), 'trained'): print('held', flush=True); sys.stdin.read()"
    before = (run / "config.json").read_text()
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", "--resume", str(run), "--steps", "6"])
        assert stopped.value.code == 2
        assert "is being trained by another command" in " ".join(capsys.readouterr().err.split())
        assert (run / "config.json").read_text() == before
        other.communicate()
    cli.main(["train", "--resume", str(run), "--steps", "6"])
    assert read_config(run).steps == 6


def test_the_learning_rate_is_recorded(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records if "loss" in record]
    assert rates == pytest.approx([1e-3 * step / 100 for step in (2, 4)])  # it warms up


def test_a_resumption_without_changes_records_none(run):
    config = dataclasses.replace(TINY, steps=6)
    start(config, run.with_name("other"), quiet())
    for step in (4, 6):
        (run.with_name("other") / f"checkpoints/step-{step:08d}").rename(run / f"gone-{step}")
    (run.with_name("other") / "ema.safetensors").unlink()
    resume(run.with_name("other"), quiet())
    assert not (run.with_name("other") / "changes.jsonl").exists()


def test_what_a_run_is_cannot_be_changed_and_all_of_it_is_named_at_once(run, capsys):
    options = "--steps 6 --model.dim 32 --method uniform --batch-size 4 --data.flip".split()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(run), *options])
    said = " ".join(capsys.readouterr().err.split())
    for text in ("batch_size=8 (not 4)", "data.flip=False (not True)", "model.dim=16 (not 32)"):
        assert text in said
    assert "method=speed_paper (not uniform)" in said and f"--init-from {run}" in said
    assert read_config(run).steps == 4


@pytest.mark.parametrize("arguments", [["--help"], ["RUN", "--help"], ["--help", "RUN"]])
def test_the_help_of_resuming_shows_the_options_with_the_values_of_the_run(run, capsys, arguments):
    config = dataclasses.replace(read_config(run), log_every=987_654)
    (run / "config.json").write_text(to_json(config))
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--resume", *given])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--evaluation.every" in shown
    assert ("987654" in shown) == (arguments[0] == "RUN")


def test_a_run_is_resumed_from_any_directory(tmp_path, monkeypatch):
    write_digits(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(TINY.data, source="shards")
    start(dataclasses.replace(TINY, data=data), Path("run"), quiet())
    assert read_config(Path("run")).data.source == str(tmp_path / "shards")
    monkeypatch.chdir("/")
    resume(tmp_path / "run", quiet(), steps=5)


def test_two_processes_train_without_a_warning(tmp_path):
    options = """--steps 2 --batch-size 8 --model.dim 16 --model.depth 1 --model.num-heads 2
        --evaluation.features none --evaluation.num-images 4 --evaluation.solver-steps 2"""
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m --"
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), "speed_engine", "train", "digits"]
        + ["--run", str(tmp_path / "run"), "--parallel", "fsdp", *options.split()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    # One of ours or of Python's; what a library says in words of its own is not.
    warned = re.search(r"^warning: |: \w+Warning: ", done.stdout, flags=re.MULTILINE)
    assert done.returncode == 0 and warned is None, done.stdout


def test_data_that_were_moved_are_found_by_their_new_name(tmp_path):
    write_digits(tmp_path / "shards")
    data = dataclasses.replace(TINY.data, source=str(tmp_path / "shards"))
    start(dataclasses.replace(TINY, data=data), tmp_path / "run", quiet())
    (tmp_path / "shards").rename(tmp_path / "moved")
    where = ["--data.source", str(tmp_path / "moved")]
    cli.main(["train", "--resume", str(tmp_path / "run"), "--steps", "5", *where])
    assert read_config(tmp_path / "run").data.source == str(tmp_path / "moved")


def test_a_run_starts_from_the_ema_of_another_complete_or_not(run):
    average, _ = load_average(run, TINY, torch.device("cpu"))
    for complete in (True, False):
        if not complete:
            (run / "ema.safetensors").unlink()
        trainer, _ = build_trainer(TINY, run.with_name("new"), quiet(), init_from=run)
        for name, value in trainer.engine.model.state_dict().items():
            assert torch.equal(value, average.state_dict()[name])


def test_a_constant_run_is_resumed_with_its_decay(tmp_path):
    constant = dataclasses.replace(
        TINY, optimizer=dataclasses.replace(TINY.optimizer, warmup_steps=0)
    )
    wsd = dataclasses.replace(
        constant, optimizer=dataclasses.replace(constant.optimizer, schedule="wsd", decay_share=0.5)
    )
    console = quiet()
    start(wsd, tmp_path / "whole", console)
    start(
        dataclasses.replace(constant, steps=2), tmp_path / "branch", console
    )  # the decay begins after it
    resume(tmp_path / "branch", console, changed=dataclasses.replace(wsd, steps=4))
    whole, branch = (
        load_average(tmp_path / name, wsd, torch.device("cpu"))[0].state_dict()
        for name in ("whole", "branch")
    )
    assert all(torch.equal(branch[name], value) for name, value in whole.items())
    record = json.loads((tmp_path / "branch" / "changes.jsonl").read_text())
    assert record["changes"]["optimizer.schedule"] == ["constant", "wsd"]


@pytest.fixture
def h200(monkeypatch):
    """A machine that has one, without anything that could run there."""
    monkeypatch.setattr(machine, "choose_device", lambda wanted: Choice("cuda", "NVIDIA H200"))
    monkeypatch.setattr(machine, "choose_kernels", lambda *_: defaultdict(lambda: Choice("", "")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (141e9, 141e9))


def test_a_small_model_is_replayed_on_one_gpu_that_is_known_and_not_on_several(h200, monkeypatch):
    digits = PRESETS["digits"][1]
    assert machine_choices(digits).compile.value == "graphs"
    assert machine_choices(digits, World(size=2, local_size=2)).compile.value == "blocks"
    assert machine_choices(PRESETS["dit-b"][1]).compile.value == "blocks"
    assert machine_choices(dataclasses.replace(digits, compile="on")).compile.value == "on"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA of another time")
    assert machine_choices(digits).compile.value == "blocks"


def test_how_a_model_is_compiled_is_chosen_when_its_microbatches_are_known(
    h200, monkeypatch, tmp_path
):
    class Chosen(Exception):
        pass

    def choices(config, *_):
        seen.append(config.microbatch_size)
        return SimpleNamespace(resident=Choice("off", ""), attention=Choice("sdpa", ""))

    def stop(*_):
        raise Chosen

    seen: list[int | None] = []
    monkeypatch.setattr(machine, "torch_device", lambda *_: torch.device("cuda"))
    for name in ("TrainingData", "settle_operators", "build_evaluator"):
        monkeypatch.setattr(starting, name, lambda *_: SimpleNamespace(num_bytes=1))
    monkeypatch.setattr(starting, "images_that_fit", lambda *_: 16)
    monkeypatch.setattr(starting, "machine_choices", choices)
    monkeypatch.setattr(starting, "build_model", stop)
    with pytest.raises(Chosen):
        build_trainer(PRESETS["digits"][1], tmp_path / "run", quiet())
    assert seen == [None, 16]


def test_a_run_by_cuda_graphs_goes_on_by_blocks_where_too_little_memory_is_free(
    run, h200, monkeypatch
):
    class Chosen(Exception):
        pass

    def choices(config, *_):
        seen.append((config.compile, config.microbatch_size))
        return SimpleNamespace(resident=Choice("off", ""), attention=Choice("sdpa", ""))

    def stop(*_):
        raise Chosen

    seen: list[tuple[str, int | None]] = []
    monkeypatch.setattr(machine, "torch_device", lambda *_: torch.device("cuda"))
    for name in ("TrainingData", "settle_operators", "build_evaluator"):
        monkeypatch.setattr(starting, name, lambda *_: SimpleNamespace(num_bytes=1))
    monkeypatch.setattr(starting, "images_that_fit", lambda *_: 4)
    monkeypatch.setattr(starting, "machine_choices", choices)
    monkeypatch.setattr(starting, "build_model", stop)
    config = dataclasses.replace(read_config(run), compile="graphs")
    (run / "config.json").write_text(to_json(config))
    said = io.StringIO()
    with pytest.raises(Chosen):
        resume(run, Console(file=said, width=200), steps=6)
    assert seen == [("graphs", None), ("blocks", 4)]
    assert "memory is free; the step is compiled by blocks" in said.getvalue()
    with pytest.raises(UserError, match="overwrites the gradients of the 4 images before"):
        build_trainer(config, run.with_name("new"), quiet())  # that was never begun


@pytest.mark.parametrize("room, fits", [(64, None), (63, 32), (31, 16), (0, 1)])
def test_images_that_do_not_fit_a_gpu_go_through_in_parts_and_that_is_said(
    room, fits, monkeypatch, caplog
):
    caplog.set_level("INFO")
    config = TrainConfig(model=DiTConfig(dim=64, depth=2, num_heads=4), batch_size=64)
    cost, resident = estimate(config), 10**6
    training = cost.state_bytes + cost.kept.weights + room * cost.kept.per_image
    free = training / USED_SHARE + resident + 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    assert images_that_fit(config, machine_choices(config), resident) == fits
    assert (f"of 64 images, {fits} go through" in caplog.text) == (fits is not None)
    both = World(size=2, local_size=2)
    monkeypatch.setattr(World, "from_first", lambda self, compute: compute())
    of_two = dataclasses.replace(config, batch_size=128)
    assert images_that_fit(of_two, machine_choices(config, both), resident, both) == fits
    offloaded = dataclasses.replace(of_two, offload=True)
    without_state = fitting_images(cost.kept, 0, 64, free - resident)
    found = images_that_fit(offloaded, machine_choices(config, both), resident, both)
    assert (found or 64) == without_state


def test_what_may_change_is_recorded_as_json(tmp_path):
    given = {"data.exclude": ["a", "b"], "optimizer.adamw_learning_rate": [None, 1e-3]}
    given |= {"optimizer.grad_clip": [math.inf, 0.5]}
    changes.refuse_another_run(given, tmp_path)
    changes.record(given, tmp_path, 7)
    line = json.loads((tmp_path / "changes.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 7, "changes": given | {"optimizer.grad_clip": ["inf", 0.5]}}
