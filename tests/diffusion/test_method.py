"""Named methods: SpeeD's presets to the committed values, the rest as P times weights."""

import json
import math
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from speed_engine.diffusion import weighting
from speed_engine.diffusion.continuous import RectifiedFlow
from speed_engine.diffusion.discrete import (
    from_alphas_cumprod,
    from_betas,
    linear,
)
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.method import SHARED, build_method, options_of
from speed_engine.diffusion.methods import METHODS
from speed_engine.diffusion.prediction import PREDICTIONS, linear_form, weight_conversion
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.timesteps import MirroredSampler
from speed_engine.runtime.checks import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "methods.json").read_text())
INDICES = torch.tensor(GOLDEN["idx0"])


def golden(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


def epsilon_weight(method: Method) -> torch.Tensor:
    """The weight as one of the epsilon-MSE."""
    own = weighting.LossWeighting(method.weight, method.prediction)
    return weighting.converted(own, method.schedule, "epsilon")


def test_speed_paper_draws_by_the_reference_values():
    method = build_method("speed_paper", linear())
    probabilities = golden("P_paper_k5_tau700")
    torch.testing.assert_close(method.probabilities[INDICES], probabilities, rtol=0, atol=1e-12)


def test_speed_official_draws_by_the_reference_values():
    method = build_method("speed_official", linear())
    mirrored = 2 * method.probabilities - method.timesteps.distribution.probabilities(0)
    component = golden("P_dual_component")
    torch.testing.assert_close(mirrored[INDICES], component, rtol=0, atol=1e-12)


BANDS = (0, 100, 220, 350, 500, 642, 700, 850, 1000)


@pytest.mark.parametrize(
    "name, options, shares",
    [
        ("uniform", {}, (.100, .120, .130, .150, .142, .058, .150, .150)),
        ("speed_paper", {"tau": 700}, (.126, .184, .200, .199, .163, .063, .032, .032)),
        ("speed_official", {}, (.156, .191, .207, .188, .153, .030, .037, .037)),
        ("speed_official", {"k": 2}, (.140, .184, .200, .162, .130, .026, .079, .079)),
        ("speed_official", {"k": 1}, (.121, .177, .192, .131, .104, .021, .127, .127)),
        ("p2", {}, (.005, .040, .101, .173, .188, .079, .207, .207)),
    ],
)  # fmt: skip
def test_the_gradient_s_share_per_band(name, options, shares):
    method = build_method(name, linear(), **options)
    measure = method.probabilities * epsilon_weight(method)
    measure = (measure / measure.sum()).cumsum(0)
    found = np.diff([0.0, *(float(measure[end - 1]) for end in BANDS[1:])])
    np.testing.assert_allclose(found, shares, atol=6e-4)


@pytest.mark.parametrize(
    "schedule, pivot",
    [
        (linear(), 642),
        (build_schedule("quadratic"), 829),
        (build_schedule("cosine"), 959),
        (linear(250), 187),
        (linear(500), 349),
        (linear(2000), 1157),
        (linear(4000), 2016),
    ],
)
def test_the_released_code_mirrors_there(schedule, pivot):
    tau = min(700, schedule.num_timesteps)
    timesteps = build_method("speed_official", schedule, tau=tau).timesteps
    assert isinstance(timesteps, MirroredSampler)
    assert timesteps.pivot == pivot


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name", METHODS)
def test_every_cell_works_or_says_why_not(name, process):
    schedule = build_schedule(process)
    if name == "speed_official" and process in ("edm", "fdm"):
        with pytest.raises(ValueError, match="no point to mirror at on schedule '.dm'"):
            build_method(name, schedule)
        return
    method = build_method(name, schedule)
    p = method.probabilities
    assert p.shape == (1000,) and float(p.min()) >= 0 and float(p.sum()) == pytest.approx(1)
    assert bool(torch.isfinite(method.weight).all()) and float(method.weight.min()) >= 0
    timesteps, weights = method.draw(8, 3)
    assert timesteps.shape == weights.shape == (8,) and weights.dtype == torch.float32


@pytest.mark.parametrize("name", ["uniform", "speed_paper"])
def test_a_million_draws_follow_p_at_every_timestep(name):
    method = build_method(name, linear())
    observed = torch.zeros(1000, dtype=torch.int64)
    for ids in torch.arange(1_000_000).split(100_000):
        drawn = method.timesteps.sample(torch.tensor(11), ids, 0)
        observed += torch.bincount(drawn, minlength=1000)
    expected = method.probabilities * 1_000_000
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    "name, process",
    [
        (name, process)
        for name in METHODS
        for process in ("linear", "edm", "flow")
        if (name, process) != ("speed_official", "edm")
    ],
)
def test_draws_follow_p(name, process):
    method = build_method(name, build_schedule(process))
    sampler = method.timesteps
    drawn = torch.cat(
        [
            sampler.sample(torch.tensor(11), torch.arange(step * 1000, step * 1000 + 1000), 0)
            for step in range(100)
        ]
    )
    observed = torch.bincount(method.schedule.cell(drawn), minlength=1000).view(100, 10).sum(1)
    expected = method.probabilities.view(100, 10).sum(1)
    assert int(observed[expected == 0].sum()) == 0
    kept = expected * 100_000 > 5
    o, e = observed[kept].numpy(), expected[kept].numpy()
    assert stats.chisquare(o, e / e.sum() * o.sum()).pvalue > 1e-4


