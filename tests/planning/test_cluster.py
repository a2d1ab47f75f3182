"""The planner's figures follow from counted ones, and real processes send what it says."""

import dataclasses
import re

import pytest

from speed_engine import cli
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.models.config import DiTConfig
from speed_engine.planning import cluster
from speed_engine.planning.cluster import describe, plan
from speed_engine.planning.cost import estimate
from speed_engine.planning.gpus import GPUS
from speed_engine.planning.memory import USED_SHARE
from speed_engine.presets import PRESETS

SMALL = TrainConfig(
    batch_size=64,
    data=DataConfig(image_shape=(3, 16, 16)),
    model=DiTConfig(dim=64, depth=2, num_heads=4),
)


def test_one_gpu_sends_nothing_and_takes_what_the_estimate_says():
    one = plan(SMALL, 1, "h200", 8, 1.0)
    cost = estimate(SMALL)
    assert (one.layout, one.sent_bytes, one.communication_seconds) == ("none", 0, 0)
    assert one.memory_bytes == cost.gpu_bytes(64)
    assert one.compute_seconds == pytest.approx(cost.step_seconds(GPUS["h200"]))


def test_shards_send_their_parameters_twice_and_gradients_once():
    parameters = estimate(SMALL).parameters
    planned = plan(SMALL, 4, "h200", 8, 0.5)
    assert planned.layout == "fsdp" and planned.images == 16
    assert planned.sent_bytes == pytest.approx((2 + 2 + 4) * parameters * 3 / 4)
    kept = plan(dataclasses.replace(SMALL, reshard=False), 4, "h200", 8, 0.5)
    assert kept.sent_bytes == pytest.approx((2 + 4) * parameters * 3 / 4)
    assert kept.memory_bytes >= planned.memory_bytes
    assert planned.state_bytes == pytest.approx(20 * parameters / 4)


def test_nodes_repeat_what_their_gpus_share():
    parameters = estimate(SMALL).parameters
    planned = plan(SMALL, 16, "h200", 8, 0.5)
    assert planned.layout == "hsdp"
    expected = 8 * parameters * 7 / 8 + 8 * parameters / 8 * 1 / 2
    assert planned.sent_bytes == pytest.approx(expected)
    copies = plan(dataclasses.replace(SMALL, parallel="ddp"), 16, "h200", 8, 0.5)
    assert copies.sent_bytes == pytest.approx(8 * parameters * 15 / 16)
    assert copies.state_bytes == pytest.approx(20 * parameters)


def test_microbatches_gather_again_and_keep_less():
    whole = plan(SMALL, 4, "h200", 8, 0.5)
    parts = plan(dataclasses.replace(SMALL, microbatch_size=4), 4, "h200", 8, 0.5)
    assert parts.activation_bytes == pytest.approx(whole.activation_bytes / 4)
    assert parts.sent_bytes > whole.sent_bytes
    uneven = plan(dataclasses.replace(SMALL, microbatch_size=5), 4, "h200", 8, 0.5)
    assert uneven.sent_bytes == parts.sent_bytes  # 16 images are three times 5, and one


def test_a_gpu_that_takes_the_images_in_parts_is_planned_so(monkeypatch):
    cost, whole = estimate(SMALL), plan(SMALL, 4, "h200", 8, 0.5)
    need = cost.state_bytes / 4 + cost.kept.weights + 8 * cost.kept.per_image
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=need / USED_SHARE + 1))
    halves = plan(SMALL, 4, "h200", 8, 0.5)
    assert (halves.images, halves.microbatch) == (16, 8)
    assert halves.activation_bytes == pytest.approx(whole.activation_bytes / 2)
    lines = describe(SMALL, 4, "h200", 8, 0.5)
    assert lines["layout"].endswith("16 images each per step, 8 at a time")
    asked = describe(dataclasses.replace(SMALL, microbatch_size=16), 4, "h200", 8, 0.5)
    assert "does not fit: lower microbatch_size, or add GPUs" in asked["memory"]


def test_further_averages_and_offloading_are_counted_where_they_are():
    averages = dataclasses.replace(SMALL.optimizer, averages=("power=6.94", "power=16.97"))
    config = dataclasses.replace(SMALL, optimizer=averages)
    parameters = estimate(SMALL).parameters
    assert plan(config, 4, "h200", 8, 0.5).state_bytes == pytest.approx(28 * parameters / 4)
    offloaded = dataclasses.replace(config, offload=True)
    on_host = plan(offloaded, 4, "h200", 8, 0.5)
    assert on_host.memory_bytes == on_host.gathered_bytes + on_host.activation_bytes
    assert "in the host's memory" in describe(offloaded, 4, "h200", 8, 0.5)["memory"]
    assert plan(offloaded, 1, "h200", 8, 0.5) == plan(config, 1, "h200", 8, 0.5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name != "digits")) for name in PRESETS],
)
def test_every_preset_can_be_planned(capsys, name):
    cli.main(["plan", name, "--gpus", "8", "--gpu", "a100", "--batch-size", "256"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["layout", "memory", "sent", "compute", "step", "scaling", "run"]
    assert not re.search(r"\b0\.0+ (GB|ms|hours)", " ".join(lines.values()))
    assert ("launches, which are not counted" in lines["compute"]) == (name == "digits")


def test_a_recipe_can_be_planned(monkeypatch):
    planned = []
    monkeypatch.setattr(cluster, "describe", lambda config, *_: planned.append(config) or {})
    cli.main(["plan", "digits", "--recipe", "flow_muon"])
    assert [(config.schedule, config.optimizer.name) for config in planned] == [("flow", "muon")]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpus", "1000", "--per-node", "8"], "batch_size=256 does not spread over 1000 GPUs"),
        (["--gpus", "12"], "12 GPUs in nodes of 8: take up to 8, or a multiple"),
        (["--efficiency", "1.5"], "efficiency=1.5 is a share"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_way_out(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "imagenet256-dit-xl2", *options])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
