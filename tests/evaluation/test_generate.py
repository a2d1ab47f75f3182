"""Image i is a function of the seed, i and its conditions; guidance acts where asked."""

import json
import math
from pathlib import Path
from typing import Any

import gaussian
import pytest
import torch
from sharded_generation import FAMILIES, make
from sharded_generation import images as images_of_network
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from speed_engine.diffusion.processes import build_schedule
from speed_engine.diffusion.solvers import SOLVERS
from speed_engine.diffusion.table import TimestepTable
from speed_engine.evaluation import generate as generating
from speed_engine.evaluation.conditions import generation_settings
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.generate import GenerationSettings, generate

SHAPE = (1, 2, 2)


class Exact(nn.Module):
    """The best denoiser of Gaussian data; a condition shifts its answer, and it counts."""

    def __init__(self, table: TimestepTable) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.table, self.asked = table, []

    def forward(self, x, t, labels=None):
        t = float(t[0]) / 1000 if self.table.schedule.name == "flow" else int(t[0])
        self.asked.append(None if labels is None else labels.tolist())
        answer = gaussian.exact(self.table)(x.double(), t).float()
        return answer if labels is None else answer + 0.01 * labels.view(-1, 1, 1, 1)


def images_of(
    process="linear",
    ids=None,
    labels=None,
    *,
    seed=5,
    batch_size=500,
    network=Exact,
    latents=True,
    advance=lambda images: None,
    **settings,
):
    schedule = build_schedule(process)
    table = TimestepTable(schedule, schedule.prediction, torch.ones(1000))
    model = network(table)
    ids = torch.arange(8) if ids is None else ids
    conditions = {} if labels is None else {"labels": labels}
    images = generate(
        model,
        table,
        conditions,
        ids,
        GenerationSettings(**{"steps": 10, **settings}),
        image_shape=SHAPE,
        null={"labels": torch.tensor(9)},
        seed=seed,
        latents=latents,
        batch_size=batch_size,
        advance=advance,
    )
    return images, model.asked


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_is_the_same_in_any_batch_and_order(solver):
    together, _ = images_of(solver=solver)
    alone, _ = images_of(solver=solver, batch_size=3)
    backwards, _ = images_of(solver=solver, ids=torch.arange(8).flip(0))
    torch.testing.assert_close(alone, together)
    torch.testing.assert_close(backwards.flip(0), together)
    other, _ = images_of(solver=solver, seed=6)
    assert (other - together).abs().amax((1, 2, 3)).min() > 0.01
    assert len(together.flatten(1).unique(dim=0)) == 8


class Small(Exact):
    """Runs out of memory with more than a few images."""

    most = 3

    def forward(self, x, t, labels=None):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x, t, labels)


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_that_do_not_fit_are_generated_fewer_at_a_time_which_is_said_once(solver, caplog):
    generating._say_too_many.cache_clear()
    labels = torch.arange(8)
    expected, _ = images_of(solver=solver, labels=labels, batch_size=3)
    for _ in range(2):
        found, asked = images_of(solver=solver, labels=labels, network=Small)
        torch.testing.assert_close(found, expected)
        assert {len(of_part) for of_part in asked} == {2}  # neither 8 nor 4
    (record,) = caplog.records
    assert record.getMessage().startswith("500 images at a time take more memory than the device")


def test_images_that_are_generated_again_are_counted_once():
    told: list[float] = []
    images_of(network=Small, advance=told.append)
    assert sum(told) == pytest.approx(8) and min(told) < 0


