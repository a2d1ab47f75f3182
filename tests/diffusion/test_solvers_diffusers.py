"""Solvers against diffusers' schedulers, at the same times and with the same exact denoiser."""

import importlib

import gaussian
import pytest
import torch

from speed_engine.diffusion.discrete import from_diffusers, from_sigmas
from speed_engine.diffusion.processes import build_schedule
from speed_engine.diffusion.solvers import SOLVERS, Denoising, solver_named
from speed_engine.diffusion.table import TimestepTable

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NOISES = [gaussian.noises(6, seed=10 + step) for step in range(40)]


def loop(scheduler, exact: Denoising, x: torch.Tensor, times=None) -> torch.Tensor:
    """diffusers' own loop; ``times`` are ours where the two count otherwise."""
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        answer = exact.predict(seen, int(t) if times is None else times[i])
        x = scheduler.step(answer, t, x).prev_sample
    return x


def discrete(scheduler, learned: float | None = None, more: tuple[int, ...] = ()) -> Denoising:
    """Our process of an untouched scheduler, then at the times of 20 of its steps."""
    schedule = from_diffusers(scheduler)
    table = TimestepTable(schedule, "epsilon", torch.ones(schedule.num_timesteps))
    v = None if learned is None else torch.tensor(learned)
    exact = Denoising(gaussian.exact(table, v), table, lambda step: NOISES[step], clip=False)
    scheduler.set_timesteps(20)
    return gaussian.at_times(exact, [*(int(t) for t in scheduler.timesteps), *more])


def start(exact: Denoising) -> torch.Tensor:
    return exact.levels(exact.times(20)[0]).sigma * gaussian.noises(6)


def assert_equal(solver: str, exact: Denoising, theirs: torch.Tensor) -> None:
    ours = SOLVERS[solver](exact, gaussian.noises(6), len(exact.times(20)))
    torch.testing.assert_close(ours, theirs.double(), rtol=2e-4, atol=2e-4)  # float32 tables there


def test_ddim_is_that_of_diffusers():
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    exact = discrete(scheduler)
    assert_equal("ddim", exact, loop(scheduler, exact, start(exact)))


def test_euler_in_sigma_space_is_that_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing"
    )
    exact = discrete(scheduler)
    theirs = loop(scheduler, exact, start(exact) / exact.levels(exact.times(20)[0]).alpha)
    assert_equal("euler", exact, theirs)


def test_heun_in_sigma_space_is_that_of_diffusers():
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing"
    )
    abar = scheduler.alphas_cumprod.double()
    schedule = from_sigmas(((1 - abar) / abar).sqrt())
    table = TimestepTable(schedule, "epsilon", torch.ones(1000))
    scheduler.set_timesteps(20)
    times = [int(t) for t in scheduler.timesteps]
    x = schedule.sigma(torch.tensor(times[0])) * gaussian.noises(6)

    def predict(state, t):  # their model sees a variance-preserving state, ours unit variance
        alpha = abar[t].sqrt()
        clean = gaussian.denoised(state.flatten(1), alpha, (1 - abar[t]).sqrt()).view_as(state)
        return (state - alpha * clean) / (1 - abar[t]).sqrt()

    theirs = loop(scheduler, Denoising(predict, table, gaussian.silent, clip=False), x)
    ours = gaussian.at_times(
        Denoising(gaussian.exact(table), table, gaussian.silent, clip=False),
        sorted(set(times), reverse=True),
    )
    drawn = SOLVERS["heun"](ours, gaussian.noises(6), 39)
    torch.testing.assert_close(drawn, theirs.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_dpm_solver_is_diffusers_default(steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, solver_order=2, lower_order_final=steps >= 15
    )
    schedule = from_diffusers(scheduler)
    table = TimestepTable(schedule, "epsilon", torch.ones(1000))
    exact = Denoising(gaussian.exact(table), table, gaussian.silent, clip=False)
    scheduler.set_timesteps(steps)
    exact = gaussian.at_times(exact, [int(t) for t in scheduler.timesteps])
    theirs = loop(scheduler, exact, gaussian.noises(6)).double()
    ours = solver_named("dpmpp_2m")(exact, gaussian.noises(6), steps)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_flow_euler_is_that_of_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    exact = gaussian.problem("flow")
    times = exact.times(20)
    scheduler.set_timesteps(sigmas=times)
    assert_equal(
        "euler",
        gaussian.at_times(exact, times),
        loop(scheduler, exact, build_schedule("flow").sigma(torch.tensor(times[0])) *
             gaussian.noises(6), times),
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind, solver, learned",
    [("fixed_small", "ddpm", None), ("fixed_large", "ddpm_large", None),
     ("learned_range", "ddpm", 0.3)],
)  # fmt: skip
def test_respaced_ancestral_sampling_is_that_of_diffusers(monkeypatch, kind, solver, learned):
    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    noises = iter(NOISES)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises))
    scheduler = diffusers.DDPMScheduler(variance_type=kind, clip_sample=False)
    exact = discrete(scheduler, learned)
    times = build_schedule("linear").solver_times(20)  # DiT's and IDDPM's own spacing
    exact = gaussian.at_times(exact, times)
    scheduler.set_timesteps(timesteps=times)
    assert_equal(solver, exact, loop(scheduler, exact, start(exact)))
