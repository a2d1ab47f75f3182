"""One step: its formula, and that it never waits for the device."""

import dataclasses
import gc
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from speed_engine.build import build_model, build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.diffusion.methods import METHODS
from speed_engine.models.config import DiTConfig, UNetConfig
from speed_engine.training.ema import Ema, warming_up
from speed_engine.training.engine import Engine, dropout_seed
from speed_engine.training.one_sweep import OneSweep
from speed_engine.training.optimizers import OPTIMIZERS, Hyperparameters, adamw
from speed_engine.training.schedules import linear_warmup
from speed_engine.training.update import Update

CONFIG = TrainConfig(model=DiTConfig(dim=16, depth=1, num_heads=2))


def engine(
    grad_clip: float = 1.0, config: TrainConfig = CONFIG, update=Update, device: str = "cpu",
    microbatch_size: int | None = None, make_optimizers=adamw,
) -> Engine:  # fmt: skip
    model = build_model(config).to(device)
    objective = build_objective(config, build_process(config), model).to(device)
    updates = update(
        model,
        objective,
        make_optimizers(model, objective, Hyperparameters(learning_rate=1e-3)),
        {"ema": Ema(model, warming_up(0.99))},
        learning_rate=linear_warmup(1e-3, 2),
        grad_clip=grad_clip,
    )
    return Engine(model, objective, updates, microbatch_size=microbatch_size)


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
    trained = engine(update=OneSweep)
    trained.step(batch())  # tables of addresses are made in the first step
    data = batch()
    with Reads() as reads:
        trained.step(data)
    assert reads.count == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "update, make_optimizers",
    [(OneSweep, adamw), *((Update, make) for make in OPTIMIZERS.values())],
)
def test_no_step_waits_for_a_gpu(update, make_optimizers):
    trained = engine(update=update, make_optimizers=make_optimizers, device="cuda")
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


def test_no_tensor_of_a_step_stays():
    trained, data, kept = engine(), batch(2), []
    for _ in range(3):
        for _ in range(10):
            trained.step(data)
        kept.append(live_tensors())
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.long
def test_nothing_else_of_a_step_stays():
    trained, data, kept = engine(), batch(2), {}
    for step in range(1, 1001):
        trained.step(data)
        if step in (100, 1000):
            gc.collect()
            kept[step] = sys.getallocatedblocks()
    # Caches grow by some hundreds; an object that stays at every step would make it 900 and more.
    assert kept[1000] - kept[100] < 900


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
    average = ours.update.averages["ema"].model.get_parameter("final_layer.linear.weight")
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


def gradients(trained: Engine, data: Batch) -> tuple[dict[str, torch.Tensor], float]:
    """Of a step, by parameter, and its loss; the parameters stay as they are."""
    found = {}

    def keep(step):
        for module in (trained.model, trained.objective):
            found.update({name: p.grad for name, p in module.named_parameters()})  # pyright: ignore
        return torch.zeros(()), torch.tensor(True)

    trained.update.step = keep
    return found, float(trained.step(data).loss)


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(2, 13),
    microbatch_size=st.integers(1, 13),
    method=st.sampled_from(["uniform", "ant_uw"]),
)
def test_microbatches_of_any_size_have_the_gradient_of_the_whole_batch(
    size, microbatch_size, method
):
    config = dataclasses.replace(CONFIG, method=method)
    expected, loss = gradients(engine(config=config), batch(size))
    found, split = gradients(engine(config=config, microbatch_size=microbatch_size), batch(size))
    assert split == pytest.approx(loss, rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_equal_microbatches_have_the_bits_of_a_mean_of_means():
    by_hand, whole = engine(), batch(12)
    for part in whole.split(4):
        output = by_hand.objective(by_hand.model, part.images, part.conditions, part.ids, 0)
        (output.loss / 3).backward()
    found, _ = gradients(engine(microbatch_size=4), whole)
    for name, parameter in by_hand.model.named_parameters():
        assert parameter.grad is not None and torch.equal(found[name], parameter.grad), name


def test_dropout_is_a_function_of_seed_step_and_rank():
    seeds = {dropout_seed(s, step, r) for s in (0, -1, 7) for step in (1, 2, 3) for r in (0, 1, 9)}
    assert len(seeds) == 27 and all(0 <= seed < 2**64 for seed in seeds)
    # Frozen: resumed runs rely on it.
    assert [dropout_seed(0, 1, 0), dropout_seed(3, 2, 1)] == [
        15844177061914550495,
        2157600886269781955,
    ]


def test_dropout_of_a_step_depends_on_no_step_before_it():
    model = UNetConfig(model_channels=32, channel_mult=(1,), attention_resolutions=(), dropout=0.5)
    config = dataclasses.replace(CONFIG, model=model)

    def losses(steps_done: int) -> list[float]:
        trained = engine(config=config)
        torch.manual_seed(0)
        for parameter in trained.model.parameters():  # some begin at zero, and would hide dropout
            torch.nn.init.normal_(parameter, std=0.1)
        torch.manual_seed(steps_done)
        trained.steps_done = steps_done
        trained.update.step = lambda step: (torch.zeros(()), torch.tensor(True))
        return [float(trained.step(batch()).loss) for _ in range(2)]

    straight = losses(0)
    assert straight[0] != straight[1] and losses(1)[0] == straight[1]
