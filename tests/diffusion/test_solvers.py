"""Solvers on Gaussian data, whose best prediction and exact solution are known."""

import dataclasses
import math

import gaussian
import pytest
import torch

from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.prediction import PREDICTIONS
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.solvers import SOLVERS, Denoising, solver_named
from speed_engine.diffusion.table import TimestepTable
from speed_engine.evaluation.config import EvaluationConfig

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
    forgotten = gaussian.problem(process).levels(build_schedule(process).solver_times(2)[0])
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


@pytest.mark.parametrize(
    "text, message",
    [
        ("plms", "'plms' is unknown; choose from ddim, euler, heun"),
        ("ddim+eta", r"solver 'ddim\+eta': write SOLVER\[\+OPTION=VALUE ...\], .* heun\+churn=40"),
        ("ddim@linear", "write SOLVER"),
        ("ddim+eta=1+eta=0", "each option once"),
        ("ddim+churn=1", "'ddim' has no option churn, the nearest is .* it has eta, start"),
        ("ddim+eta=1.5", r"'ddim': eta=1.5 must lie in \[0, 1\]"),
        ("heun+churn=-1", r"churn=-1.0 must lie in \[0, inf\]"),
        ("heun+start=zero", "should be 'unit' or 'process'"),
    ],
)
def test_a_solver_or_an_option_that_there_is_not_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        solver_named(text)
    config = TrainConfig(evaluation=EvaluationConfig(solver=text))
    with pytest.raises(ValueError, match=message):
        from_json(to_json(config))


def space_timesteps(num_timesteps: int, count: int) -> list[int]:
    """improved-diffusion's (respace.py) for one section."""
    start, all_steps = 0, []
    frac_stride = 1 if count <= 1 else (num_timesteps - 1) / (count - 1)
    cur_idx, taken_steps = 0.0, []
    for _ in range(count):
        taken_steps.append(start + round(cur_idx))
        cur_idx += frac_stride
    all_steps += taken_steps
    return sorted(set(all_steps), reverse=True)


def test_respacing_is_that_of_iddpm_for_every_count():
    schedule = linear()
    assert all(schedule.solver_times(n) == space_timesteps(1000, n) for n in range(1, 1001))
    assert schedule.solver_times(1) == [0]
    assert schedule.solver_times(3) == [999, 500, 0] and schedule.solver_times(9)[4] == 500


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process", ["linear", "cosine", "flow", "edm"])
def test_solvers_start_from_unit_noise_unless_they_are_told_otherwise(solver, process):
    exact, x = gaussian.problem(process, noise=lambda step: gaussian.noises(2)), gaussian.noises(2)
    first = []

    def noting(seen, t):
        first.append(seen)
        return exact.predict(seen, t)

    asking = dataclasses.replace(exact, predict=noting)
    rows = exact.table.rows_at(exact.times(10)[0])
    for spelled, factor in (("", 1.0), ("+start=process", float(rows.a_e))):
        first.clear()
        solver_named(solver + spelled)(asking, x, 10)
        in_sigma_space = process == "edm"
        expected = x * (float(rows.a_e) if in_sigma_space else factor)
        torch.testing.assert_close(first[0], expected, rtol=1e-12, atol=0)


def iddpm_ddim_sample(exact, x, times, eta, noises):
    """improved-diffusion's ddim_sample, over its respaced steps."""
    abar = linear().alphas_cumprod
    for i, t in enumerate(times):
        alpha_bar = abar[t]
        alpha_bar_prev = abar[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0).double()
        eps = exact.predict(x, t)
        xstart = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        sigma = (
            eta
            * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
            * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        )
        mean = xstart * torch.sqrt(alpha_bar_prev) + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        x = mean + (sigma * noises(i) if i + 1 < len(times) else 0)
    return x


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_with_eta_is_iddpm_s(eta):
    noises = lambda step: gaussian.noises(4, seed=100 + step)
    exact, x = gaussian.problem("linear", noise=noises), gaussian.noises(4)
    drawn = solver_named(f"ddim+eta={eta}")(exact, x, 25)
    theirs = iddpm_ddim_sample(exact, x, exact.times(25), eta, noises)
    torch.testing.assert_close(drawn, theirs, rtol=1e-9, atol=1e-9)


def test_ddim_with_eta_one_is_ancestral_sampling():
    exact = gaussian.problem("linear", noise=lambda step: gaussian.noises(4, seed=100 + step))
    drawn = (solver_named(name)(exact, gaussian.noises(4), 25) for name in ("ddim+eta=1", "ddpm"))
    torch.testing.assert_close(*drawn, rtol=1e-9, atol=1e-9)


