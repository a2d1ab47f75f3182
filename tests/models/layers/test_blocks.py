"""Recomputed activations and compiled blocks: the same figures, less memory, one compilation."""

import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from speed_engine import build
from speed_engine.build import build_engine, build_model, build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.evaluation.generate import GenerationSettings, generate
from speed_engine.models.config import DiTConfig, EdmUNetConfig, MDTConfig, UNetConfig
from speed_engine.models.dit import DiT
from speed_engine.models.layers.blocks import compile_each, compiled, compiled_blocks, set_recompute
from speed_engine.run.starting import machine_choices
from speed_engine.runtime.choice import Choice
from speed_engine.runtime.world import ALONE, World
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.ema import EMA, Ema, warming_up
from speed_engine.training.engine import Engine
from speed_engine.training.optimizers import Hyperparameters, adamw
from speed_engine.training.schedules import linear_warmup
from speed_engine.training.update import Update

CPU = torch.device("cpu")
VARIANTS = pytest.mark.parametrize("variant", ["original", "modern"])


def model(**changes) -> DiT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 32, "depth": 4, "num_heads": 2, "patch_size": 2} | changes
    net = DiT(input_size=(16, 16), channels=3, num_classes=5, **sizes)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 16), torch.tensor([3, 871]), torch.tensor([0, 5])


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


class Operations(TorchDispatchMode):
    """How often each operation ran, the dtypes of its results, and what of them is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.dtypes: defaultdict[str, set[torch.dtype]] = defaultdict(set)
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.dtypes[name].add(tensor.dtype)
                if not func.is_view:
                    storage = tensor.untyped_storage()
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def held(self) -> int:
        """Bytes of the results that something still holds."""
        return sum(size for storage, size in self.storages.values() if not storage.expired())


@VARIANTS
def test_the_dial_trades_memory_for_time_and_nothing_else(variant):
    net, held, work, found = model(variant=variant), [], [], []
    for dial in (0, 0.25, 0.5, 0.75, 1):
        set_recompute(net.blocks, dial)
        with Operations() as forward:
            loss = net(*inputs()).square().mean()
        held.append(forward.held())
        with Operations() as backward:
            found.append(gradients(net, loss))
        work.append(backward.counts.total())
    assert held == sorted(held, reverse=True) and len(set(held)) == len(held)
    assert work == sorted(work) and len(set(work)) == len(work)
    assert held[-1] < 0.1 * held[0]
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize(
    "dial, expected",
    [
        (0, ["nothing"] * 4),
        (0.25, ["nothing", "cheap"] * 2),
        (0.5, ["cheap"] * 4),
        (0.875, ["cheap", "everything", "everything", "everything"]),
        (1, ["everything"] * 4),
    ],
)
def test_what_is_recomputed_is_spread_over_the_depth(dial, expected):
    assert [block.recompute for block in model(checkpointing=dial).blocks] == expected


def test_a_dial_outside_its_range_is_named():
    with pytest.raises(ValueError, match=r"checkpointing=1.5 is a share; choose from \[0, 1\]"):
        model(checkpointing=1.5)


@pytest.mark.parametrize("dial, products", [(0, 0), (0.5, 0), (1, 5 * 4)])
def test_matrix_products_and_attention_are_not_repeated_up_to_one_half(dial, products):
    net = model(checkpointing=dial)
    loss = net(*inputs()).square().mean()
    with Operations() as backward:
        gradients(net, loss)
    assert backward.counts["addmm"] == products  # adaLN, qkv, proj and two of the feed-forward
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert backward.counts[attention] == (4 if dial == 1 else 0)
    assert backward.counts["gelu"] == (4 if dial else 0)


def test_compiled_recomputing_blocks_have_the_eager_gradients():
    torch._dynamo.reset()
    net = model(variant="modern", depth=2, checkpointing=0.75).double()
    assert [block.recompute for block in net.blocks] == ["cheap", "everything"]
    x, t, labels = inputs()
    expected = gradients(net, net(x.double(), t, labels).square().mean())
    whole = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = gradients(net, whole(x.double(), t, labels).square().mean())
    torch.testing.assert_close(found, expected)


@pytest.fixture
def compilations(monkeypatch) -> CompileCounterWithBackend:
    """Counts the graphs that whatever is compiled in the test comes to."""
    torch._dynamo.reset()
    counter, plain = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: plain(f, **o, backend=counter))
    return counter


def test_compilations_of_equal_blocks_do_not_grow_with_the_depth(compilations):
    net = model(depth=9)
    expected = net(*inputs())
    blockwise = compiled_blocks(net)
    for _ in range(3):
        torch.testing.assert_close(blockwise(*inputs()), expected)
    assert compilations.frame_count == 2  # the first has no branch to add


def test_only_graphs_are_replayed_and_shapes_are_compiled_as_they_come(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: modes.append(options) or f)
    for how in ("on", "graphs", "off"):
        assert isinstance(compiled(nn.Linear(2, 2), how), nn.Linear)
    assert modes == [
        {"dynamic": False, "mode": None},
        {"dynamic": False, "mode": "reduce-overhead"},
    ]


def test_blocks_of_many_shapes_are_compiled_every_one_in_every_way():
    """PyTorch's own limit is 8 in all; beyond it blocks run as they are."""
    torch._dynamo.reset()
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph

    class Block(nn.Linear):  # torch 2.11 traces no module of PyTorch's own
        def forward(self, input):
            return super().forward(input)

    blocks = [Block(width, width) for width in range(1, 13)]
    with torch._dynamo.config.patch(recompile_limit=8):  # pyright: ignore[reportAttributeAccessIssue]
        compile_each(blocks, backend=backend)
        for gradients, batch in itertools.product((True, False), (2, 3, 2)):
            with torch.set_grad_enabled(gradients):
                for width, block in enumerate(blocks, 1):
                    block(torch.ones(batch, width))
    assert len(compiled_graphs) == 12 * 2 * 2


