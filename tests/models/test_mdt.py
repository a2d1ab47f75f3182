"""The masked diffusion transformer: what a mask hides, names, sizes, errors."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speed_engine.models.layers import mdt_block
from speed_engine.models.layers.embeddings import _Embedded, embedded
from speed_engine.models.layers.mdt_block import (
    MdtBlock,
    RelativePositionBias,
    Shown,
    bias_among,
    distance_index,
)
from speed_engine.models.mdt import MDT, MDTv2
from speed_engine.ops import Stream, random_bits

SMALL: dict[str, Any] = {
    "input_size": (8, 12), "channels": 3, "patch_size": 2, "dim": 32, "depth": 4, "num_heads": 4,
    "num_classes": 5, "decode_layers": 2,
}  # fmt: skip
VERSIONS = [MDT, MDTv2]


def model(version, **changes) -> MDT:
    torch.manual_seed(0)
    return version(**(SMALL | changes))


def trained(version, **changes) -> MDT:
    """Away from the zero initialisation."""
    net = model(version, **changes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(batch: int = 3):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 8, 12), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


def draws(net: MDT, batch: int = 3) -> torch.Tensor:
    return random_bits(torch.tensor(0), torch.arange(batch), net.mask_words, Stream.TOKEN_MASK)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_model_answers_zero_masked_or_not(version):
    net = model(version)
    assert not bool(net(*inputs()).any())
    assert not bool(net(*inputs(), mask_draws=draws(net)).any())


def test_a_new_block_is_the_identity():
    net, condition = model(MDT), torch.randn(3, 32)
    tokens = torch.randn(3, 24, 32)
    assert torch.equal(net.blocks[0](tokens, condition), tokens)
    shown = net.choose_shown(draws(net))
    assert torch.equal(net.blocks[0](tokens[:, :16], condition, shown), tokens[:, :16])


def defined(block: MdtBlock, x: Tensor, condition: Tensor, shown: Shown, skip: Tensor) -> Tensor:
    """What the papers say a block computes."""
    assert block.skip_linear is not None and shown.valid is not None
    x = block.skip_linear(torch.cat([x, skip], dim=2))
    modulation = block.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
    shift, scale, gate = modulation[:3]
    y = F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift
    width = x.shape[2] // block.attn.num_heads
    q, k, v = (each.unflatten(2, (-1, width)) for each in block.attn.qkv(y).chunk(3, dim=2))
    bias = torch.stack([block.attn.rel_pos_bias()[:, p][:, :, p] for p in shown.places])
    logits = torch.einsum("bqmd,bkmd->bmqk", q, k) / width**0.5 + bias
    logits = logits.masked_fill(~shown.valid[:, None, None], -torch.inf)
    attended = torch.einsum("bmqk,bkmd->bqmd", logits.softmax(dim=3), v).flatten(2)
    x = x + gate * block.attn.proj(attended)
    shift, scale, gate = modulation[3:]
    y = F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift
    return x + gate * block.mlp.fc2(F.gelu(block.mlp.fc1(y), approximate="tanh"))


def test_a_block_is_its_definition():
    block = MdtBlock(dim=32, num_heads=4, mlp_ratio=2.0, grid=(4, 6), skip=True).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    tokens, skip = torch.randn(2, 3, 16, 32, dtype=torch.float64, generator=generator)
    condition = torch.randn(3, 32, dtype=torch.float64, generator=generator)
    places = torch.stack([torch.randperm(24, generator=generator)[:16] for _ in range(3)])
    shown = Shown(places, torch.rand(3, 16, generator=generator) < 0.8)
    answer = block(tokens, condition, shown, skip)
    torch.testing.assert_close(answer, defined(block, tokens, condition, shown, skip))


@pytest.mark.parametrize("version", VERSIONS)
def test_full_and_masked_answers_train_every_parameter(version):
    net = trained(version)
    loss = net(*inputs()).square().sum() + net(*inputs(), mask_draws=draws(net)).square().sum()
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_hidden_patches_of_the_first_version_leave_no_trace():
    net = trained(MDT)
    x, t, labels = inputs()
    x.requires_grad_()
    net(x, t, labels, mask_draws=draws(net)).square().sum().backward()
    assert x.grad is not None
    seen = x.grad.unflatten(3, (6, 2)).unflatten(2, (4, 2)).abs().amax((1, 3, 5)).flatten(1) > 0
    expected = torch.zeros_like(seen)
    expected.scatter_(1, net.choose_shown(draws(net)).places, True)
    assert torch.equal(seen, expected)
    assert int(seen.sum()) == 3 * int(24 * 0.7)


def test_the_second_version_hides_three_to_five_tenths():
    net = trained(MDTv2)
    words = torch.randint(0, 2**32, (3, 25))
    words[:, 24] = torch.tensor([0, 2**31, 2**32 - 1])
    shown = net.choose_shown(words)
    assert shown.valid is not None
    assert shown.valid.sum(1).tolist() == [int(24 * 0.7), int(24 * 0.6), int(24 * 0.5)]


def test_tokens_that_are_not_valid_are_as_good_as_absent(monkeypatch):
    """Fixed shapes cost nothing: the answer is that of an encoder which never had the tokens."""
    net = trained(MDTv2)
    words = draws(net)
    words[:, -1] = 2**31
    padded = net(*inputs(), mask_draws=words)
    count = int(24 * 0.6)
    assert count < net.num_shown
    places = net.choose_shown(words).places[:, :count]
    monkeypatch.setattr(net, "choose_shown", lambda _: Shown(places, None))
    torch.testing.assert_close(padded, net(*inputs(), mask_draws=words), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mask_changes_the_answer_and_depends_on_its_draws_alone(version):
    net = trained(version)
    masked = net(*inputs(), mask_draws=draws(net))
    assert not torch.equal(masked, net(*inputs()))
    x, t, labels = inputs()
    alone = net(x[1:2], t[1:2], labels[1:2], mask_draws=draws(net)[1:2])
    torch.testing.assert_close(alone, masked[1:2], rtol=1e-5, atol=1e-5)


def test_every_place_is_hidden_equally_often():
    net = model(MDT)
    shown = net.choose_shown(draws(net, 4000)).places
    counts = torch.bincount(shown.flatten(), minlength=24).double()
    share = net.num_shown / 24
    assert float((counts / 4000 - share).abs().max()) < 4 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 4), (5, 2)])
def test_places_equally_far_apart_share_a_bias(rows, columns):
    places = list(itertools.product(range(rows), range(columns)))
    index, number_of = distance_index(rows, columns), {}
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        distance = a[0] - b[0], a[1] - b[1]
        assert number_of.setdefault(distance, int(index[i, j])) == int(index[i, j])
    assert sorted(number_of.values()) == list(range((2 * rows - 1) * (2 * columns - 1)))


@pytest.mark.parametrize("by", [embedded, _Embedded.apply], ids=["on a CPU", "on a GPU"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (5, 2)])
def test_the_bias_is_of_the_table_by_distance_and_so_is_its_gradient(monkeypatch, grid, by):
    monkeypatch.setattr(mdt_block, "embedded", by)
    bias = RelativePositionBias(grid, 3).double()
    table = bias.relative_position_bias_table
    found, plain = bias(), table[distance_index(*grid)].permute(2, 0, 1)
    assert torch.equal(found, plain) and found.is_contiguous()
    upstream = torch.randn(plain.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, table, upstream)[0] for y in (found, plain)]
    torch.testing.assert_close(*gradients)


def test_the_bias_among_shown_tokens_is_that_of_their_places():
    bias = torch.randn(2, 6, 6)
    places = torch.tensor([[3, 0, 5], [1, 2, 4]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    among = bias_among(bias, Shown(places, valid))
    for image, head, i, j in itertools.product(range(2), range(2), range(3), range(3)):
        expected = bias[head, places[image, i], places[image, j]]
        if not valid[image, j]:
            expected = torch.tensor(-torch.inf)
        assert among[image, head, i, j] == expected


@pytest.mark.parametrize(
    "version, decode_layers, published", [(MDT, 2, 35_797_208), (MDTv2, 6, 38_454_872)]
)
def test_published_sizes_have_the_parameters_of_the_originals(
    version, decode_layers, published, without_initialisation
):
    with torch.device("meta"):
        net = version(
            input_size=(32, 32),
            channels=4,
            patch_size=2,
            dim=384,
            depth=12,
            num_heads=6,
            num_classes=1000,
            decode_layers=decode_layers,
            learn_sigma=True,
        )
    assert sum(parameter.numel() for parameter in net.parameters()) == published


def test_names_are_those_of_the_originals():
    common = {
        "pos_embed", "decoder_pos_embed", "mask_token", "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias", "final_layer.linear.weight",
        "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table",
        "sideblocks.0.attn.rel_pos_bias.relative_position_index",
    }  # fmt: skip
    first, second = (set(model(version).state_dict()) for version in VERSIONS)
    assert common | {"blocks.3.attn.qkv.weight", "blocks.0.mlp.fc1.bias"} <= first
    assert {
        "en_inblocks.0.attn.qkv.weight",
        "en_outblocks.0.skip_linear.weight",
        "de_blocks.1.skip_linear.bias",
        "de_blocks.0.adaLN_modulation.1.weight",
        *common,
    } <= second


def test_a_model_without_classes_takes_no_labels():
    net = trained(MDT, num_classes=None)
    x, t, _ = inputs()
    assert net(x, t).shape == x.shape


@pytest.mark.parametrize(
    "version, changes, message",
    [
        (MDT, {"patch_size": 5}, "patch_size=5 does not divide the input size 8 x 12"),
        (MDT, {"num_heads": 5}, "num_heads=5 does not divide the width 32; choose from"),
        (MDT, {"dim": 30, "num_heads": 5}, "dim=30 is not a multiple of 4"),
        (MDT, {"decode_layers": 5}, r"decode_layers=5 must lie in \[1, depth=4\]"),
        (MDT, {"mask_ratio": 0.99}, "mask_ratio=0.99 hides up to 0.99 of 24 tokens"),
        (MDT, {"mask_ratio": 0.0}, "mask_ratio=0.0 hides up to 0 of 24 tokens"),
        (MDTv2, {"mask_ratio": 0.8}, "mask_ratio=0.8 hides up to 1 of 24 tokens"),
        (MDTv2, {"decode_layers": 1}, r"decode_layers=1 .* choose from \[2, 4\]"),
    ],
)
def test_numbers_that_do_not_fit_are_named(version, changes, message):
    with pytest.raises(ValueError, match=message):
        model(version, **changes)
