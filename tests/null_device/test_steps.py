"""What a training step and a generation of every preset ask of a GPU.

A training step must run ahead of the device: it waits for nothing, reads nothing back, sends
nothing from the host, and has the memory that it needs from the steps before. Its launches are a
budget, counted with a toolchain as those of the kernels are; a call of cuDNN counts as one.
"""

import null_device
import pytest
import toolchain

from speed_engine.presets import PRESETS

# preset: launches of a training step on 8 images, and of the generation of 8 images in 3 steps
LAUNCHES = {
    toolchain.TORCH_2_11_TRITON_3_6: {
    },
    toolchain.TORCH_2_14_TRITON_3_8: {
    },
}  # fmt: skip
BUDGETS = LAUNCHES[toolchain.nearest(LAUNCHES)]
QUICK = "imagenet256-dit-xl2"
PARAMETERS = [
    pytest.param(name, marks=() if name == QUICK else pytest.mark.long) for name in PRESETS
]
SOLVER_STEPS = 3


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_step_never_waits_and_launches_no_more_than_was_counted(preset, compiled):
    found = null_device.run("measure.py", "step", preset, compiled=compiled)
    train, generate = found["train"], found["generate"]
    assert found["graph_breaks"] == 0
    assert train["syncs"] == {} and train["host_copies"] == {}, train
    assert train["allocations"] == 0, train
    # Sent are the seed, and in each step the time and, with guidance, the condition of nothing.
    sent = 1 + SOLVER_STEPS * (2 if PRESETS[preset][1].evaluation.guidance != 1 else 1)
    assert generate["host_copies"].pop("DtoH async") == 1, generate  # the images
    assert sum(generate["host_copies"].values()) <= sent, generate
    assert sum(generate["syncs"].values()) <= sent + 1, generate
    assert generate["allocations"] == 0, generate
    over = [
        f"{preset}, {what}: {found[what]['launches']} launches, budget {budget}: {found[what]['most']}"
        for what, budget in zip(("train", "generate"), BUDGETS[preset], strict=True)
        if found[what]["launches"] > budget
    ]
    toolchain.hold(LAUNCHES, over)
