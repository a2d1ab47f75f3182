"""Runs are killed, damaged and restarted, many times, and set against runs left alone.

    python benchmarks/bench_faults.py --kills 200         # all sections, about half an hour
    python benchmarks/bench_faults.py --sections saving   # one of them

kills     kill -9 of all processes at random times; final parameters, bit for bit
flips     single bits of checkpoints inverted; every one must be found
restart   one process killed under torchrun; seconds to the next step
saving    what a checkpoint beside training costs a step, and the host's memory

Every section adds to ``results/<machine>/faults.json``.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fault_harness as faults
from harness import result_path, write_result
from speed_engine.build import build_model, build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.data.config import DataConfig
from speed_engine.models.config import DiTConfig
from speed_engine.runtime.records import Sums
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import Checkpoints, State
from speed_engine.training.ema import Ema, warming_up
from speed_engine.training.engine import Engine
from speed_engine.training.optimizers import Hyperparameters, adamw
from speed_engine.training.update import Update

OPTIONS = "--checkpoint-every 10 --keep-checkpoints 5 --parallel fsdp".split()
KILLS_PER_RUN = 10
STEPS_PER_RUN = 400


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Runs of two processes, each killed several times at random moments."""
    options = ["--steps", str(STEPS_PER_RUN), *OPTIONS]
    straight = folder / "straight"
    training = faults.train(straight, options)
    assert training.join(600) == [0, 0], training.said()
    expected, records = faults.parameters(straight), losses(straight)
    rng = random.Random(0)
    done = runs = equal = damaged = lost = 0
    lives: list[float] = []
    while done < count:
        run = folder / f"run-{runs}"
        training = faults.train(run, options)
        training.wait_for(lambda run=run: bool(faults.checkpoints(run)), 600)
        for _ in range(min(KILLS_PER_RUN, count - done)):
            # From before the process group exists to well into training, and inside saves.
            moment = time.monotonic() + rng.uniform(0.2, 5)
            before = committed(run)
            if not training.wait_for(lambda moment=moment: time.monotonic() > moment):
                break  # it came to its end first
            lives.append(faults.steps(run))
            training.kill()
            training.join()
            done += 1
            try:
                kept = faults.checkpoints(run)
            except checkpoint.InvalidCheckpoint:
                damaged += 1
            else:
                lost += int(max(kept, default="") < before)
            training = faults.resume(run)
        codes = training.join(900)
        # A run that was complete when it was last killed says so and ends with 2.
        if codes != [0, 0] and "is complete at step" not in training.said():
            raise RuntimeError(training.said())
        same = faults.equal(faults.parameters(run), expected) and losses(run) == records
        equal += same
        runs += 1
        shutil.rmtree(run)
        print(f"{done} kills, {runs} runs, {equal} equal", flush=True)
    return {
        "kills": done, "runs": runs, "runs_equal_bit_for_bit": equal, "processes": 2,
        "layout": "fsdp", "steps_per_run": STEPS_PER_RUN, "checkpoints_damaged": damaged,
        "checkpoints_lost": lost, "median_step_at_kill": statistics.median(lives),
    }  # fmt: skip


def flips(folder: Path, count: int) -> dict[str, Any]:
    """A sharded checkpoint of two processes, one bit wrong at a time."""
    run = folder / "flips"
    training = faults.train(run, ["--steps", "10", *OPTIONS])
    assert training.join(600) == [0, 0], training.said()
    path = checkpoint.newest(run / "checkpoints")
    files = sorted(file for file in path.iterdir() if file.name != "manifest.json")
    rng, found = random.Random(1), 0
    for _ in range(count):
        file = rng.choice(files)
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            checkpoint.verify(path)
        except checkpoint.InvalidCheckpoint:
            found += 1
        file.write_bytes(original)
    checkpoint.verify(path)
    return {"flips": count, "found": found}


