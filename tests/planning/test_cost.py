"""What --dry-run says is counted, and agrees with what is published and with real tensors."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest
import torch

from speed_engine import cli
from speed_engine.build import build_model, training_inputs
from speed_engine.commands.train import TrainCommand
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.models.config import DiTConfig, MDTConfig, UNetConfig
from speed_engine.planning.cost import describe, estimate, short
from speed_engine.planning.gpus import GPUS, Gpu
from speed_engine.planning.memory import USED_SHARE, Kept, fitting_images, kept_bytes
from speed_engine.presets import PRESETS
from train_cases import gpu_cases

PIXELS = DataConfig(image_shape=(3, 16, 16))
SMALL = TrainConfig(data=PIXELS, model=DiTConfig(dim=64, depth=2, num_heads=4))
RESULTS = Path(__file__).parents[2] / "benchmarks/results/nvidia-h200/gpu_defaults.json"
MEASURED = json.loads(RESULTS.read_text())["rows"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_dry_run(capsys, name):
    cli.main(["train", name, "--dry-run", "--gpu", "a100"])
    shown = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert list(lines) == [
        "model", "method", "parameters", "FLOPs", "state", "activations", "memory", "step",
        "compile", "run",
    ]  # fmt: skip
    assert "on one a100" in lines["step"]


def test_a_short_run_is_told_in_seconds():
    lines = describe(dataclasses.replace(SMALL, steps=20), "h200")
    seconds = 20 * estimate(SMALL).step_seconds(GPUS["h200"])
    assert lines["run"].endswith(f"at least {seconds:.3g} seconds")


def test_dit_xl_2_costs_what_its_paper_says():
    _, config = PRESETS["imagenet256-dit-xl2"]
    cost = estimate(config)
    assert round(cost.parameters / 1e6) == 675
    assert round(cost.forward_flops / 2e9, 1) == 118.6
    assert cost.training_flops == 3 * cost.forward_flops
    gpu = Gpu(1e15, 4e12, 1e11, 1e11, 1e10)
    by_hand = 256 * 3 * cost.forward_flops / 1e15 + 36 * cost.parameters / 4e12
    assert math.isclose(cost.step_seconds(gpu), by_hand)


@pytest.mark.parametrize("model", [SMALL.model, UNetConfig()])
def test_activations_are_those_that_autograd_keeps(model):
    config = dataclasses.replace(SMALL, model=model)
    network = build_model(config)
    kept, counted = [], []
    for images in (1, 2):
        storages = {}
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}

        def keep(tensor, own=own, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        x, t = torch.zeros(images, 3, 16, 16), torch.zeros(images)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer = network(x, t, labels=torch.zeros(images, dtype=torch.int64))
        assert answer.requires_grad
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        counted.append(kept_bytes(network, training_inputs(network, config, images)))
    assert counted[1] - counted[0] == pytest.approx(kept[1] - kept[0], rel=0.02)  # and the answer


def test_autocast_halves_what_products_read_and_copies_the_weights():
    cost, network = estimate(SMALL), build_model(SMALL)
    one, two = (kept_bytes(network, training_inputs(network, SMALL, n)) for n in (1, 2))
    assert 0.4 < cost.kept.per_image / (two - one) < 0.8
    assert 0.85 < cost.kept.weights / (2 * cost.parameters) < 1.01  # and a few scalars


@pytest.mark.parametrize(
    "model, measured",
    [({}, 98.14), ({"residual_dtype": "bfloat16"}, 89.51), ({"checkpointing": 0.5}, 63.52)],
)
def test_the_memory_of_dit_xl_2_is_within_a_tenth_of_what_an_h200_measured(model, measured):
    """The figures are the allocator's peaks in benchmarks/results/nvidia-h200/gpu_xl.json."""
    preset = PRESETS["imagenet256-dit-xl2"][1]
    config = dataclasses.replace(preset, model=dataclasses.replace(preset.model, **model))
    assert estimate(config).gpu_bytes(256) / 1e9 == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize("name", [name for name in MEASURED["memory"] if name != "seconds"])
def test_what_an_h200_held_is_within_the_memory_that_is_planned_for_it(name):
    config = PRESETS[name][1] if name in PRESETS else gpu_cases()[name]
    row, layouts = MEASURED["memory"][name], MEASURED["U-Nets by layout"].get(name, {})
    held = [row["measured_gb"], *(layout["peak_gigabytes"] for layout in layouts.values())]
    planned = estimate(config).gpu_bytes(row["microbatch"]) / USED_SHARE
    assert planned >= 1e9 * max(held)


