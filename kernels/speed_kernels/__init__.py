"""Operators of the diffusion training step, one per module; import from the module that owns it."""
