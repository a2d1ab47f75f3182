"""What ``import speed_engine`` offers."""
