"""Training: a table of events around the engine's step.

RUN/config.json         resolved configuration; what ``--resume`` reads
RUN/environment.json    versions, hardware, command
RUN/metrics.jsonl       records; RUN/tensorboard the same
RUN/checkpoints/        see checkpoint.py
RUN/samples/            images of the averaged model, one row per class, as PNG; latents as npy
RUN/ema.safetensors     the averaged model, once the run is complete

Several processes, started by torchrun, train one run together; the first one writes.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from speed_engine.build import (
    CHECKPOINTS,
    CONFIG_FILE,
    build_process,
    newest_checkpoint,
    read_config,
)
from speed_engine.build_evaluation import build_evaluator
from speed_engine.build_training import TrainingData, build_engine
from speed_engine.config import TrainConfig, to_json
from speed_engine.data.loading.loader import Batch
from speed_engine.evaluation.evaluator import Evaluation
from speed_engine.evaluation.generate import grid_rows, save_images
from speed_engine.models.layouts.files import require_shapes
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.memory import keep_freed_memory
from speed_engine.runtime.progress import TrainingProgress
from speed_engine.runtime.records import IntervalMean, RunLog, SkippedSteps, TrainingClock
from speed_engine.runtime.sharding import whole
from speed_engine.runtime.stopping import StopRequest
from speed_engine.runtime.watchdog import Watchdog
from speed_engine.runtime.world import ALONE, World, join
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import Checkpoints
from speed_engine.training.optimizers import OneSweep, optimizer_tensors

log = logging.getLogger(__name__)

FIGURES = ("loss", "squared_error", "grad_norm")
EMA_FILE = "ema.safetensors"


def start(config: TrainConfig, run: Path, console: Console) -> None:
    """Train a new run; torchrun restarting its processes continues the one that it started.

    Raises:
        UserError: the run folder exists, or the configuration does not fit the data.
    """
    world = join(machine.torch_device(config).type)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if world.from_first(run.exists):
        if restarted and world.from_first((run / EMA_FILE).exists):
            if world.is_first:  # a process died on its way out
                console.print(f"{run} was complete before the restart.")
            return
        if restarted and world.from_first(lambda: (run / CONFIG_FILE).exists()):
            _continue(read_config(run), run, console, world)
            return
        raise UserError(
            f"{run} exists already; continue it with `speed-engine train --resume {run}`, "
            "or name another folder with --run."
        )
    trainer = Trainer(config, run, console, world, config.init_from)
    # The choices go on record: others round differently, and a resumed run must not.
    config = replace(
        config,
        compile=trainer.choices["torch.compile"].value,
        attention=trainer.choices["attention"].value,
    )
    if world.is_first:
        run.mkdir(parents=True)
        write_durably(run / CONFIG_FILE, to_json(config).encode())
    trainer.train()


def resume(run: Path, console: Console, steps: int | None = None) -> None:
    """Continue a run from its newest complete checkpoint, to ``steps`` if given.

    Raises:
        UserError: not a run, no checkpoint, one of another model or other data, or nothing to do.
    """
    config = read_config(run)
    if steps is not None:
        config = replace(config, steps=steps)
    world = join(machine.torch_device(config).type)
    world.from_first(lambda: str(newest_checkpoint(run)))
    _continue(config, run, console, world)


def _continue(config: TrainConfig, run: Path, console: Console, world: World) -> None:
    """From the newest complete checkpoint; from the start if none had been written yet."""
    saved = world.from_first(lambda: any((run / CHECKPOINTS).glob("step-*")))
    trainer = Trainer(config, run, console, world, None if saved else config.init_from)
    if saved:
        trainer.load(Path(world.from_first(lambda: str(newest_checkpoint(run)))))
    if world.is_first:
        write_durably(run / CONFIG_FILE, to_json(config).encode())
    trainer.train()


class Trainer:
    """One run in this process. Everything is built and checked before anything is written."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        console: Console,
        world: World = ALONE,
        init_from: Path | None = None,
    ) -> None:
        keep_freed_memory()
        self.config, self.run, self.world = config, run, world
        self.console = console if world.is_first else Console(quiet=True)
        kind = machine.torch_device(config).type
        self.device = torch.device(f"cuda:{world.local_rank}" if kind == "cuda" else kind)
        self.data = TrainingData(config, world, self.device)
        self.choices = machine.choices(config, world, self.data.num_bytes)
        process = build_process(config)
        self.evaluator = build_evaluator(config, process, world)
        self.engine = build_engine(config, process, self.choices, world, self.device, init_from)
        self.means = IntervalMean(FIGURES, self.device)
        self.bad_samples, self._bad = 0, 0  # of the whole run; here since they were counted
        self.skipped = SkippedSteps(self.device)
        self.clock = TrainingClock()
        self.newest_evaluation: tuple[str, Path] | None = None
        self.events: list[tuple[int, Callable[[], None]]] = [
            (config.log_every, self._log),
            (config.evaluation.every, self._evaluate),
            (config.checkpoint_every, self._checkpoint),
        ]

    def load(self, path: Path) -> None:
        """Take over the state of a checkpoint."""
        state = checkpoint.read_state(path)
        fingerprint = self.data.reader.fingerprint
        if state["data"] != fingerprint:
            raise UserError(
                f"{self.config.data.source} holds other data than when {path} was written "
                f"(SHA-256 {fingerprint[:12]}, then {state['data'][:12]}); put the shards back as "
                "they were, or start a new run."
            )
        if state["step"] >= self.config.steps:
            raise UserError(
                f"{self.run} is complete at step {state['step']} of {self.config.steps}; "
                "--steps N trains it longer."
            )
        tensors = self._tensors()
        ours = {name: tuple(value.shape) for name, value in tensors.items()}
        require_shapes(ours, checkpoint.shapes(path), path)
        checkpoint.load(path, tensors, self.world)
        if isinstance(self.engine.optimizer, OneSweep):
            self.engine.optimizer.renew_shadows()
        self.means.load_state(state["means"])
        self.bad_samples = state["bad_samples"]
        self.skipped.load_state(state["skipped"])
        self.clock = TrainingClock(state["seconds"])
        self.engine.steps_done = state["step"]

    def train(self) -> None:
        """Run to the last step; each event fires at its interval and after the last step.

        Raises:
            FloatingPointError: too many steps in a row had to be skipped.
            OSError: a checkpoint could not be written; the run is complete nevertheless.
        """
        config, engine = self.config, self.engine
        if self.world.is_first:
            command = machine.describe(sys.argv)
            text = json.dumps(command, indent=2) + "\n"
            write_durably(self.run / "environment.json", text.encode())
            self.records = RunLog(self.run, engine.steps_done)
        self.checkpoints = Checkpoints(
            self.run / CHECKPOINTS, self.world, config.keep_checkpoints, config.keep_every
        )
        self.clock.start()
        self._interval = self.clock.seconds, engine.steps_done
        self._data_seconds = 0.0
        self.lost: list[str] = []
        self._introduce()
        first, last = engine.steps_done, config.steps
        resident = self.choices["resident data"].value == "on"
        with (
            closing(self.data.batches(first * config.batch_size, resident)) as batches,
            TrainingProgress(self.console, first, last) as self.progress,
            Watchdog(self.world, config.hang_timeout) as self.watchdog,
            StopRequest(self.world, self.device) as stop,
        ):
            self._loop(batches, stop)
            self.checkpoints.wait()
        if self.world.is_first:
            self.records.close()
        if engine.steps_done < last:
            cause = "a signal to another process" if stop.signal is None else stop.signal.name
            text = f"stopped by {cause} at step {engine.steps_done} of {last}; continue with"
            self._say(f"{text} speed-engine train --resume {self.run}")
        else:
            self._finish()
        lost = [*self.lost, *self.checkpoints.failures]
        if self.world.is_first and self.records.lost:
            lost.append(f"{self.records.lost} records of metrics.jsonl")
        if lost:
            raise OSError(f"not everything could be written (step: cause): {'; '.join(lost)}")

    def _loop(self, batches: Iterator[Batch], stop: StopRequest) -> None:
        engine, watchdog = self.engine, self.watchdog
        while engine.steps_done < self.config.steps:
            watchdog.doing(engine.steps_done, "waiting for data")
            waited = time.perf_counter()
            batch = next(batches)
            self._data_seconds += time.perf_counter() - waited
            watchdog.doing(engine.steps_done, "training")
            self._step(batch)
            self.progress.step(engine.steps_done)
            stopping = stop.agreed()
            self._fire()
            if stopping:
                if engine.steps_done % self.config.checkpoint_every:
                    self._checkpoint()
                return

    def _step(self, batch: Batch) -> None:
        self._bad += len(batch.replaced)
        report = self.engine.step(batch)
        figures = self.world.mean_(torch.stack(report[: len(FIGURES)]))
        self.means.add(figures, report.skipped)
        self.skipped.add(report.skipped)

    def _introduce(self) -> None:
        parameters = sum(p.numel() for p in self.engine.model.parameters())
        where = self.choices["device"].value
        if self.world.size > 1:
            where = f"{self.world.size} x {where}, {self.choices['parallel'].value}"
        lines = {
            "run": self.run,
            "data": f"{len(self.data.reader):,} images of shape {self.config.data.image_shape}",
            "model": f"{parameters:,} parameters on {where}",
            "method": self.config.method,
            "features": self.evaluator.extractor.describe() if self.evaluator.extractor else "none",
        }
        for name, text in lines.items():
            self._say(f"{name:10}{text}")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _fire(self) -> None:
        step = self.engine.steps_done
        for every, event in self.events:
            if step % every == 0 or step == self.config.steps:
                event()

    def _record(self, figures: dict[str, Any]) -> None:
        if self.world.is_first:
            step = self.engine.steps_done
            images, seconds = step * self.config.batch_size, round(self.clock.seconds, 3)
            self.records.write(step, {"images": images, "seconds": seconds, **figures})

    def _log(self) -> None:
        step = self.engine.steps_done
        figures = self.means.read()
        skipped = self._check_skipped()
        since, first = self._interval
        now = self.clock.seconds
        rate = (step - first) * self.config.batch_size / (now - since)
        figures |= self._data_wait(step - first)
        self._interval = now, step
        figures["bad_samples"] = self._count_bad()
        if skipped:
            figures["skipped_steps"] = skipped
        self._record({**figures, "images_per_second": rate})
        self.progress.figures(step, figures["loss"], rate)

    def _data_wait(self, steps: int) -> dict[str, float]:
        """Seconds per step that processes waited for data, since the last call: a straggler's."""
        mine = torch.tensor([self._data_seconds / steps], device=self.device)
        self._data_seconds = 0.0
        seconds = self.world.gather(mine).tolist()
        figures = {"data_seconds": sum(seconds) / len(seconds)}
        if len(seconds) > 1:
            slowest = max(range(len(seconds)), key=seconds.__getitem__)
            figures |= {"data_seconds_slowest": seconds[slowest], "slowest_loader_rank": slowest}
        return figures

    def _count_bad(self) -> int:
        """Damaged samples that were replaced so far, by all processes."""
        mine = torch.tensor([self._bad], device=self.device)
        self.bad_samples += int(self.world.gather(mine).sum())
        self._bad = 0
        return self.bad_samples

    def _check_skipped(self) -> int:
        """Steps skipped so far.

        Raises:
            FloatingPointError: too many in a row.
        """
        total, most = self.skipped.read()
        if most >= self.config.on_nonfinite:
            raise FloatingPointError(
                f"loss or gradient were not finite in {most} steps in a row, up to step "
                f"{self.engine.steps_done} ({total} in the whole run); all were skipped and the "
                "newest checkpoint is intact. Lower optimizer.learning_rate or "
                "optimizer.grad_clip, or allow more with on_nonfinite."
            )
        return total

    def _evaluate(self) -> None:
        step = self.engine.steps_done
        self.watchdog.doing(step, "evaluating")
        with self.clock.paused():
            images, found = self.evaluator(self.engine.ema.model)
            if self.world.is_first:
                self._keep_evaluation(images, found)
        self.watchdog.doing(step, "training")

    def _keep_evaluation(self, images: Tensor, found: Evaluation | None) -> None:
        """On the first process: pictures and figures."""
        step = self.engine.steps_done
        rows = grid_rows(len(images), self.evaluator.conditions)
        where = self.run / "samples" / f"step-{step:08d}.png"
        where = self._try_to_write(where, lambda: save_images(images, rows, where))
        quality = ""
        if found is not None:
            self._record(found.record())
            quality = f"{found.headline()}  "
        self.newest_evaluation = quality, where
        self.progress.say(f"step {step}/{self.config.steps}  {quality}{where}")

    def _try_to_write(self, path: Path, write: Callable[[], Path | None]) -> Path:
        """What a full disk may cost without ending the run, and the path that was written."""
        try:
            return write() or path
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            log.error("%s could not be written: %s", path, error)
            self.lost.append(f"{path.name}: {error}")
            return path

    def _tensors(self) -> dict[str, Tensor]:
        """All that a run consists of, by ``group/name``."""
        engine = self.engine
        groups = {
            "model": engine.model.state_dict(),
            "ema": engine.ema.model.state_dict(),
            "optimizer": optimizer_tensors(engine.model, engine.optimizer),
            "objective": engine.objective.state_dict(),
            "objective_optimizer": optimizer_tensors(engine.objective, engine.optimizer),
        }
        return {f"{group}/{k}": v for group, tensors in groups.items() for k, v in tensors.items()}

    def _checkpoint(self) -> None:
        self._check_skipped()
        step = self.engine.steps_done
        self.watchdog.doing(step, "saving")
        state = {
            "step": step,
            "means": self.means.state(),
            "bad_samples": self._count_bad(),
            "skipped": self.skipped.state(),
            "seconds": self.clock.seconds,
            "data": self.data.reader.fingerprint,
        }
        self.checkpoints.save(step, self._tensors(), state)
        self.watchdog.doing(step, "training")

    def _finish(self) -> None:
        """The averaged model in one file, and what came of the run."""
        average = {
            name: whole(value).cpu().contiguous()
            for name, value in self.engine.ema.model.state_dict().items()
        }
        if not self.world.is_first:
            return
        temporary = self.run / f".{EMA_FILE}"
        self._try_to_write(temporary, lambda: save_file(average, temporary))
        if temporary.exists():
            temporary.rename(self.run / EMA_FILE)
        if self.newest_evaluation is not None:
            quality, samples = self.newest_evaluation
            if quality:
                self._say(f"quality   {quality}(all in {self.run / 'metrics.jsonl'})")
            self._say(f"samples   {samples}")