def test_models_of_many_widths_are_compiled_by_blocks_in_one_process(compilations):
    """PyTorch's own limit is 8 for all of them."""
    widths = (16, 32, 48)
    with torch._dynamo.config.patch(recompile_limit=8):  # pyright: ignore[reportAttributeAccessIssue]
        for width in widths:
            net = compiled_blocks(model(dim=width, depth=2))
            trained = net(*inputs())
            gradients(net, trained.square().mean())
            with torch.no_grad():
                torch.testing.assert_close(net(*inputs()), trained)
    # The first block and the other one, with and without gradients.
    assert compilations.frame_count == 4 * len(widths)


def test_a_model_without_blocks_is_not_compiled_by_blocks():
    with pytest.raises(ValueError, match="Linear has none; choose on or off"):
        compiled_blocks(nn.Linear(2, 2))


SIZES: dict[str, Any] = {"dim": 32, "depth": 1, "num_heads": 2}
CONFIGS = {
    "dit": TrainConfig(model=DiTConfig(**SIZES)),
    "dit-modern-sigma": TrainConfig(model=DiTConfig(**SIZES, variant="modern", learn_sigma=True)),
    "mdt": TrainConfig(model=MDTConfig(**SIZES, decode_layers=1)),
    "unet": TrainConfig(model=UNetConfig(channel_mult=(1,), attention_resolutions=(1,))),
    "edm": TrainConfig(model=EdmUNetConfig(channel_mult=(1,)), schedule="edm"),
}


def batch(step: int) -> Batch:
    labels, ids = torch.arange(8) % 10, torch.arange(8) + 8 * step
    return Batch(torch.rand(8, 1, 8, 8), {"labels": labels}, ids)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "unet")) for name in CONFIGS]
)
def test_the_whole_training_step_is_one_graph_compiled_once(compilations, name):
    """Noise, timesteps, model and loss together, at changing steps and image counters."""
    net = build_model(CONFIGS[name])
    objective = build_objective(CONFIGS[name], build_process(CONFIGS[name]), net)
    loss = torch.compile(lambda *batch: objective(net, *batch).loss, fullgraph=True)
    counts = []
    for step in range(4):
        given = batch(step)
        loss(given.images, given.conditions, given.ids, step).backward()
        counts.append(compilations.frame_count)
    assert counts[0] == 1 and counts[1] == counts[-1]


