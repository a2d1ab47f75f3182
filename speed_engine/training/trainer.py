"""Training: a table of events around the engine's step.

Several processes, started by torchrun, train one run together; the first one writes.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from speed_engine.data.batch import Batch
from speed_engine.data.format.reader import ShardReader
from speed_engine.evaluation.evaluator import Evaluation, Evaluator
from speed_engine.evaluation.generate import grid_rows, save_images
from speed_engine.runtime.checks import UserError, require_shapes
from speed_engine.runtime.environment import describe
from speed_engine.runtime.files import save_tensors, write_durably
from speed_engine.runtime.loggers import Logger
from speed_engine.runtime.progress import TrainingProgress, announced
from speed_engine.runtime.records import IntervalMean, RunLog, SkippedSteps, TrainingClock
from speed_engine.runtime.sharding import whole
from speed_engine.runtime.stopping import Stopped, StopRequest
from speed_engine.runtime.watchdog import Watchdog
from speed_engine.runtime.world import World
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import CHECKPOINTS, EMA_FILE, Checkpoints
from speed_engine.training.ema import EMA
from speed_engine.training.engine import Engine, StepReport

log = logging.getLogger(__name__)

FIGURES = ("loss", "squared_error", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long a run trains, and what happens when; intervals are in optimizer steps."""

    steps: int  # of the whole run
    batch_size: int  # images per step, all processes together
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    keep_checkpoints: int  # newest ones
    keep_every: int | None  # of the older ones, those at multiples of it
    on_nonfinite: int  # skipped steps in a row that stop the run
    hang_timeout: float  # seconds without a step
    resident: bool  # whether the data set is kept on the device


class Batches(Protocol):
    """What a run is trained on."""

    source: str
    reader: ShardReader

    def batches(self, start: int, resident: bool) -> Generator[Batch]:
        """This process's batches, endlessly, after ``start`` images of all processes."""
        ...


