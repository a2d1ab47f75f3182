"""Synthetic comparisons with a known speed-up."""

import numpy as np

from speed_engine.arena.results import Contestant, Curve, Point, Results

BUDGET = 20_000


def comparison(speeds: dict[str, float], seeds=1, noise=0.0, draw=None, evaluations=20) -> Results:
    """Power laws: a contestant of speed s has at n images the quality that speed 1 has at s n."""
    draw = np.random.default_rng(0) if draw is None else draw
    images = np.linspace(BUDGET / evaluations, BUDGET, evaluations).round().astype(int)
    shared = draw.normal(0, noise, seeds)
    curves = []
    for name, speed in speeds.items():
        for seed in range(seeds):
            wobble = draw.normal(0, noise) + draw.normal(0, noise, evaluations)
            fid = 1000 * (images * speed) ** -0.6 * np.exp(shared[seed] + wobble)
            points = [
                Point(images=int(n), seconds=n / 50, values={"held_out_fid": float(value)})
                for n, value in zip(images, fid, strict=True)
            ]
            curves.append(
                Curve(
                    contestant=name, seed=seed, run=f"runs/{name}/{seed}", points=tuple(points),
                    by_solver_steps={"8": 9.0, "50": 4.0}, denoising={"-2": 0.3, "2": 0.1},
                    copied_share=0.05,
                )
            )  # fmt: skip
    return Results(
        metric="held_out_fid", extractor="digits classifier", budget_images=BUDGET,
        contestants=tuple(contestant(name) for name in speeds), seeds=tuple(range(seeds)),
        curves=tuple(curves), baselines=(next(iter(speeds)),),
        config={"batch_size": 128, "evaluation": {"solver_steps": 20}},
        environment={"torch": "2.11"}, command="speed-engine compare --seeds 5",
    )  # fmt: skip


def contestant(name: str) -> Contestant:
    method, _, process = name.partition("@")
    return Contestant(
        name=name, method=method, schedule=process or "linear",
        prediction="velocity" if process == "flow" else "epsilon", options={},
        learning_rate=1e-3, tuning={"0.0005": 3.0, "0.001": 2.0},
    )  # fmt: skip
