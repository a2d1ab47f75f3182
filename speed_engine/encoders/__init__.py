"""Pretrained models of others that turn pictures and texts into what a model takes."""
