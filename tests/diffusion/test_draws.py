"""A method in someone else's loop: what is drawn call by call, learned, saved and resumed."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speed_engine.diffusion.continuous import Edm, RectifiedFlow
from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.distributions import Distribution
from speed_engine.diffusion.draws import Draws
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.methods import METHODS

FINE = RectifiedFlow()  # its draws are real numbers: two are equal only if their images are
LEARNING = ("task_curriculum", "adaptive", "ant_uw", "learned_uncertainty", "edm2")


def drawn(method: Method, *draws: tuple[int, int], **where: Any) -> list[float]:
    """Timesteps of draws (batch size, step), in turn."""
    return [t for batch, step in draws for t in method.draw(batch, step, **where)[0].tolist()]


def all_differ(values: list[float]) -> bool:
    return len(set(values)) == len(values)


@pytest.mark.parametrize("name", ["speed_paper", "speed_plus", "ant_uw"])
def test_draws_of_one_step_differ(name):
    assert all_differ(drawn(build_method(name, FINE), (16, 7), (16, 7), (16, 7), (16, 8)))


def test_a_short_last_batch_repeats_no_other_step():
    assert all_differ(drawn(build_method("uniform", FINE), *((16, s) for s in range(10)), (5, 10)))


def test_steps_that_are_counted_anew_every_epoch_repeat_nothing():
    epochs = [(16, step) for _ in range(3) for step in range(5)]
    assert all_differ(drawn(build_method("uniform", FINE), *epochs))


@pytest.mark.parametrize("batches", [(16, 16, 16), (5, 64, 130)])
@pytest.mark.parametrize("name", ["speed_paper", "speed_plus"])
def test_ranks_differ_whatever_their_batches(name, batches):
    methods = [build_method(name, FINE) for _ in batches]
    values = [
        drawn(method, (size, 0), (size, 0), (3, 1), rank=rank, world_size=len(batches))
        for rank, (method, size) in enumerate(zip(methods, batches, strict=True))
    ]
    assert all_differ(list(itertools.chain(*values)))


def test_processes_draw_together_what_one_would():
    alone = build_method("speed_paper", FINE).draw(256, 3)[0]
    parts = [
        build_method("speed_paper", FINE).draw(128, 3, rank=r, world_size=2)[0] for r in (0, 1)
    ]
    assert torch.equal(torch.cat(parts).sort().values, alone.sort().values)


def test_counters_say_what_is_drawn_whatever_came_before():
    method, ids = build_method("speed_paper", FINE), torch.tensor([3, 1, 4])
    first = method.draw(ids, 5)
    method.draw(16, 5)
    for before, after in zip(first, method.draw(ids, 5), strict=True):
        assert torch.equal(before, after)


def test_a_run_resumed_without_its_state_does_not_repeat_its_beginning():
    whole = drawn(build_method("uniform", FINE), *((16, step) for step in range(20)))
    assert all_differ(
        whole + drawn(build_method("uniform", FINE), *((16, s) for s in range(10, 20)))
    )


def test_counters_never_meet():
    taken: set[int] = set()
    for rank, sizes in enumerate([(1, 63, 64, 65), (200, 7), (64,) * 4]):
        draws = Draws()
        for size in sizes:
            ids = draws.take(size, 0, rank, 3).tolist()
            assert len(ids) == size and taken.isdisjoint(ids)
            taken.update(ids)


def loop(method: Method, steps: range, scale: float = 1.0) -> list[Any]:
    """Timesteps and losses of a loop with two draws a step, which trains what the method learns."""
    parameters = method.parameters()
    optimizer = torch.optim.SGD(parameters, 0.1) if parameters else None
    record = []
    for step in steps:
        for size in (12, 7):
            timesteps, _ = method.draw(size, step)
            error = scale * (1 + timesteps.float() / 1000)
            loss = method.loss(error)
            record.append((timesteps, loss.detach()))
            if optimizer is not None:
                loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return record


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_loop_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    options: dict[str, Any] = {"patience": 2, "clusters": 5} if name == "task_curriculum" else {}
    whole = loop(build_method(name, linear(), **options), range(60))
    method = build_method(name, linear(), **options)
    loop(method, range(55))
    torch.save(method.state_dict(), tmp_path / "method.pt")
    resumed = build_method(name, linear(), **options)
    resumed.load_state_dict(torch.load(tmp_path / "method.pt", weights_only=True))
    for ours, theirs in zip(loop(resumed, range(55, 60)), whole[-10:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


def test_the_state_of_another_method_is_refused():
    state = build_method("adaptive", linear()).state_dict()
    with pytest.raises(ValueError, match="the state is of adaptive, the method is uniform"):
        build_method("uniform", linear()).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of something else,"):
        build_method("uniform", linear()).load_state_dict({})


@pytest.mark.parametrize("name", LEARNING)
def test_a_method_that_is_shown_nothing_warns_once(name, caplog):
    method = build_method(name, linear())
    for step in (0, 0):
        method.draw(8, step)
    assert not caplog.records
    for step in (1, 2, 3):
        method.draw(8, step)
    assert len(caplog.records) == 1
    assert f"method '{name}' learns from the losses, and has been shown none" in caplog.text


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_shown_losses_does_not_warn(name, caplog):
    loop(build_method(name, linear()), range(5))
    assert not caplog.records


def test_a_curriculum_climbs_by_steps_not_by_draws():
    method = build_method("task_curriculum", linear(), clusters=4, patience=3)
    loop(method, range(5))  # steps 1 to 3 are without gain, but for noise in t
    assert int(method.state_dict()["timesteps"]["distribution.stage"]) <= 1
    loop(method, range(5, 60))
    assert float(method.timesteps.probabilities(60)[:10].sum()) > 0


@pytest.mark.parametrize("name", ["uniform", "p2", "adaptive"])
def test_the_loss_is_the_mean_of_weight_times_error(name):
    method = build_method(name, linear())
    loop(method, range(60))
    timesteps, weights = method.draw(32, 60)
    error = torch.rand(32)
    torch.testing.assert_close(method.loss(error), (weights * error).mean())


def test_whatever_distribution_observes_is_shown_the_losses():
    """Also one that keeps nothing for a checkpoint."""
    seen = []

    class Watching(Distribution):
        def observe(self, step, cells, loss):
            seen.append((step, loss.tolist()))

    method = build_method("uniform", linear())
    assert not method.timesteps.distribution.learns
    method.timesteps.distribution = Watching(method.probabilities)
    assert method.timesteps.distribution.learns
    for step in range(2):
        method.draw(2, step)
        method.loss(torch.tensor([1.0, 2.0]))
    assert seen == [(0, [1.0, 2.0])]


def test_what_a_distribution_sees_is_not_divided_by_its_own_probability():
    ours, theirs = (build_method("adaptive", FINE) for _ in range(2))
    for step in range(120):
        timesteps, _ = ours.draw(64, step)
        error = 1 + (timesteps / 1000).float()
        ours.loss(error)
        t = timesteps / 1000
        theirs.timesteps.observe(step, t, error)
    torch.testing.assert_close(
        ours.state_dict()["timesteps"]["distribution.cell_probabilities"],
        theirs.timesteps.probabilities(0),
    )


@pytest.mark.parametrize(
    "batch, step, where, message",
    [
        (0, 0, {}, "batch=0: must be the number of images of this process, at least 1"),
        (2.5, 0, {}, "batch=2.5: must be the number of images"),
        (8, -1, {}, "step=-1: must be the number of optimizer steps done so far"),
        (torch.tensor([0.5]), 0, {}, r"counters have shape \(1,\) and type torch.float32"),
        (8, 0, {"rank": 1}, "rank=1, world_size=None: give both, or neither"),
        (8, 0, {"rank": 2, "world_size": 2}, r"rank=2 of world_size=2: must lie in \[0, 2\)"),
    ],
)
def test_impossible_draws_are_refused(batch, step, where, message):
    with pytest.raises(ValueError, match=message):
        build_method("uniform", linear()).draw(batch, step, **where)


def test_numbers_of_numpy_and_of_tensors_are_numbers():
    method = build_method("uniform", linear())
    assert len(method.draw(np.int64(4), torch.tensor(3))[0]) == 4


def test_losses_that_are_not_of_the_last_draw_are_refused():
    method = build_method("uniform", linear())
    with pytest.raises(ValueError, match=r"shape \(3,\) for no draw"):
        method.loss(torch.zeros(3))
    method.draw(4, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 1\) for a draw of 4 images"):
        method.loss(torch.zeros(4, 1))


@pytest.mark.parametrize("schedule", [linear(), Edm()], ids=lambda of: of.name)
def test_results_lie_where_they_were_asked_for(schedule):
    method = build_method("speed_paper", schedule)
    ids = torch.arange(4, device="cpu")
    for timesteps, weights in (method.draw(ids, 0, "meta"), method.draw(4, 0, device="meta")):
        assert timesteps.device.type == weights.device.type == "meta"


def test_two_processes_of_a_diffusers_loop_draw_other_images_and_learn_the_same(tmp_path):
    script, store = Path(__file__).with_name("diffusers_rank.py"), tmp_path / "store"
    outs = [tmp_path / f"{rank}.pt" for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), store, outs[rank]],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert not any("learns from the losses" in error for error in errors)
    one, other = (torch.load(out) for out in outs)
    assert torch.equal(one["learned"], other["learned"]) and float(one["learned"].std()) > 0
    # Of 1000 timesteps, 160 draws of one process and 200 of the other share what chance lets them.
    shared = torch.isin(one["drawn"], other["drawn"]).double().mean()
    assert float(shared) == pytest.approx(1 - math.exp(-0.2), abs=0.1)
