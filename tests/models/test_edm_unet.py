"""EDM's U-Nets: sizes, names, initial behaviour, errors."""

from typing import Any

import pytest
import torch

from speed_engine.models import edm_unet
from speed_engine.models.edm_unet import EDM_UNET_SIZES, DhariwalUNet, SongUNet

SMALL: dict[str, Any] = {
    "input_size": (8, 12), "in_channels": 3, "out_channels": 3, "model_channels": 64,
    "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (4,), "num_classes": 5,
}  # fmt: skip
NETWORKS = [SongUNet, DhariwalUNet]


def model(network, **changes):
    torch.manual_seed(0)
    return network(**(SMALL | changes))


def inputs():
    return torch.randn(2, 3, 8, 12), torch.tensor([-700.0, 1100.0]), torch.tensor([0, 4])


def test_new_models_answer_nearly_nothing():
    assert float(model(SongUNet)(*inputs()).detach().abs().max()) < 1e-3
    assert not bool(model(DhariwalUNet)(*inputs()).any())


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_is_trained(network):
    net = model(network)
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        torch.nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)
    net(*inputs()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize(
    "network, size, input_size, num_classes, published",
    [
        (SongUNet, "ddpm++-cifar10", 32, 10, 55_734_147),
        (DhariwalUNet, "adm-cifar10", 32, 10, 279_631_875),
        (DhariwalUNet, "adm-imagenet64", 64, 1000, 295_899_267),
    ],
)
def test_published_sizes_have_the_parameters_of_the_originals(
    network, size, input_size, num_classes, published, without_initialisation
):
    with torch.device("meta"):
        net = network(
            input_size=(input_size, input_size),
            in_channels=3,
            out_channels=3,
            num_classes=num_classes,
            **EDM_UNET_SIZES[size],
        )
    assert sum(parameter.numel() for parameter in net.parameters()) == published


def test_names_are_those_of_the_original():
    blocks = {
        "enc.8x12_conv.weight", "enc.8x12_block0.conv0.weight", "enc.4x6_down.skip.weight",
        "enc.4x6_block0.qkv.weight", "dec.4x6_in0.proj.bias", "dec.4x6_in1.norm0.weight",
        "dec.8x12_up.affine.weight", "dec.8x12_block1.norm1.bias", "map_layer0.weight",
        "map_label.weight",
    }  # fmt: skip
    assert blocks | {"map_label.bias", "dec.8x12_aux_norm.weight", "dec.8x12_aux_conv.bias"} <= set(
        model(SongUNet).state_dict()
    )
    without_skip = blocks - {"enc.4x6_down.skip.weight"}  # ADM resamples without a convolution
    assert without_skip | {"out_norm.weight", "out_conv.weight"} <= set(
        model(DhariwalUNet).state_dict()
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_no_label_is_no_class_and_other_labels_differ(network):
    net = model(network)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, _ = inputs()
    blank, first, second = (net(x, t, torch.full((2,), label)) for label in (5, 0, 1))
    assert not torch.equal(first, second) and not torch.equal(first, blank)
    with torch.no_grad():
        net.map_label.weight.zero_()
    assert torch.equal(net(x, t, torch.tensor([0, 1])), net(x, t, torch.tensor([5, 5])))


@pytest.mark.parametrize("network", NETWORKS)
def test_channels_last_equals_contiguous(network):
    net = model(network)
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        torch.nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)
    x, t, labels = inputs()
    expected = net(x, t, labels)
    x = x.contiguous(memory_format=torch.channels_last)
    answer = net.to(memory_format=torch.channels_last)(x, t, labels)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_images_are_laid_out_for_the_first_block(monkeypatch, network):
    """On a GPU with channels last, here by a layout that any device has."""
    net, seen = model(network), []
    to_last = lambda x: x.contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(edm_unet, "laid_out", to_last)
    first, *_ = net.enc.values()
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(*inputs())
    (x,) = seen
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize(
    "network, changes, message",
    [
        (SongUNet, {"input_size": (8, 13)}, "its size 8 x 13 must be a multiple of 2 both ways"),
        (SongUNet, {"model_channels": 132}, "a group norm has 132 .* 32. Change model_channels or"),
        (SongUNet, {"model_channels": 9, "channel_mult": (1,)}, "has 9 channels.* multiple of 2"),
        (SongUNet, {"model_channels": 3}, "a group norm has 3 channels.* a multiple of 4"),
        (DhariwalUNet, {"model_channels": 48}, "an attention has 96 channels; needed: a multiple"),
    ],
)
def test_sizes_that_do_not_fit_are_named(network, changes, message):
    with pytest.raises(ValueError, match=message):
        model(network, **changes)
