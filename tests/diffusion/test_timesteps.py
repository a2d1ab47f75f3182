"""Distributions against independent transcriptions, and draws against distributions.

Each statistical test fails by chance with probability 1e-4 or less; seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from speed_engine.diffusion.discrete import from_alphas_cumprod, linear
from speed_engine.diffusion.distributions import (
    AdaptiveDistribution,
    ClimbingDistribution,
    Distribution,
    TaskCurriculum,
    thresholds,
)
from speed_engine.diffusion.probabilities import (
    asymmetric,
    log_normal,
    logit_normal,
    mode,
    shifted,
    uniform,
)
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.timesteps import (
    MirroredSampler,
    TimestepSampler,
    by_interval,
    independent,
    stratified,
)

DRAWS = 200_000
SEED = torch.tensor(11)


def draw(sampler: TimestepSampler, batch_size: int = 500, draws: int = DRAWS) -> torch.Tensor:
    """(steps, batch_size) timesteps."""
    ids = torch.arange(draws // batch_size * batch_size).split(batch_size)
    return torch.stack([sampler.sample(SEED, batch, step) for step, batch in enumerate(ids)])


def pvalue(cells: torch.Tensor, p: torch.Tensor) -> float:
    observed = torch.bincount(cells.flatten(), minlength=len(p))
    assert bool((observed[p == 0] == 0).all())
    kept = p > 0
    return stats.chisquare(observed[kept], p[kept] * cells.numel()).pvalue


# Distributions.


@given(T=st.integers(2, 2000), k=st.floats(1, 100), share=st.floats(0, 1))
def test_asymmetric_sampling_is_a_distribution_with_ratio_k(T, k, share):
    tau = 1 + share * (T - 1)
    p = asymmetric(T, tau, k)
    assert float(p.sum()) == pytest.approx(1)
    assert bool((p > 0).all())
    frequent = int(tau)
    if frequent < T:
        assert float(p[frequent - 1] / p[frequent]) == pytest.approx(k)


@given(
    T=st.integers(21, 500),
    mean=st.floats(-3, 3),
    std=st.floats(0.1, 3),
    scale=st.floats(-1, 1.75),
    shift=st.floats(0.05, 20),
)
def test_every_density_is_a_distribution(T, mean, std, scale, shift):
    distributions = (
        logit_normal(T, mean, std),
        log_normal(linear(T), mean, std + 1),
        mode(T, scale),
        shifted(T, shift),
    )
    for p in distributions:
        assert p.shape == (T,) and float(p.min()) >= 0
        assert float(p.sum()) == pytest.approx(1)


def test_logit_normal_is_a_sigmoid_of_a_normal():
    u = 1 / (1 + np.exp(-(0.3 + 0.8 * np.random.default_rng(0).standard_normal(100_000))))
    cdf = np.concatenate([[0], logit_normal(1000, 0.3, 0.8).cumsum(0)])
    assert stats.kstest(u, lambda x: np.interp(x, np.arange(1001) / 1000, cdf)).pvalue > 1e-4


def test_mode_is_its_published_map_of_a_uniform():
    """diffusers' compute_density_for_timestep_sampling, weighting_scheme "mode"."""
    u = np.random.default_rng(1).random(100_000)
    u = 1 - u - 1.29 * (np.cos(math.pi * u / 2) ** 2 - 1 + u)
    cdf = np.concatenate([[0], mode(1000, 1.29).cumsum(0)])
    assert stats.kstest(u, lambda x: np.interp(x, np.arange(1001) / 1000, cdf)).pvalue > 1e-4


def test_shifted_is_its_published_map_of_a_uniform():
    x = np.random.default_rng(2).random(100_000)
    cdf = np.concatenate([[0], shifted(1000, 3.0).cumsum(0)])
    moved = 3 * x / (1 + 2 * x)
    assert stats.kstest(moved, lambda t: np.interp(t, np.arange(1001) / 1000, cdf)).pvalue > 1e-4


@pytest.mark.parametrize("sigma_data, quantiles", [(0.5, (9, 88, 412)), (1.0, (21, 171, 541))])
def test_edm_s_distribution_on_ddpm_timesteps(sigma_data, quantiles):
    """P(t) ~ N(log(sigma_t / c); -1.2, 1.2**2) dlog(sigma_t)/dt, c = sigma_data / 0.5."""
    abar = linear().alphas_cumprod
    p = log_normal(from_alphas_cumprod(abar, sigma_data=sigma_data))
    log_sigma = ((1 - abar) / abar).sqrt().log().numpy()
    density = stats.norm.pdf(log_sigma - np.log(2 * sigma_data), -1.2, 1.2)
    transcribed = density * np.gradient(log_sigma)
    transcribed /= transcribed.sum()
    np.testing.assert_allclose(p[2:], transcribed[2:], rtol=0.03, atol=1e-6)
    found = tuple(int((p.cumsum(0) >= q).int().argmax()) for q in (0.05, 0.5, 0.95))
    assert found == pytest.approx(quantiles, abs=1)