class Trainer:
    """Trains one run in this process.

    Args:
        loop: how long, and what happens when.
        folder: of the run.
        engine: one optimizer step.
        data: batches of this process.
        evaluator: what is generated and measured.
        device: of this process.
        world: the processes of the run.
        console: what the first process prints to.
        introduction: lines about the run that are printed first, by their heads.
        open_loggers: of the first process, by name, from the step that is given on.
    """

    def __init__(
        self,
        loop: Loop,
        folder: Path,
        engine: Engine,
        data: Batches,
        evaluator: Evaluator,
        *,
        device: torch.device,
        world: World,
        console: Console,
        introduction: Mapping[str, str],
        open_loggers: Callable[[int], Mapping[str, Logger]],
    ) -> None:
        self.loop, self.folder, self.engine = loop, folder, engine
        self.data, self.evaluator, self.device, self.world = data, evaluator, device, world
        self.console = console if world.is_first else Console(quiet=True)
        self.introduction, self.open_loggers = introduction, open_loggers
        self.means = IntervalMean(FIGURES, device)
        self.bad_samples, self._bad = 0, 0  # of the whole run; here since they were counted
        self.skipped = SkippedSteps(device)
        self.clock = TrainingClock()
        self.newest_evaluation: tuple[str, Path] | None = None

    def load(self, path: Path) -> None:
        """Take over the state of a checkpoint."""
        state = checkpoint.read_state(path)
        fingerprint = self.data.reader.fingerprint
        if state.data != fingerprint:
            raise UserError(
                f"{self.data.source} holds other data than when {path} was written "
                f"(SHA-256 {fingerprint[:12]}, then {state.data[:12]}); put the shards back as "
                "they were, or start a new run."
            )
        complete = self.world.from_first((self.folder / EMA_FILE).exists)
        if state.step > self.loop.steps:
            raise UserError(
                f"{self.folder} stands at step {state.step}, beyond the {self.loop.steps} that are "
                f"asked for; --steps N trains it further, with N above {state.step}."
            )
        if state.step == self.loop.steps and complete:
            raise UserError(
                f"{self.folder} is complete at step {state.step} of {self.loop.steps}; "
                "--steps N trains it longer."
            )
        tensors = self._tensors()
        ours = {name: tuple(value.shape) for name, value in tensors.items()}
        require_shapes(ours, checkpoint.shapes(path), path)
        checkpoint.load(path, tensors, self.world)
        self.means.load_state(state.means)
        self.bad_samples = state.bad_samples
        self.skipped.load_state(state.skipped)
        self.clock = TrainingClock(state.seconds)
        self.engine.steps_done = state.step

    def train(self) -> None:
        """Run to the last step; each event fires at its interval and after the last step.

        After a step, what it came to is recorded, then saved, and only then evaluated. An
        evaluation that was given up, or lost with its process, is made up for by the resumed run.

        Raises:
            FloatingPointError: too many steps in a row had to be skipped.
            OSError: a checkpoint could not be written; the run is complete nevertheless.
        """
        loop, engine = self.loop, self.engine
        if self.world.is_first:
            command = describe(sys.argv)
            text = json.dumps(command, indent=2) + "\n"
            write_durably(self.folder / "environment.json", text.encode())
            if engine.steps_done < loop.steps:  # of a run that is made longer: no longer its end
                (self.folder / EMA_FILE).unlink(missing_ok=True)
            loggers = self.open_loggers(engine.steps_done)
            self.records = RunLog(self.folder, engine.steps_done, loggers)
        self.checkpoints = Checkpoints(
            self.folder / CHECKPOINTS, self.world, loop.keep_checkpoints, loop.keep_every
        )
        self.clock.start()
        self._interval = self.clock.seconds, engine.steps_done
        self._data_seconds = 0.0
        self._unread = loop.resident  # all of the data before the first batch
        self.lost: list[str] = []
        self._introduce()
        first, last = engine.steps_done, loop.steps
        with (
            closing(self.records) if self.world.is_first else nullcontext(),
            closing(self.data.batches(first * loop.batch_size, loop.resident)) as batches,
            TrainingProgress(self.console, first, last) as self.progress,
            Watchdog(self.world, loop.hang_timeout) as self.watchdog,
            StopRequest(self.world, self.device) as self.stop,
        ):
            stopping = self._lacks_evaluation() and not self._evaluate()
            while engine.steps_done < last and not stopping:
                try:
                    batch = self._next(batches)
                except Stopped:
                    stopping = True
                    if engine.steps_done > first and not self._is_due(loop.checkpoint_every):
                        self._checkpoint()
                    break
                try:
                    # The first step may compile for minutes, and there is nothing to save yet.
                    with self.stop.interrupting(
                        self.world.size == 1 and engine.steps_done == first
                    ):
                        report = engine.step(batch)
                except Stopped:
                    stopping = True
                    engine.steps_done = first
                    break
                self._count(batch, report)
                stopping = self._fire(self.stop.agreed())
            self.watchdog.doing(engine.steps_done, "saving")
            self.checkpoints.wait()
        if stopping:
            stop = self.stop
            cause = "a signal to another process" if stop.signal is None else stop.signal.name
            text = f"stopped by {cause} at step {engine.steps_done} of {last}; continue with"
            self._say(f"{text} speed-engine train --resume {self.folder}")
        else:
            self._finish()
        lost = [*self.lost, *self.checkpoints.failures]
        if self.world.is_first and self.records.lost:
            lost.append(f"{self.records.lost} records of metrics.jsonl")
        if lost:
            raise OSError(f"not everything could be written (step: cause): {'; '.join(lost)}")

    def _next(self, batches: Iterator[Batch]) -> Batch:
        step = self.engine.steps_done
        self.watchdog.doing(step, "reading the data set" if self._unread else "waiting for data")
        waited = time.perf_counter()
        with self.stop.interrupting(self.world.size == 1):
            batch = next(batches)
        self._unread = False
        self._data_seconds += time.perf_counter() - waited
        self.watchdog.doing(step, "training")
        return batch

    def _count(self, batch: Batch, report: StepReport) -> None:
        self._bad += len(batch.replaced)
        figures = self.world.mean_(torch.stack(report[: len(FIGURES)]))
        self.means.add(figures, report.skipped)
        self.skipped.add(report.skipped)
        if self.skipped.may_have(self.loop.on_nonfinite, wait=self.world.size > 1):
            self._check_skipped()
        self.progress.step(self.engine.steps_done)

    def _introduce(self) -> None:
        lines = {"run": self.folder, **self.introduction}
        if step := self.engine.steps_done:
            lines["resumed"] = f"from step {step} of {self.loop.steps}"
        for name, text in lines.items():
            self._say(f"{name:10}{text}")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _is_due(self, every: int) -> bool:
        step = self.engine.steps_done
        return step % every == 0 or step == self.loop.steps

    def _fire(self, stopping: bool) -> bool:
        """What is due after a step; whether to stop, which may be asked for meanwhile."""
        loop = self.loop
        saves = stopping or self._is_due(loop.checkpoint_every)
        try:
            if self._is_due(loop.log_every):
                self._log()
        except SystemExit:  # rich's, where nobody reads what is printed any more
            if saves:
                self._checkpoint()
                self.checkpoints.wait()
            raise
        if saves:
            self._checkpoint()
        if stopping or not self._is_due(loop.evaluate_every):
            return stopping
        finished = self._evaluate()
        if not finished and not saves:
            self._checkpoint()
        return not finished

    def _lacks_evaluation(self) -> bool:
        """Whether the step that a run is resumed from was to be evaluated, and was not."""
        step = self.engine.steps_done
        picture = self.folder / "samples" / f"step-{step:08d}.png"
        kept = picture, picture.with_suffix(".npy")  # not what `evaluate` keeps beside it
        evaluated = self.world.from_first(lambda: any(path.exists() for path in kept))
        return step > 0 and self._is_due(self.loop.evaluate_every) and not evaluated

    def _record(
        self, figures: dict[str, Any], curves: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        if self.world.is_first:
            step = self.engine.steps_done
            images, seconds = step * self.loop.batch_size, round(self.clock.seconds, 3)
            self.records.write(step, {"images": images, "seconds": seconds, **figures}, curves)

    def _log(self) -> None:
        step = self.engine.steps_done
        figures = self.means.read()
        skipped = self._check_skipped()
        since, first = self._interval
        now = self.clock.seconds
        step_seconds = (now - since) / (step - first)
        rate = self.loop.batch_size / step_seconds
        figures |= self._data_wait(step - first)
        self._interval = now, step
        figures["bad_samples"] = self._count_bad()
        if skipped:
            figures["skipped_steps"] = skipped
        figures["learning_rate"] = self.engine.update.learning_rate(step)
        self._record({**figures, "images_per_second": rate})
        self.progress.figures(step, figures["loss"], rate, step_seconds)

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
        if most >= self.loop.on_nonfinite:
            raise FloatingPointError(
                f"loss or gradient were not finite in {most} steps in a row, up to step "
                f"{self.engine.steps_done} ({total} in the whole run); all were skipped, and no "
                "checkpoint holds any of them. Lower optimizer.learning_rate or "
                "optimizer.grad_clip, or allow more with on_nonfinite."
            )
        return total

    def _evaluate(self) -> bool:
        """Whether it came to its end, and no process is asked to stop."""
        step, alone = self.engine.steps_done, self.world.size == 1
        self.watchdog.doing(step, "evaluating")
        self.checkpoints.wait()  # an evaluation may fail, and take a save under way with it
        model = self.engine.update.averages[EMA].model
        with self.clock.paused():
            try:
                advance = self.progress.evaluating(step, self.evaluator.share)
                with self.stop.interrupting(alone):
                    called = model if alone else self.stop.watched(model)
                    images = self._generated(called, advance)
                    validation = self.evaluator.validate(called)
                if self.world.is_first:
                    comparing = announced("comparing generated images with real ones")
                    with self.stop.interrupting(True), comparing:
                        found = self.evaluator.measure(images, validation)
                    self._keep_evaluation(images, found)
            except Stopped:
                pass
            stopping = self.stop.agreed_at_once()
        self.watchdog.doing(step, "training")
        return not stopping

    def _generated(self, model: nn.Module, advance: Callable[[float], object]) -> Tensor | None:
        """The images of an evaluation; None where they are not finite, which ends no run."""
        try:
            return self.evaluator.generate(model, advance)
        except FloatingPointError as error:
            if self.world.is_first:
                log.warning("step %d: %s", self.engine.steps_done, error)
            return None

    def _keep_evaluation(self, images: Tensor | None, found: Evaluation | None) -> None:
        """On the first process: pictures and figures; of images that are not finite, none."""
        step = self.engine.steps_done
        quality = ""
        if found is not None:
            self._record(found.record(), found.curves())
            quality = f"{found.headline()}  "
        if images is None:
            self.progress.say(f"step {step}/{self.loop.steps}  {quality}")
            return
        rows = grid_rows(len(images), self.evaluator.conditions)
        where = self.folder / "samples" / f"step-{step:08d}.png"
        where = self._try_to_write(where, lambda: save_images(images, rows, where))
        if where.suffix == ".png" and where.exists():
            self.records.picture(step, where)
        self.newest_evaluation = quality, where
        self.progress.say(f"step {step}/{self.loop.steps}  {quality}{where}")

    def _try_to_write(self, path: Path, write: Callable[[], Path | None]) -> Path:
        """What a full disk may cost without ending the run, and the path that was written."""
        try:
            return write() or path
        except OSError as error:
            log.error("%s could not be written: %s", path, error)
            self.lost.append(f"{path.name}: {error}")
            return path

    def _tensors(self) -> dict[str, Tensor]:
        """All that a run consists of, by ``group/name``."""
        engine = self.engine
        groups = {
            "model": engine.model.state_dict(),
            "objective": engine.objective.state_dict(),
            **engine.update.tensors(),
        }
        return {f"{group}/{k}": v for group, tensors in groups.items() for k, v in tensors.items()}

    def _checkpoint(self) -> None:
        self._check_skipped()
        step = self.engine.steps_done
        self.watchdog.doing(step, "saving")
        state = checkpoint.State(
            step=step,
            means=self.means.state(),
            bad_samples=self._count_bad(),
            skipped=self.skipped.state(),
            seconds=self.clock.seconds,
            data=self.data.reader.fingerprint,
        )
        self.checkpoints.save(self._tensors(), state)
        self.watchdog.doing(step, "training")

    def _finish(self) -> None:
        """The averaged model in one file, and what came of the run."""
        average = {
            name: whole(value).cpu().contiguous()
            for name, value in self.engine.update.averages[EMA].model.state_dict().items()
        }
        if not self.world.is_first:
            return
        path = self.folder / EMA_FILE
        self._try_to_write(path, lambda: save_tensors(average, path))
        if self.newest_evaluation is not None:
            quality, samples = self.newest_evaluation
            if quality:
                self._say(f"quality   {quality}(all in {self.folder / 'metrics.jsonl'})")
            self._say(f"samples   {samples}")
