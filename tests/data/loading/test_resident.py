"""A resident data set gives the batches of a loader, bit for bit."""

import re

import numpy as np
import pytest
import torch

from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.resident import CHUNK, Resident, resident_bytes
from speed_engine.data.preparing.pictures import npy_bytes

SEED = 5
FEED = Feed(8, SEED)
SHAPE = (4, 4, 6)
N = 50  # batches of 8 straddle epochs


@pytest.fixture(params=["uint8", "float16", "float32"])
def reader(tmp_path, request):
    """Noise of a dtype, with labels, tokens and a smaller picture."""
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "shards", "x", 7) as writer:
        for i in range(N):
            image = generator.uniform(0, 255, SHAPE).astype(request.param)
            members = {
                "npy": npy_bytes(image),
                "cls": str(i % 10).encode(),
                "tokens.npy": npy_bytes(generator.normal(size=(3, 2)).astype(np.float16)),
                "low.npy": npy_bytes(generator.integers(0, 256, (1, 2, 3), dtype=np.uint8)),
            }
            writer.write(f"{i:04d}", members)
    return ShardReader(tmp_path / "shards", ("npy", "cls", "tokens.npy", "low.npy"))


def cleaning(reader, **options) -> Cleaning:
    stored = reader.dataset.contents["npy"]["dtype"]
    latents = {} if stored == "uint8" else dict(posterior=True, scale=0.18215, shift=0.06)
    return Cleaning(torch.tensor(SEED), **latents, **options)


def from_loader(reader, clean, count, feed=FEED, **options):
    with Loader(reader, SHAPE, feed, **options) as loader:
        return [clean.batch(next(loader).to("cpu")) for _ in range(count)]


def from_memory(reader, clean, count, feed=FEED, **options):
    with Resident(reader, SHAPE, feed, clean, **options) as resident:
        return [next(resident) for _ in range(count)]


def assert_equal(one, other):
    assert torch.equal(one.images, other.images) and one.images.dtype == torch.float32
    assert torch.equal(one.ids, other.ids) and list(one.replaced) == list(other.replaced)
    assert one.conditions.keys() == other.conditions.keys()
    for name, value in one.conditions.items():
        assert torch.equal(value, other.conditions[name])
        assert value.dtype == other.conditions[name].dtype


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_those_of_a_loader(reader, flip):
    clean = cleaning(reader, flip=flip)
    pairs = zip(from_loader(reader, clean, 20), from_memory(reader, clean, 20), strict=True)
    for loaded, resident in pairs:
        assert_equal(loaded, resident)
    assert resident.conditions["tokens"].dtype == torch.float32


def test_every_rank_gets_its_part_from_any_start(reader):
    clean = cleaning(reader, flip=True)
    for rank in range(2):
        feed = Feed(8, SEED, start=37, rank=rank, world=2, window=3)
        loaded = from_loader(reader, clean, 14, feed, num_classes=10)
        resident = from_memory(reader, clean, 14, feed, num_classes=10)
        for pair in zip(loaded, resident, strict=True):
            assert_equal(*pair)


def test_a_smaller_picture_is_mirrored_with_its_image(reader):
    plain, mirrored = (
        from_memory(reader, cleaning(reader, flip=flip), 1)[0] for flip in (False, True)
    )
    low = [batch.conditions["low_resolution"] for batch in (plain, mirrored)]
    moved = (low[0] != low[1]).flatten(1).any(1)
    assert moved.any() and not moved.all()
    assert torch.equal(low[0][moved].flip(-1), low[1][moved])
    if reader.dataset.contents["npy"]["dtype"] == "uint8":
        assert torch.equal(plain.images[moved].flip(-1), mirrored.images[moved])
        assert torch.equal(plain.images[~moved], mirrored.images[~moved])


def test_what_it_takes_is_what_it_holds(reader):
    resident = Resident(reader, SHAPE, FEED, cleaning(reader))
    held = resident._stored.values()
    assert resident_bytes(reader, SHAPE) == sum(tensor.nbytes for tensor in held)
    assert resident._stored["tokens"].dtype == torch.float16  # as stored
    assert all(len(tensor) == N for tensor in held)


def test_more_samples_than_are_read_at_once(make_shards, monkeypatch):
    monkeypatch.setattr("speed_engine.data.loading.resident.CHUNK", 7)
    assert CHUNK != 7
    reader = ShardReader(make_shards(N, per_shard=11))
    clean = Cleaning(torch.tensor(SEED))
    resident = Resident(reader, (1, 2, 3), FEED, clean)
    images = torch.cat([next(resident).images for _ in range(25)])
    samples = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().reshape(4, N)
    assert (samples.sort(dim=1).values == torch.arange(N)).all()


def test_what_does_not_fit_is_named(make_shards):
    reader = ShardReader(make_shards(N, per_shard=11))
    clean = Cleaning(torch.tensor(SEED))
    with pytest.raises(ValueError, match=r"has label 3; needed: less than num_classes=3"):
        Resident(reader, (1, 2, 3), FEED, clean, num_classes=3)
    with pytest.raises(ValueError, match=r"expected .* of shape \(1, 3, 3\)"):
        Resident(reader, (1, 3, 3), FEED, clean)


def test_damaged_samples_have_the_substitutes_of_a_loader(reader, tmp_path):
    path = sorted((tmp_path / "shards").glob("*.tar"))[2]
    data = bytearray(path.read_bytes())
    members = [match.start() for match in re.finditer(rb"\x93NUMPY", data)]
    for place in (members[1], members[9]):  # of different samples, one of which is no image
        data[place + 70] ^= 0xFF
    path.write_bytes(data)
    clean = cleaning(reader, flip=True)
    loaded = from_loader(reader, clean, 40, on_bad_sample="skip")
    resident = from_memory(reader, clean, 40, on_bad_sample="skip")
    for pair in zip(loaded, resident, strict=True):
        assert_equal(*pair)
    assert sum(len(batch.replaced) for batch in resident) >= 2
    with pytest.raises(ValueError, match="CRC-32 mismatch"):
        Resident(reader, SHAPE, FEED, clean)
