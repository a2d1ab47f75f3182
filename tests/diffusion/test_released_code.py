"""What SpeeD's released code does, transcribed, where it departs from the paper and its sources.

NUS-HPC-AI-Lab/SpeeD at f5650f9; docs/methods.md cites these tests. Formulas are those of
speed/diffusion/speed/__init__.py, class Speed_IDDPM, unless said otherwise. The library itself has
the released distribution and weights (``speed_official``) and none of the slips.
"""

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.processes import build_schedule

T, TAU = 1000, 700
LINEAR = build_schedule("linear")
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
SNR = ABAR / (1 - ABAR)
INDEX = np.arange(T)


def distribution(k: float, mirrored: bool = True) -> np.ndarray:
    """``sampling="ours"`` in a large batch; ``no_dual`` without the mirror."""
    p = np.array([k] * TAU + [1] * (T - TAU)) / (k * TAU + T - TAU)
    pivot = np.argmax(np.gradient(np.sqrt(1 - ABAR)) < 1e-4) + 1
    dual = np.bincount(np.where(INDEX < pivot, pivot - INDEX, INDEX - pivot), p, T)
    return (p + dual) / 2 if mirrored else p


def weights(lam: float) -> np.ndarray:
    """``weighting="ours"``."""
    rate, k = np.gradient(1 - ABAR), 1 - lam
    w = k + (1 - 2 * k) * (rate - rate.min()) / (rate.max() - rate.min())
    return np.append(w[:TAU], np.ones(T - TAU))


def clts(step: int) -> np.ndarray:
    """``sampling="clts"``."""
    normal = 1 / (T * np.sqrt(2 * np.pi)) * np.exp(-((INDEX - 300) ** 2) / 2 * T**2)
    p = step / 50_000 * normal + (1 - step / 50_000) / T
    return p / np.abs(p).sum()


def log_normal() -> np.ndarray:
    """``sampling="lognorm"``."""
    u = np.sqrt(1 - ABAR)
    density = 1 / np.sqrt(2 * np.pi) / (u * (1 - u)) * np.exp(-(np.log(u / (1 - u)) ** 2 / 2))
    p = u / (1 - u) * density
    return p / p.sum()


@pytest.mark.parametrize("k, below_tau, mean", [(5, 0.9605, 339.6), (2, 0.9118, 359.6)])
def test_mirroring_draws_fewer_late_timesteps_than_the_paper(k, below_tau, mean):
    p = distribution(k)
    assert p[:TAU].sum() == pytest.approx(below_tau, abs=5e-5)
    assert (p * INDEX).sum() == pytest.approx(mean, abs=0.05)
    ratios = p[[1, 357, 642, 643, 699]] / p[999]
    assert ratios == pytest.approx({5: [15, 11, 10, 5, 5], 2: [6, 5, 4, 2, 2]}[k])
    released = build_method("speed_official", LINEAR, k=k).probabilities
    np.testing.assert_allclose(released, p, rtol=1e-12)
    paper = build_method("speed_paper", LINEAR, tau=TAU).probabilities
    assert float(paper[:TAU].sum()) == pytest.approx(0.9211, abs=5e-5)
    assert float(paper[0] / paper[999]) == pytest.approx(5)


def test_beyond_tau_the_weight_is_the_largest_not_the_smallest():
    w = weights(0.6)
    assert w[TAU] / w[TAU - 1] == pytest.approx(2.456, abs=5e-4) and w[TAU:].min() == w.max() == 1
    paper = build_method("speed_paper", LINEAR).weight
    assert float(paper[TAU:].max()) == pytest.approx(0.407, abs=5e-4)
    np.testing.assert_allclose(build_method("speed_official", LINEAR).weight, w, rtol=1e-9)
    step = distribution(5, mirrored=False) * w
    assert step[TAU - 1] / step[TAU] == pytest.approx(2.04, abs=5e-3)  # the paper's is 5
    methods = [build_method(name, LINEAR) for name in ("speed_paper", "speed_official")]
    measures = [m.probabilities * m.weight for m in methods]
    shares = [float(measure[TAU:].sum() / measure.sum()) for measure in measures]
    assert shares == pytest.approx([0.064, 0.075], abs=5e-4)
    means = [float(measure.sum()) for measure in measures]
    assert means == pytest.approx([0.497, 0.528], abs=5e-4)
    k2, k1 = distribution(2) * w, distribution(1) * w
    assert k2[TAU:].sum() / k2.sum() == pytest.approx(0.159, abs=5e-4)
    assert k1[TAU:].sum() / k1.sum() == pytest.approx(0.254, abs=5e-4)


def test_the_constructor_s_defaults_ascend_on_a_third_of_the_timesteps():
    w = weights(5)
    negative = np.flatnonzero(w < 0)
    assert len(negative) == 315 and w.min() == pytest.approx(-3.676, abs=5e-4) and w.max() == 5
    assert set(negative) == {*range(58), *range(443, TAU)}
    with pytest.raises(ValueError, match=r"lambda=5.0 is outside \[0.5, 1\]"):
        build_method("speed_official", LINEAR, k=1, lam=5)


def test_the_released_min_snr_is_five_times_p2():
    released = np.stack([SNR, 5 * np.ones(T)], axis=1).min(axis=1)[0] / (SNR + 1)
    p2 = build_method("p2", LINEAR).weight.numpy()
    np.testing.assert_allclose(released, 5 * p2, rtol=1e-9)
    correct = build_method("min_snr", LINEAR).weight.numpy()
    assert released[150] / released.mean() == pytest.approx(0.296, abs=5e-4)
    assert correct[150] / correct.mean() == pytest.approx(1.095, abs=5e-4)


def test_the_released_clts_is_uniform_and_then_one_timestep():
    peaks = {0: 0.001, 25_000: 0.0014, 45_000: 0.0046, 49_000: 0.020, 49_900: 0.167, 50_000: 1.0}
    for step, peak in peaks.items():
        p = clts(step)
        assert p[300] == pytest.approx(peak, abs=5e-4)
        assert np.ptp(np.delete(p, 300)) < 1e-12  # all others alike
    with pytest.raises(RuntimeError, match="< 0"):
        torch.multinomial(torch.from_numpy(clts(50_001)), 4, replacement=True)


def test_the_released_log_normal_never_trains_high_noise():
    p = log_normal()
    assert p[TAU:].sum() == pytest.approx(5.4e-5, abs=1e-6)
    assert (p * INDEX).sum() == pytest.approx(332.2, abs=0.1)
    correct = build_method("logit_normal", LINEAR).probabilities
    assert float(correct[TAU:].sum()) == pytest.approx(0.198, abs=5e-4)


@pytest.mark.parametrize("seed_of_rank, images", [(lambda rank: 0, 1336), (lambda rank: rank, 888)])
def test_a_seed_for_every_rank_loses_a_third_of_an_epoch(seed_of_rank, images):
    """runner/base.py: DistributedSampler(seed=config.seed * world_size + rank)."""
    seen: set[int] = set()
    for rank in range(8):
        seen |= set(
            DistributedSampler(range(1336), num_replicas=8, rank=rank, seed=seed_of_rank(rank))  # type: ignore
        )
    assert len(seen) == images
