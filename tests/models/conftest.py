"""Fixtures of the model tests."""

import pytest
import torch
from torch import nn


@pytest.fixture
def without_initialisation(monkeypatch):
    """Random initialisation is slow on the meta device, and does nothing there."""
    for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    for name in ("xavier_uniform_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)
