"""Comparing methods at equal budget."""
