"""The memory of a full-sized step, read from PyTorch's allocator on the null device.

A step allocates the same on every device, and what it has allocated at its peak is linear in the
number of blocks: two short models tell the peak of a long one.
"""

import json

import null_device
import pytest

SHORT, LONGER, DEPTH = 2, 4, 28
MEASURED = {  # gigabytes on an H200, of imagenet256-dit-xl2 with 256 images a step
    "{}": 98.14,
    '{"residual_dtype": "bfloat16"}': 89.51,
    '{"checkpointing": 0.5}': 63.52,
}


@pytest.mark.long
@pytest.mark.parametrize("model", MEASURED)
def test_two_short_models_tell_the_peak_that_a_gpu_measured_of_dit_xl2(
    model, compiled, record_property
):
    short, longer = (
        null_device.run("measure.py", "memory", str(depth), model, compiled=compiled)["peak"] / 1e9
        for depth in (SHORT, LONGER)
    )
    peak = short + (longer - short) / (LONGER - SHORT) * (DEPTH - SHORT)
    record_property("peak_gigabytes", peak)
    print(f"model={json.loads(model)}: {peak:.2f} GB at depth {DEPTH}")
    assert peak == pytest.approx(MEASURED[model], rel=0.01)