@given(
    T=st.integers(20, 600),
    beta_max=st.floats(0.02, 0.2),
    k=st.floats(1, 50),
    lam=st.floats(0.5, 1),
    r=st.floats(1.1, 500),
    closed_form=st.booleans(),
)
def test_speed_on_any_schedule(T, beta_max, k, lam, r, closed_form):
    schedule = linear(T, 1e-4, beta_max)
    if not closed_form:
        schedule = from_alphas_cumprod(schedule.alphas_cumprod)
    method = build_method("speed_paper", schedule, k=k, lam=lam, r=r)
    p, w = method.probabilities, method.weight
    assert float(p.sum()) == pytest.approx(1) and float(p.min()) > 0
    assert float(w.min()) == pytest.approx(1 - lam) and float(w.max()) == pytest.approx(lam)
    steps = p[:-1] / p[1:]
    assert bool(((steps - 1).abs() < 1e-9).logical_or((steps - k).abs() < 1e-6 * k).all())


def test_k_one_is_uniform():
    p = build_method("speed_paper", linear(), k=1.0).probabilities
    torch.testing.assert_close(p, torch.full_like(p, 1e-3))


@pytest.mark.parametrize("name", METHODS)
@given(prediction=st.sampled_from(list(PREDICTIONS)), process=st.sampled_from(list(SCHEDULES)))
def test_a_method_is_the_same_objective_on_every_target(name, prediction, process):
    schedule = build_schedule(process, 720)
    try:
        own = build_method(name, schedule)
    except ValueError:
        return
    other = build_method(name, schedule, prediction, normalised=False)
    own = build_method(name, schedule, normalised=False)
    torch.testing.assert_close(epsilon_weight(own), epsilon_weight(other), rtol=1e-6, atol=0)


def test_weights_may_be_applied_unconverted():
    schedule = RectifiedFlow()
    method = build_method("speed_paper", schedule, weight_on="prediction")
    assert torch.equal(method.weight, weighting.change_aware(schedule).values)
    converted = build_method("speed_paper", schedule)
    epsilon, velocity = (
        linear_form(schedule, name, schedule.timesteps) for name in ("epsilon", "velocity")
    )
    factor = weight_conversion(epsilon, velocity)
    torch.testing.assert_close(converted.weight, method.weight * factor)


@pytest.mark.parametrize("name", ["speed_paper", "speed_official", "p2", "min_snr", "speed_plus"])
def test_normalised_weights_average_to_one(name):
    method = build_method(name, linear(), "v", normalised=True)
    assert float((method.probabilities * method.weight).sum()) == pytest.approx(1)


