"""What a weight says of the maps in it is what is computed with them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from speed_engine.models.edm_unet import DhariwalUNet
from speed_engine.models.layers.attention import split_heads
from speed_engine.models.layers.edm_block import EdmBlock
from speed_engine.models.layers.fused import ONE, FusedLinear, Maps
from speed_engine.models.layers.unet_layers import AttentionBlock


@pytest.mark.parametrize(
    "maps", [ONE, Maps((3, -1), axis=0), Maps((2, 3, -1), axis=1), Maps((-1, 3), axis=1)]
)
def test_what_was_taken_apart_is_put_together(maps):
    rows = torch.arange(24.0).view(12, 2)
    apart = maps.apart(rows)
    assert apart.shape == ((1, 12, 2) if maps is ONE else (3, 4, 2))
    assert torch.equal(maps.together(apart), rows)


def test_the_maps_of_a_fused_linear_layer_are_its_answers_in_turn():
    layer, x = FusedLinear(4, 6, 2), torch.randn(5, 4)
    for weight, answer in zip(
        layer.maps.apart(layer.weight), (layer(x) - layer.bias).chunk(2, dim=1), strict=True
    ):
        torch.testing.assert_close(x @ weight.T, answer)


@pytest.mark.parametrize("network", ["UNet", "DhariwalUNet"])
def test_the_maps_of_a_u_net_s_attention_are_queries_keys_and_values(network):
    torch.manual_seed(0)
    if network == "UNet":
        block = AttentionBlock(128, 2)
        norm, qkv, projection = block.norm, block.qkv, block.proj_out
    else:
        block = EdmBlock(128, 128, 8, DhariwalUNet.style, 0.0, attention=True)
        norm, qkv, projection = block.norm2, block.qkv, block.proj
    maps: Any = qkv.maps
    separate, x = torch.randn(3, 128, 128) / 8, torch.randn(1, 128, 2, 3)
    with torch.no_grad():
        qkv.weight.copy_(maps.together(separate).view_as(qkv.weight))
        assert qkv.bias is not None
        qkv.bias.zero_()
        projection.weight.copy_(torch.eye(128).view_as(projection.weight))
        places = norm(x).flatten(2).transpose(1, 2)
        q, k, v = (split_heads(places @ weight.T, 2) for weight in separate)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found = block(x) - x if isinstance(block, AttentionBlock) else block._attend(x)
    torch.testing.assert_close(found.flatten(2).mT, expected, rtol=1e-4, atol=1e-4)
