import itertools
import random
import tarfile
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from webdataset.filters import shuffle

from speed_engine.data.format.decode import UnfitSample
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.repair import RepairList
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading import stream
from speed_engine.data.loading.decoding import BatchReader
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.stream import stream_samples
from speed_engine.data.preparing.pictures import npy_bytes

SHAPE, N = (1, 2, 3), 60
FEED = Feed(8, 5)


def take(folder, count, feed=FEED, **options):
    with Loader(ShardReader(folder), SHAPE, feed, mode="stream", **options) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_whole_samples_and_says_that_it_is_not_exact(make_shards, workers, caplog):
    batches = take(make_shards(N, per_shard=7), 40, workers=workers)
    images = torch.cat([batch.images for batch in batches])[:, 0, 0, 0]
    labels = torch.cat([batch.conditions["labels"] for batch in batches])
    assert (labels == images % 10).all() and set(images.tolist()) == set(range(N))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(320))
    assert "data.mode=stream is not exact" in caplog.text


def test_ranks_and_resumed_runs_draw_differently_and_number_on(make_shards):
    folder = make_shards(N, per_shard=7)
    draws = [
        take(folder, 3, Feed(8, 5, start, rank, world=2)) for rank in (0, 1) for start in (0, 800)
    ]
    assert len({str(draw[0].images.tolist()) for draw in draws}) == 4
    assert draws[3][1].ids.tolist() == [812, 813, 814, 815]


def test_a_damaged_sample_is_dropped_and_counted_or_stops_the_stream(make_shards):
    folder = make_shards(N, per_shard=7)
    path = folder / "x-000000.tar"
    index, _ = load_index(index_path(path))
    data = bytearray(path.read_bytes())
    data[int(index.offset[3, 1])] ^= 1  # the magic of npy: streams do not compare checksums
    path.write_bytes(data)
    batches = take(folder, 40, on_bad_sample="skip")
    replaced = [reason for batch in batches for reason in batch.replaced]
    assert replaced and all("sample '0003': not an npy file" in reason for reason in replaced)
    assert all((batch.images[:, 0, 0, 0] != 3).all() for batch in batches)
    with pytest.raises(ShardError, match="sample '0003'"):
        take(folder, 40, on_bad_sample="stop")


def test_what_is_excluded_is_not_streamed(make_shards, tmp_path):
    folder = make_shards(N, per_shard=7)
    RepairList({}, {"x-000000.tar": {"0003": "?"}, "x-000001.tar": {"0004": "?"}}).save(
        tmp_path / "repair.json"
    )
    reader = ShardReader(folder, exclude=tmp_path / "repair.json")
    with Loader(reader, SHAPE, FEED, mode="stream") as loader:
        seen = {i for _ in range(60) for i in next(loader).images[:, 0, 0, 0].tolist()}
    assert seen == set(range(N)) - {3}  # 4 is in another shard


def test_a_stream_of_nothing_but_damage_ends(tmp_path):
    with ShardWriter(tmp_path, "x", 5) as writer:
        for i in range(20):
            writer.write(f"{i}", {"npy": b"junk", "cls": b"1"})
    reader = ShardReader(tmp_path)
    batches = BatchReader(reader, SHAPE, None, "skip")
    with pytest.raises(ShardError, match="not an npy file"):
        batches.collect(stream_samples(reader, FEED, worker=0), np.arange(8))


def test_only_damage_in_a_row_ends_a_stream(make_shards, monkeypatch):
    monkeypatch.setattr("speed_engine.data.loading.decoding.BAD_IN_A_ROW", 1)
    reader = ShardReader(make_shards(1, per_shard=1))
    good, bad = next(reader.stream([0])), ShardError("bad")
    batches = BatchReader(reader, SHAPE, on_bad_sample="skip")
    batch = batches.collect(iter([("x", good), ("x", bad)] * 3), np.arange(3))
    assert batch.replaced == ("bad", "bad")
    with pytest.raises(ShardError, match="bad"):
        batches.collect(iter([("x", good), ("x", bad), ("x", bad)]), np.arange(2))


def test_a_streamed_sample_unlike_the_others_is_named(tmp_path):
    with ShardWriter(tmp_path, "x", 5) as writer:
        for i, dtype in enumerate((np.uint8, np.float16)):
            writer.write(str(i), {"npy": npy_bytes(np.zeros(SHAPE, dtype)), "cls": b"1"})
    reader = ShardReader(tmp_path)
    samples = stream_samples(reader, FEED, worker=0)
    with pytest.raises(UnfitSample, match=r"x-000000\.tar: sample .*needs one dtype"):
        BatchReader(reader, SHAPE).collect(samples, np.arange(30))


def write_tar(path, *members):
    """Members of (name, size, content); of content that is short the rest is a hole."""
    with path.open("wb") as file:
        for name, size, content in members:
            header = tarfile.TarInfo(name)
            header.size = size
            file.write(header.tobuf(tarfile.USTAR_FORMAT, "utf-8") + content)
            file.seek(-len(content) + size + -size % 512, 1)
        file.write(bytes(1024))


def test_a_streamed_member_larger_than_any_may_be_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BUFFER", 2)
    monkeypatch.setattr(stream, "MAX_MEMBER", 2**20)
    array = npy_bytes(np.zeros(SHAPE, np.uint8))
    members = [("a.npy", len(array), array), ("a.mp4", 2**24, b"")]
    write_tar(tmp_path / "x.tar", *members)
    reader = ShardReader(tmp_path, ["npy"])
    tracemalloc.start()
    write_tar(tmp_path / "x.tar", *members, ("b.npy", 2**24, b""))  # after it was opened
    samples = stream_samples(reader, FEED, worker=0)
    found = {where: sample for where, sample in islice(samples, 2)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    sound = found[f"{tmp_path}/x.tar: sample 'a'"]
    assert not isinstance(sound, ShardError) and bytes(sound["npy"]) == array
    damage = str(found[f"{tmp_path}/x.tar: sample 'b'"])
    assert "members {'npy': 16777216} of more than 1,048,576 bytes" in damage


def test_a_member_larger_than_any_may_be_is_named_when_the_data_set_is_opened(tmp_path):
    write_tar(tmp_path / "x.tar", ("a.npy", 2**29, b""))
    with pytest.raises(ShardError, match="x.tar: sample 'a': its member 'npy' has 536,870,912 b"):
        ShardReader(tmp_path, ["npy"])


def test_a_tar_that_is_damaged_under_a_stream_is_named(make_shards):
    folder = make_shards(4, per_shard=4)
    reader = ShardReader(folder)
    path = folder / "x-000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ShardError, match=r"x-000000\.tar: .*; it is damaged"):
        list(islice(stream_samples(reader, FEED, worker=0), 20))


def test_the_buffer_of_a_stream_shuffles_as_webdataset_and_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(stream, "BUFFER", 20)

    def samples():
        for i in itertools.count():
            seen.append(i)
            yield {"__key__": str(i), "npy": bytes(100)}

    seen: list[int] = []
    theirs = shuffle(20, initial=10, rng=random.Random(0))(samples())
    ours = stream._shuffled(samples(), random.Random(0))
    first = [sample["__key__"] for sample in islice(ours, 200)]
    assert first == [sample["__key__"] for sample in islice(theirs, 200)]
    monkeypatch.setattr(stream, "BUFFER_BYTES", 500)
    seen.clear()
    ours = stream._shuffled(samples(), random.Random(0))
    for given in range(1, 200):
        next(ours)
        assert len(seen) - given <= 5
