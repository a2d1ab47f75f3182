"""Choices follow what is asked for, what was measured and what there is; and say why."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.run.starting import machine_choices
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.machine import (
    Launching,
    choose_attention,
    choose_checksums,
    choose_compile,
    choose_generation,
    choose_jpeg_decoder,
    choose_noise,
    choose_resident,
)
from speed_engine.runtime.world import World

GPU = "NVIDIA H200"


@pytest.fixture
def gpu(monkeypatch):
    """A machine with 100 GB of free GPU memory."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 10**9, 140 * 10**9))


def test_noise_is_drawn_again_on_a_gpu_and_stored_on_a_cpu():
    assert choose_noise("cuda").value == "drawn again"
    assert "an H200 no longer" in choose_noise("cuda").reason
    assert choose_noise("cpu").value == "stored"


@pytest.mark.parametrize("size, value", [(49 * 10**9, "on"), (51 * 10**9, "off"), (None, "on")])
def test_data_are_resident_where_they_take_half_of_the_free_memory_at_most(gpu, size, value):
    choice = choose_resident("auto", "cuda", size)
    assert choice.value == value and "50% of 100.0 GB" in choice.reason


@pytest.mark.parametrize(
    "size, workers, value",
    [(2**26, 0, "on"), (2**26 + 1, 0, "off"), (1, 1, "off"), (None, 0, "on")],
)
def test_a_cpu_keeps_small_data_sets_that_no_worker_shall_read(size, workers, value):
    choice = choose_resident("auto", "cpu", size, workers=workers)
    assert choice.value == value and "67 MB" in choice.reason


def test_data_are_resident_where_it_is_asked_for(gpu):
    for wanted in ("on", "off"):
        assert choose_resident(wanted, "cuda", 10**15) == (wanted, "asked for")


def test_streaming_and_resident_data_exclude_each_other(gpu):
    assert choose_resident("auto", "cuda", 1, "stream").value == "off"
    with pytest.raises(ValueError, match="data.resident=on keeps the exact order"):
        DataConfig(resident="on", mode="stream")


def test_every_choice_of_a_run_is_among_those_that_doctor_shows():
    config = TrainConfig(device="cpu", data=DataConfig(resident="on"))
    shown = machine_choices(config).shown()
    assert shown["resident data"].value == "on" and shown["noise"].value == "stored"


def test_attention_is_pytorchs_and_says_what_xformers_lacks(monkeypatch):
    value, reason = choose_attention("auto", "cpu")
    assert value == "sdpa" and "has operators for CUDA only" in reason
    assert choose_attention("sdpa", "cpu").reason.endswith("asked for")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "xFormers is not installed" in choose_attention("auto", "cpu").reason


def test_xformers_where_it_cannot_run_is_refused_in_its_own_words():
    with pytest.raises(ValueError, match=r"attention=xformers, but xFormers \S+ has operators"):
        choose_attention("xformers", "cpu")
    # Not a device of xFormers either, and here it is asked: forward, with its operators loaded.
    with pytest.raises(ValueError, match="does not run here: .+; use sdpa or auto"):
        choose_attention("xformers", "meta")


def test_xformers_is_used_where_it_runs_and_was_asked_for(monkeypatch):
    from xformers.ops import fmha

    monkeypatch.setattr(fmha, "memory_efficient_attention", lambda q, k, v: q + k + v)
    assert choose_attention("xformers", "meta").value == "xformers"
    assert choose_attention("auto", "meta") == ("sdpa", "PyTorch's; xFormers would run, too")


@pytest.mark.parametrize(
    "compile, on_cuda", [("auto", "blocks"), ("on", "blocks"), ("blocks", "blocks"), ("off", "off")]
)
def test_the_average_is_compiled_by_blocks_on_cuda_unless_compilation_is_off(compile, on_cuda):
    assert choose_compile("auto", "cuda", 1).value == "blocks"
    assert choose_generation(compile, "cuda").value == on_cuda
    assert choose_generation(compile, "cpu").value == "off"


@pytest.mark.parametrize(
    "host, device, steps, value",
    [(0.063, 0.032, 1000, "graphs"), (0.063, 0.032, 451, "blocks"), (0.14, 0.4, 10**6, "blocks")],
)
def test_graphs_are_chosen_where_the_host_loses_more_time_than_they_take_to_compile(
    host, device, steps, value
):
    choice = choose_compile("auto", "cuda", steps, launching=Launching(host, device, 14.0))
    assert choice.value == value
    assert f"in about {1e3 * host:.0f} ms, which the GPU computes in {1e3 * device:g}" in (
        choice.reason
    )
    assert ("do not win" in choice.reason) == (value == "blocks" and host > device)
    assert choose_compile("auto", "cpu", steps, launching=Launching(host, device, 14.0)).value in (
        "on",
        "off",
    )


def test_the_reason_for_blocks_is_true_of_those_that_share_no_compilation():
    reason = choose_compile("auto", "cuda", 1).reason
    assert "Blocks that differ, as a U-Net's, take one each" in reason


def test_cuda_graphs_need_one_process_with_a_gpu():
    assert choose_compile("graphs", "cuda", 1).value == "graphs"
    with pytest.raises(UserError, match="a CPU has none; use blocks or auto"):
        choose_compile("graphs", "cpu", 1)
    with pytest.raises(UserError, match="there are 2 processes; use blocks"):
        choose_compile("graphs", "cuda", 1, World(0, 2, 0, 2))


@pytest.mark.parametrize("wanted", ["on", "blocks", "off"])
def test_compilation_that_was_asked_for_is_done(wanted):
    assert choose_compile(wanted, "cpu", 1) == (wanted, "asked for")


@pytest.mark.parametrize(
    "choose, module, first, second",
    [
        (choose_jpeg_decoder, "simplejpeg", "simplejpeg", "Pillow"),
        (choose_checksums, "zlib_ng.zlib_ng", "zlib-ng", "zlib"),
    ],
)
def test_a_library_that_cannot_be_imported_is_named_and_does_without(
    monkeypatch, choose, module, first, second
):
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert choose().value == first
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    assert choose().value == second and module in choose().reason
