"""Named runs: what each trains, and what to expect of it."""

from speed_engine.config import TrainConfig

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "digits": ("UCI digits, 8 x 8, ten classes; minutes on two CPU cores", TrainConfig()),
}
