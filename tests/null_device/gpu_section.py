"""A section of ``benchmarks/gpu.py`` on the null device; run by the tests beside this file.

Usage: ``gpu_section.py RESULTS SECTION --seconds N``, where RESULTS is the folder of the results.
"""

import sys
from pathlib import Path

import harness

harness.RESULTS = Path(sys.argv.pop(1))

if __name__ == "__main__":
    import gpu

    gpu.main()
