"""What is compiled block by block must not grow with the number of blocks."""

import null_device
import pytest


@pytest.mark.long
def test_neither_graphs_nor_generated_code_grow_with_the_depth(compiled):
    by_depth = null_device.run("measure.py", "depths", "2", "4", "6", compiled=compiled)
    assert by_depth["2"]["graphs"] == 2  # the first block, which adds no branch, and the others
    assert by_depth["2"]["bytes"] > 10_000
    assert by_depth["2"] == by_depth["4"] == by_depth["6"]
