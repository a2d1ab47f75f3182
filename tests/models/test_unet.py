"""The U-Net of ADM and latent diffusion: names, initial behaviour, memory formats, errors."""

from typing import Any

import pytest
import torch

from speed_engine.models import unet
from speed_engine.models.layers.group_norm import group_norm_silu
from speed_engine.models.layers.spatial_transformer import SpatialTransformer
from speed_engine.models.layers.unet_layers import AttentionBlock, ResBlock
from speed_engine.models.unet import UNET_SIZES, UNet
from speed_engine.runtime.sharding import blocks

SMALL: dict[str, Any] = {
    "input_size": (8, 12), "in_channels": 3, "out_channels": 3, "model_channels": 64,
    "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,), "num_heads": 4,
}  # fmt: skip
KINDS: dict[str, Any] = {
    "ldm": {"num_classes": 5},
    "adm": {"num_classes": 5, "scale_shift_norm": True, "resblock_updown": True},
    "tokens": {"token_dim": 16},
}


def model(**changes) -> UNet:
    torch.manual_seed(0)
    return UNet(**(SMALL | changes))


def trained(net):
    """Away from the zero initialisation, with activations of order one."""
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        torch.nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)
    return net


def inputs(net: UNet) -> dict[str, torch.Tensor]:
    given = {"x": torch.randn(2, 3, 8, 12), "t": torch.tensor([0, 999])}
    if net.token_dim is not None:
        return given | {"tokens": torch.randn(2, 7, net.token_dim)}
    return given if net.num_classes is None else given | {"labels": torch.tensor([0, 5])}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_answers_zero_whatever_it_sees(kind):
    net = model(**KINDS[kind])
    assert not bool(net(**inputs(net)).any())


def test_new_blocks_are_the_identity():
    x, embedding = torch.randn(2, 64, 4, 6), torch.randn(2, 32)
    for scale_shift_norm in (False, True):
        assert torch.equal(ResBlock(64, 64, 32, scale_shift_norm, 0.0, None)(x, embedding), x)
    assert torch.equal(AttentionBlock(64, 4)(x), x)
    assert torch.equal(SpatialTransformer(64, 4, 16, depth=2)(x, torch.randn(2, 7, 16)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_trained(kind):
    net = trained(model(**KINDS[kind]))
    net(**inputs(net)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_names_are_those_of_the_original():
    names = set(model(num_classes=5, transformer_depth=1, token_dim=16).state_dict())
    transformer = "output_blocks.0.1.transformer_blocks.0"
    assert {
        "time_embed.0.weight",
        "label_emb.weight",
        "input_blocks.0.0.bias",
        "input_blocks.1.0.in_layers.0.weight",
        "input_blocks.1.0.in_layers.2.weight",
        "input_blocks.1.0.emb_layers.1.bias",
        "input_blocks.1.0.out_layers.3.weight",
        "input_blocks.2.0.op.weight",
        "input_blocks.3.0.skip_connection.weight",
        "middle_block.1.proj_in.weight",
        "output_blocks.1.2.conv.weight",
        f"{transformer}.attn1.to_q.weight",
        f"{transformer}.attn2.to_out.0.bias",
        f"{transformer}.ff.net.0.proj.weight",
        f"{transformer}.ff.net.2.weight",
        f"{transformer}.norm3.bias",
        "out.0.weight",
        "out.2.weight",
    } <= names


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_embeddings_and_the_output_is_in_blocks(kind):
    net = model(**KINDS[kind])
    found = blocks(net)
    assert {*net.middle_block} <= {*found}  # each one is compiled, and gathered, by itself
    inside = {parameter for block in found for parameter in block.parameters()}
    outside = {name for name, parameter in net.named_parameters() if parameter not in inside}
    assert {name.partition(".")[0] for name in outside} <= {"time_embed", "label_emb", "out"}


@pytest.mark.parametrize(
    "size, arguments, published",
    [
        ("speed", {"in_channels": 4, "out_channels": 4, "learn_sigma": True}, 35_876_104),
        ("ldm-ffhq", {}, 274_056_163),
        ("ldm-imagenet", {"token_dim": 512}, 400_920_579),
        # 999 classes and "no label" are as many rows as ADM's 1000.
        ("adm-64", {"num_classes": 999, "learn_sigma": True}, 295_904_454),
        ("adm-256", {"num_classes": 999, "learn_sigma": True}, 553_838_086),
    ],
)
def test_published_sizes_have_the_parameters_of_the_originals(
    size, arguments, published, without_initialisation
):
    with torch.device("meta"):
        channels = {"input_size": (64, 64), "in_channels": 3, "out_channels": 3}
        net = UNet(**(channels | UNET_SIZES[size] | arguments))
    assert sum(parameter.numel() for parameter in net.parameters()) == published


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_equals_contiguous(kind):
    net = trained(model(**KINDS[kind]))
    given = inputs(net)
    expected = net(**given)
    given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    answer = net.to(memory_format=torch.channels_last)(**given)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    assert answer.is_contiguous(memory_format=torch.channels_last)


def test_images_are_laid_out_for_the_first_block(monkeypatch):
    """On a GPU with channels last, here by a layout that any device has."""
    net, seen = model(), []
    monkeypatch.setattr(unet, "laid_out", lambda x: x.contiguous(memory_format=torch.channels_last))
    net.input_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(**inputs(net))
    (x,) = seen
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def test_dropout_is_off_unless_asked_for_and_in_evaluation():
    net = trained(model(dropout=0.5, num_classes=5))
    given = inputs(net)
    assert not torch.equal(net(**given), net(**given))
    net.eval()
    assert torch.equal(net(**given), net(**given))
    plain = trained(model(num_classes=5))
    assert torch.equal(plain(**given), plain(**given))


def test_scale_and_shift_come_before_silu():
    x, scale, shift = torch.randn(2, 8, 3, 5), torch.randn(2, 8), torch.randn(2, 8)
    weight, bias = torch.randn(8), torch.randn(8)
    y = group_norm_silu(x, 4, weight, bias, scale, shift, eps=1e-5)
    groups = x.view(2, 4, -1)
    deviation = (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = ((groups - groups.mean(2, keepdim=True)) / deviation).view_as(x)
    normed = normed * weight[:, None, None] + bias[:, None, None]
    told = normed * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(y, told * told.sigmoid())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": (8, 13)}, "its size 8 x 13 must be a multiple of 2 both ways"),
        ({"num_heads": 5}, "num_heads=5 does not divide an attention's 128 channels; choose from"),
        ({"num_head_channels": 48}, "num_head_channels=48 does not divide"),
        ({"model_channels": 40}, "model_channels=40 at multiplier 1 makes 40 channels"),
        ({"attention_resolutions": (4,)}, r"attention_resolutions=\(4,\) are downsampling rates"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_a_missing_and_a_useless_condition_are_refused():
    x, t, labels = torch.randn(1, 3, 8, 12), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="this U-Net needs labels"):
        model(num_classes=5)(x, t)
    with pytest.raises(ValueError, match="has no use for, labels"):
        model()(x, t, labels=labels)
    with pytest.raises(ValueError, match="needs tokens"):
        model(token_dim=16)(x, t)
