"""``speed-engine shards`` that is killed by SIGKILL once so many samples are done.

Usage: ``killed.py GOAL make|encode ...``.
"""

import os
import signal
import sys

from speed_engine import cli
from speed_engine.runtime.progress import SampleProgress

GOAL = int(sys.argv[1])
done = 0


def advance(self: SampleProgress, samples: int) -> None:
    """Count the samples, and end where they are enough."""
    global done
    done += samples
    if done >= GOAL:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # workers import this file, too
    SampleProgress.advance = advance
    cli.main(["shards", *sys.argv[2:]])
