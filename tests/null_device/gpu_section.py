"""A section of ``benchmarks/gpu.py`` on the null device; run by the tests beside this file.

Usage: ``gpu_section.py RESULTS SECTION``, where RESULTS is the folder of the results.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import gpu
import harness

with patch.object(harness, "RESULTS", Path(sys.argv.pop(1))):
    gpu.main()