def test_an_image_that_does_not_fit_alone_is_an_error(monkeypatch):
    monkeypatch.setattr(Small, "most", 0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        images_of(network=Small)


def test_processes_that_compute_together_do_not_try_again(monkeypatch):
    """The others would wait for the rest of what failed."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError):
        images_of(network=Small)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    images, _ = images_of(network=Small)
    assert len(images) == 8


@pytest.mark.parametrize("process", ["linear", "flow"])
@pytest.mark.parametrize("solver, steps", [("heun", 51), ("dpmpp_2m", 50), ("ddpm", 250)])
def test_noise_by_counters_gives_the_gaussian(process, solver, steps):
    count = 4000
    images, _ = images_of(
        process, torch.arange(count), solver=solver, steps=steps, batch_size=count
    )
    centred = images.double().flatten(1) - gaussian.MEAN
    scale = gaussian.POWER.sqrt()
    along_axes = (centred @ gaussian.AXES) / scale
    assert along_axes.mean(0).abs().max() < 4.5 / count**0.5 + 0.01
    covariance = along_axes.T @ along_axes / count
    assert (covariance - torch.eye(4)).abs().max() < 4.5 * (2 / count) ** 0.5 + 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_another_batch_size_differ_by_rounding_only(family):
    model, ids = make(FAMILIES[family]), torch.arange(8)

    def generated(batch_size: int, latents: bool) -> Tensor:
        return images_of_network(model, ids, batch_size=batch_size, latents=latents)

    for latents in (True, False):
        together, alone = generated(8, latents), generated(3, latents)
        difference = together.double() - alone.double()
        if latents:
            assert difference.square().mean().sqrt() < 1e-5 * together.std()
        else:
            assert difference.abs().max() <= 1


class Transfers(TorchFunctionMode):
    """Counts tensors that go from the CPU to the device, here a device without data.

    What is fetched from there is zeros, and a number that is asked of it an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.cpu:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        out = func(*args, **(kwargs or {}))
        if func in (Tensor.to, Tensor.copy_, torch.tensor):
            come = isinstance(args[0], Tensor) and args[0].is_meta
            self.count += int(out.is_meta and not come)
        return out


class Plain(nn.Module):
    """Answers with its input, on whatever device it is."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), device="meta"))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x + (t + labels).view(-1, 1, 1, 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_step_of_a_solver_copies_to_the_device_or_waits_for_it(solver):
    def transfers(steps: int) -> int:
        schedule = build_schedule("linear")
        with Transfers() as counted:
            generate(
                Plain(),
                TimestepTable(schedule, schedule.prediction, torch.ones(1000)),
                {"labels": torch.zeros(4, dtype=torch.int64)},
                torch.arange(4),
                GenerationSettings(solver=solver, steps=steps, guidance=2.0, interval=(0.1, 5.0)),
                image_shape=SHAPE,
                null={"labels": torch.tensor(9)},
                seed=5,
            )
        return counted.count

    assert transfers(5) == transfers(11) == 3  # ids, labels and what hides them


def test_guidance_asks_twice_only_inside_its_interval():
    schedule, labels = build_schedule("linear"), torch.zeros(8, dtype=torch.int64)
    times = torch.tensor(schedule.solver_times(10))
    inside = ((schedule.sigma(times) / schedule.alpha(times)) > 0.5).sum()
    _, asked = images_of(labels=labels, guidance=2.0, interval=(0.5, float("inf")))
    assert sum(labels == [9] * 8 for labels in asked) == inside < 10 == len(asked) - inside
    everywhere, asked = images_of(labels=labels, guidance=2.0)
    assert len(asked) == 20
    wide, _ = images_of(labels=labels, guidance=2.0, interval=(0.0, 1e9))
    nowhere, _ = images_of(labels=labels, guidance=2.0, interval=(1e6, 1e9))
    plain, _ = images_of(labels=labels)
    assert torch.equal(wide, everywhere) and torch.equal(nowhere, plain)
    assert not torch.equal(everywhere, plain)


class FourChannels(nn.Module):
    """Answers four channels and a learned variance, larger with a label."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, labels):
        return torch.cat([x, x.sin()], dim=1) + torch.where(labels == 9, 0.0, 0.1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("channels, guided", [(3, 3), (1, 1), (None, 4), (7, 4)])
def test_guidance_may_act_on_the_first_channels_alone_as_dit_s_does(channels, guided):
    def images(**settings):
        return generate(
            FourChannels(),
            TimestepTable(build_schedule("linear"), "epsilon", torch.ones(1000)),
            {"labels": torch.zeros(2, dtype=torch.int64)},
            torch.arange(2),
            GenerationSettings(solver="ddpm", steps=4, **settings),
            image_shape=(4, 2, 2),
            null={"labels": torch.tensor(9)},
            seed=5,
            latents=True,
        )

    drawn = images(guidance=4.0, channels=channels)
    fully, plain = images(guidance=4.0), images()
    assert torch.equal(drawn[:, :guided], fully[:, :guided])
    assert torch.equal(drawn[:, guided:], plain[:, guided:])
    assert not torch.equal(fully, plain)


def test_the_configuration_reaches_the_solver_and_its_guidance():
    options: dict[str, Any] = dict(solver="ddim+eta=1", guidance=2.0, guidance_channels=3)
    settings = generation_settings(EvaluationConfig(**options))
    assert (settings.solver, settings.guidance, settings.channels) == tuple(options.values())
    assert settings.record()["guidance_channels"] == 3
    with pytest.raises(ValueError, match="solver 'plms' is unknown"):
        generation_settings(EvaluationConfig(solver="plms"))
    with pytest.raises(ValueError, match="guidance_channels=0: must be at least 1"):
        EvaluationConfig(guidance_channels=0)


def test_guidance_of_an_unconditional_model_is_refused_before_it_is_asked():
    with pytest.raises(ValueError, match="guidance=2 compares .* conditioned on nothing"):
        images_of(guidance=2.0)


class Rounding(Exact):
    """Answers in bfloat16, or with the same values in float32."""

    answer_dtype = torch.bfloat16

    def forward(self, x, t, labels=None):
        return super().forward(x, t, labels).bfloat16().to(self.answer_dtype)


@pytest.mark.parametrize("latents", [True, False], ids=["latents", "pixels"])
def test_images_that_are_not_finite_are_counted_and_said(latents, caplog):
    class Broken(Exact):
        def forward(self, x, t, labels=None):
            answer = super().forward(x, t)
            return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) < 3, torch.nan, answer)

    images_of(network=Exact, latents=latents)
    assert not caplog.records
    images_of(network=Broken, latents=latents)
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 8 generated images are not finite")


