"""Schedulers of Hugging Face diffusers are noise processes here."""

# pyright: reportPrivateImportUsage=false

import copy
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from speed_engine.diffusion.discrete import from_diffusers
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.prediction import linear_form
from speed_engine.diffusion.processes import build_schedule


def images_and_noise(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, count, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(),
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.EDMEulerScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_process_makes_the_noisy_images_of_its_scheduler(scheduler):
    schedule = from_diffusers(scheduler)
    t = torch.arange(0, schedule.num_timesteps, 37)
    images, noise = images_and_noise(len(t))
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    times = schedule.model_time(t)
    if hasattr(scheduler, "scale_noise"):
        noisy = scheduler.scale_noise(images, times, noise)
    else:
        noisy = scheduler.add_noise(images, noise, times)
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler):
        noisy = noisy * alpha  # its images keep unit signal; scale_model_input brings them here
    torch.testing.assert_close(noisy, alpha * images + sigma * noise, rtol=0, atol=1e-6)


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTED = FLOW_SIGMAS | {"flow_shift": 3.0}


@pytest.mark.parametrize(
    "name, options",
    [
        *(
            (name, {"prediction_type": kind})
            for name in ("DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "Heun")
            for kind in ("epsilon", "sample", "v_prediction")
            if (name, kind) != ("Heun", "sample")
        ),
        *(("EulerDiscrete", {"prediction_type": of}) for of in ("epsilon", "v_prediction")),
        ("EulerDiscrete", {"prediction_type": "sample"}),
        ("DDPM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        *(
            (name, {"prediction_type": kind, **others})
            for name in ("EDMEuler", "EDMDPMSolverMultistep")
            for kind in ("epsilon", "v_prediction")
            for others in (
                {}, {"sigma_data": 1.0, "sigma_min": 0.3}, {"final_sigmas_type": "sigma_min"},
                {"sigma_max": 0.9},
            )
        ),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}),
        *(
            (name, options)
            for name in ("DPMSolverMultistep", "UniPCMultistep", "DPMSolverSinglestep")
            for options in (FLOW_SIGMAS, SHIFTED)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)  # fmt: skip
def test_a_perfect_prediction_is_the_clean_image_by_the_scheduler_s_own_account(name, options):
    kinds = [f"{name}Scheduler", f"{name}DiscreteScheduler"]
    kind = next(getattr(diffusers, of) for of in kinds if hasattr(diffusers, of))
    schedule = from_diffusers(kind(**options))
    scheduler = kind(**options)
    if hasattr(scheduler, "convert_model_output") and not name.startswith("EDM"):
        # Until then, diffusers holds timesteps and sigmas of these in opposite orders.
        flow = options.get("use_flow_sigmas", False)
        scheduler = kind(**options, **({} if flow else {"timestep_spacing": "trailing"}))
        scheduler.set_timesteps(1000)
    images, noise = images_and_noise(1)
    images = images.tanh()  # some schedulers clip
    for index in (3, 400, 990):
        t = torch.tensor([index])
        rows = linear_form(schedule, schedule.prediction, t)
        time = schedule.model_time(t)
        noisy = added(scheduler, images, noise, time)
        answer = rows.b_x * images + rows.b_e * noise
        clean = denoised(copy.deepcopy(scheduler), answer, time[0], noisy)
        torch.testing.assert_close(clean, images, rtol=0, atol=5e-4)
        if hasattr(scheduler, "scale_model_input"):
            shown = copy.deepcopy(scheduler).scale_model_input(noisy, time[0])
            torch.testing.assert_close(
                shown, rows.a_x * images + rows.a_e * noise, rtol=0, atol=5e-4
            )
        if options.get("prediction_type") == "v_prediction" and name in ("DDPM", "DDIM"):
            velocity = scheduler.get_velocity(images, noise, time)
            torch.testing.assert_close(answer, velocity, rtol=0, atol=1e-5)


def added(scheduler, images, noise, time):
    """The noisy images of a scheduler, by whichever of two names it has for that."""
    add = getattr(scheduler, "scale_noise", None)
    return add(images, time, noise) if add else scheduler.add_noise(images, noise, time)


def denoised(scheduler, answer, time, noisy):
    """What a scheduler takes for the clean image."""
    if hasattr(scheduler, "convert_model_output"):  # its steps do not return it
        scheduler._init_step_index(time)
        return scheduler.convert_model_output(answer, sample=noisy)
    if not hasattr(scheduler, "scale_noise"):
        if scheduler.num_inference_steps is None:
            scheduler.num_inference_steps = 1000
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.scale_model_input(noisy, time)
        time = time.float() if isinstance(scheduler, diffusers.EulerDiscreteScheduler) else time
        return scheduler.step(answer, time, noisy).pred_original_sample  # pyright: ignore
    scheduler._init_step_index(time)
    scheduler.sigmas[scheduler.step_index + 1 :] = 0  # the step ends at the clean image
    return scheduler.step(answer, time, noisy).prev_sample


@pytest.mark.parametrize("t", [0, 300, 999])
def test_euler_shows_the_model_what_ddpm_does(t):
    scheduler = diffusers.EulerDiscreteScheduler()
    images, noise = images_and_noise(1)
    schedule, index = from_diffusers(scheduler), torch.tensor([t])
    noisy = scheduler.add_noise(images, noise, index)
    shown = schedule.alpha(index) * images + schedule.sigma(index) * noise
    torch.testing.assert_close(scheduler.scale_model_input(noisy, t), shown, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, options, frequent",
    [
        ("linear", {}, 700),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}, 946),
        (
            "scaled_linear",
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            963,
        ),
    ],
)
def test_methods_are_the_same_on_both_libraries_schedules(name, options, frequent):
    schedules = build_schedule(name), from_diffusers(diffusers.DDPMScheduler(**options))
    own, other = (build_method("speed_paper", schedule) for schedule in schedules)
    t = torch.arange(1000)
    torch.testing.assert_close(schedules[1].sigma(t), schedules[0].sigma(t), rtol=0, atol=1e-5)
    torch.testing.assert_close(other.weight, own.weight, rtol=0, atol=2e-3)
    for method in (own, other):
        assert int((method.probabilities > 0.5e-3).sum()) == frequent


