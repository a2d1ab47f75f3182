"""What is measured once, of a run's final model: few and many solver steps, and denoising.

The denoising error is the mean squared error of the clean image as the model estimates it, at given
signal-to-noise ratios: unlike a loss it means the same for every process, target and weighting.

Letters: B images.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from speed_engine.arena.planned import FINAL_FILE
from speed_engine.build import build_evaluator, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch, StoredBatch
from speed_engine.data.loading.decoding import read_all
from speed_engine.data.opening import build_cleaning, open_data
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.prediction import solve
from speed_engine.models.layers.blocks import compiled
from speed_engine.ops import Stream, normal
from speed_engine.run import load_average, read_config
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.machine import choose_generation, torch_device
from speed_engine.runtime.sharding import autocast

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


@torch.inference_mode()
def denoising_errors(
    config: TrainConfig, process: Method, model: torch.nn.Module
) -> dict[str, float]:
    """{log-SNR: mean squared error of the clean image}, of images that were not trained on.

    Of the training images where none are held out. A process that does not reach a ratio has none
    there.
    """
    device = torch_device(config.device)
    held_out = "held_out" if config.data.held_out else "training"
    reader = open_data(config.data, part=held_out)
    pixels, conditions = read_all(reader, config.data.image_shape, config.data.on_bad_sample)
    rows = {k: torch.from_numpy(v[:DENOISED_IMAGES]).to(device) for k, v in conditions.items()}
    images = torch.from_numpy(pixels[:DENOISED_IMAGES]).to(device)
    ids = torch.arange(len(images), device=device)
    cleaning = build_cleaning(config.data, reader, config.seed, device)
    batch = cleaning.batch(StoredBatch(images, rows, ids))
    root = torch.tensor(config.seed, device=device)
    noise = normal(root, ids, batch.images[0].numel(), Stream.NOISE).view_as(batch.images)
    times = times_at(process, LOG_SNRS)
    errors = {}
    for log_snr, t in times.items():
        estimate = _denoised(process, model, batch, noise, t)
        errors[str(log_snr)] = float((estimate - batch.images).square().mean())
    return errors


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


def _denoised(
    process: Method, model: torch.nn.Module, batch: Batch, noise: Tensor, t: float
) -> Tensor:
    """(B, C, H, W): the clean images as the model estimates them from images with noise."""
    rows = process.table.rows_at(t)
    x_in = (rows.a_x * batch.images + rows.a_e * noise).float()
    time = process.schedule.model_time(torch.tensor(t, dtype=process.schedule.timesteps.dtype))
    times = time.to(x_in.device).expand(len(x_in))
    with autocast(x_in.device.type):
        answer = model(x_in, times, **batch.conditions).float()
    return solve(rows, x_in, answer[:, : x_in.shape[1]])[0]


def _quality(
    config: TrainConfig, process: Method, model: torch.nn.Module, steps: int, metric: str
) -> float:
    evaluation = replace(config.evaluation, solver_steps=steps)
    _, found = build_evaluator(replace(config, evaluation=evaluation), process)(model)
    assert found is not None  # this process is alone
    return found.figures[metric]