def test_solvers_compute_in_float32_whatever_the_model_answers_in(monkeypatch):
    labels = torch.arange(8)
    in_bfloat16, _ = images_of(labels=labels, guidance=3.0, network=Rounding)
    monkeypatch.setattr(Rounding, "answer_dtype", torch.float32)
    in_float32, _ = images_of(labels=labels, guidance=3.0, network=Rounding)
    assert in_bfloat16.dtype == torch.float32 and torch.equal(in_bfloat16, in_float32)


def test_models_sharded_as_on_gpus_generate_the_images_of_float32(two_processes):
    """Their parameters are bfloat16 while they are used; two processes on a CPU stand for GPUs."""
    distances = json.loads(two_processes(Path(__file__).with_name("sharded_generation.py")))
    assert len(distances) == 7
    # bfloat16 holds 8 bits: 0.4 % of each of some sums. Zero would mean that nothing was cast.
    assert all(0 < distance < 0.02 for distance in distances.values()), distances


def test_an_interval_without_an_upper_end_is_recorded_as_json():
    endless = GenerationSettings(interval=(0.5, math.inf)).record()
    assert json.loads(json.dumps(endless, allow_nan=False))["guidance_interval"] == [0.5, None]
    assert GenerationSettings(interval=(0.0, 2.0)).record()["guidance_interval"] == [0.0, 2.0]
    assert GenerationSettings().record()["guidance_interval"] is None