def test_what_does_not_fit_goes_through_in_halves():
    kept = Kept(per_image=10, weights=20)
    room = lambda images, state=100: fitting_images(kept, state, images, 1000)
    assert room(76) == 76 == fitting_images(kept, 100, 76, 1000)
    assert 76 * 10 + 20 + 100 <= USED_SHARE * 1000 < 77 * 10 + 20 + 100
    assert (room(77), room(152), room(153), room(1000)) == (39, 76, 39, 63)
    assert room(7, state=10_000) == 1
    _, config = PRESETS["imagenet256-dit-xl2"]
    assert "it takes 128 at a time, and 57" in describe(config, "h100")["memory"]
    assert "at a time" not in describe(config, "h200")["memory"]
    huge = dataclasses.replace(
        config, data=dataclasses.replace(config.data, image_shape=(4, 512, 512))
    )
    assert "does not fit, even one by one" in describe(huge, "rtx4090")["memory"]


def test_what_is_asked_to_go_through_at_a_time_is_what_is_counted(monkeypatch):
    config, cost = dataclasses.replace(SMALL, batch_size=64), estimate(SMALL)
    room = cost.gpu_bytes(40) / USED_SHARE
    monkeypatch.setitem(GPUS, "h100", GPUS["h100"]._replace(memory=room))

    def memory(size):
        return describe(dataclasses.replace(config, microbatch_size=size), "h100")["memory"]

    assert memory(None).startswith(f"{short(cost.gpu_bytes(64))}B of one h100's")
    assert memory(None).endswith(f"; it takes 32 at a time, and {short(cost.gpu_bytes(32))}B")
    assert memory(16).startswith(f"{short(cost.gpu_bytes(16))}B of one h100's")
    assert memory(16).endswith("with 16 of 64 images of a step at once")
    assert memory(48).endswith("; it does not fit: --microbatch-size 32 does")
    assert "with all 64 images" in memory(300)


def test_further_averages_are_held_and_updated():
    averages = dataclasses.replace(SMALL.optimizer, averages=("power=6.94",))
    config = dataclasses.replace(SMALL, optimizer=averages)
    one, two = estimate(SMALL), estimate(config)
    assert two.gpu_bytes(8) - one.gpu_bytes(8) == 4 * one.parameters
    assert two.update_bytes == one.update_bytes + 8 == 44
    assert f"EMAs {short(8 * one.parameters)}B" in describe(config, "h200")["state"]


@pytest.mark.parametrize(
    "options",
    [
        ["--model.dim", "4608", "--model.num-heads", "64"],
        ["--model.variant", "modern", "--model.dim", "1024", "--model.num-heads", "1"],
    ],
)
def test_what_no_kernel_takes_is_counted_as_the_reference_computes_it(capsys, options):
    cli.main(["train", "digits", "--model.depth", "1", *options, "--dry-run"])
    assert "B per image on a GPU" in capsys.readouterr().out


def test_a_mask_costs_a_second_shorter_pass():
    cost = estimate(dataclasses.replace(SMALL, model=MDTConfig(dim=64, depth=12, num_heads=4)))
    assert 3 * cost.forward_flops < cost.training_flops < 6 * cost.forward_flops


def test_recomputing_keeps_less():
    kept = []
    for dial in (0.0, 0.5, 1.0):
        model = dataclasses.replace(SMALL.model, checkpointing=dial)
        kept.append(estimate(dataclasses.replace(SMALL, model=model)).kept.per_image)
    assert kept[2] < 0.3 * kept[0] and 0.3 * kept[0] < kept[1] < 0.8 * kept[0]


def test_every_gpu_can_be_named_on_the_command_line():
    choices = typing.get_args(typing.get_type_hints(TrainCommand)["gpu"])
    assert set(choices) == set(GPUS)


def test_what_cannot_be_built_is_refused_as_in_training(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "digits", "--dry-run", "--model.patch-size", "3"])
    assert stopped.value.code == 2
    assert "patch_size=3 does not divide" in capsys.readouterr().err


def test_muon_keeps_one_moment_of_matrices_and_says_what_its_products_take():
    plain = PRESETS["imagenet256-dit-xl2"][1]
    muon = dataclasses.replace(plain, optimizer=dataclasses.replace(plain.optimizer, name="muon"))
    with_adamw, with_muon = estimate(plain), estimate(muon)
    # 28 blocks of 1152: q, k, v, projection, adaLN's six, and two of 4 x 1152.
    assert with_muon.muon_parameters == 28 * 18 * 1152**2
    saved = with_adamw.optimizer_bytes - with_muon.optimizer_bytes
    assert saved == 4 * with_muon.muon_parameters == with_adamw.state_bytes - with_muon.state_bytes
    square, wide = 6 * 1152**3, 18 * 1152**3
    assert with_muon.muon_flops == 28 * 5 * (10 * square + 2 * wide)
    assert "Muon's products take 20.55 TFLOP a step" in describe(muon, "h200")["state"]
