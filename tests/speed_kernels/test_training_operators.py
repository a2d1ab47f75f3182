"""The operators around a model: what they save; compiling and splitting change nothing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speed_kernels.noising import noised_input
from speed_kernels.variational_bound import hybrid_loss
from speed_kernels.weighted_mse import weighted_mse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SHAPE = 4, (2, 8, 16)
NUM_ELEMENTS = 2 * 8 * 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, checkpointed: bool):
        if checkpointed:
            x = checkpoint(self.hidden, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self.hidden(x)
        return self.outer(x)

    def hidden(self, x):
        return nn.functional.gelu(self.inner(x))


def make_step(checkpointed: bool, autocast: bool, learn_sigma: bool = False):
    def step(model, x0, coefficients, seed, ids):
        x_in = noised_input(x0, coefficients, seed, ids, torch.float32)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=autocast):
            answer = model(x_in, checkpointed)
            if learn_sigma:
                answer = torch.cat([answer, 0.3 * answer.sin()], dim=1)
                loss, error = hybrid_loss(answer, x0, coefficients, bound_rows(ids), seed, ids)
            else:
                loss, error = weighted_mse(answer, x0, coefficients, seed, ids)
        return loss.mean(), error

    return step


def bound_rows(ids):
    """(log posterior variance, log beta, gap, first, weight); every fourth image is at t = 0."""
    row = torch.tensor([-9.5, -8.9, 0.011, 0.0, 1.0], device=ids.device)
    first = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], device=ids.device)
    return row + first * (ids % 4 == 2)[:, None]


def draw():
    """Model, x0, coefficients, seed, ids."""
    torch.manual_seed(0)
    x0, coefficients = torch.randn(BATCH, *SHAPE), torch.rand(BATCH, 5)
    ids = torch.arange(BATCH) + 2**31 - 2
    tensors = (tensor.to(DEVICE) for tensor in (x0, coefficients, torch.tensor(7), ids))
    return Model().to(DEVICE), *tensors


def gradients(step, model, *batch):
    step(model, *batch)[0].backward()
    result = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return result


@pytest.mark.parametrize(
    "checkpointed, autocast, learn_sigma",  # each two of them in all four ways
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
    ids=["plain-float32-error", "plain-autocast-hybrid"]
    + ["checkpointed-float32-hybrid", "checkpointed-autocast-error"],
)
def test_one_graph_serves_every_seed_and_all_ids(checkpointed, autocast, learn_sigma):
    torch._dynamo.reset()
    model, x0, coefficients, seed, ids = draw()
    step = make_step(checkpointed, autocast, learn_sigma)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # pyright: ignore[reportAttributeAccessIssue]
        for shift in (0, 1, -5):
            batch = (x0, coefficients, seed + shift, ids + 8 * shift)
            plain = gradients(step, model, *batch)
            for ours, eager in zip(gradients(compiled, model, *batch), plain, strict=True):
                torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("learn_sigma", [False, True], ids=["error", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_difference_is_saved_and_no_noise(dtype, learn_sigma):
    _, x0, coefficients, seed, ids = draw()
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = noised_input(x0, coefficients, seed, ids, dtype)
        if learn_sigma:
            answer = torch.cat([answer, answer], dim=1)
            leaf = answer.detach().requires_grad_()
            hybrid_loss(leaf, x0, coefficients, bound_rows(ids), seed, ids)
        else:
            weighted_mse(answer.detach().requires_grad_(), x0, coefficients, seed, ids)
    large = [tensor for tensor in saved.values() if tensor.numel() >= NUM_ELEMENTS]
    assert [(tensor.dtype, tensor.shape) for tensor in large] == [(dtype, answer.shape)]


@pytest.mark.parametrize("learn_sigma", [False, True], ids=["error", "hybrid"])
def test_a_split_batch_has_the_gradient_of_the_whole(learn_sigma):
    model, x0, coefficients, seed, ids = draw()
    step = make_step(False, False, learn_sigma)
    whole = gradients(step, model, x0, coefficients, seed, ids)
    parts = [
        gradients(step, model, x0[rank::2], coefficients[rank::2], seed, ids[rank::2])
        for rank in range(2)
    ]
    for gradient, *halves in zip(whole, *parts, strict=True):
        assert (sum(halves) / 2 - gradient).norm() <= 1e-6 * gradient.norm()
