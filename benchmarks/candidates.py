"""Ideas beside the recipe ``flow_muon`` with Muon's usual five Newton-Schulz steps: each trains
instead of it, on the digits or on CIFAR-10.

Run: ``python benchmarks/candidates.py digits|cifar16 [--shards FOLDER] [--names NAME ...] [--seeds
SEED ...] [--dry-run]``. CIFAR-10 is read from FOLDER and FOLDER-test, as ``speed-engine shards make
--size 16`` writes them. What is in the result already is left alone.

``--step`` times a step of what changes its cost, in turn; on an idle machine. Seeds are others than
those of the reports. What wins on both data sets belongs into the recipe; ``docs/recipes.md`` has
the table.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import speed_engine as se
from harness import result_path, write_result
from speed_engine import build
from speed_engine.arena.recipes import values_of
from speed_engine.arena.request import FAIR_PRESETS
from speed_engine.config import TrainConfig, with_values
from speed_engine.diffusion.objective import Objective, ObjectiveOutput
from speed_engine.diffusion.terms import Pass
from speed_engine.models import dit, families
from speed_engine.models.dit import DiT
from speed_engine.models.layers.attention import SelfAttention
from speed_engine.models.layers.feed_forward import FeedForward
from speed_engine.models.layers.fused import Maps
from speed_engine.models.layers.open_sum import OpenSum, opened
from speed_engine.ops import normal
from speed_engine.training import muon, optimizers
from train_providers import cpu_provider
from turns import in_turn


class Routed(DiT):
    """In training, a random half of each image's tokens goes around all but the outer blocks
    (TREAD, Krause et al. 2025).
    """

    kept_share = 0.5

    @property
    def training_passes(self) -> tuple[dict[str, int], ...]:
        return ({"route_words": self.pos_embed.shape[1]},)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, route_words: Tensor | None = None
    ) -> Tensor:
        if route_words is None:
            return super().forward(x, t, labels)
        condition, rotation = self.condition(t, labels), self.rotation()
        kept = route_words.argsort(dim=1)[:, : int(self.kept_share * route_words.shape[1])]
        first, middle, last = self.blocks[:1], self.blocks[1:-1], self.blocks[-1:]
        tokens = self.through(first, self.embed(x), condition, *rotation).closed()
        index = kept[:, :, None].expand(-1, -1, tokens.shape[2])
        own = [table[kept] for table in rotation]
        routed = self.through(middle, opened(tokens.gather(1, index)), condition, *own).closed()
        tokens = tokens.scatter(1, index, routed)
        return self.answer(self.through(last, opened(tokens), condition, *rotation), condition)


class Watched(DiT):
    """Returns the tokens after any of its blocks."""

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(f"blocks.{i}" for i in range(len(self.blocks)))

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, features: tuple[str, ...] = ()
    ) -> Any:
        condition, stream, seen = self.condition(t, labels), self.embed(x), {}
        for name, block in zip(self.features, self.blocks, strict=True):
            stream = self.through([block], stream, condition, *self.rotation())
            if name in features:
                seen[name] = stream.closed()
        answer = self.answer(stream, condition)
        return (answer, seen) if features else answer


class SharedValues(SelfAttention):
    """Mixes its values with those of the first block, in a share that it learns."""

    values: Tensor  # of the pass before

    def __init__(self, dim: int, num_heads: int, backend: str = "sdpa") -> None:
        super().__init__(dim, num_heads, backend)
        self.share = nn.Parameter(torch.tensor(0.5))

    def _mix(self, x: Tensor, *first: Tensor) -> Tensor:
        q, k, self.values = self._heads(x)
        values = self.values.lerp(first[0], self.share) if first else self.values
        return self.attend(q, k, values).transpose(1, 2).flatten(2)


class ValueResidual(DiT):
    """The values of the first block reach the attention of all others (Zhou et al. 2024)."""

    def through(
        self, blocks: Iterable[nn.Module], stream: OpenSum, condition: Tensor, *context: Tensor
    ) -> OpenSum:
        first, *others = blocks
        stream = super().through([first], stream, condition)
        attention = first.attn
        assert isinstance(attention, SharedValues)
        return super().through(others, stream, condition, attention.values)


class Dispersive(nn.Module):
    """weight log mean over j of exp(-|z_i - z_j|^2 / D), which repels the features of images (Wang
    and He 2025).
    """

    def __init__(self, name: str, weight: float) -> None:
        super().__init__()
        self.features, self.weight = (name,), weight

    def forward(self, seen: Pass) -> Tensor:
        z = seen.features[self.features[0]].float().flatten(1)
        distances = (z[:, None] - z).square().mean(2)
        return self.weight * (-distances).exp().mean(1).log()


class Contrastive(nn.Module):
    """-weight |answer - target of another image|^2 (Stoica et al. 2025)."""

    features = ()

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, seen: Pass) -> Tensor:
        noise = seen.noise
        if noise is None:
            noise = normal(seen.seed, seen.ids, seen.images[0].numel()).view_as(seen.images)
        of_image, of_noise = seen.coefficients[:, 2:4, None, None, None].unbind(1)
        target = (of_image * seen.images + of_noise * noise).roll(1, 0)
        return -self.weight * (seen.answer - target).square().flatten(1).mean(1)


class Repeated(Objective):
    """Half as many images in a step, each with two timesteps and noises."""

    def forward(
        self,
        model: Any,
        images: Tensor,
        conditions: Any,
        ids: Tensor,
        step: int,
        targets: Any = None,
    ) -> ObjectiveOutput:
        half = len(ids) // 2
        images = torch.cat([images[:half]] * 2)
        conditions = {name: torch.cat([of[:half]] * 2) for name, of in conditions.items()}
        return super().forward(model, images, conditions, ids, step, targets)


class Normed(muon.Muon):
    """Rows of an update are divided by the root of what their mean square was so far, and the whole
    keeps its norm (NorMuon, Li et al. 2025).
    """

    kept = 0.95  # of the mean squares before

    def __init__(self, weights: Any, **options: Any) -> None:
        super().__init__(weights, **options)
        for weight in self._maps:
            self.state[weight]["square"] = torch.zeros_like(weight.flatten(1)[:, :1])

    def _orthogonal(self, weights: list[Tensor], ahead: Any) -> list[Tensor]:
        found = []
        for weight, update in zip(weights, super()._orthogonal(weights, ahead), strict=True):
            square, rows = self.state[weight]["square"], update.flatten(1)
            own = rows.square().mean(1, keepdim=True)
            if self.found_inf is not None:
                own = torch.where(self.found_inf == 1, square, own)
            square.lerp_(own, 1 - self.kept)
            even = rows / (square.sqrt() + muon.TINY)
            even *= rows.norm() / (even.norm() + muon.TINY)
            found.append(even.view_as(update))
        return found


class Candidate(NamedTuple):
    what: str
    changes: dict[str, Any] = {}  # of the configuration
    put: Callable[[], None] = lambda: None  # what no option says, in place for this process


def _network(family: type[DiT]) -> None:
    families.DiT = family


def _value_residual() -> None:
    dit.VARIANTS["original"] = (SharedValues, FeedForward)
    _network(ValueResidual)


def _loss(weight: float, term: Callable[[float], Any]) -> None:
    families.DiT = Watched
    build.Objective = partial(Objective, terms=[term(weight)])


def _objective(kind: type[Objective]) -> None:
    build.Objective = kind


def _without_modulation() -> None:
    """AdamW trains what maps the condition to shifts, scales and gates."""

    def matrices(model: nn.Module) -> list[tuple[Tensor, Maps]]:
        left = {id(of) for name, of in model.named_parameters() if "adaLN" in name}
        found = muon.hidden_matrices(model)
        return [(weight, maps) for weight, maps in found if id(weight) not in left]

    optimizers.hidden_matrices = matrices


def _quintics(*of: muon.Quintic) -> None:
    muon.quintics = lambda _: of


def _optimizer_class(kind: type[muon.Muon]) -> None:
    optimizers.Muon = kind


def _optimizer(**changes: Any) -> dict[str, Any]:
    return {"optimizer": changes}


def _lean() -> None:
    _without_modulation()
    _quintics(*muon.STEEP[:3])


MODERN = {"model": {"variant": "modern"}}
TWO = (6.7524, -18.3510, 13.2633), (2.5379, -1.8747, 0.4413)  # of least error from 0.05 on

CANDIDATES = {
    "recipe": Candidate("the recipe itself"),
    "adamw": Candidate("AdamW", _optimizer(name="adamw")),
    "adamw_decay": Candidate("AdamW, weight decay 0.1",
                             _optimizer(name="adamw", weight_decay=0.1)),
    "decay": Candidate("weight decay 0.1", _optimizer(weight_decay=0.1)),
    "decay_30": Candidate("weight decay 0.3", _optimizer(weight_decay=0.3)),
    "nearest_decay": Candidate("weight decay 0.1, three Newton-Schulz steps of least error",
                               _optimizer(weight_decay=0.1), partial(_quintics, *muon.NEAREST)),
    "two_nearest_decay": Candidate("weight decay 0.1, two of least error",
                                   _optimizer(weight_decay=0.1), partial(_quintics, *TWO)),
    "two_nearest_modern": Candidate("that, QK-norm, rotary positions, SwiGLU",
                                    _optimizer(weight_decay=0.1) | MODERN,
                                    partial(_quintics, *TWO)),
    "no_modulation": Candidate("Muon without adaLN's matrices", put=_without_modulation),
    "three_steps": Candidate("three Newton-Schulz steps", put=partial(_quintics, *muon.STEEP[:3])),
    "both": Candidate("both of these", put=_lean),
    "lean_modern": Candidate("both, weight decay 0.1, QK-norm, rotary positions, SwiGLU",
                             _optimizer(weight_decay=0.1) | MODERN, _lean),
    "beta2_99": Candidate("AdamW's beta2 0.99", _optimizer(beta2=0.99)),
    "rate_32": Candidate("Muon's rate 0.032, AdamW's 0.016",
                         _optimizer(learning_rate=0.032, adamw_learning_rate=0.016)),
    "normed": Candidate("updates of even rows (NorMuon)", put=partial(_optimizer_class, Normed)),
    "cosine": Candidate("a cosine to zero", _optimizer(schedule="cosine")),
    "speed_plus": Candidate("logit-normal around -0.5, stratified", {"method": "speed_plus"}),
    "modern": Candidate("QK-norm, rotary positions, SwiGLU", MODERN),
    "value_residual": Candidate("values of the first block in all (value residual)",
                                put=_value_residual),
    "routed": Candidate("half of the tokens skip the inner blocks (TREAD)",
                        put=partial(_network, Routed)),
    "dispersive": Candidate("dispersive loss, weight 0.5, on the second block",
                            put=partial(_loss, 0.5, partial(Dispersive, "blocks.1"))),
    "contrastive": Candidate("contrastive flow matching, weight 0.05",
                             put=partial(_loss, 0.05, Contrastive)),
    "repeated": Candidate("two noises per image, half of the images",
                          put=partial(_objective, Repeated)),
}  # fmt: skip
STEPS_DIFFER = (
    "recipe", "adamw", "nearest_decay", "no_modulation", "three_steps", "both", "modern", "routed",
)  # fmt: skip

# Steps of 128 images, the rate of Muon, and how images are generated, as in the reports.
CASES: dict[str, dict[str, Any]] = {
    "digits": {"steps": 1600, "evaluation": {"solver_steps": 15}},
    "cifar16": {"steps": 800, "evaluation": {"solver": "dpmpp_2m", "solver_steps": 20}},
}


def configuration(case: str, name: str, seed: int, shards: str | None, steps: int) -> TrainConfig:
    """Of one run."""
    base, candidate = FAIR_PRESETS[case][1], CANDIDATES[name]
    recipe = values_of("flow_muon")
    values = CASES[case] | {"seed": seed, "steps": steps, "checkpoint_every": steps} | recipe
    values["optimizer"] = recipe["optimizer"] | {"learning_rate": 0.016}
    values["evaluation"] = CASES[case]["evaluation"] | {
        "every": steps, "guidance": 1, "metrics": ["fid", "loss"],
    }  # fmt: skip
    if shards is not None:
        values["data"] = {"source": shards, "test_source": f"{shards}-test"}
    return with_values(with_values(base, values), candidate.changes)


def train(case: str, name: str, seed: int, shards: str | None, steps: int) -> dict[str, float]:
    """The figures at the end of one run."""
    torch.set_num_threads(1)
    _quintics(*muon.STEEP)
    CANDIDATES[name].put()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        from rich.console import Console

        run = se.train(
            configuration(case, name, seed, shards, steps), Path(folder) / "run",
            console=Console(file=quiet),
        )  # fmt: skip
        record = next(r for r in reversed(run.metrics) if "held_out_fid" in r)
    return {key: record[key] for key in ("images", "held_out_fid", "validation_loss")}


def provider(case: str, name: str) -> Callable[[], object]:
    """One step, for a process of its own."""
    _quintics(*muon.STEEP)
    CANDIDATES[name].put()
    torch.set_num_threads(1)
    config = configuration(case, name, 0, None, CASES[case]["steps"])
    return cpu_provider("compiled", config)


def main() -> None:
    options = _options()
    path, case = result_path("candidates"), options.case
    found = json.loads(path.read_text()) if path.exists() else {"runs": {}, "step_ms": {}}
    found.pop("environment", None)
    if options.step:
        providers = {name: partial(provider, case, name) for name in STEPS_DIFFER}
        timings = in_turn(providers, warmup=3, turns=12, calls=10)
        found["step_ms"][case] = {name: timing._asdict() for name, timing in timings.items()}
        print(write_result("candidates", found))
        return
    runs = found["runs"].setdefault(case, {})
    steps = 2 if options.dry_run else CASES[case]["steps"]
    wanted = [
        (name, seed)
        for seed in options.seeds
        for name in options.names
        if str(seed) not in runs.get(name, {})
    ]
    slots = len(os.sched_getaffinity(0))
    with get_context("spawn").Pool(slots, maxtasksperchild=1) as pool:
        waiting = [
            (name, seed, pool.apply_async(train, (case, name, seed, options.shards, steps)))
            for name, seed in wanted
        ]
        for name, seed, outcome in waiting:
            figures = outcome.get()
            print(f"{case} {name} seed {seed}: {figures}", flush=True)
            runs.setdefault(name, {})[str(seed)] = figures
            if not options.dry_run:
                write_result("candidates", found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--shards", help="folder of CIFAR-10 at 16 pixels")
    parser.add_argument("--names", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2000])
    parser.add_argument("--step", action="store_true", help="time a step")
    parser.add_argument("--dry-run", action="store_true", help="two steps, nothing kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