@pytest.mark.parametrize("how", ["on", "blocks"])
def test_the_engine_never_recompiles_after_the_second_step(compilations, how):
    config = CONFIGS["dit"]
    net = build_model(config)
    objective = build_objective(config, build_process(config), net)
    update = Update(
        net,
        objective,
        adamw(net, objective, Hyperparameters(learning_rate=1e-3)),
        {"ema": Ema(net, warming_up(0.99))},
        learning_rate=linear_warmup(1e-3, 2),
        grad_clip=1.0,
    )
    engine = Engine(net, objective, update, forward=compiled(net, how))
    counts = []
    for step in range(5):
        engine.step(batch(step))
        counts.append(compilations.frame_count)
    assert counts[0] == 1 and counts[1] == counts[-1]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_compiled_by_blocks_without_a_break(compilations, name):
    net = build_model(CONFIGS[name]).eval().requires_grad_(False)
    given = batch(0)
    arguments = given.images * 2 - 1, torch.arange(8) * 100, given.conditions["labels"]
    expected = net(*arguments)
    torch.testing.assert_close(compiled(net, "blocks")(*arguments), expected)
    assert compilations.frame_count > 0


def test_code_of_blocks_is_for_the_sizes_that_come():
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.extend(i for i in inputs if isinstance(i, torch.SymInt))
        return graph

    blocks = [nn.ReLU(), nn.ReLU()]
    compile_each(blocks, backend=backend)
    for size in (2, 3, 4):
        for block in blocks:
            block(torch.ones(size, size))
    assert not sizes


def test_the_average_that_generates_shares_compilations_between_blocks(compilations):
    sizes = DiTConfig(dim=32, depth=5, num_heads=2)
    config = TrainConfig(model=sizes, compile="blocks", microbatch_size=8)
    process, by_blocks = build_process(config), Choice("blocks", "")
    choices = replace(machine_choices(config), generation=by_blocks)

    def generations(engine: Engine) -> list[int]:
        """Graphs after each of three evaluations amid training."""
        counts = []
        for step in range(3):
            engine.step(batch(step))
            generate(
                engine.update.averages[EMA].model,
                process.table,
                {"labels": torch.arange(6)},
                torch.arange(6),
                GenerationSettings(steps=2, guidance=2.0),
                image_shape=(1, 8, 8),
                null={"labels": torch.tensor(10)},
                seed=0,
            )
            counts.append(compilations.frame_count)
        return counts

    engines = [
        build_engine(config, process, build_model(config), choices, ALONE, CPU) for _ in range(2)
    ]
    # The first block and the others, with and without gradients; not once more for another run.
    assert [generations(engine) for engine in engines] == [[4, 4, 4]] * 2


@pytest.mark.parametrize("generating", ["blocks", "off"])
def test_several_processes_compile_model_and_average_before_laying_them_out(
    monkeypatch, generating
):
    config = TrainConfig(model=DiTConfig(**SIZES), optimizer=OptimizerConfig(averages=("ema=0.9",)))
    choices = replace(
        machine_choices(config), compile=Choice("on", ""), generation=Choice(generating, "")
    )
    done: list[tuple[str, nn.Module]] = []
    monkeypatch.setattr(build, "compile_each", lambda blocks: done.append(("compiled", blocks[0])))
    monkeypatch.setattr(
        build,
        "distribute",
        lambda model, *_, **__: done.append(("laid out", model.blocks[0])),
    )
    world = World(rank=0, size=2, local_size=2)
    model, process = build_model(config), build_process(config)
    engine = build_engine(config, process, model, choices, world, CPU)
    averages = engine.update.averages
    trained, ema, other = (
        model.get_submodule("blocks.0")
        for model in (engine.model, averages[EMA].model, averages["ema=0.9"].model)
    )
    compiled_ones = [trained, ema] if generating == "blocks" else [trained]
    assert done == [
        *(("compiled", block) for block in compiled_ones),
        *(("laid out", block) for block in (trained, ema, other)),
    ]


@VARIANTS
def test_under_autocast_only_matrix_products_are_bfloat16(variant):
    """Norms, their statistics, the residual stream, parameters and gradients stay float32."""
    net = model(variant=variant)
    streams: list[torch.dtype] = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, __, out: streams.append(out.tokens.dtype))
    with Operations() as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        answer = net(*inputs())
    norms = {name for name in seen.dtypes if "norm" in name or name == "rsqrt"}
    assert norms and all(seen.dtypes[name] == {torch.float32} for name in norms)
    assert seen.dtypes["addmm"] == {torch.bfloat16} and set(streams) == {torch.float32}
    found = gradients(net, answer.float().square().mean())
    assert {gradient.dtype for gradient in found} == {torch.float32}
    exact = net(*inputs())
    assert (answer - exact).norm() < 0.03 * exact.norm()
