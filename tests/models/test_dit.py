"""The DiT: names, initial behaviour, shapes and errors."""

import pytest
import torch

from speed_engine.models.dit import DiT
from speed_engine.models.layers.embeddings import position_grid, unpatchify

SMALL = {
    "input_size": (8, 12), "channels": 3, "patch_size": 4, "dim": 32, "depth": 2, "num_heads": 4,
    "num_classes": 5,
}  # fmt: skip


def model(**changes) -> DiT:
    torch.manual_seed(0)
    return DiT(**(SMALL | changes))


def inputs(batch: int = 3):
    return torch.randn(batch, 3, 8, 12), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


def test_a_new_model_answers_zero_whatever_it_sees():
    assert not bool(model()(*inputs()).any())


def test_a_new_block_is_the_identity():
    block, tokens = model().blocks[0], torch.randn(2, 6, 32)
    assert torch.equal(block(tokens, torch.randn(2, 32)), tokens)


def test_every_parameter_is_trained():
    net = model()
    for parameter in net.parameters():  # leave the zero initialisation, where gradients vanish
        torch.nn.init.normal_(parameter, std=0.2)
    net(*inputs()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_names_are_those_of_the_original():
    names = set(model().state_dict())
    block = {
        f"blocks.0.{part}.{kind}"
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    }
    assert block <= names
    assert {"pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"} <= names
    assert {
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.2.bias",
        "final_layer.linear.weight",
    } <= names


def test_patches_return_to_their_place():
    """The value that the last layer writes for patch (i, j), pixel (p, q) lands there."""
    tokens = torch.arange(2 * 3 * 4 * 4 * 3, dtype=torch.float32).view(1, 6, 48)
    image = unpatchify(tokens, grid=(2, 3), patch_size=4)
    assert image.shape == (1, 3, 8, 12)
    for i, j, p, q, c in [(0, 0, 0, 0, 0), (1, 2, 3, 1, 2), (0, 1, 2, 3, 1)]:
        assert image[0, c, i * 4 + p, j * 4 + q] == tokens[0, i * 3 + j, (p * 4 + q) * 3 + c]


def test_positions_differ_and_encode_rows_and_columns_apart():
    grid = position_grid(3, 4, 16)[0].view(3, 4, 16)
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])  # the first half knows the column only
    assert torch.equal(grid[:, 0, 8:], grid[:, 3, 8:])  # the second half knows the row only
    assert len(grid.view(12, 16).unique(dim=0)) == 12


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 5}, "patch_size=5 does not divide the input size 8 x 12"),
        ({"num_heads": 5}, "num_heads=5 does not divide the width 32; choose from"),
        ({"dim": 30, "num_heads": 5}, "dim=30 is not a multiple of 4"),
    ],
)
def test_sizes_that_do_not_divide_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
