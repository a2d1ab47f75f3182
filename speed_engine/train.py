"""Training: a table of events around the engine's step.

RUN/config.json         resolved configuration; what ``--resume`` reads
RUN/environment.json    versions, hardware, command
RUN/metrics.jsonl       records; RUN/tensorboard the same
RUN/checkpoints/        see checkpoint.py
RUN/samples/            images of the averaged model, one row per class, as PNG; latents as npy
"""

import json
import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from speed_engine import checkpoint, environment
from speed_engine.assemble import (
    CHECKPOINTS,
    CONFIG_FILE,
    build_cleaning,
    build_evaluator,
    build_model,
    build_objective,
    build_process,
    condition_shapes,
    load_parameters,
    newest_checkpoint,
    open_data,
    read_config,
    stored_shape,
)
from speed_engine.config import TrainConfig, to_json
from speed_engine.data.device import on_device
from speed_engine.data.loader import Batch, Loader
from speed_engine.data.resident import Resident, resident_bytes
from speed_engine.ema import Ema
from speed_engine.engine import Engine
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.evaluation.generate import grid_rows, save_images
from speed_engine.metrics import IntervalMean, RunLog
from speed_engine.models.blocks import compiled
from speed_engine.models.pretrained import load_pretrained
from speed_engine.optim import (
    MOMENTUM_DECAYS,
    adamw,
    linear_warmup,
    load_optimizer_tensors,
    optimizer_tensors,
)
from speed_engine.progress import TrainingProgress

FIGURES = ("loss", "squared_error", "grad_norm")


def start(config: TrainConfig, run: Path, console: Console) -> None:
    """Train a new run.

    Raises:
        ValueError: the run folder exists, or the configuration does not fit the data.
    """
    if run.exists():
        raise ValueError(
            f"{run} exists already; continue it with `speed-engine train --resume {run}`, "
            "or name another folder with --run."
        )
    trainer = Trainer(config, run, console, config.init_from)
    # The choices go on record: others round differently, and a resumed run must not.
    config = replace(
        config,
        compile=trainer.choices["torch.compile"].value,
        attention=trainer.choices["attention"].value,
    )
    run.mkdir(parents=True)
    (run / CONFIG_FILE).write_text(to_json(config))
    trainer.train()


def resume(run: Path, console: Console, steps: int | None = None) -> None:
    """Continue a run from its newest complete checkpoint, to ``steps`` if given.

    Raises:
        ValueError: not a run, no checkpoint, one of another model or other data, or nothing to do.
    """
    config = read_config(run)
    if steps is not None:
        config = replace(config, steps=steps)
    trainer = Trainer(config, run, console)
    trainer.load(newest_checkpoint(run))
    (run / CONFIG_FILE).write_text(to_json(config))
    trainer.train()


