"""What is measured once, of a run's final model: few and many solver steps, and denoising.

The denoising error is the mean squared error of the clean image as the model estimates it, at given
signal-to-noise ratios: unlike a loss it means the same for every process, target and weighting.

Letters: B images.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from speed_engine.arena.planned import FINAL_FILE
from speed_engine.build import build_evaluator, build_process, build_validation
from speed_engine.config import TrainConfig
from speed_engine.diffusion.fitted import Method
from speed_engine.models.layers.blocks import compiled
from speed_engine.run.averages import load_average
from speed_engine.run.folder import read_config
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.machine import choose_generation, torch_device

LOG_SNRS = (-8, -6, -4, -2, 0, 2, 4, 6, 8)
DENOISED_IMAGES = 256


def measure_final(run: Path, solver_steps: tuple[int, ...], metric: str) -> None:
    """Measure the averaged model of a complete run, into RUN/final.json.

    Args:
        run: its folder.
        solver_steps: evaluations of the model per image, each measured.
        metric: what is measured of them.
    """
    config = read_config(run)
    process, device = build_process(config), torch_device(config.device)
    model, _ = load_average(run, config, device)
    denoising = denoising_errors(config, process, model)  # too few answers to compile for
    compiled(model, choose_generation(config.compile, device.type).value)
    measured = {
        "by_solver_steps": {
            str(steps): _quality(config, process, model, steps, metric) for steps in solver_steps
        },
        "denoising": denoising,
    }
    write_durably(run / FINAL_FILE, (json.dumps(measured, indent=1) + "\n").encode())


def denoising_errors(
    config: TrainConfig, process: Method, model: torch.nn.Module
) -> dict[str, float]:
    """{log-SNR: mean squared error of the clean image}, of images that were not trained on.

    Of the training images where none are held out. A process that does not reach a ratio has none
    there.
    """
    times = times_at(process, LOG_SNRS)
    validation = build_validation(config, process, images=DENOISED_IMAGES)
    errors = validation.errors(model, list(times.values()), "x0").tolist()
    return {str(log_snr): error for log_snr, error in zip(times, errors, strict=True)}


def times_at(process: Method, log_snrs: tuple[int, ...]) -> dict[int, float]:
    """The timestep nearest to each ratio, of those that the process reaches."""
    schedule = process.schedule
    found = schedule.snr(schedule.timesteps).log()  # falls with t
    lowest, highest = float(found.min()), float(found.max())
    return {
        wanted: float(schedule.timesteps[(found - wanted).abs().argmin()])
        for wanted in log_snrs
        if lowest <= wanted <= highest
    }


def _quality(
    config: TrainConfig, process: Method, model: torch.nn.Module, steps: int, metric: str
) -> float:
    # Of the metrics only the one that decides, which is a Frechet distance.
    evaluation = replace(config.evaluation, solver_steps=steps, metrics=("fid",))
    _, found = build_evaluator(replace(config, evaluation=evaluation), process)(model)
    assert found is not None  # this process is alone
    return found.figures[metric]
