"""Processes, files and the machine that a run uses."""
