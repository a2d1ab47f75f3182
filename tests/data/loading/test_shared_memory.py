"""Memory of workers is used again, but never while anybody holds what is in it."""

import os
import random

import numpy as np
import pytest
from PIL import Image

from speed_engine.data.batch import StoredBatch
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.shared_memory import PIECES
from speed_engine.data.preparing.pictures import encode_picture

SHAPE, N, B = (3, 32, 32), 96, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every image as an array and as a picture, all of its pixels its label."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "x", 20) as writer:
        for i in range(N):
            picture = Image.fromarray(np.full((*SHAPE[1:], SHAPE[0]), i, dtype=np.uint8))
            members = {kind: encode_picture(picture, kind, 100) for kind in ("npy", "jpg")}
            writer.write(f"{i:04d}", {**members, "cls": str(i).encode()})
    return folder


def loader(folder, kind, workers):
    return Loader(ShardReader(folder, (kind, "cls")), SHAPE, Feed(B, 5), workers=workers)


def piece(batch: StoredBatch) -> int:
    """Which file in memory the batch is in."""
    descriptor, _ = batch.images.untyped_storage()._share_fd_cpu_()
    return os.fstat(descriptor).st_ino


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["npy", "jpg"])
def test_what_is_held_stays_as_it_was(folder, kind, workers):
    """The batch, a part of it, or an array that shares its memory."""
    rng = random.Random(0)
    held: list[tuple[list[int], object]] = []
    with loader(folder, kind, workers) as batches:
        for _ in range(60):
            batch = next(batches)
            labels = batch.conditions["labels"].tolist()
            part = rng.choice([batch.images, batch.images[:, :, 3], batch.images.numpy()])
            held.append((labels, part))
            del batch, part
            while len(held) > rng.randrange(12):
                held.pop(rng.randrange(len(held)))
            for labels, part in held:
                rows = np.asarray(part).reshape(B, -1)
                assert (rows == np.array(labels)[:, None]).all()


@pytest.mark.parametrize("kind", ["npy", "jpg"])
def test_memory_is_used_again_once_nobody_holds_it(folder, kind):
    with loader(folder, kind, 2) as batches:
        used = {piece(next(batches)) for _ in range(50)}
    assert len(used) <= 2 * PIECES


def test_more_batches_than_there_are_pieces_can_be_held(folder):
    with loader(folder, "npy", 1) as batches:
        held = [next(batches) for _ in range(4 * PIECES)]
    assert len({piece(batch) for batch in held}) == len(held)
    for batch in held:
        assert (batch.images[:, 0, 0, 0] == batch.conditions["labels"]).all()
