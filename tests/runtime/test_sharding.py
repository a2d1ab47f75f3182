"""Where a model whose parameters are laid out over processes computes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speed_engine.runtime.sharding import computing_device


@pytest.mark.parametrize("mesh, expected", [(None, "cpu"), ("cpu", "cpu"), ("cuda", "cuda:1")])
def test_offloaded_parameters_do_not_say_where_a_model_computes(monkeypatch, mesh, expected):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    parameter = SimpleNamespace(device=torch.device("cpu"))
    if mesh is not None:
        parameter.device_mesh = SimpleNamespace(device_type=mesh)
    model: Any = SimpleNamespace(parameters=lambda: iter([parameter]))
    assert computing_device(model) == torch.device(expected)
