"""Embeddings of labels."""

import torch
import torch.nn.functional as F

from speed_engine.models.layers.embeddings import _Embedded, embedded


def test_the_gradient_of_the_gpu_is_that_of_pytorch():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    labels, upstream = torch.tensor([4, 0, 4, 2]), torch.randn(4, 3, dtype=torch.float64)
    plain, ours = F.embedding(labels, table), _Embedded.apply(table, labels)
    assert torch.equal(plain, ours)
    gradients = [torch.autograd.grad(y, table, upstream)[0] for y in (plain, ours)]
    torch.testing.assert_close(*gradients)
    assert not bool(gradients[1][[1, 3]].any())  # no image is of these


def test_autocast_does_not_round_the_gradient():
    table = torch.randn(3, 4).requires_grad_()
    labels, upstream = torch.tensor([1, 1]), torch.tensor([[1.0] * 4, [2.0**-12] * 4])
    with torch.autocast("cpu", torch.bfloat16):
        gradient = torch.autograd.grad(_Embedded.apply(table, labels), table, upstream)[0]
    assert gradient[1].tolist() == [1 + 2.0**-12] * 4


def test_a_cpu_keeps_pytorchs_own_gradient():
    table = torch.randn(3, 4).requires_grad_()
    assert "Embedding" in type(embedded(table, torch.tensor([1])).grad_fn).__name__
    assert "Embedded" not in type(embedded(table, torch.tensor([1])).grad_fn).__name__