def restart(folder: Path, count: int) -> dict[str, Any]:
    """torchrun --max-restarts: seconds from the kill of one process to a step not seen before."""
    seconds = []
    for i in range(count):
        run = folder / f"restart-{i}"
        options = [*faults.TINY, "--steps", "300", *OPTIONS, "--run", str(run)]
        launcher = "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 -m --"
        with (folder / "log").open("w") as log:
            torchrun = subprocess.Popen(
                [sys.executable, "-m", *launcher.split(), "speed_engine", "train", *options],
                stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        _wait_for_step(run, 35, torchrun)
        asked = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
        reached, begun = faults.steps(run), time.monotonic()
        os.kill(int(asked.stdout.split()[-1]), signal.SIGKILL)
        _wait_for_step(run, reached + 2, torchrun)
        seconds.append(time.monotonic() - begun)
        assert torchrun.wait(600) == 0
    return {"restarts": count, "seconds": seconds, "median": statistics.median(seconds)}


def _wait_for_step(run: Path, step: int, torchrun: subprocess.Popen[bytes]) -> None:
    while faults.steps(run) < step:
        if torchrun.poll() is not None:
            log = (run.parent / "log").read_text()
            raise RuntimeError(f"torchrun ended before step {step} of {run.name}:\n{log[-3000:]}")
        time.sleep(0.01)


def saving(folder: Path, count: int) -> dict[str, Any]:
    """A DiT-S/2 in one process: what a checkpoint beside training costs steps, and host memory.

    Steps of two images are timed in turn alone and while a checkpoint is being written.
    """
    config = TrainConfig(model=DiTConfig(size="DiT-S/2"), data=DataConfig(image_shape=(4, 32, 32)))
    trained = _engine(config)
    tensors = {
        **{f"model/{k}": v for k, v in trained.model.state_dict().items()},
        **{
            f"{g}/{k}": v for g, group in trained.update.tensors().items() for k, v in group.items()
        },
    }
    checkpoints = Checkpoints(folder / "saving", keep=1)
    images = torch.zeros(2, 4, 32, 32)

    def step() -> float:
        first = 2 * trained.steps_done
        batch = Batch(images, {"labels": torch.tensor([0, 1])}, torch.arange(first, first + 2))
        begun = time.perf_counter()
        trained.step(batch)
        return time.perf_counter() - begun

    step()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    alone, beside, waits, totals = [], [], [], []
    for number in range(1, count + 1):
        alone += [step(), step()]
        begun = time.perf_counter()
        checkpoints.save(tensors, State(number, Sums((), 0.0), 0, (0.0, 0.0, 0.0), 0.0, ""))
        waits.append(time.perf_counter() - begun)
        while checkpoints.is_saving:
            beside.append(step())
        totals.append(time.perf_counter() - begun)
        checkpoints.wait()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    median = statistics.median
    return {
        "bytes": sum(value.nbytes for value in tensors.values()), "saves": count,
        "seconds_a_step_waits": median(waits), "seconds_until_complete": median(totals),
        "step_seconds_alone": median(alone), "step_seconds_beside_a_save": median(beside),
        "host_bytes_above_training": 1024 * (peak - memory),
    }  # fmt: skip


def _engine(config: TrainConfig) -> Engine:
    model = build_model(config)
    objective = build_objective(config, build_process(config), model)
    update = Update(
        model,
        objective,
        adamw(model, objective, Hyperparameters(learning_rate=1e-4)),
        {"ema": Ema(model, warming_up(0.9999))},
        learning_rate=lambda _: 1e-4,
        grad_clip=1.0,
    )
    return Engine(model, objective, update)


def losses(run: Path) -> list[tuple[int, float]]:
    """Of every step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def committed(run: Path) -> str:
    """Name of the newest checkpoint; empty if there is none."""
    return max((path.name for path in (run / "checkpoints").glob("step-*")), default="")


SECTIONS = {"kills": kills, "flips": flips, "restart": restart, "saving": saving}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Trainings that are killed, damaged and restarted."
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--restart", type=int, default=5)
    parser.add_argument("--saving", type=int, default=10)
    arguments = parser.parse_args()
    path = result_path("faults")
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures.pop("environment", None)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SPEED_ENGINE_CACHE"] = f"{temporary}/cache"
        for name in arguments.sections:
            figures[name] = SECTIONS[name](Path(temporary), getattr(arguments, name))
            print(name, json.dumps(figures[name]), flush=True)
            write_result("faults", figures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
