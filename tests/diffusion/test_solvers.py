"""Solvers on Gaussian data, whose best prediction and exact solution are known."""

import dataclasses
import math
from typing import get_args

import gaussian
import pytest
import torch

from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.prediction import PREDICTIONS
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.solvers import SOLVERS, solver_named
from speed_engine.evaluation.config import SolverName

STEPS = {"ddim": 250, "heun": 101, "dpmpp_2m": 100, "ddpm": 250, "ddpm_large": 250}
STOCHASTIC = ("ddpm", "ddpm_large")


def covariance_error(process: str, solver: str, steps: int) -> tuple[float, float]:
    """Of the mean, and the largest of the covariance in units of the standard deviations."""
    exact = gaussian.problem(process)

    def solve(noise, x):
        return SOLVERS[solver](dataclasses.replace(exact, noise=noise), x, steps)

    mean, covariance = gaussian.law(solve, steps - 1 if solver in STOCHASTIC else 0)
    scale = gaussian.POWER.sqrt()
    along_axes = gaussian.AXES.T @ covariance @ gaussian.AXES / scale / scale[:, None]
    error = (along_axes - torch.eye(gaussian.D)).abs().max()
    return float((mean - gaussian.MEAN).abs().max()), float(error)


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("solver", STEPS)
def test_every_solver_draws_the_gaussian_on_every_process(solver, process):
    mean, covariance = covariance_error(process, solver, STEPS[solver])
    # The flow starts from pure noise, which forgets the little signal that each process keeps.
    forgotten = gaussian.problem(process).levels(build_schedule(process).solver_times(1)[0])
    assert mean < 0.4 * float(forgotten.alpha / forgotten.sigma) + 2e-4
    assert covariance < (0.09 if solver == "ddpm" else 0.05)


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("solver", STEPS)
def test_what_the_model_predicts_changes_nothing(solver, process):
    noise = gaussian.noises(8, seed=1)
    drawn = [
        SOLVERS[solver](
            gaussian.problem(process, prediction, lambda step: noise.roll(step, 0)),
            gaussian.noises(8),
            7,
        )
        for prediction in PREDICTIONS
    ]
    for images in drawn[1:]:
        torch.testing.assert_close(images, drawn[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("solver, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_to_the_exact_flow_at_their_order(solver, order, process):
    errors = []
    for intervals in (100, 200):
        exact = gaussian.problem(process)
        ends = (900, 100) if exact.table.schedule.discrete else (0.9, 0.1)
        spaced = torch.linspace(*ends, intervals + 1, dtype=torch.float64).tolist()
        times = [int(t) for t in spaced] if exact.table.schedule.discrete else spaced
        exact = gaussian.at_times(exact, times)
        x = gaussian.noises(4)
        drawn = SOLVERS[solver](exact, x, 2 * intervals + 1 if solver == "heun" else intervals + 1)
        errors.append(float((drawn - gaussian.solution(exact, x, times[0], times[-1])).norm()))
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(order, abs=0.12), errors


@pytest.mark.parametrize("process", ["linear", "edm", "flow"])
def test_ancestral_sampling_tends_to_the_data(process):
    coarse, fine = (covariance_error(process, "ddpm", steps)[1] for steps in (100, 200))
    assert coarse / fine == pytest.approx(2, abs=0.35)


@pytest.mark.parametrize("learned, equal", [(1.0, "ddpm_large"), (-1.0, "ddpm")])
def test_a_learned_variance_lies_between_fixed_small_and_fixed_large(learned, equal):
    noise = gaussian.noises(8, seed=1)
    told = gaussian.problem("linear", noise=lambda step: noise, learned=torch.tensor(learned))
    plain = gaussian.problem("linear", noise=lambda step: noise)
    drawn = SOLVERS["ddpm"](told, gaussian.noises(8), 20)
    torch.testing.assert_close(drawn, SOLVERS[equal](plain, gaussian.noises(8), 20))
    for solver in ("ddim", "heun", "dpmpp_2m", "ddpm_large"):  # ignore it
        drawn = (SOLVERS[solver](exact, gaussian.noises(8), 20) for exact in (told, plain))
        assert torch.equal(*drawn)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 24, 25])
def test_steps_are_model_evaluations(solver, steps):
    exact, asked = gaussian.problem("linear", noise=lambda step: gaussian.noises(2)), []

    def counting(x, t):
        asked.append(t)
        return exact.predict(x, t)

    SOLVERS[solver](dataclasses.replace(exact, predict=counting), gaussian.noises(2), steps)
    assert len(asked) == (steps - 1 + steps % 2 if solver == "heun" else steps)


def test_clipping_keeps_every_estimate_in_range():
    exact = gaussian.problem("linear", noise=lambda step: gaussian.noises(64, seed=step))
    clipping = dataclasses.replace(exact, clip=True)
    for solver in SOLVERS.values():
        assert solver(exact, gaussian.noises(64), 9).abs().max() > 1
        assert solver(clipping, gaussian.noises(64), 9).abs().max() <= 1


def test_the_configuration_knows_every_solver():
    assert get_args(SolverName) == tuple(SOLVERS)
    with pytest.raises(ValueError, match="'plms' is unknown; choose from ddim, euler, heun"):
        solver_named("plms")


@pytest.mark.parametrize("steps", [1, 2, 25, 999, 1000])
def test_timesteps_fall_from_the_noisiest_to_the_cleanest(steps):
    timesteps = linear().solver_times(steps)
    assert len(set(timesteps)) == steps and timesteps[0] == 999
    assert timesteps == sorted(timesteps, reverse=True)
    assert steps == 1 or timesteps[-1] == 0


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"41 solver steps: must lie in \[1, 40\]"):
        linear(40).solver_times(41)