def test_edm_s_distribution_is_uniform_on_edm():
    p = log_normal(build_schedule("edm"))
    torch.testing.assert_close(p, uniform(1000), rtol=1e-9, atol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=300).filter(lambda p: sum(p) > 1e-3))
def test_thresholds_hold_every_probability_to_a_word(values):
    p = torch.tensor(values, dtype=torch.float64)
    p = p / p.sum()
    table = thresholds(p)
    assert table[-1] == 2**32 and bool((table.diff() >= 0).all())
    masses = torch.cat([table[:1], table.diff()]).double() / 2**32
    torch.testing.assert_close(masses, p, rtol=0, atol=3e-10)


# Draws.


SAMPLERS = {
    "independent": independent,
    "by_interval": by_interval(5),
    "stratified": stratified,
}


@pytest.mark.parametrize("name", ["linear", "edm", "flow"])
def test_draws_follow_p(name):
    schedule = build_schedule(name)
    distribution = Distribution(asymmetric(1000, 700.0, 5.0))
    sampler = TimestepSampler(schedule, distribution)
    assert pvalue(schedule.cell(draw(sampler)), sampler.probabilities()) > 1e-4


@pytest.mark.parametrize("words", SAMPLERS)
def test_the_draw_of_one_place_in_the_batch_follows_p(words):
    """Over steps, one place is an independent draw whatever holds a batch together."""
    sampler = TimestepSampler(linear(40), Distribution(logit_normal(40)), SAMPLERS[words])
    steps = [sampler.sample(SEED, torch.tensor([64 * i + 3]), i) for i in range(8000)]
    assert pvalue(torch.cat(steps), sampler.probabilities()) > 1e-4


@pytest.mark.parametrize("name", ["edm", "vp", "flow"])
def test_inside_a_cell_time_is_uniform(name):
    t = draw(TimestepSampler(build_schedule(name, 8), Distribution(uniform(8)))).flatten()
    assert t.dtype == torch.float64
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-4


@given(
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True),
    step=st.integers(0, 2**31),
    split=st.integers(0, 20),
    words=st.sampled_from(list(SAMPLERS)),
    name=st.sampled_from(["linear", "edm"]),
    mirrored=st.booleans(),
)
def test_the_timestep_of_an_image_does_not_depend_on_its_batch(
    ids, step, split, words, name, mirrored
):
    schedule, distribution = build_schedule(name, 100), Distribution(asymmetric(100, 70, 5))
    sampler = (
        MirroredSampler(schedule, distribution, 64, SAMPLERS[words])
        if mirrored
        else TimestepSampler(schedule, distribution, SAMPLERS[words])
    )
    whole = sampler.sample(SEED, torch.tensor(ids), step)
    parts = [torch.tensor(part, dtype=torch.int64) for part in (ids[:split], ids[split:])]
    apart = torch.cat([sampler.sample(SEED, part, step) for part in parts])
    assert torch.equal(whole, apart)


@pytest.mark.parametrize(
    "p, batch_size",
    [(uniform(1000), 16), (asymmetric(1000, 700, 5), 64), (logit_normal(1000), 250)],
    ids=["uniform-16", "asymmetric-64", "logit_normal-250"],
)
def test_stratified_draws_vary_less(p, batch_size):
    def variance(words) -> float:
        drawn = draw(TimestepSampler(linear(), Distribution(p), words), batch_size, 50_000).double()
        return float((drawn / 1000).square().mean(1).var())

    assert variance(stratified) < variance(independent) / (batch_size / 8)


