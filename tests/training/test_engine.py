"""One step: its formula, and that it never waits for the device."""

import dataclasses
import gc
import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speed_engine.build import build_model, build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.diffusion.methods import METHODS
from speed_engine.models.config import DiTConfig
from speed_engine.training.ema import Ema
from speed_engine.training.engine import Engine
from speed_engine.training.optimizers import adamw, linear_warmup, one_sweep

CONFIG = TrainConfig(model=DiTConfig(dim=16, depth=1, num_heads=2))


def engine(
    grad_clip: float = 1.0, config: TrainConfig = CONFIG, make_optimizer=adamw, device: str = "cpu"
) -> Engine:
    model = build_model(config).to(device)
    objective = build_objective(config, build_process(config), model).to(device)
    return Engine(
        model,
        objective,
        make_optimizer(
            model, learning_rate=1e-3, beta1=0.9, beta2=0.999, weight_decay=0, loss=objective
        ),
        Ema(model, 0.99),
        learning_rate=linear_warmup(1e-3, 2),
        grad_clip=grad_clip,
    )


def batch(size: int = 8) -> Batch:
    images = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, {"labels": torch.arange(size) % 10}, torch.arange(size))


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device tensor's value."""

    BLOCKING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.BLOCKING
        return func(*args, **(kwargs or {}))


def test_the_counter_of_reads_counts():
    with Reads() as reads:
        torch.ones(()).item()
        torch.ones(3).nonzero()
    assert reads.count == 2


@pytest.mark.parametrize(
    "method, schedule, learn_sigma",
    [(name, "linear", learn_sigma) for name in METHODS for learn_sigma in (False, True)]
    + [("adaptive", "edm", False)],
)
def test_a_step_never_waits_for_the_device(method, schedule, learn_sigma):
    model = dataclasses.replace(CONFIG.model, learn_sigma=learn_sigma)
    trained = engine(
        config=dataclasses.replace(CONFIG, method=method, schedule=schedule, model=model)
    )
    trained.step(batch())  # the optimizer makes its state in the first step
    trained.steps_done = 49  # the next step is one at which a sampler that learns decides
    data = batch()
    with Reads() as reads:
        trained.step(data)
    assert reads.count == 0


def test_one_sweep_never_waits_either():
    trained = engine(make_optimizer=one_sweep)
    trained.step(batch())  # tables of addresses are made in the first step
    data = batch()
    with Reads() as reads:
        trained.step(data)
    assert reads.count == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make_optimizer", [adamw, one_sweep])
def test_no_step_waits_for_a_gpu(make_optimizer):
    trained = engine(make_optimizer=make_optimizer, device="cuda")
    on_cpu = batch()
    labels = {"labels": on_cpu.conditions["labels"].cuda()}
    data = Batch(on_cpu.images.cuda(), labels, on_cpu.ids.cuda())
    for _ in range(3):  # state, tables of addresses, kernels are made
        trained.step(data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.step(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_thousand_steps_allocate_nothing_that_stays():
    trained, data, kept = engine(), batch(2), {}
    for step in range(1, 1001):
        trained.step(data)
        if step in (100, 1000):
            kept[step] = live_tensors(), sys.getallocatedblocks()
    assert kept[1000][0] == kept[100][0]
    # Caches grow by some hundreds; an object that stays at every step would make it 900 and more.
    assert kept[1000][1] - kept[100][1] < 900


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_step_is_forward_backward_clip_adamw_average():
    ours, by_hand = engine(grad_clip=0.1), engine()
    report = ours.step(batch())

    model, data = by_hand.model, batch()
    output = by_hand.objective(model, data.images, data.conditions, data.ids, 0)
    output.loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()  # pyright: ignore[reportOptionalMemberAccess]
    for parameter in model.parameters():
        assert parameter.grad is not None
        gradient = parameter.grad * (0.1 / (norm + 1e-6)).clamp(max=1)
        update = gradient / (gradient.abs() + 1e-8)  # AdamW's first step
        with torch.no_grad():
            parameter -= 5e-4 * update  # half the learning rate: the warm-up takes two steps
    torch.testing.assert_close(report.loss, output.loss.detach())
    torch.testing.assert_close(report.grad_norm, norm)
    for ours_now, expected in zip(ours.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours_now, expected, rtol=1e-4, atol=1e-6)
    weight = ours.model.get_parameter("final_layer.linear.weight").detach()
    average = ours.ema.model.get_parameter("final_layer.linear.weight")
    torch.testing.assert_close(average, (1 - 2 / 11) * weight)  # it began at zero


def test_without_a_limit_a_step_is_that_of_a_limit_never_reached():
    free, bounded = engine(grad_clip=math.inf), engine(grad_clip=1e30)
    for _ in range(3):
        reports = free.step(batch()), bounded.step(batch())
        assert torch.equal(reports[0].grad_norm, reports[1].grad_norm)
    for one, other in zip(free.model.parameters(), bounded.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dropped_labels_become_the_null_label_at_the_stated_rate():
    objective = build_objective(CONFIG, build_process(CONFIG), build_model(CONFIG))
    seen = []

    def model(x_in, t, labels):
        seen.append(labels)
        return torch.zeros_like(x_in)

    images, told = torch.zeros(20_000, 1, 1, 1), {"labels": torch.zeros(20_000).long()}
    objective(model, images, told, torch.arange(20_000), 0)
    share = (seen[0] == CONFIG.data.num_classes).double().mean()
    assert abs(float(share) - CONFIG.condition_dropout) < 0.01