def test_a_process_without_convergence_area_says_so_and_is_sampled_uniformly(caplog):
    schedule = linear(1000, 1e-5, 1e-3)
    method = build_method("speed_paper", schedule)
    assert len(caplog.records) == 1 and "no convergence area" in caplog.text
    assert float(method.probabilities.max()) == pytest.approx(float(method.probabilities.min()))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("speed_paper", {"k": 0.5}, "k=0.5: .* must lie in"),
        ("speed_paper", {"k": math.nan}, "k=nan"),
        ("speed_paper", {"k": 1e300}, r"k=1e\+300: .* must lie in"),
        ("speed_paper", {"r": 1.0}, "r=1.0: .* above 1"),
        ("speed_paper", {"tau": 0.0}, r"tau=0.0 is outside \[1, 1000\]"),
        ("speed_paper", {"tau": 1001.0}, r"tau=1001.0 is outside \[1, 1000\]"),
        ("speed_paper", {"lam": 0.4}, r"lambda=0.4 is outside \[0.5, 1\]"),
        ("speed_official", {"lam": 5.0}, r"lambda=5.0 is outside \[0.5, 1\]"),
        ("uniform", {"k": 5.0}, "'uniform' has no option k, .* it has stratified, normalised"),
        ("min_snr", {"gama": 5.0}, "no option gama, the nearest is gamma; it has gamma, strat"),
        ("speed_official", {"tau": 500.5}, "'speed_official': tau=500.5: should be a valid int"),
        ("speed_paper", {"k": True}, "k=true: should be a valid number"),
        ("uniform", {"weight_on": "x0"}, "should be 'definition' or 'prediction'"),
        ("p2", {"gamma": math.inf}, "P2 needs both to be at least 0, and finite"),
        ("ant_uw", {"stratified": True}, "stratified=True would replace .*; leave stratified out"),
        ("ant_uw", {"stratified": False}, "stratified=False would replace the intervals that it"),
        ("speed_paper:v", {}, "names a process or a prediction.* schedule and prediction"),
        ("speed_paper@cosine+k=3", {}, "names a process or a prediction"),
        ("speed_papr", {}, r"did you mean 'speed_paper'\? Choose from uniform, speed_paper"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_method(name, linear(), **options)


def test_the_released_method_needs_its_700_timesteps():
    with pytest.raises(ValueError, match=r"tau=700 is outside \[1, 250\]"):
        build_method("speed_official", linear(250))


def test_two_lines_train_in_someone_else_s_loop():
    """draw() gives the times and weights of the objective's own table, batch after batch."""
    schedule = from_betas(torch.linspace(1e-4, 0.02, 1000))
    method = build_method("speed_paper", schedule)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(200):
        x0, noise = torch.randn(64, 2), torch.randn(64, 2)
        timesteps, weights = method.draw(64, step)
        alpha = schedule.alphas_cumprod[timesteps].sqrt().float()[:, None]
        x_in = alpha * x0 + (1 - alpha**2).sqrt() * noise
        loss = (weights * (model(x_in) - noise).square().mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])


def test_options_may_be_spelled_or_given():
    spelled = build_method("speed_paper+k=3+normalised=True", linear(), lam=0.7)
    given = build_method("speed_paper", linear(), k=3, lam=0.7, normalised=True)
    assert torch.equal(spelled.probabilities, given.probabilities)
    assert torch.equal(spelled.weight, given.weight)
    assert not torch.equal(given.weight, build_method("speed_paper", linear(), k=3).weight)
    assert spelled.name == "speed_paper"


def test_one_method_alone_decays_the_momentum_of_its_optimizer():
    decays = {name: build_method(name, linear()).momentum_decay for name in METHODS}
    assert {name: how for name, how in decays.items() if how != "none"} == {"clts_mdlrc": "demon"}


def test_an_option_is_what_the_recipe_declares_and_nothing_else():
    assert list(options_of("clts")) == ["ramp_steps", "mean", "std", *SHARED]
    assert list(SHARED) == ["stratified", "normalised", "weight_on", "max_weight", "weigh_bound"]
    kinds = {of.annotation for name in METHODS for of in options_of(name).values()}
    assert kinds <= {
        float, int, float | None, bool | None, bool, Literal["definition", "prediction"],
    }  # fmt: skip


def test_edm2_has_its_timestep_distribution_its_weighting_and_its_learned_weights():
    schedule = build_schedule("edm")
    method = build_method("edm2", schedule)
    log_sigma = schedule.edges
    mass = stats.norm.cdf(log_sigma.numpy(), -0.4, 1.0)
    np.testing.assert_allclose(method.probabilities.numpy(), np.diff(mass), rtol=1e-9, atol=1e-12)
    # (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 is one on F.
    assert method.prediction == "F"
    torch.testing.assert_close(method.weight, torch.ones(1000, dtype=torch.float64))
    # weight / exp(u) err^2 + u, as their EDM2Loss; of one image, so that u is what no error costs.
    with torch.no_grad():
        method.parameters()[0].copy_(torch.linspace(-1, 1, 128))
    method.draw(1, 0)
    u = method.loss(torch.zeros(1))
    assert abs(float(u.detach())) > 1e-3
    torch.testing.assert_close(method.loss(torch.full((1,), 3.0)), 3 * torch.exp(-u) + u)