def test_a_rank_s_slice_of_a_stratified_batch_is_spread_too():
    sampler = TimestepSampler(linear(), Distribution(uniform(1000)), stratified)
    batch = sampler.sample(SEED, torch.arange(256), 0)
    for part in batch.split(32):
        counts = torch.bincount(part // 125, minlength=8)
        assert int(counts.min()) >= 3 and int(counts.max()) <= 5


@given(clusters=st.integers(1, 9), start=st.integers(0, 1000), step=st.integers(0, 50))
def test_intervals_take_turns(clusters, start, step):
    """ANT draws B / K timesteps from each of K clusters."""
    sampler = TimestepSampler(linear(2520), Distribution(uniform(2520)), by_interval(clusters))
    t = sampler.sample(SEED, torch.arange(start, start + 10 * clusters), step)
    counts = torch.bincount(t * clusters // 2520, minlength=clusters)
    assert counts.tolist() == [10] * clusters


# SpeeD's released distribution.


def test_the_mirrored_law_is_the_released_one_exactly():
    sampler = MirroredSampler(linear(), Distribution(asymmetric(1000, 700, 5)), 642)
    relative = sampler.probabilities() * 3800 / 5 * 2  # in units of half the frequent probability
    for start, end, value in (
        (0, 1, 2), (1, 58, 3), (58, 358, 2.2), (358, 643, 2), (643, 700, 1), (700, 1000, 0.2),
    ):  # fmt: skip
        torch.testing.assert_close(relative[start:end], torch.full((end - start,), value).double())
    p = sampler.probabilities()
    t = torch.arange(1000)
    assert float(p[:700].sum()) == pytest.approx(0.9605, abs=5e-5)
    assert float((p * t).sum()) == pytest.approx(339.6, abs=0.05)


def test_without_preference_mirroring_alone_is_asymmetric():
    sampler = MirroredSampler(linear(), Distribution(uniform(1000)), 642)
    p = sampler.probabilities() * 1000
    assert [float(p[t]) for t in (0, 1, 357, 358, 642, 643, 999)] == pytest.approx(
        [1.0, 1.5, 1.5, 1.0, 1.0, 0.5, 0.5]
    )


def test_mirrored_draws_follow_the_mirrored_law_and_come_in_pairs():
    sampler = MirroredSampler(linear(), Distribution(asymmetric(1000, 700, 5)), 642)
    drawn = draw(sampler).flatten()
    first, second = drawn[0::2], drawn[1::2]
    assert torch.equal(second, torch.where(first < 642, 642 - first, first - 642))
    distribution = sampler.distribution.probabilities(0)
    assert pvalue(first, distribution) > 1e-4
    assert pvalue(second, 2 * sampler.probabilities() - distribution) > 1e-4


@pytest.mark.parametrize("pivot", [0, 1000])
def test_a_mirror_outside_the_process_is_refused(pivot):
    with pytest.raises(ValueError, match=f"pivot={pivot}"):
        MirroredSampler(linear(), Distribution(uniform(1000)), pivot)


# Curricula.


@given(step=st.integers(0, 3000), mean=st.floats(0.1, 0.9), std=st.floats(0.05, 0.5))
def test_clts_is_its_mixture(step, mean, std):
    distribution = ClimbingDistribution(500, 2000, mean, std)
    share = min(step / 2000, 1)
    u = np.arange(501) / 500
    gaussian = np.diff(stats.norm.cdf((u - mean) / std))
    expected = (1 - share) / 500 + share * gaussian / gaussian.sum()
    np.testing.assert_allclose(distribution.probabilities(step), expected, 1e-6, 1e-12)
    table = distribution.thresholds(step)
    masses = torch.cat([table[:1], table.diff()]).double() / 2**32
    np.testing.assert_allclose(masses, expected, 0, 1e-9)


def test_clts_defaults_end_near_their_peak():
    p = ClimbingDistribution(1000, 1).probabilities(1)
    t = torch.arange(1000)
    assert float((p * t).sum()) == pytest.approx(327, abs=1.5)
    assert float(p[700:].sum()) == pytest.approx(0.024, abs=0.002)


class TranscribedCurriculum:
    """Task difficulty curriculum in plain Python, from its description."""

    def __init__(self, clusters: int, patience: int) -> None:
        self.clusters, self.patience, self.stage = clusters, patience, 1
        self.best, self.bad = math.inf, 0

    def update(self, loss: float) -> None:
        if loss < self.best:
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.bad >= self.patience and self.stage < self.clusters:
            self.stage, self.best, self.bad = self.stage + 1, math.inf, 0


@given(
    losses=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=80),
    clusters=st.integers(1, 6),
    patience=st.integers(1, 4),
)
def test_the_task_curriculum_is_its_transcription(losses, clusters, patience):
    distribution, expected = (
        TaskCurriculum(60, clusters, patience),
        TranscribedCurriculum(clusters, patience),
    )
    for step, loss in enumerate(losses):
        first = 60 - expected.stage * 60 // clusters
        p = distribution.probabilities(step)
        assert bool((p[:first] == 0).all())
        torch.testing.assert_close(p[first:], torch.full((60 - first,), 1 / (60 - first)).double())
        assert torch.equal(distribution.thresholds(step), thresholds(p))
        distribution.observe(step, torch.tensor([1, 2]), torch.tensor([loss, loss]))
        expected.update(loss)


def loss_at(cells: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + cells.float() / 50)


def trained(distribution: AdaptiveDistribution, first: int, last: int) -> AdaptiveDistribution:
    sampler = TimestepSampler(linear(400), distribution)
    for step in range(first, last):
        t = sampler.sample(SEED, torch.arange(64 * step, 64 * step + 64), step)
        sampler.observe(step, t, loss_at(t))
    return distribution


def test_the_adaptive_law_follows_the_root_mean_square_of_the_loss_above_its_floor():
    distribution = trained(AdaptiveDistribution(400, bins=40, interval=20, floor=0.1), 0, 400)
    p = distribution.probabilities(400)
    by_bin = loss_at(torch.arange(400)).view(40, 10).square().mean(1).sqrt().double()
    expected = (0.1 / 400 + 0.9 * (by_bin / by_bin.sum() / 10)).repeat_interleave(10)
    torch.testing.assert_close(p, expected, rtol=0.02, atol=0)
    assert float(p.min()) >= 0.1 / 400 and float(p.sum()) == pytest.approx(1)


def test_importance_keeps_the_adaptive_objective():
    distribution = trained(AdaptiveDistribution(400), 0, 200)
    cells = torch.arange(400)
    unbiased = (
        distribution.probabilities(0) * distribution.importance(cells) * loss_at(cells)
    ).sum()
    assert float(unbiased) == pytest.approx(float(loss_at(cells).mean()), rel=1e-5)


@pytest.mark.parametrize("split", [1, 19, 20, 21, 70])
def test_a_law_that_learns_goes_on_exactly_from_its_state(split):
    whole = trained(AdaptiveDistribution(400, interval=20), 0, 120)
    half, resumed = (
        trained(AdaptiveDistribution(400, interval=20), 0, split),
        AdaptiveDistribution(400, interval=20),
    )
    resumed.load_state_dict(half.state_dict())
    trained(resumed, split, 120)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@given(ranks=st.sampled_from([1, 2, 4, 8]))
def test_what_a_law_learns_does_not_depend_on_the_number_of_processes(ranks):
    """Each process draws its own slice; observed are all slices in the order of the counters."""
    alone, spread = AdaptiveDistribution(400, interval=5), AdaptiveDistribution(400, interval=5)
    one, many = (
        TimestepSampler(linear(400), distribution, stratified) for distribution in (alone, spread)
    )
    for step in range(20):
        ids = torch.arange(64 * step, 64 * step + 64)
        t = one.sample(SEED, ids, step)
        one.observe(step, t, loss_at(t))
        slices = torch.cat([many.sample(SEED, part, step) for part in ids.chunk(ranks)])
        many.observe(step, slices, loss_at(slices))
    assert torch.equal(alone.cell_probabilities, spread.cell_probabilities)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Distribution(torch.tensor([0.5, -0.1])), "non-negative"),
        (lambda: Distribution(torch.zeros(3)), "not all zero"),
        (lambda: Distribution(torch.tensor([math.nan, 1.0])), "finite"),
        (
            lambda: TimestepSampler(linear(40), Distribution(uniform(41))),
            "distribution has 41 cells",
        ),
        (lambda: asymmetric(10, 5, 0.5), "k=0.5: .* must lie in"),
        (lambda: logit_normal(10, std=0), "std=0: a standard deviation"),
        (lambda: log_normal(linear(40), std=-1.0), "std=-1.0"),
        (lambda: log_normal(linear(40), 50.0), "no mass on the timesteps"),
        (lambda: mode(10, 2.0), r"scale=2.0: .* \[-1, 1.752\]"),
        (lambda: shifted(10, 0), "shift=0: must be a positive"),
        (lambda: ClimbingDistribution(10, 0), "ramp_steps=0"),
        (lambda: TaskCurriculum(10, 11), r"clusters=11: must lie in \[1, 10\]"),
        (lambda: TaskCurriculum(10, 2, 0), "patience=0"),
        (lambda: AdaptiveDistribution(10, floor=0), "floor=0: need"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_sampler_serves_every_process(name):
    schedule = build_schedule(name, 50)
    t = TimestepSampler(schedule, Distribution(uniform(50)), stratified).sample(
        SEED, torch.arange(50), 0
    )
    assert bool(torch.isfinite(schedule.alpha(t)).all())
    assert len(schedule.cell(t).unique()) > 40
