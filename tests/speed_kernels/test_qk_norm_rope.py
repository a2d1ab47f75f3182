"""RMS norm and rotation of queries and keys, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from speed_kernels.qk_norm_rope import (
    MAX_DIM,
    _qk_norm_rope,
    _qk_norm_rope_backward,
    qk_norm_rope,
    qk_norm_rope_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Device = torch.device | str
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["packed", "head-major", "token-major", "every other element"]
NAMES = ["q_out", "k_out", "dq", "dk", "dq_weight", "dk_weight"]


def place(values, layout):
    """(2, B, H, N, D) values as q and k that lie in memory as said."""
    both, batch, heads, tokens, dim = values.shape
    if layout == "packed":
        buffer = values.new_zeros(batch, tokens, 3, heads, dim)
        views = buffer.permute(2, 0, 3, 1, 4)[:2]
    elif layout == "token-major":
        views = values.new_zeros(both, batch, tokens, heads, dim).transpose(2, 3)
    elif layout == "every other element":
        views = values.new_zeros(both, batch, heads, tokens, 2 * dim)[..., ::2]
    else:
        views = torch.zeros_like(values)
    return views.copy_(values).unbind()


def draw(
    shape=(2, 3, 5, 12),
    dtype=torch.float32,
    layout="packed",
    device: Device = DEVICE,
    per_image=False,
):
    """q, k, their weights, cos, sin; then the gradients from above. cos and sin are of no table."""
    batch, _, tokens, dim = shape
    rows = (batch, tokens) if per_image else (tokens,)
    generator = torch.Generator().manual_seed(0)
    values, upstream, weights, tables = (
        torch.randn(size, generator=generator)
        for size in ((2, *shape), (2, *shape), (2, dim), (2, *rows, dim))
    )
    q, k = place(values.to(device, dtype), layout)
    q_out, k_out = place(upstream.to(device, dtype), layout)
    return (q, k, *(1 + weights).to(device), *tables.to(device)), (q_out, k_out)


def run(operator, inputs, upstream, dtype=None):
    q, k, q_weight, k_weight, cos, sin = inputs
    leaves = [t.detach() if dtype is None else t.to(dtype) for t in (q, k, q_weight, k_weight)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = operator(*leaves, cos, sin)
    upstream = [t.to(outputs[0].dtype) for t in upstream]
    return dict(
        zip(NAMES, [*outputs, *torch.autograd.grad(outputs, leaves, upstream)], strict=True)
    )


@settings(max_examples=12)
@given(
    shape=st.tuples(
        st.integers(1, 2),
        st.integers(1, 5),
        st.integers(1, 18),
        st.integers(1, 20).map((2).__mul__),
    ),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    per_image=st.booleans(),
)
def test_matches_float64_as_well_as_eager_does(shape, dtype, layout, per_image, assert_accurate):
    inputs, upstream = draw(shape, dtype, layout, per_image=per_image)
    truth = run(qk_norm_rope_reference, inputs, upstream, torch.float64)
    eager, fused = (run(f, inputs, upstream) for f in (qk_norm_rope_reference, qk_norm_rope))
    for name in truth:
        assert fused[name].dtype == (torch.float32 if name.endswith("weight") else dtype)
        assert_accurate(name, fused[name], eager[name], truth[name])


@pytest.mark.parametrize("dim, heads", [(72, 16), (64, 40), (256, 3)])
def test_heads_of_real_models_are_covered(dim, heads, assert_accurate):
    """More heads than a program holds, and widths that are no power of two."""
    inputs, upstream = draw((1, heads, 3, dim), torch.bfloat16)
    truth = run(qk_norm_rope_reference, inputs, upstream, torch.float64)
    eager, fused = (run(f, inputs, upstream) for f in (qk_norm_rope_reference, qk_norm_rope))
    for name in truth:
        assert_accurate(name, fused[name], eager[name], truth[name])


@pytest.mark.parametrize("operator", [qk_norm_rope_reference, qk_norm_rope])
def test_tables_of_each_image_turn_each_image_as_if_alone(operator):
    inputs, upstream = draw((3, 2, 5, 8), per_image=True)
    q, k, q_weight, k_weight, cos, sin = inputs
    together = run(operator, inputs, upstream)
    for i in range(3):
        own = q[i : i + 1], k[i : i + 1], q_weight, k_weight, cos[i], sin[i]
        alone = run(operator, own, [gradient[i : i + 1] for gradient in upstream])
        for name in ("q_out", "k_out", "dq", "dk"):
            torch.testing.assert_close(alone[name], together[name][i : i + 1])


def test_a_rotation_keeps_the_length_and_turns_with_the_position():
    (q, k, *_), _ = draw((1, 2, 4, 8))
    angles = torch.arange(4.0, device=DEVICE)[:, None] * torch.rand(4, device=DEVICE)
    cos, sin = (f(torch.cat([angles, angles], dim=1)) for f in (torch.cos, torch.sin))
    ones = torch.ones(8, device=DEVICE)
    q_out, _ = qk_norm_rope(q, k, ones, ones, cos, sin, eps=0.0)
    lengths = torch.full_like(q[..., 0], 8**0.5)
    torch.testing.assert_close(q_out.norm(dim=-1), lengths)
    q, k = (x[:, :, :1].expand_as(x) for x in (q, k))  # one query and one key, at every position
    q_out, k_out = qk_norm_rope(q, k, ones, ones, cos, sin)
    scores = q_out @ k_out.mT  # depend on the distance only
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1])


def test_where_a_tensor_lies_does_not_change_a_bit():
    results = [run(qk_norm_rope, *draw(layout=layout)) for layout in LAYOUTS]
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in NAMES)


def test_queries_and_keys_in_a_packed_buffer_are_not_copied():
    inputs, _ = draw((1, 2, 3, 16), torch.bfloat16)
    q, k, q_weight, k_weight, cos, sin = inputs
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = qk_norm_rope(q.requires_grad_(), k, q_weight, k_weight, cos, sin)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs}
    assert all(out.transpose(1, 2).is_contiguous() for out in outputs)  # as attention has it


def test_tensors_may_lie_further_apart_than_int32_counts():
    """Two images at the ends of a buffer of which only they are ever touched."""
    inputs, upstream = draw((2, 1, 3, 8), torch.bfloat16)
    near = run(qk_norm_rope, inputs, upstream)
    buffer = torch.empty(2**31 + 24, dtype=torch.bfloat16, device=DEVICE)
    far = [buffer.as_strided(t.shape, (2**31, 8, 8, 1)).copy_(t) for t in inputs[:1]]
    other = run(qk_norm_rope, (*far, *inputs[1:]), upstream)
    assert all(torch.equal(near[name], other[name]) for name in NAMES)


def test_float64_passes_gradcheck():
    (q, k, q_weight, k_weight, cos, sin), _ = draw((1, 2, 2, 4), torch.float64, device="cpu")
    leaves = [t.double().requires_grad_() for t in (q, k, q_weight, k_weight)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: qk_norm_rope(a, b, c, d, cos, sin), leaves)


def test_the_operators_are_registered_soundly():
    (q, k, q_weight, k_weight, cos, sin), upstream = draw((1, 2, 3, 8))
    leaves = [t.detach().requires_grad_() for t in (q, k, q_weight, k_weight)]
    torch.library.opcheck(_qk_norm_rope, (*leaves, cos, sin, 1e-6))
    plain = (*upstream, q, k, q_weight, k_weight, cos, sin, 1e-6)
    torch.library.opcheck(_qk_norm_rope_backward, plain)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiles_whole_under_autocast_and_checkpointing(autocast):
    torch._dynamo.reset()
    qkv = torch.nn.Linear(24, 72).to(DEVICE)
    _, _, q_weight, k_weight, cos, sin = draw((2, 2, 5, 12))[0]
    for weight in (q_weight, k_weight):
        weight.requires_grad_()

    def attend(x):
        q, k, v = qkv(x).view(2, 5, 3, 2, 12).permute(2, 0, 3, 1, 4)
        q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def step(x, checkpointed):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            if checkpointed:
                return checkpoint(attend, x, use_reentrant=False, preserve_rng_state=False)
            return attend(x)

    x = torch.randn(2, 5, 24, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [*qkv.parameters(), q_weight, k_weight]
    results = [
        torch.autograd.grad(f(x, checkpointed).float().square().sum(), leaves)
        for f, checkpointed in ((step, False), (compiled, False), (compiled, True))
    ]
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8), (2, 0, 3, 8)])
def test_nothing_to_rotate_is_fine(shape):
    figures = run(qk_norm_rope, *draw(shape))
    assert figures["q_out"].shape == figures["dk"].shape == shape
    assert torch.equal(figures["dq_weight"], torch.zeros(8, device=DEVICE))


def test_what_cannot_be_launched_is_named():
    (q, k, q_weight, k_weight, cos, sin), _ = draw((2, 3, 5, 8))
    with pytest.raises(ValueError, match=r"D even; got torch.float32 \(2, 3, 5, 7\)"):
        qk_norm_rope(q[..., :7], k, q_weight, k_weight, cos, sin)
    with pytest.raises(ValueError, match=r"k must match q.*; got torch.bfloat16 \(2, 3, 5, 8\)"):
        qk_norm_rope(q, k.bfloat16(), q_weight, k_weight, cos, sin)
    with pytest.raises(ValueError, match=r"got torch.float32 \(2, 3, 5, 8\) on meta"):
        qk_norm_rope(q, k.to("meta"), q_weight, k_weight, cos, sin)
    with pytest.raises(ValueError, match=r"k_weight must be \(8,\).*; got torch.float32 \(4,\)"):
        qk_norm_rope(q, k, q_weight, k_weight[:4], cos, sin)
    with pytest.raises(ValueError, match=r"sin must be float32 \(5, 8\).*; got torch.bfloat16"):
        qk_norm_rope(q, k, q_weight, k_weight, cos, sin.bfloat16())
    with pytest.raises(ValueError, match="cos must be .*requires_grad=True"):
        qk_norm_rope(q, k, q_weight, k_weight, cos.clone().requires_grad_(), sin)
    of_each = cos.expand(2, 5, 8)
    with pytest.raises(ValueError, match=r"sin must be float32 \(2, 5, 8\).*; got .*\(5, 8\)"):
        qk_norm_rope(q, k, q_weight, k_weight, of_each, sin)
    with pytest.raises(ValueError, match=r"cos must be float32 \(2, 5, 8\).*; got .*\(1, 5, 8\)"):
        qk_norm_rope(q, k, q_weight, k_weight, of_each[:1], of_each[:1])


def test_heads_wider_than_a_program_holds_go_through_the_reference():
    inputs, upstream = draw((1, 2, 3, MAX_DIM + 8))
    found, expected = (run(f, inputs, upstream) for f in (qk_norm_rope, qk_norm_rope_reference))
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
