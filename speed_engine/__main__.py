"""``python -m speed_engine`` is ``speed-engine``."""

from speed_engine.cli import main

if __name__ == "__main__":  # processes that a comparison starts import this, too
    main()
