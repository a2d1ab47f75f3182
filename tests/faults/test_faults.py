"""A run survives what happens to long runs; each fault is set against the run without it.

All runs here are one training of 120 steps, across an epoch border, with a checkpoint every 10: on
two processes that share the parameters (FSDP2), unless a test says otherwise.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fault_harness as harness
from speed_engine.runtime.watchdog import EXIT_HUNG

OPTIONS = "--steps 120 --checkpoint-every 10 --keep-checkpoints 100 --parallel fsdp".split()
OPTIONS += ["--data.resident", "off"]  # batches come through the loader, as those of large data do
OK = [0, 0]
DAMAGES = ("truncate", "remove", "pickle")
NEXT_BATCH = "speed_engine.data.loading.loader:Loader.__next__"


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    harness.kill_all()


@pytest.fixture
def train(tmp_path):
    def start(*options, run="run", **how):
        options = [*OPTIONS, *options]
        return harness.train(tmp_path / run, options, **how)

    return start


@pytest.fixture
def resume(tmp_path):
    def start(world=2):
        return harness.resume(tmp_path / "run", world)

    return start


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing happens to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    training = harness.train(run, OPTIONS)
    assert training.join() == OK, training.said()
    return run


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def assert_same(run: Path, straight: Path) -> None:
    """Records, parameters, averages and optimizer state, bit for bit."""
    assert losses(run) == losses(straight)
    assert harness.equal(harness.parameters(run), harness.parameters(straight))


@pytest.mark.long
def test_kill_9_of_all_processes_at_random_times_changes_nothing(train, resume, straight):
    rng = random.Random(0)
    training = train()
    run, begun = training.run, 0
    for _ in range(3):
        begun = min(begun + rng.randint(15, 40), 110)
        if training.wait_for_step(begun):
            time.sleep(0.1 * rng.random())
        training.kill()
        assert training.join() == [-9, -9]
        kept = harness.checkpoints(run)  # every one of them holds
        assert kept and int(kept[-1].removeprefix("step-")) >= begun - 20
        training = resume()
    assert training.join() == OK, training.said()
    assert_same(run, straight)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)]
)
def test_a_signal_to_one_process_checkpoints_and_ends_all(train, resume, straight, number):
    training = train()
    assert training.wait_for_step(33)
    training.kill(number, ranks=[0])
    assert training.join() == OK, training.said()
    assert f"stopped by {number.name}" in training.said()
    reached = harness.steps(training.run)
    assert 33 <= reached < 120
    assert harness.checkpoints(training.run)[-1] == f"step-{reached:08d}"
    again = resume()
    assert again.join() == OK, again.said()
    assert_same(training.run, straight)


SAVE = "speed_engine.training.checkpoint:"
ELSEWHERE_IN_A_SAVE = [
    ("_Writer.write_data", 4),  # before the data of the fourth checkpoint
    ("describe", 7),  # its data written, not described
    ("sync", 14),  # the manifest written, not flushed
    ("sync", 15),  # before the folder is renamed
    ("sync", 16),  # renamed
    ("Checkpoints._prune", 4),
    ("shutil.rmtree", 2),  # an old checkpoint out of sight, not deleted
    ("shutil.os.unlink", 12),  # an old checkpoint deleted in part
]


@pytest.mark.parametrize(
    "target, call",
    [
        ("Checkpoints.commit", 4),  # all described, no manifest
        *(pytest.param(*each, marks=pytest.mark.long) for each in ELSEWHERE_IN_A_SAVE),
    ],
)
def test_kill_9_anywhere_inside_a_save_leaves_whole_checkpoints(tmp_path, target, call):
    run = tmp_path / "run"
    options = "--steps 60 --checkpoint-every 10 --keep-checkpoints 2".split()
    fault = harness.Fault(SAVE + target, call)
    training = harness.train(run, options, 1, fault)
    assert training.join() == [-9], training.said()
    kept = harness.checkpoints(run)
    assert kept and "step-00000030" <= kept[-1] <= "step-00000050"
    assert harness.resume(run, 1).join() == [0]
    assert harness.checkpoints(run)[-1] == "step-00000060"
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert [step for step, _ in losses(run)] == list(range(1, 61))


@pytest.mark.long
def test_torchrun_restarts_a_run_whose_process_was_killed(tmp_path, straight):
    run, log = tmp_path / "run", (tmp_path / "log").open("w")
    options = [*harness.TINY, *OPTIONS, "--run", str(run)]
    launcher = (
        "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2 -m --".split()
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(
        [sys.executable, "-m", *launcher, "speed_engine", "train", *options],
        stdout=log, stderr=log, env=environment,
    )  # fmt: skip
    while harness.steps(run) < 25:
        assert torchrun.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    asked = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
    os.kill(int(asked.stdout.split()[-1]), signal.SIGKILL)
    assert torchrun.wait(600) == 0, (tmp_path / "log").read_text()
    assert_same(run, straight)


RELATIVE_BOUND = 1e-4  # of a loss, between layouts and numbers of processes; see docs/scaling.md


def assert_close(run: Path, straight: Path) -> None:
    for (step, ours), (expected, theirs) in zip(losses(run), losses(straight), strict=True):
        assert step == expected and ours == pytest.approx(theirs, rel=RELATIVE_BOUND)


@pytest.mark.long
def test_any_layout_continues_any_other(tmp_path, train, resume, straight):
    """4 processes FSDP, then 1, then 2 DDP, then 2 FSDP: the losses of one run."""
    training = train("--parallel", "fsdp", world=4)
    assert training.wait_for_step(25)
    training.kill(signal.SIGTERM)
    assert training.join() == [0] * 4, training.said()
    layouts = [(1, "auto", 45), (2, "ddp", 65), (2, "fsdp", 120)]
    for world, layout, until in layouts:
        configure(training.run, parallel=layout)
        training = resume(world)
        if training.wait_for_step(min(until, 119)) and until < 120:
            training.kill(signal.SIGTERM)
        assert training.join() == [0] * world, training.said()
    assert_close(training.run, straight)


@pytest.mark.long
def test_muon_continues_on_another_number_of_processes(train):
    """2 processes FSDP, then 1, then 2 DDP: losses and state of a run that was never stopped."""
    options = ["--optimizer.name", "muon", "--evaluation.features", "none", "--steps"]
    straight = train(*options, "45", run="straight")
    assert straight.join() == OK, straight.said()
    training = train(*options, "15")
    assert training.join() == OK, training.said()
    for world, layout, steps in ((1, "auto", "30"), (2, "ddp", "45")):
        resumed = ["--resume", str(training.run), "--parallel", layout, "--steps", steps]
        training = harness.Training(training.run, resumed, world)
        assert training.join() == [0] * world, training.said()
    assert_close(training.run, straight.run)
    ours, theirs = map(harness.parameters, (training.run, straight.run))
    assert any(name.endswith("momentum_buffer") for name in theirs)
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 0.01 * tensor.norm() + 1e-7, name


def configure(run: Path, **changes: object) -> None:
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.long
@pytest.mark.parametrize(
    "options", ["--parallel hsdp", "--parallel fsdp --no-reshard", "--parallel fsdp --offload"]
)
def test_every_way_to_hold_parameters_trains_alike(train, straight, options):
    nodes = {"LOCAL_WORLD_SIZE": "2"} if "hsdp" in options else {}
    world = 4 if nodes else 2
    training = train(*options.split(), "--steps", "20", world=world, **nodes)
    assert training.join() == [0] * world, training.said()
    for ours, theirs in zip(losses(training.run), losses(straight)[:20], strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE_BOUND)


@pytest.mark.long
def test_gradients_of_microbatches_are_those_of_the_batch(train, straight):
    training = train("--microbatch-size", "2", "--steps", "40")
    assert training.join() == OK, training.said()
    for ours, theirs in zip(losses(training.run), losses(straight)[:40], strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE_BOUND)


# That every damage is found, test_checkpoint.py has; here all processes must agree on it.
@pytest.mark.parametrize(
    "damage", ["flip", *(pytest.param(how, marks=pytest.mark.long) for how in DAMAGES)]
)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    train, resume, straight, damage, tmp_path
):
    shutil.copytree(straight, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000120"
    victim = newest / "shard-00002-model-00001-of-00001.safetensors"
    data, trace = bytearray(victim.read_bytes()), tmp_path / "trace"
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        victim.unlink()
    else:
        victim = newest / ".metadata"
        victim.write_bytes(b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    training = resume()
    assert training.join() == OK, training.said()
    assert f"{newest}" in training.said() and victim.name in training.said()
    assert "falling back to the checkpoint before it" in training.said()
    assert not trace.exists()
    assert_same(tmp_path / "run", straight)


def test_a_full_disk_costs_checkpoints_but_not_the_run(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        run = disk / "run"
        options = [*OPTIONS, "--log-every", "10", "--steps", "60"]
        out = tmp_path / "out"  # what is printed has room: a process that cannot print fails
        training = harness.train(run, options, out=out)
        assert training.join() == [2, 2], training.said()
        said = training.said()
        assert "not everything could be written (step: cause)" in said
        assert "earlier ones are intact" in said
        assert harness.steps(run) == 60  # trained to the end
        assert harness.checkpoints(run)
        assert not list((run / "checkpoints").glob(".tmp-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def poison(times: int) -> harness.Fault:
    """NaN in the loss of the second process only, at its 30th step and some after it."""
    return harness.Fault(
        "speed_engine.training.engine:Engine.step",
        30,
        harness.PoisonNext(times),
        rank=1,
        every=True,
    )


@pytest.mark.long
def test_a_nan_in_one_process_skips_the_step_in_all(train, straight):
    training = train(fault=poison(2))
    assert training.join() == OK, training.said()
    assert losses(training.run)[:29] == losses(straight)[:29]
    lines = (training.run / "metrics.jsonl").read_text().splitlines()
    records = {r["step"]: r for r in map(json.loads, lines) if "loss" in r}
    assert [records[step].get("skipped_steps", 0) for step in (29, 30, 31, 120)] == [0, 1, 2, 2]


def test_nans_in_a_row_stop_all_processes(train):
    training = train(fault=poison(3))
    assert training.join() == [2, 2], training.said()
    assert "not finite in 3 steps in a row, up to step 32" in training.said()
    assert harness.checkpoints(training.run)[-1] == "step-00000030"


@pytest.mark.long
@pytest.mark.parametrize("what", ["stopped", "stuck"])
def test_the_process_that_hangs_is_named(train, resume, straight, what):
    stuck = harness.Fault(NEXT_BATCH, 36, harness.Sleep(1000), rank=1)
    training = train("--hang-timeout", "6", fault=stuck if what == "stuck" else None)
    if what == "stopped":
        assert training.wait_for_step(35)
        training.kill(signal.SIGSTOP, ranks=[1])
    training.processes[0].join(600)
    assert training.processes[0].exitcode == EXIT_HUNG, training.said()
    said = training.said()
    pid = training.processes[1].pid
    reason = "has stopped answering" if what == "stopped" else "is where the others have left"
    assert f"rank 1 {reason} (process {pid} on " in said
    training.kill()
    again = resume()
    assert again.join() == OK, again.said()
    assert_same(training.run, straight)


@pytest.mark.long
def test_a_straggler_shows_in_the_records(train):
    slow = harness.Fault(NEXT_BATCH, 1, harness.Sleep(0.2), rank=1, every=True)
    training = train("--steps", "12", "--log-every", "4", fault=slow)
    assert training.join() == OK, training.said()
    lines = map(json.loads, (training.run / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if "loss" in record]
    assert [record["slowest_loader_rank"] for record in records] == [1, 1, 1]
    assert all(record["data_seconds_slowest"] >= 0.2 for record in records)
    assert all(record["data_seconds"] < record["data_seconds_slowest"] for record in records)


@pytest.mark.long
def test_a_killed_loader_worker_ends_the_run_and_resuming_is_exact(train, resume, straight):
    training = train("--data.workers", "1")
    assert training.wait_for_step(25)
    pid = training.processes[1].pid
    asked = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    os.kill(int(asked.stdout.split()[0]), signal.SIGKILL)
    training.processes[1].join(600)
    assert training.processes[1].exitcode == 2, training.said()
    assert "worker" in training.said()
    training.kill()
    again = resume()
    assert again.join() == OK, again.said()
    assert_same(training.run, straight)


@pytest.mark.long
def test_saving_at_every_step_neither_hangs_nor_changes_anything(train, straight):
    training = train("--checkpoint-every", "2")
    assert training.join() == OK, training.said()
    assert len(harness.checkpoints(training.run)) == 60
    assert_same(training.run, straight)
