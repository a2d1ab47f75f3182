"""How compiled code grows with the number of blocks; what is compiled whole repeats."""

import null_device
import pytest


@pytest.mark.long
def test_neither_graphs_nor_generated_code_grow_with_the_depth(compiled):
    by_depth = null_device.run("measure.py", "depths", "blocks", "2", "4", "6", compiled=compiled)
    assert by_depth["2"]["graphs"] == 2  # the first block, which adds no branch, and the others
    assert by_depth["2"]["bytes"] > 10_000
    assert by_depth["2"] == by_depth["4"] == by_depth["6"]


@pytest.mark.long
def test_code_that_is_compiled_whole_grows_by_as_much_with_every_block(compiled):
    """PyTorch 2.11 spells the arguments of operators in full: tenfold with every block, unless
    ``ops.prepare_compiler`` has kept it from that.
    """
    by_depth = null_device.run("measure.py", "depths", "on", "2", "4", "6", compiled=compiled)
    sizes = [by_depth[depth]["bytes"] for depth in ("2", "4", "6")]
    assert 10_000 < sizes[0] < sizes[1] < sizes[2] < 1_000_000, sizes
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.3), sizes


@pytest.mark.long
def test_code_that_is_compiled_whole_adds_in_a_fixed_order(compiled):
    found = null_device.run("measure.py", "atomics", "digits", compiled=compiled)
    assert found["kernels"] > 10 and found["atomics"] == 0, found
