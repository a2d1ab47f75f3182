"""Does the loader keep up? The same step fed by shards, and by one batch again and again."""

import argparse
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from harness import interleaved
from loader_providers import npy_bytes
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.device import on_device
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.resident import Resident
from speed_engine.data.opening import build_cleaning, open_data, stored_shape
from speed_engine.runtime.memory import keep_freed_memory
from speed_engine.training.engine import Engine
from train_cases import cpu_cases, gpu_cases, synthetic_batch, tiny
from train_providers import engine_of

NUM_LATENTS, NUM_SHARDS = 4096, 4  # (4, 32, 32) float16, 33 MB
GOAL = 0.97
Workers = int | Literal["resident"]


def cases(device: torch.device, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """One measurement, of the digits and of DiT-S/2 on latents."""
    return {"": partial(measure, device, options)}


def measure(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Images/s with the loader over images/s without."""
    known = cpu_cases() if device.type == "cpu" else cpu_cases() | gpu_cases()
    rows = []
    keep_freed_memory()  # as the trainer does
    with ExitStack() as stack:
        for name in ("digits", "DiT-S/2"):
            # Small data sets lie in memory, as the trainer keeps them on a CPU.
            config, workers = known[name], [0, 2] if name == "DiT-S/2" else ["resident", 0]
            if options.dry_run:
                config = tiny(config) if name != "digits" else replace(config, batch_size=8)
            if name != "digits":
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                config = on_shards(config, folder, 64 if options.dry_run else NUM_LATENTS)
            repeats = 2 if options.dry_run else options.repeats or (200 if name == "digits" else 20)
            for count in workers:
                rows.append(fed(name, config, device, count, repeats, options.dry_run))
                print(
                    f"{rows[-1]['case']}: {rows[-1]['share']:.1%} of the rate without a loader, "
                    f"goal {GOAL:.0%}",
                    flush=True,
                )
    return {"goal": GOAL, "rows": rows}


def fed(
    name: str, config: TrainConfig, device: torch.device, workers: Workers, repeats: int, dry: bool
) -> dict[str, Any]:
    """One engine, fed in turn by the loader and by a batch that lies there."""
    engine = engine_of("eager" if dry else "compiled", config, device)
    still = synthetic_batch(config, device)
    with batches(config, device, workers) as stream:
        providers = {
            "loader": partial(_step_from, engine, stream),
            "one batch": partial(engine.step, still),
        }
        timings = interleaved(providers, warmup=1 if dry else 5, repeats=repeats)
    return {
        "case": f"{name}, batch {config.batch_size}, "
        + (workers if isinstance(workers, str) else f"workers {workers}"),
        "step_milliseconds": {n: timing._asdict() for n, timing in timings.items()},
        "share": round(timings["one batch"].median / timings["loader"].median, 4),
    }


def _step_from(engine: Engine, stream: Iterator[Batch]) -> None:
    engine.step(next(stream))


@contextmanager
def batches(
    config: TrainConfig, device: torch.device, workers: Workers
) -> Generator[Iterator[Batch]]:
    """The run's batches, as ``Trainer`` has them."""
    reader = open_data(config.data)
    cleaning = build_cleaning(config.data, reader, config.seed, device)
    classes = config.data.num_classes
    shape, feed = stored_shape(config.data, reader), Feed(config.batch_size, config.seed)
    if isinstance(workers, str):
        yield Resident(reader, shape, feed, cleaning, num_classes=classes)
        return
    pinned = device.type == "cuda"
    with Loader(reader, shape, feed, workers=workers, num_classes=classes, pinned=pinned) as loader:
        yield map(cleaning.batch, on_device(loader, device))


def on_shards(config: TrainConfig, folder: Path, count: int) -> TrainConfig:
    """The configuration on shards of random latents, written now."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "shards", "x", -(-count // NUM_SHARDS)) as writer:
        for i in range(count):
            latent = generator.standard_normal(config.data.image_shape).astype(np.float16)
            label = str(i % config.data.num_classes).encode()
            writer.write(f"{i:06d}", {"npy": npy_bytes(latent), "cls": label})
    return replace(config, data=replace(config.data, source=str(folder / "shards")))
