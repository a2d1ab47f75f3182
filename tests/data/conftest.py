"""Small data sets on disk."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from speed_engine.data.format.writer import ShardWriter

SHAPE = (1, 2, 3)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sample(i: int) -> dict[str, bytes]:
    """Image full of i, label i % 10."""
    return {"npy": npy(np.full(SHAPE, i, np.uint8)), "cls": str(i % 10).encode()}


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes samples 0 ... n - 1, whose pixels say which they are, and returns the folder."""

    def make(num_samples: int, per_shard: int, name: str = "shards") -> Path:
        with ShardWriter(tmp_path / name, "x", per_shard) as writer:
            for i in range(num_samples):
                writer.write(f"{i:04d}", sample(i))
        return tmp_path / name

    return make
