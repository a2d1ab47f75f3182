"""What a network may declare, used as a researcher would: routed tokens, a loss on features.

TREAD and the dispersive loss train with the engine as it is.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from candidates import Dispersive, Routed, Watched
from speed_engine.data.batch import Batch
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.objective import Objective, training_passes
from speed_engine.diffusion.processes import build_schedule
from speed_engine.diffusion.terms import Pass
from speed_engine.models.dit import DiT
from speed_engine.models.super_resolution import SuperResolution, conditioned_channels
from speed_engine.ops import Stream, random_bits
from speed_engine.training.ema import Ema, warming_up
from speed_engine.training.engine import Engine
from speed_engine.training.optimizers import Hyperparameters, adamw
from speed_engine.training.update import Update

SIZE: dict[str, Any] = {
    "input_size": (4, 6), "channels": 2, "patch_size": 1, "dim": 16, "depth": 4, "num_heads": 2,
    "num_classes": 5, "variant": "modern",
}  # fmt: skip


class Alignment(nn.Module):
    """Projected tokens towards the batch's targets, as in REPA (Yu et al. 2025)."""

    def __init__(self, name: str, dim: int, target_dim: int) -> None:
        super().__init__()
        self.features = (name,)
        self.projection = nn.Linear(dim, target_dim)

    def forward(self, seen: Pass) -> Tensor:
        projected = self.projection(seen.features[self.features[0]])
        return -nn.functional.cosine_similarity(projected, seen.targets["tokens"], dim=-1).mean(1)


def network(family: type[DiT], **changes: Any) -> Any:
    """Away from the zero initialisation."""
    torch.manual_seed(0)
    net = family(**(SIZE | changes))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def batch(first: int = 0, size: int = 4) -> Batch:
    ids = torch.arange(first, first + size)
    images = torch.sin(torch.arange(48.0) * 0.3 + ids[:, None]).view(-1, 2, 4, 6)
    targets = {"tokens": torch.cos(torch.arange(24.0 * 3) + ids[:, None]).view(-1, 24, 3)}
    return Batch(images, {"labels": ids % 5}, ids, targets=targets)


def objective(net: nn.Module, **options: Any) -> Objective:
    return Objective(
        build_method("uniform", build_schedule("linear", 1000)), 3, network=net, **options
    )


def engine(net: nn.Module, objective: Objective, **options: Any) -> Engine:
    hyper = Hyperparameters(learning_rate=2e-3)
    update = Update(
        net, objective, adamw(net, objective, hyper), {"ema": Ema(net, warming_up(0.9))},
        learning_rate=lambda _: 2e-3, grad_clip=1.0,
    )  # fmt: skip
    return Engine(net, objective, update, **options)


def words(ids: Tensor, count: int = 24) -> Tensor:
    return random_bits(torch.tensor(3), ids, count, Stream.TOKEN_MASK)


