"""What is compiled by blocks does not grow with their number; what is compiled whole repeats."""

import null_device
import pytest


@pytest.mark.long
def test_neither_graphs_nor_generated_code_grow_with_the_depth(compiled):
    by_depth = null_device.run("measure.py", "depths", "2", "4", "6", compiled=compiled)
    assert by_depth["2"]["graphs"] == 2  # the first block, which adds no branch, and the others
    assert by_depth["2"]["bytes"] > 10_000
    assert by_depth["2"] == by_depth["4"] == by_depth["6"]


@pytest.mark.long
def test_code_that_is_compiled_whole_adds_in_a_fixed_order(compiled):
    found = null_device.run("measure.py", "atomics", "digits", compiled=compiled)
    assert found["kernels"] > 10 and found["atomics"] == 0, found