def edm_sampler(denoise, latents, t_steps, noises, churn, least, most, s_noise):
    """NVlabs/edm generate.py, with sigma_hat as it comes: net.round_sigma is the identity."""
    num_steps = len(t_steps)
    t_steps = torch.cat([t_steps, torch.zeros_like(t_steps[:1])])
    x_next = latents * t_steps[0]
    for i, (t_cur, t_next) in enumerate(zip(t_steps[:-1], t_steps[1:], strict=True)):
        x_cur = x_next
        gamma = min(churn / num_steps, math.sqrt(2) - 1) if least <= t_cur <= most else 0
        t_hat = t_cur + gamma * t_cur
        x_hat = x_cur + (t_hat**2 - t_cur**2).sqrt() * s_noise * noises(i)
        d_cur = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x_next = x_hat + (t_next - t_hat) * d_cur
        if i < num_steps - 1:
            d_prime = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x_hat + (t_next - t_hat) * (0.5 * d_cur + 0.5 * d_prime)
    return x_next


@pytest.mark.parametrize("least, most, s_noise", [(0.0, math.inf, 1.0), (0.05, 50.0, 1.003)])
@pytest.mark.parametrize("churn", [0, 4, 40])
def test_heun_with_churn_is_edm_s(churn, least, most, s_noise):
    noises = lambda step: gaussian.noises(4, seed=100 + step)
    exact, x = gaussian.problem("edm", noise=noises), gaussian.noises(4)
    text = f"heun+churn={churn}+churn_min={least}+churn_max={most}+churn_noise={s_noise}"
    drawn = solver_named(text)(exact, x, 35)
    sigmas = torch.stack([exact.levels(t).sigma for t in exact.times(18)])
    denoise = lambda x, sigma: gaussian.denoised(
        x.flatten(1), torch.tensor(1.0).double(), sigma
    ).view_as(x)
    theirs = edm_sampler(denoise, x, sigmas, noises, churn, least, most, s_noise)
    torch.testing.assert_close(drawn, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", SCHEDULES)
def test_a_noise_level_is_found_again_on_every_process(process):
    schedule = build_schedule(process)
    for cell in (0, 300, 990):
        t = schedule.timesteps[cell]
        level = float(schedule.sigma(t) / schedule.alpha(t))
        assert schedule.time_at(level) == pytest.approx(float(t), abs=1e-9)


@pytest.mark.parametrize("solver, steps", [("ddim+eta=0.7", 250), ("heun+churn=40", 101)])
@pytest.mark.parametrize("process", ["linear", "edm", "vp"])
def test_solvers_with_fresh_noise_draw_the_gaussian(solver, steps, process):
    exact = gaussian.problem(process)

    def solve(noise, x):
        return solver_named(solver)(dataclasses.replace(exact, noise=noise), x, steps)

    mean, covariance = gaussian.law(solve, steps)
    scale = gaussian.POWER.sqrt()
    along_axes = gaussian.AXES.T @ covariance @ gaussian.AXES / scale / scale[:, None]
    assert float((along_axes - torch.eye(gaussian.D)).abs().max()) < 0.09


@pytest.mark.parametrize("deviation", [0.2, 0.5])
@pytest.mark.parametrize("steps", [20, 50])
def test_dpm_solver_is_no_worse_where_data_are_narrow(deviation, steps):
    """Its error of the deviation stays below the first-order step's by as much as it carries on."""
    table = TimestepTable(linear(), "epsilon", torch.ones(1000))

    def predict(x, t):
        rows = table.rows_at(t)
        power = (rows.a_x * deviation).square()
        return (x - power / (power + rows.a_e.square()) * x) / rows.a_e

    exact = Denoising(predict, table, gaussian.silent, clip=False)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    drawn = float(solver_named("dpmpp_2m")(exact, one, steps)) / deviation
    assert abs(drawn - 1) < {(0.2, 20): 0.15, (0.2, 50): 0.02}.get((deviation, steps), 0.02)


@pytest.mark.parametrize("steps", [1, 2, 25, 999, 1000])
def test_timesteps_fall_from_the_noisiest_to_the_cleanest(steps):
    timesteps = linear().solver_times(steps)
    assert len(set(timesteps)) == steps and timesteps[-1] == 0
    assert timesteps == sorted(timesteps, reverse=True)
    assert steps == 1 or timesteps[0] == 999


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"41 solver steps: must lie in \[1, 40\]"):
        linear(40).solver_times(41)
