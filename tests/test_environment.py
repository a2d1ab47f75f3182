"""What will be used here, and the reasons given."""

import importlib.util

import pytest

from speed_engine.environment import choose_attention, choose_compile


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
    with pytest.raises(ValueError, match="does not run here: No operator found.*use sdpa or auto"):
        choose_attention("xformers", "meta")


def test_xformers_is_used_where_it_runs_and_was_asked_for(monkeypatch):
    from xformers.ops import fmha

    monkeypatch.setattr(fmha, "memory_efficient_attention", lambda q, k, v: q + k + v)
    assert choose_attention("xformers", "meta").value == "xformers"
    assert choose_attention("auto", "meta") == ("sdpa", "PyTorch's; xFormers would run, too")


@pytest.mark.parametrize("wanted", ["on", "blocks", "off"])
def test_compilation_that_was_asked_for_is_done(wanted):
    assert choose_compile(wanted, "cpu", 1) == (wanted, "asked for")