def test_the_largest_weight_cuts_the_velocity_s_of_a_flow_that_predicts_x0():
    schedule = build_schedule("flow", 1000)
    free = build_method("logit_normal", schedule, "x0").weight
    cut = build_method("logit_normal+max_weight=400", schedule, "x0").weight
    time = schedule.timesteps
    torch.testing.assert_close(free, time**-2)
    torch.testing.assert_close(cut, time.clamp(min=0.05) ** -2)
    with pytest.raises(ValueError, match="max_weight=0.0 must be positive"):
        build_method("uniform", schedule, max_weight=0.0)


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    known = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(known)


PINNED = {
    (name, process): build_method(name, build_schedule(process)).draw(torch.arange(512), 7)
    for process in ("linear", "flow", "edm")
    for name in ("uniform", "speed_paper", "speed_paper+k=3.3", "learned_uncertainty", "edm2")
}


@pytest.mark.parametrize("name, process", PINNED)
def test_draws_are_the_same_whatever_the_default_type_of_someone_else_s_loop(
    name, process, default_dtype
):
    method = build_method(name, build_schedule(process))
    for ours, pinned in zip(method.draw(torch.arange(512), 7), PINNED[name, process], strict=True):
        assert torch.equal(ours, pinned)
    assert {parameter.dtype for parameter in method.parameters()} <= {torch.float32}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["adaptive", "task_curriculum"])
def test_a_loss_that_overflows_is_not_learned_from(name, bad):
    """As half precision with a gradient scaler has it: that step is skipped, training goes on."""
    method, same = (build_method(name, build_schedule("linear")) for _ in range(2))
    for step in range(101):
        timesteps, _ = method.draw(16, step)
        assert torch.equal(timesteps, same.draw(16, step)[0])
        error = 1 + timesteps / 1000
        same.loss(error)
        if step % 50 == 20:
            error[3] = bad
        method.loss(error)
        if step % 50 == 20:  # the other is not shown this step
            same.loop.seen.clear()
    assert bool(torch.isfinite(method.timesteps.probabilities(101)).all())
    for now, expected in zip(method.timesteps.buffers(), same.timesteps.buffers(), strict=True):
        assert torch.equal(now, expected)


def test_the_largest_word_s_time_is_below_one(monkeypatch):
    monkeypatch.setattr(
        "speed_engine.diffusion.timesteps.random_bits",
        lambda seed, ids, words, stream: torch.full((len(ids), words), 2**32 - 1),
    )
    t = build_method("uniform", build_schedule("edm")).timesteps.sample(
        torch.tensor(0), torch.arange(2), 0
    )
    assert float(t.max()) < 1 and bool(torch.isfinite(build_schedule("edm").sigma(t)).all())


def drawn():
    method = build_method("adaptive", build_schedule("linear"))
    method.draw(4, 0)
    return method


def state_with(**changes: Any):
    return {**drawn().state_dict(), **changes}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda wrong: build_method(wrong, build_schedule("linear")), "method="),
        (lambda wrong: build_method("uniform", build_schedule("linear"), seed=wrong), "seed="),
        (
            lambda wrong: build_method(
                "speed_paper", build_schedule("linear"), k=cast(Any, [wrong])
            ),
            "k=",
        ),
        (lambda wrong: build_schedule(wrong), "is unknown; choose from linear"),
        (lambda wrong: build_schedule("linear", wrong), "num_timesteps="),
        (lambda wrong: drawn().draw(wrong, 1), "batch="),
        (lambda wrong: drawn().draw(4, wrong), "step="),
        (lambda wrong: drawn().draw(4, 1, wrong), "device="),
        (lambda wrong: drawn().draw(4, 1, rank=wrong, world_size=2), "rank="),
        (lambda wrong: drawn().draw(4, 1, rank=0, world_size=wrong), "world_size="),
        (lambda wrong: drawn().loss(wrong), "losses of shape"),
        (lambda wrong: drawn().load_state_dict(wrong), "the method is adaptive"),
        (lambda wrong: drawn().load_state_dict(state_with(images=wrong)), "images="),
        (lambda wrong: drawn().load_state_dict(state_with(first=wrong)), "first="),
        (lambda wrong: drawn().load_state_dict(state_with(timesteps=wrong)), "state's timesteps"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "wrong", [b"x", 2.5, [], object(), 10**30], ids=lambda of: type(of).__name__
)
def test_arguments_of_another_type_are_one_message(call, message, wrong):
    with pytest.raises(UserError) as refused:
        call(wrong)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_state_of_other_options_is_refused_before_anything_is_loaded():
    method, state = drawn(), build_method("adaptive", build_schedule("flow", 40)).state_dict()
    before = method.state_dict()
    with pytest.raises(UserError, match="with other options or another process"):
        method.load_state_dict(state)
    assert method.state_dict()["images"] == before["images"] == 4
