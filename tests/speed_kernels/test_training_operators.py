"""The operators around a model: what they save; compiling and splitting change nothing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speed_kernels.noising import noised_input
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


def make_step(checkpointed: bool, autocast: bool):
    def step(model, x0, coefficients, seed, ids):
        x_in = noised_input(x0, coefficients, seed, ids, torch.float32)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=autocast):
            prediction = model(x_in, checkpointed)
            loss, error = weighted_mse(prediction, x0, coefficients, seed, ids)
        return loss.mean(), error

    return step


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


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_one_graph_serves_every_seed_and_all_ids(checkpointed, autocast):
    torch._dynamo.reset()
    model, x0, coefficients, seed, ids = draw()
    step = make_step(checkpointed, autocast)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # pyright: ignore[reportAttributeAccessIssue]
        for shift in (0, 1, -5):
            batch = (x0, coefficients, seed + shift, ids + 8 * shift)
            plain = gradients(step, model, *batch)
            for ours, eager in zip(gradients(compiled, model, *batch), plain, strict=True):
                torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_difference_is_saved_and_no_noise(dtype):
    _, x0, coefficients, seed, ids = draw()
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x_in = noised_input(x0, coefficients, seed, ids, dtype)
        weighted_mse(x_in.detach().requires_grad_(), x0, coefficients, seed, ids)
    large = [tensor for tensor in saved.values() if tensor.numel() >= NUM_ELEMENTS]
    assert [(tensor.dtype, tensor.shape) for tensor in large] == [(dtype, x0.shape)]


def test_a_split_batch_has_the_gradient_of_the_whole():
    model, x0, coefficients, seed, ids = draw()
    step = make_step(checkpointed=False, autocast=False)
    whole = gradients(step, model, x0, coefficients, seed, ids)
    parts = [
        gradients(step, model, x0[rank::2], coefficients[rank::2], seed, ids[rank::2])
        for rank in range(2)
    ]
    for gradient, *halves in zip(whole, *parts, strict=True):
        assert (sum(halves) / 2 - gradient).norm() <= 1e-6 * gradient.norm()