def test_tokens_in_another_order_answer_the_same_with_their_own_rotation(monkeypatch):
    """All tokens go through the middle, shuffled differently in each image: nothing changes."""
    monkeypatch.setattr(Routed, "kept_share", 1.0)
    net, data = network(Routed), batch()
    inputs = data.images, torch.tensor([3, 500, 700, 999]), data.conditions["labels"]
    shuffled = net(*inputs, route_words=words(data.ids))
    torch.testing.assert_close(shuffled, net(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["original", "modern"])
def test_the_route_of_an_image_is_its_own(variant):
    net, data = network(Routed, variant=variant), batch()
    inputs = data.images, torch.tensor([3, 500, 700, 999]), data.conditions["labels"]
    together = net(*inputs, route_words=words(data.ids))
    assert not torch.allclose(together, net(*inputs))
    alone = net(*(value[2:3] for value in inputs), route_words=words(data.ids[2:3]))
    torch.testing.assert_close(alone, together[2:3], rtol=1e-4, atol=1e-4)


def test_a_routed_step_is_the_same_in_parts():
    reports = []
    for size in (None, 3):
        net = network(Routed)
        training = engine(net, objective(net), microbatch_size=size)
        reports.append(training.step(batch(size=6)))
    torch.testing.assert_close(reports[0].loss, reports[1].loss)
    torch.testing.assert_close(reports[0].grad_norm, reports[1].grad_norm)


def test_a_routed_network_learns_and_is_the_whole_one_without_words():
    torch.manual_seed(0)
    net = Routed(**SIZE)
    training = engine(net, objective(net))
    losses = [float(training.step(batch()).loss) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    data = batch()
    inputs = data.images, torch.tensor([3, 500, 700, 999]), data.conditions["labels"]
    assert torch.equal(net(*inputs), DiT.forward(net, *inputs))


def test_what_a_network_declares_is_found_through_what_is_around_it():
    declared = ({"route_words": 24},)
    plain = {"in_channels": conditioned_channels(2, 2)}
    assert training_passes(SuperResolution(network(Routed, **plain))) == declared
    assert training_passes(torch.compile(network(Routed))) == declared
    assert training_passes(SuperResolution(network(DiT, **plain))) == ({},)
    assert SuperResolution(network(Watched, **plain)).features[-1] == "blocks.3"


def test_a_routed_network_behind_super_resolution_gets_its_words():
    net = SuperResolution(network(Routed, in_channels=conditioned_channels(2, 2)))
    data = batch()
    conditions = data.conditions | {"low_resolution": data.images[:, :, ::2, ::2]}
    found = objective(net)(net, data.images, conditions, data.ids, 0)
    given = conditions | {"route_words": words(data.ids)}
    expected = objective(DiT(**SIZE))(net, data.images, given, data.ids, 0)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("family", [Routed, Watched])
def test_a_step_that_routes_or_watches_is_one_graph(family):
    torch._dynamo.reset()
    net, data = network(family, depth=3), batch()
    terms = [Dispersive("blocks.1", 0.5)] if family is Watched else []
    loss = objective(net, terms=terms)
    compiled = torch.compile(lambda *b: loss(net, *b).loss, fullgraph=True, backend="aot_eager")
    arguments = data.images, data.conditions, data.ids, 0
    torch.testing.assert_close(compiled(*arguments), loss(net, *arguments).loss)


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_a_loss_on_features_trains_the_blocks_before_them_alone(checkpointing):
    net, data = network(Watched, checkpointing=checkpointing), batch()
    arguments = data.images, data.conditions, data.ids, 0
    gradients = []
    for terms in ([], [Dispersive("blocks.1", 0.5)]):
        loss = objective(net, terms=terms)(net, *arguments).loss
        gradients.append(torch.autograd.grad(loss, [b.attn.qkv.weight for b in net.blocks]))
    same = [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert same == [False, False, True, True]


def test_a_dispersive_loss_moves_the_features_of_images_apart():
    spread = []
    for terms in ([], [Dispersive("blocks.1", 0.5)]):
        torch.manual_seed(0)
        net = Watched(**SIZE)
        training = engine(net, objective(net, terms=terms))
        for _ in range(40):
            training.step(batch())
        data = batch()
        inputs = data.images, torch.full((4,), 500), torch.full((4,), 5)
        with torch.no_grad():
            _, features = net(*inputs, features=("blocks.1",))
        spread.append(float(features["blocks.1"].var(0).mean()))
    assert spread[1] > 1.2 * spread[0]


def test_targets_of_a_batch_reach_the_term_in_parts_and_its_parameters_train():
    reports, projections = [], []
    for size in (None, 3):
        net = network(Watched)
        term = Alignment("blocks.2", 16, 3)
        before = term.projection.weight.detach().clone()
        training = engine(net, objective(net, terms=[term]), microbatch_size=size)
        reports.append(training.step(batch(size=6)))
        projections.append(term.projection.weight.detach())
        assert not torch.equal(projections[-1], before)
    torch.testing.assert_close(reports[0].loss, reports[1].loss)
    torch.testing.assert_close(*projections, rtol=1e-4, atol=1e-5)
