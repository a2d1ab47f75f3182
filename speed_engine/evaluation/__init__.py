"""Evaluation of generated images: generation, features, fidelity, speed-up and reports."""
