"""``python -m speed_engine`` is ``speed-engine``."""

from speed_engine.cli import main

main()
