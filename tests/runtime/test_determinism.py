"""Deterministic algorithms: on before the GPU is, for a run that asks, and off after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speed_engine.config import TrainConfig, to_json
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.determinism import WORKSPACE, deterministic

# Prints the flags at the first look for a GPU of each of several runs, and those after the run.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from rich.console import Console
from torch._inductor import config as inductor
from speed_engine.config import TrainConfig
from speed_engine.run import starting
from speed_engine.run.folder import read_config

def flags():
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return {
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": cudnn.deterministic,
        "attention": [
            cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
        ],
        "benchmark": cudnn.benchmark,
        "inductor": inductor.deterministic,
        "initialised": torch.cuda.is_initialized(),
    }

class Seen(Exception):
    pass

def seen(wanted):
    print(json.dumps(flags()))
    raise Seen

torch.backends.cudnn.benchmark = True
starting.machine.torch_device = seen
for folder in map(Path, sys.argv[1:]):
    for resumed in (False, True):
        try:
            if resumed:
                starting.resume(folder, Console())
            else:
                starting.start(read_config(folder), folder, Console())
        except Seen:
            print(json.dumps(flags()))
"""
USUAL = {
    "workspace": None,
    "algorithms": False,
    "warn only": False,
    "filled": True,
    "cudnn": False,
    "attention": [True] * 4,
    "benchmark": True,
    "inductor": False,
    "initialised": False,
}
DETERMINISTIC = {
    "workspace": ":4096:8",
    "algorithms": True,
    "warn only": False,  # cuDNN's attention is passed over only where this is not set
    "filled": False,
    "cudnn": True,
    "attention": [False, True, True, True],
    "benchmark": False,
    "inductor": True,
    "initialised": False,
}


def test_a_run_has_its_flags_before_it_touches_a_gpu_and_leaves_none(tmp_path):
    wanted = {"usual": False, "deterministic": True, "usual again": False}
    for name, asked in wanted.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(TrainConfig(deterministic=asked)))
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != WORKSPACE}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in wanted)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    inside = [DETERMINISTIC if asked else USUAL for asked in wanted.values()]
    expected = [flags for each in inside for flags in (each, USUAL) * 2]  # started, then resumed
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_a_workspace_that_was_given_is_kept_if_results_repeat_with_it(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(True):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":4096:2:16:8")
    with pytest.raises(UserError, match="to be :4096:8 or :16:8, but .* has :4096:2:16:8; unset"):
        deterministic(True).__enter__()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_that_fails_leaves_no_flags(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    with pytest.raises(ZeroDivisionError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ


def test_a_caller_who_asked_for_warnings_only_has_them_again():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_xformers_is_not_promised_to_be_deterministic():
    with pytest.raises(UserError, match="attention=xformers.*choose sdpa"):
        TrainConfig(deterministic=True, attention="xformers")