class Trainer:
    """One run in this process. Everything is built and checked before anything is written."""

    def __init__(
        self, config: TrainConfig, run: Path, console: Console, init_from: Path | None = None
    ) -> None:
        self.config, self.run, self.console = config, run, console
        self.reader = open_data(config)
        self.stored_shape = stored_shape(config, self.reader)
        self._loader(start=0).close()  # an unfit data set fails here
        num_bytes = resident_bytes(self.reader, self.stored_shape)
        self.choices = environment.choices(config, num_bytes)
        self.device = torch.device(self.choices["device"].value)
        self.cleaning = build_cleaning(config, self.reader, self.device)
        process = build_process(config)
        model = build_model(config, self.choices["attention"].value).to(self.device)
        if init_from is not None:
            load_pretrained(model, init_from)
        self.evaluator: Evaluator = build_evaluator(config, process)
        settings = config.optimizer
        warmup = linear_warmup(settings.learning_rate, settings.warmup_steps)
        decay = settings.momentum_decay or process.momentum_decay
        momentum = MOMENTUM_DECAYS[decay](settings.beta1, config.steps)
        store_noise = self.choices["noise"].value == "stored"
        objective = build_objective(config, process, model, store_noise).to(self.device)
        self.engine = Engine(
            model,
            objective,
            adamw(
                model,
                learning_rate=settings.learning_rate,
                beta1=settings.beta1,
                beta2=settings.beta2,
                weight_decay=settings.weight_decay,
                loss=objective,
                loss_learning_rate=process.batch_loss.learning_rate,
            ),
            Ema(model, settings.ema_decay),
            learning_rate=lambda step: warmup(step) * momentum.compensation(step),
            beta1=momentum.beta1,
            grad_clip=settings.grad_clip,
            forward=compiled(model, self.choices["torch.compile"].value),
            seed=config.seed,
        )
        self.means = IntervalMean(FIGURES, self.device)
        self.bad_samples = 0  # of the whole run
        self.newest_evaluation: tuple[float | None, Path] | None = None
        self.events: list[tuple[int, Callable[[], None]]] = [
            (config.log_every, self._log),
            (config.evaluation.every, self._evaluate),
            (config.checkpoint_every, self._checkpoint),
        ]

    def load(self, path: Path) -> None:
        """Take over the state of a checkpoint."""
        tensors, state = checkpoint.load(path)
        if state["data"] != self.reader.fingerprint:
            raise ValueError(
                f"{self.config.data.source} holds other data than when {path} was written "
                f"(SHA-256 {self.reader.fingerprint[:12]}, then {state['data'][:12]}); put the "
                "shards back as they were, or start a new run."
            )
        if state["step"] >= self.config.steps:
            raise ValueError(
                f"{self.run} is complete at step {state['step']} of {self.config.steps}; "
                "--steps N trains it longer."
            )
        load_parameters(self.engine.model, tensors["model"], path)
        load_parameters(self.engine.ema.model, tensors["ema"], path)
        load_optimizer_tensors(self.engine.model, self.engine.optimizer, tensors["optimizer"])
        load_parameters(self.engine.objective, tensors["objective"], path)
        load_optimizer_tensors(
            self.engine.objective, self.engine.optimizer, tensors["objective_optimizer"]
        )
        self.means.load_state(state["means"])
        self.bad_samples = state["bad_samples"]
        self.engine.steps_done = state["step"]

    def train(self) -> None:
        """Run to the last step; each event fires at its interval and after the last step."""
        config, engine = self.config, self.engine
        command = environment.describe(sys.argv)
        (self.run / "environment.json").write_text(json.dumps(command, indent=2) + "\n")
        self.records = RunLog(self.run, engine.steps_done)
        self._interval = time.perf_counter(), engine.steps_done
        self._introduce()
        with (
            closing(self._batches(start=engine.steps_done * config.batch_size)) as batches,
            TrainingProgress(self.console, engine.steps_done, config.steps) as progress,
        ):
            self.progress = progress
            for batch in batches:
                if engine.steps_done >= config.steps:
                    break
                self.bad_samples += len(batch.replaced)
                self.means.add(engine.step(batch))
                progress.step(engine.steps_done)
                self._fire()
        self.records.close()
        if self.newest_evaluation is not None:
            fid, samples = self.newest_evaluation
            if fid is not None:
                where = self.run / "metrics.jsonl"
                self.console.print(
                    f"FID       {fid:.3f}  (all in {where})", highlight=False, soft_wrap=True
                )
            self.console.print(f"samples   {samples}", highlight=False, soft_wrap=True)

    def _introduce(self) -> None:
        parameters = sum(p.numel() for p in self.engine.model.parameters())
        lines = {
            "run": self.run,
            "data": f"{len(self.reader):,} images of shape {self.config.data.image_shape}",
            "model": f"{parameters:,} parameters on {self.choices['device'].value}",
            "method": self.config.method,
            "features": self.evaluator.extractor.describe() if self.evaluator.extractor else "none",
        }
        for name, text in lines.items():
            self.console.print(f"{name:10}{text}", highlight=False, soft_wrap=True)

    def _fire(self) -> None:
        step = self.engine.steps_done
        for every, event in self.events:
            if step % every == 0 or step == self.config.steps:
                event()

    def _log(self) -> None:
        step = self.engine.steps_done
        figures = self.means.read()
        since, first = self._interval
        now = time.perf_counter()
        rate = (step - first) * self.config.batch_size / (now - since)
        self._interval = now, step
        self._require_finite(figures["loss"])
        images = step * self.config.batch_size
        counts = {"images": images, "bad_samples": self.bad_samples}
        self.records.write(step, {**counts, **figures, "images_per_second": rate})
        self.progress.figures(step, figures["loss"], rate)

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.engine.steps_done}; the newest checkpoint is "
                "intact. Lower optimizer.learning_rate or optimizer.grad_clip."
            )

    def _evaluate(self) -> None:
        step = self.engine.steps_done
        begun = time.perf_counter()
        images, fidelity = self.evaluator(self.engine.ema.model)
        rows = grid_rows(len(images), self.evaluator.conditions)
        where = save_images(images, rows, self.run / "samples" / f"step-{step:08d}.png")
        figure = ""
        if fidelity is not None:
            measured = {
                name: value for name, value in asdict(fidelity).items() if value is not None
            }
            self.records.write(step, {"images": step * self.config.batch_size, **measured})
            figure = f"FID {fidelity.fid:.3f}  "
        self.newest_evaluation = fidelity and fidelity.fid, where
        self.progress.say(f"step {step}/{self.config.steps}  {figure}{where}")
        since, first = self._interval
        self._interval = since + time.perf_counter() - begun, first  # not part of the training rate

    def _checkpoint(self) -> None:
        engine = self.engine
        tensors = {
            "model": engine.model.state_dict(),
            "ema": engine.ema.model.state_dict(),
            "optimizer": optimizer_tensors(engine.model, engine.optimizer),
            "objective": engine.objective.state_dict(),
            "objective_optimizer": optimizer_tensors(engine.objective, engine.optimizer),
        }
        state = {
            "step": engine.steps_done,
            "means": self.means.state(),
            "bad_samples": self.bad_samples,
            "data": self.reader.fingerprint,
        }
        self._require_finite(state["means"]["sum"][FIGURES.index("loss")])
        folder = self.run / CHECKPOINTS
        checkpoint.save(folder, engine.steps_done, tensors, state)
        checkpoint.prune(folder, self.config.keep_checkpoints)

    def _batches(self, start: int) -> Generator[Batch]:
        """Batches of clean images on the device."""
        if self.choices["resident data"].value == "on":
            yield from self._resident(start)
        else:
            with self._loader(start) as loader:
                for images, conditions, ids, replaced in on_device(loader, self.device):
                    yield self.cleaning.batch(images, conditions, ids)._replace(replaced=replaced)

    def _resident(self, start: int) -> Resident:
        config = self.config
        return Resident(
            self.reader,
            self.stored_shape,
            config.batch_size,
            config.seed,
            self.cleaning,
            start=start,
            window=config.data.window,
            num_classes=config.data.num_classes,
            on_bad_sample=config.data.on_bad_sample,
        )

    def _loader(self, start: int) -> Loader:
        config = self.config
        return Loader(
            self.reader,
            self.stored_shape,
            config.batch_size,
            config.seed,
            start=start,
            workers=config.data.workers,
            window=config.data.window,
            num_classes=config.data.num_classes,
            condition_shapes=condition_shapes(config),
            on_bad_sample=config.data.on_bad_sample,
        )
