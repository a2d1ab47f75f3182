"""Noise processes, timestep distributions, loss weights and the objective they make together."""