def test_a_linear_schedule_rescaled_to_zero_snr_is_not_taken_for_linear():
    schedule = from_diffusers(diffusers.DDPMScheduler(rescale_betas_zero_snr=True))
    assert schedule.linear_betas is None


@pytest.mark.parametrize(
    "betas", [np.linspace(1e-4, 0.02, 500), torch.linspace(1e-4, 0.02, 500)], ids=["numpy", "torch"]
)
def test_trained_betas_are_arrays_too(betas):
    scheduler = diffusers.DDPMScheduler(500, trained_betas=betas)
    schedule = from_diffusers(scheduler)
    torch.testing.assert_close(
        schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-6, atol=0
    )


def test_a_shifted_schedule_with_linear_betas_has_no_closed_form():
    """CogVideoX divides the signal-to-noise ratio by 3 after that."""
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02
    )
    schedule = from_diffusers(scheduler)
    assert schedule.linear_betas is None
    # The signal has fallen 138.6-fold earlier than at 700.
    suppressed = int((scheduler.alphas_cumprod <= 1 / 138.6).int().argmax()) + 1
    frequent = build_method("speed_paper", schedule).probabilities > 0.5e-3
    assert suppressed < 650 and int(frequent.sum()) == suppressed


@pytest.mark.parametrize(
    "name", ["DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "LCM"]
)
def test_a_zero_snr_schedule_falls_to_its_end(name):
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = from_diffusers(scheduler)
    torch.testing.assert_close(
        schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-6, atol=1e-7
    )


def test_draws_are_timesteps_that_the_scheduler_knows():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (diffusers.DDPMScheduler(), flow):
        timesteps, _ = build_method("speed_paper", from_diffusers(scheduler)).draw(64, 0)
        assert set(timesteps.tolist()) <= set(torch.as_tensor(scheduler.timesteps).tolist())


def test_a_method_takes_a_scheduler_for_its_process():
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    ours, theirs = (
        build_method("speed_paper", of) for of in (scheduler, from_diffusers(scheduler))
    )
    for one, other in zip(ours.draw(16, 0), theirs.draw(16, 0), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(
        ValueError,
        match="'linear' is no scheduler; needed .* build_schedule of speed_engine",
    ):
        build_method("speed_paper", "linear")


def used_already():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    return scheduler


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (diffusers.IPNDMScheduler(), "IPNDMScheduler has neither alphas_cumprod nor sigmas"),
        (diffusers.SCMScheduler(), "SCMScheduler has neither alphas_cumprod nor sigmas"),
        (SimpleNamespace(), "SimpleNamespace has neither alphas_cumprod nor sigmas"),
        (SimpleNamespace(sigmas=torch.empty(0), config={}), "neither alphas_cumprod nor sigmas"),
        (used_already(), "20 sigmas for 1000 timesteps; pass a scheduler on which set_timesteps"),
        (diffusers.HeliosScheduler(), "set_timesteps.1000. failed, .* use from_sigmas"),
        (
            diffusers.CMStochasticIterativeScheduler(),
            "does not say what its model predicts; use from_sigmas",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "prediction_type 'flow_prediction'; known are epsilon, sample, v_prediction",
        ),
    ],
)  # fmt: skip
def test_a_scheduler_that_does_not_fit_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(scheduler)
