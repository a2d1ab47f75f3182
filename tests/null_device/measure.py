"""What presets ask of a GPU, measured on the null device; run by the tests beside this file.

Usage: ``measure.py step PRESET COMPILE``, ``measure.py memory PRESET MODEL``, where MODEL is JSON
of options of the model, ``measure.py depths COMPILE DEPTH...`` or ``measure.py atomics PRESET``.
The result is JSON in the last line.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import books
import numpy as np
import torch
from torch._inductor.utils import clear_caches

from speed_engine.build import build_engine, build_model, build_process
from speed_engine.config import TrainConfig
from speed_engine.data import opening
from speed_engine.data.batch import Batch
from speed_engine.data.opening import condition_shapes, null_conditions
from speed_engine.evaluation.generate import GenerationSettings, generate
from speed_engine.planning.cost import estimate
from speed_engine.presets import PRESETS
from speed_engine.run.starting import machine_choices
from speed_engine.runtime import kernels
from speed_engine.runtime.world import ALONE
from speed_engine.training.ema import EMA
from speed_engine.training.engine import Engine

CUDA = torch.device("cuda:0")
BATCH = 8  # images; launches depend on it only where a kernel splits its work
SOLVER_STEPS = 3
Compile = Literal["on", "blocks", "off"]
XL = {"size": None, "patch_size": 2, "dim": 1152, "num_heads": 16, "depth": 2}


def small(name: str, batch: int = BATCH, compile: Compile = "blocks", **model: Any) -> TrainConfig:
    """A preset on a small batch; DiT-XL/2 with two of its 28 blocks.

    Args:
        name: of the preset.
        batch: images per step.
        compile: as in the configuration.
        model: options of the model to replace.
    """
    config = PRESETS[name][1]
    if getattr(config.model, "size", None) == "DiT-XL/2":
        model = XL | model
    return replace(config, model=replace(config.model, **model), batch_size=batch, compile=compile)


def engine_of(config: TrainConfig) -> Engine:
    process = build_process(config)
    choices = machine_choices(config)
    model = build_model(config, choices.attention.value).to(CUDA)
    return build_engine(config, process, model, choices, ALONE, CUDA)


def batch_of(config: TrainConfig) -> Batch:
    size = config.batch_size
    ids = torch.arange(size, device=CUDA)
    conditions = {
        name: ids % config.data.num_classes
        if name == "labels"
        else torch.rand(size, *shape, device=CUDA)
        for name, shape in condition_shapes(config.data).items()
    }
    return Batch(torch.rand(size, *config.data.image_shape, device=CUDA), conditions, ids)


def figures_of(action: Callable[[], Any]) -> dict[str, Any]:
    """What the books say of an action."""
    books.reset()
    action()
    written = books.read()
    return {
        "launches": written.launches(),
        "syncs": {entry.name: entry.count for entry in written if entry.kind == "sync"},
        "host_copies": written.host_copies(),
        "allocations": written.count("malloc", "free", "pinned"),
        "most": [(entry.count, entry.kind, entry.name[:200]) for entry in written[:8]],
    }


def step(name: str, compile: Compile) -> dict[str, Any]:
    """A training step of a preset and a generation, when the same has been done before."""
    config = small(name, compile=compile)
    engine, batch = engine_of(config), batch_of(config)
    train = lambda: engine.step(batch)
    pictures = lambda: generation(config, engine, batch)
    for action in (train, train, train, pictures):
        action()
    return {
        "train": figures_of(train),
        "generate": figures_of(pictures),
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }


def generation(config: TrainConfig, engine: Engine, batch: Batch) -> None:
    generate(
        engine.update.averages[EMA].model,
        build_process(config).table,
        batch.conditions,
        batch.ids,
        GenerationSettings(steps=SOLVER_STEPS, guidance=config.evaluation.guidance),
        image_shape=config.data.image_shape,
        null=null_conditions(config.data),
        seed=config.seed,
        latents=config.data.latents,
    )


def memory(name: str, model: dict[str, Any]) -> dict[str, float]:
    """Bytes that a step of a preset has allocated at its peak, and the estimate of them."""
    config = small(name, PRESETS[name][1].batch_size, **model)
    engine, data = engine_of(config), batch_of(config)
    engine.step(data)
    gc.collect()  # compiling leaves activations behind in cycles of references
    torch.cuda.reset_peak_memory_stats()
    engine.step(data)
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "estimate": estimate(config).gpu_bytes(config.batch_size),
    }


def depths(compile: Compile, wanted: list[int]) -> dict[int, Any]:
    """Of digits at each depth, compiled anew: graphs, and the size of Inductor's code."""
    found = {}
    for depth in wanted:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = small("digits", compile=compile, depth=depth)
        with tempfile.TemporaryDirectory() as folder:
            with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
                clear_caches()
                engine_of(config).step(batch_of(config))
            code = [path.stat().st_size for path in Path(folder).rglob("*.py")]
        found[depth] = {
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "files": len(code),
            "bytes": sum(code),
        }
    return found


def atomics(preset: str) -> dict[str, int]:
    """Of a preset compiled whole: atomic additions in the code, whose order is not fixed."""
    with tempfile.TemporaryDirectory() as folder:
        with patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
            clear_caches()
            config = small(preset, compile="on")
            engine_of(config).step(batch_of(config))
        code = [path.read_text() for path in Path(folder).rglob("*.py")]
    return {"kernels": len(code), "atomics": sum(text.count("atomic_add(") for text in code)}


MEASUREMENTS: dict[str, Callable[..., dict[Any, Any]]] = {
    "step": step,
    "memory": lambda name, model: memory(name, json.loads(model)),
    "atomics": atomics,
    "depths": lambda compile, *wanted: depths(compile, [int(each) for each in wanted]),
}

if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    tokens = lambda data: np.zeros(data.token_shape, np.float32)
    with (
        patch.object(opening, "_null_tokens", tokens),  # of no shards
        patch.object(kernels, "check_kernels", lambda device: []),  # no kernel could pass
    ):
        print(json.dumps(MEASUREMENTS[command](*arguments)))
