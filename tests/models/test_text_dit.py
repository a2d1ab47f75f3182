from typing import Any

import pytest
import torch

from speed_engine.models.text_dit import TextDiT

SMALL: dict[str, Any] = dict(
    input_size=(8, 8), channels=2, patch_size=2, dim=32, depth=2, num_heads=2, token_dim=6
)


def model(**changes) -> TextDiT:
    torch.manual_seed(0)
    return TextDiT(**(SMALL | changes))


def inputs(length: int = 5):
    torch.manual_seed(1)
    return torch.randn(3, 2, 8, 8), torch.tensor([0.0, 300.0, 999.0]), torch.randn(3, length, 6)


@pytest.mark.parametrize("variant", ["original", "modern"])
def test_a_new_block_is_the_identity(variant):
    block = model(variant=variant).blocks[0]
    tokens, condition, text = torch.randn(3, 16, 32), torch.randn(3, 32), torch.randn(3, 5, 32)
    net = model(variant=variant)
    rotation = net.rotation()
    assert torch.equal(block(tokens, condition, text, *rotation), tokens)


@pytest.mark.parametrize("variant", ["original", "modern"])
@pytest.mark.parametrize("checkpointing", [0.0, 1.0])
def test_every_parameter_learns_once_training_has_begun(variant, checkpointing):
    net = model(variant=variant, checkpointing=checkpointing)
    for parameter in net.parameters():  # as after a step: nothing is zero any more
        torch.nn.init.normal_(parameter, std=0.1)
    net(*inputs()).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_answer_depends_on_every_token_of_the_text():
    net = model()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, tokens = inputs()
    answer = net(x, t, tokens)
    for place in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, place] += 1
        assert float((net(x, t, other) - answer).abs().max().detach()) > 1e-4


def test_texts_of_any_length_are_taken():
    assert model(learn_sigma=True)(*inputs(length=9)).shape == (3, 4, 8, 8)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="num_heads=3 does not divide the width 32"):
        model(num_heads=3)
    with pytest.raises(ValueError, match="patch_size=3 does not divide the input size 8 x 8"):
        model(patch_size=3)
