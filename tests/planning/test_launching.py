"""How a model is compiled on a GPU follows from what was measured of DiT-S/2 and DiT-XL/2."""

import dataclasses

import pytest
import torch

from speed_engine.build import build_model, training_inputs
from speed_engine.config import TrainConfig
from speed_engine.models.config import DiTConfig, MDTConfig
from speed_engine.planning.cost import describe
from speed_engine.planning.gpus import GPUS, GpuName, gpu_called
from speed_engine.planning.launching import launching
from speed_engine.presets import PRESETS

IMAGENET = PRESETS["imagenet256-dit-xl2"][1]
S2 = dataclasses.replace(IMAGENET, model=DiTConfig(size="DiT-S/2", learn_sigma=True))
GRAPHS = {"digits", "emoji32", "emoji64", "cifar16", "cifar10-dit"}


def estimated(config):
    with torch.device("meta"):
        model = build_model(config)
        return launching(config, model, training_inputs(model, config, 1), GPUS["h200"])


def chosen(config, gpu: GpuName = "h200"):
    return describe(config, gpu)["compile"].split(":")[0]


def test_the_estimate_of_dit_s_2_is_what_an_h200_measured():
    found = estimated(S2)
    assert found is not None
    assert found.host_seconds == pytest.approx(0.0626, rel=0.02)  # by blocks
    assert found.device_seconds == pytest.approx(0.0324, rel=0.02)  # by CUDA graphs
    assert found.compile_seconds == pytest.approx(20.0 - 5.9, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
def test_small_dits_are_replayed_as_graphs_on_an_h200_and_nothing_else_is(preset):
    assert chosen(PRESETS[preset][1]) == ("graphs" if preset in GRAPHS else "blocks")


def test_every_pass_of_a_step_is_launched(monkeypatch):
    monkeypatch.setattr(MDTConfig, "GRAPHS", True)  # which has two
    mdt = PRESETS["imagenet256-mdt-s2"][1]
    found, parameters = estimated(mdt), 157
    assert found is not None and found.host_seconds == pytest.approx(0.48e-3 * 2 * parameters)


def test_what_graphs_cannot_do_is_compiled_by_blocks():
    for changed in ({"microbatch_size": 128}, {"deterministic": True}, {"steps": 300}):
        assert chosen(dataclasses.replace(S2, **changed)) == "blocks"
    assert chosen(dataclasses.replace(S2, microbatch_size=256, steps=1000)) == "graphs"


def test_a_gpu_that_takes_the_images_in_parts_compiles_by_blocks(monkeypatch):
    monkeypatch.setitem(GPUS, "h200", GPUS["h200"]._replace(memory=5e9))
    assert chosen(S2) == "blocks"


def test_an_option_decides_before_the_estimate():
    assert chosen(dataclasses.replace(S2, compile="on")) == "on"
    assert chosen(dataclasses.replace(IMAGENET, compile="graphs")) == "graphs"


@pytest.mark.parametrize(
    "name, gpu",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_pytorch_has_for_it(name, gpu):
    assert gpu_called(name) is GPUS[gpu]


@pytest.mark.parametrize(
    "name",
    [
        "Tesla T4", "NVIDIA RTX A1000", "NVIDIA GH200 480GB", "NVIDIA L4", "NVIDIA L40",
        "NVIDIA H800", "NVIDIA GeForce RTX 4080", "NVIDIA RTX 6000 Ada Generation",
    ],
)  # fmt: skip
def test_a_gpu_of_another_name_is_none_that_is_known(name):
    assert gpu_called(name) is None


def test_graphs_in_microbatches_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="overwrites the gradients of the 8 images.*choose blocks"):
        TrainConfig(compile="graphs", batch_size=16, microbatch_size=8)
    TrainConfig(compile="graphs", batch_size=16, microbatch_size=16)
