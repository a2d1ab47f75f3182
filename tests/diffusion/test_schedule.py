import pytest
import torch

from speed_engine.diffusion.schedule import NoiseSchedule, from_betas, linear


def test_linear_is_ho_et_al():
    schedule = linear()
    abar, product = schedule.alphas_cumprod, 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        assert float(abar[i]) == pytest.approx(product, rel=1e-12)


def test_signal_and_noise_power_add_to_one_and_snr_is_their_ratio():
    schedule = linear(100)
    t = schedule.timesteps
    alpha2, sigma2 = schedule.alpha(t).square(), schedule.sigma(t).square()
    torch.testing.assert_close(alpha2 + sigma2, torch.ones_like(alpha2))
    torch.testing.assert_close(schedule.snr(t), alpha2 / sigma2)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5])
def test_a_beta_outside_0_1_is_named(beta):
    with pytest.raises(ValueError, match=r"betas\[2\] = .* strictly between 0 and 1"):
        from_betas(torch.tensor([0.1, 0.1, beta]))


def test_a_schedule_that_is_not_monotone_is_refused():
    with pytest.raises(ValueError, match="does not fall from timestep 1 to 2"):
        NoiseSchedule("mine", torch.tensor([0.9, 0.5, 0.6]))


def test_signal_power_outside_0_1_is_refused():
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        NoiseSchedule("mine", torch.tensor([1.0, 0.5]))
