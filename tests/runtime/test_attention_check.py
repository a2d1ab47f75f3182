"""Attention is tried in a model's own shapes; a backend that fails in them is left out."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.backends import cuda

from speed_engine import build
from speed_engine.build import attention_shapes
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.models.config import DiTConfig, MDTConfig
from speed_engine.ops import ALL_KERNELS, use_kernels
from speed_engine.presets import PRESETS
from speed_engine.runtime.attention_check import BACKENDS, AttentionShape, settle_attention
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import World

CPU = torch.device("cpu")
WIDE, NARROW = AttentionShape(1, 16, 16, 256, False), AttentionShape(2, 16, 8, 64, True)
SHAPES = {WIDE, NARROW}
NO_PLAN = "[cudnn_frontend] Error: No valid execution plans built."


@pytest.fixture(autouse=True)
def backends_as_before():
    yield
    for _, _, enable in BACKENDS.values():
        enable(True)


@pytest.fixture(params=["No available kernel", "No viable backend"])
def attention(monkeypatch, request):
    """PyTorch's choice on a GPU that prefers cuDNN; what each backend raises is up to the test."""
    raised, ran, unsuited = {}, [], request.param

    def choose(q, k, v, attn_mask=None):
        suited = {  # PyTorch's rules: flash takes no bias
            "cuDNN": cuda.cudnn_sdp_enabled(),
            "flash": cuda.flash_sdp_enabled() and attn_mask is None,
            "memory-efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
        }
        name = next((name for name, chosen in suited.items() if chosen), None)
        if name is None:
            raise RuntimeError(f"{unsuited}. Aborting execution.")
        if q.shape[-1] >= 256 and name in raised:
            raise RuntimeError(f"{raised[name]}\nat line 7")
        ran.append(name)
        scores = q @ k.transpose(-1, -2)
        return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", choose)
    return raised, ran


def settle(quiet: bool = False) -> None:
    settle_attention(SHAPES, CPU, torch.float32, quiet)


def enabled() -> list[str]:
    return [name for name, (_, is_enabled, _) in BACKENDS.items() if is_enabled()]


def test_where_attention_works_nothing_is_changed(attention, caplog):
    settle()
    assert attention[1] == ["cuDNN"] * 2  # one trial of each shape
    assert len(enabled()) == 3 and not caplog.messages


def test_a_backend_without_a_plan_for_wide_heads_is_left_out_and_named_once(attention, caplog):
    raised, ran = attention
    raised["cuDNN"] = NO_PLAN
    with caplog.at_level(logging.WARNING):
        settle()
    assert enabled() == ["flash", "memory-efficient"]  # flash, though a bias is not for it
    assert ran[-2:] == ["flash", "memory-efficient"]  # of the heads of 256, of those with a bias
    (line,) = caplog.messages
    assert f"cuDNN fails here: {NO_PLAN} (1 heads of 256, 16 to 16 tokens)" in line


def test_of_several_processes_one_says_so(attention, caplog):
    attention[0]["cuDNN"] = NO_PLAN
    settle(quiet=True)
    assert "cuDNN" not in enabled() and not caplog.messages


def test_a_backend_that_is_switched_off_stays_so_and_is_not_tried(attention, caplog):
    cuda.enable_flash_sdp(False)
    attention[0].update(dict.fromkeys(["cuDNN", "flash"], NO_PLAN))
    settle()
    assert enabled() == ["memory-efficient"]
    assert "flash" not in caplog.text


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_backend_that_fails_backward_is_left_out_wherever_it_is_tried(
    attention, monkeypatch, caplog, mode
):
    choose = F.scaled_dot_product_attention

    def refuse(_):
        raise RuntimeError(NO_PLAN)

    def attend(*given, **options):
        by_cudnn, result = cuda.cudnn_sdp_enabled(), choose(*given, **options)
        if by_cudnn:
            result.register_hook(refuse)
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with mode():
        settle()
    assert "cuDNN" not in enabled() and "cuDNN fails here" in caplog.text


def test_attention_that_runs_by_no_backend_stops_the_run(attention):
    attention[0].update(dict.fromkeys([*BACKENDS, "math"], "an illegal instruction"))
    with pytest.raises(UserError, match="attention does not run on this GPU: an illegal instr"):
        settle()


def test_on_a_gpu_a_model_s_attention_is_tried_in_the_dtype_of_its_training(monkeypatch):
    tried: list[tuple] = []
    monkeypatch.setattr(
        build, "settle_attention", lambda *given, quiet: tried.append((*given, quiet))
    )
    config = TrainConfig(kernels="off")
    for device, world in (("cpu", World()), ("cuda", World()), ("cuda", World(rank=1, size=2))):
        build.settle_operators(config, "off", torch.device(device), world)
    shapes, cuda_device = attention_shapes(config), torch.device("cuda")
    assert tried == [(shapes, cuda_device, torch.bfloat16, quiet) for quiet in (False, True)]
    use_kernels(ALL_KERNELS)


@pytest.mark.parametrize("kind, order", [("cpu", ["kernels"]), ("cuda", ["attention", "kernels"])])
def test_attention_is_settled_before_kernels_are_tried_that_call_it(monkeypatch, kind, order):
    settled = []
    for name in ("attention", "kernels"):
        monkeypatch.setattr(
            build, f"settle_{name}", lambda *_, name=name, **__: settled.append(name)
        )
    build.settle_operators(TrainConfig(), "auto", torch.device(kind))
    assert settled == order


def test_shapes_are_those_that_the_model_calls_attention_in():
    data = DataConfig(image_shape=(4, 16, 16))
    dit = TrainConfig(model=DiTConfig(dim=32, depth=2, num_heads=4, patch_size=4), data=data)
    assert attention_shapes(dit) == {AttentionShape(4, 16, 16, 8, False)}
    mdt = TrainConfig(
        model=MDTConfig(size=None, dim=32, depth=4, num_heads=2, patch_size=4), data=data
    )
    assert {s.queries for s in attention_shapes(mdt)} == {16, 11}  # all tokens, the shown ones
    assert all(s.has_bias for s in attention_shapes(mdt))
    text = attention_shapes(PRESETS["coco-t2i-dit-xl2"][1])
    assert {(s.queries, s.keys) for s in text} == {(256, 256), (256, 77)}
    unet = attention_shapes(PRESETS["cifar10-edm"][1])
    assert {s.width for s in unet} == {256}
