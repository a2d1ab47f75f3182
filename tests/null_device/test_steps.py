"""What a training step and a generation of every preset ask of a GPU.

A training step must run ahead of the device: it waits for nothing, reads nothing back, sends
nothing from the host, and has the memory that it needs from the steps before. Its launches are a
budget, counted with a toolchain as those of the kernels are; a call of cuDNN counts as one.
"""

import null_device
import pytest

import toolchain
from speed_engine.presets import OWN_IMAGES, PRESETS

# preset: launches of a training step on 8 images, and of the generation of 8 images in 3 steps
LAUNCHES = {
    toolchain.TORCH_2_11_TRITON_3_6: {
        "digits": (326, 775),
        "emoji32": (322, 775),
        "emoji32-unet": (1455, 3211),
        "emoji64": (581, 1279),
        "emoji64-unet": (1700, 4144),
        "cifar16": (369, 406),
        "cifar10-dit": (855, 910),
        "metfaces-dit-xl2": (245, 268),
        "ffhq-dit-xl2": (245, 268),
        "ffhq-unet": (2095, 2376),
        "imagenet256-dit-xl2": (257, 520),
        "imagenet256-unet": (2080, 4911),
        "imagenet256-mdt-s2": (2245, 3015),
        "cifar10-edm": (2246, 2731),
        "cifar10-fdm": (2255, 2731),
        "coco-t2i-dit-xl2": (351, 783),
        "metfaces512-superres": (265, 279),
    },
    toolchain.TORCH_2_14_TRITON_3_8: {
        "digits": (325, 775),
        "emoji32": (321, 775),
        "emoji32-unet": (1458, 3211),
        "emoji64": (577, 1279),
        "emoji64-unet": (1758, 3871),
        "cifar16": (368, 406),
        "cifar10-dit": (845, 910),
        "metfaces-dit-xl2": (239, 268),
        "ffhq-dit-xl2": (239, 268),
        "ffhq-unet": (2099, 2329),
        "imagenet256-dit-xl2": (251, 520),
        "imagenet256-unet": (2113, 4651),
        "imagenet256-mdt-s2": (2259, 1858),
        "cifar10-edm": (2326, 2380),
        "cifar10-fdm": (2335, 2380),
        "coco-t2i-dit-xl2": (335, 724),
        "metfaces512-superres": (256, 274),
    },
}
BUDGETS = LAUNCHES[toolchain.nearest(LAUNCHES)]


def assert_never_waits(train, generate):
    assert train["syncs"] == {} and train["host_copies"] == {}, train
    assert train["allocations"] == 0, train
    # The condition of nothing is sent once, the images are read; no step of the solver waits.
    assert generate["host_copies"].pop("DtoH async") == 1, generate
    assert sum(generate["host_copies"].values()) <= 1, generate
    assert sum(generate["syncs"].values()) <= 2, generate
    assert generate["allocations"] == 0, generate


def test_a_step_that_is_not_compiled_never_waits(compiled):
    found = null_device.run("measure.py", "step", "digits", "off", compiled=compiled)
    assert_never_waits(found["train"], found["generate"])
    assert found["train"]["launches"] > 300


@pytest.mark.long
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in OWN_IMAGES])
def test_a_compiled_step_never_waits_and_launches_no_more_than_was_counted(preset, compiled):
    found = null_device.run("measure.py", "step", preset, "blocks", compiled=compiled)
    train, generate = found["train"], found["generate"]
    assert found["graph_breaks"] == 0
    assert_never_waits(train, generate)
    over = [
        f"{preset}, {what}: {figures['launches']} launches, budget {budget}: {figures['most']}"
        for what, figures, budget in zip(
            ("train", "generate"), (train, generate), BUDGETS[preset], strict=True
        )
        if figures["launches"] > budget
    ]
    toolchain.hold(LAUNCHES, over)
