"""Attention backends agree; rotation is relative."""

import pytest
import torch
from torch import Tensor

from speed_engine.models.dit import DiT, dit_size
from speed_engine.models.layers.attention import (
    BACKENDS,
    RotaryAttention,
    SelfAttention,
    sdpa,
)
from speed_engine.models.layers.embeddings import rotary_grid
from speed_engine.ops import qk_norm_rope


def heads(tokens: int, batch: int = 1, width: int = 8) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(batch, 3, tokens, width, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(
    ("keys", "dtype", "spelled_out"),
    [(8, torch.float64, True), (9, torch.float64, False), (8, torch.bfloat16, False)],
)
def test_compiled_for_a_cpu_few_keys_are_attended_to_by_the_definition(keys, dtype, spelled_out):
    q = heads(5, batch=2)[0].to(dtype).requires_grad_()
    k, v = (x.to(dtype).requires_grad_() for x in heads(keys, batch=2)[1:])
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    answers = torch.compile(sdpa, backend=record, fullgraph=True)(q, k, v), sdpa(q, k, v)
    assert any("scaled_dot_product" in name for name in called) is not spelled_out
    torch.testing.assert_close(*answers)
    gradients = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in answers]
    torch.testing.assert_close(*gradients)


def test_xformers_says_why_it_cannot():
    """The library itself, which has operators for CUDA only."""
    pytest.importorskip("xformers")
    with pytest.raises(NotImplementedError, match="."):
        q, k, v = heads(4)
        BACKENDS["xformers"](q, k, v)


def test_xformers_gets_its_own_order_of_axes(monkeypatch):
    """With its documented formula in place of its CUDA operators."""
    fmha = pytest.importorskip("xformers.ops.fmha")

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        logits = q @ k.transpose(-2, -1) * query.shape[-1] ** -0.5
        return (logits.softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(fmha, "memory_efficient_attention", formula)
    q, k, v = heads(7, batch=2)
    torch.testing.assert_close(BACKENDS["xformers"](q, k, v), sdpa(q, k, v))


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="attention='flash' is unknown; choose from sdpa, xform"):
        SelfAttention(16, 2, "flash")


def test_rotation_depends_on_relative_position_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    cos, sin = (table.view(5, 7, 16).double() for table in rotary_grid(5, 7, 16))

    def logit(a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        turned = [x * cos[at] + torch.cat([-x[8:], x[:8]]) * sin[at] for x, at in ((q, a), (k, b))]
        return turned[0] @ turned[1]

    torch.testing.assert_close(logit((0, 0), (2, 3)), logit((2, 1), (4, 4)), atol=1e-6, rtol=0)
    for other in ((2, 4), (3, 3), (3, 2)):
        assert abs(logit((0, 0), (2, 3)) - logit((0, 0), other)) > 1e-2


def test_queries_and_keys_are_normalised_then_turned_as_complex_numbers():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 12, 8, dtype=torch.float64)
    weights = torch.rand(2, 8, dtype=torch.float64) + 0.5
    cos, sin = rotary_grid(3, 4, 8)
    angle = torch.complex(cos[:, :4], sin[:, :4])
    answers = qk_norm_rope(q, k, weights[0], weights[1], cos, sin, 1e-6)
    for x, weight, found in zip((q, k), weights, answers, strict=True):
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        turned = torch.complex(y[..., :4], y[..., 4:]) * angle
        expected = torch.cat([turned.real, turned.imag], dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_logits_of_rotary_attention_stay_bounded():
    """However large the tokens: normalised heads of width K have logits of at most sqrt(K)."""
    attention, tokens = RotaryAttention(32, 2), 1e4 * torch.randn(1, 6, 32)
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
        return sdpa(q, k, v)

    attention.attend = attend
    attention(tokens, *rotary_grid(2, 3, 16))
    assert seen[0].abs().max() <= 4.001


def test_the_modern_variant_costs_what_the_original_does():
    """Names as in LightningDiT; parameters within 0.2 %."""
    with torch.device("meta"):
        sizes = {"input_size": (32, 32), "channels": 4, "num_classes": 1000}
        modern, original = (DiT(**sizes, **dit_size(f"DiT-L/2{v}")) for v in ("-modern", ""))
    counts = [sum(p.numel() for p in net.parameters()) for net in (modern, original)]
    assert counts[0] == pytest.approx(counts[1], rel=2e-3)
    added = modern.state_dict().keys() - original.state_dict().keys()
    assert {name.removeprefix("blocks.0.") for name in added if name.startswith("blocks.0.")} == {
        "attn.q_norm.weight", "attn.k_norm.weight",
        "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias",
    }  # fmt: skip
    assert modern.state_dict()["blocks.0.mlp.w12.weight"].shape == (2 * 2736, 1024)


def test_a_new_modern_block_is_the_identity_and_its_parameters_train():
    torch.manual_seed(0)
    net = DiT(
        input_size=(8, 8), channels=3, patch_size=2, dim=32, depth=2, num_heads=4, num_classes=5,
        variant="modern",
    )  # fmt: skip
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(net.blocks[0](tokens, torch.randn(2, 32), *net.rotation()), tokens)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 871]), torch.tensor([0, 5])
    net(*inputs).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_heads_that_cannot_turn_on_two_axes_are_named():
    with pytest.raises(ValueError, match="a head of width 6 cannot be rotated"):
        DiT(
            input_size=(8, 8), channels=3, patch_size=2, dim=12, depth=1, num_heads=2,
            num_classes=5, variant="modern",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["DiT-M/2", "DiT-XL", "DiT-XL/0", "dit-xl/2", "DiT-B/2-old"])
def test_a_name_of_no_dit_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' names no DiT.*S, B, L, XL"):
        dit_size(name)
