"""The held-out part: chosen by keys alone, never trained on, the same wherever the data lie."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.data.config import DataConfig
from speed_engine.data.format.held_out import Part, in_part, is_held_out
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import DataOrder, Feed
from speed_engine.data.loading.resident import Resident

SHAPE, N, SHARE = (1, 2, 3), 200, 0.3


def images_of(reader):
    """Image n of these shards is full of n."""
    return {reader.read(i)["npy"][-1] for i in range(len(reader))}


def parts(folder, share=SHARE):
    chosen: tuple[Part | None, ...] = ("training", "held_out", None)
    return [ShardReader(folder, held_out=share, part=part) for part in chosen]


@given(st.lists(st.text(), unique=True, max_size=50), st.floats(0, 0.9))
def test_the_parts_are_complements_and_a_larger_share_holds_out_more(keys, share):
    held_out = in_part(keys, share, "held_out")
    assert (held_out != in_part(keys, share, "training")).all()
    assert (in_part(keys, min(0.9, share + 0.1), "held_out") >= held_out).all()


def test_the_split_is_frozen():
    """Computed with sha256sum: hexadecimal digests that begin below 0.1 of 16 ** 16."""
    held_out = [n for n in range(50) if is_held_out(f"{n:06d}", 0.1)]
    assert held_out == [16, 19, 22, 23, 38, 44, 46]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_what_was_asked_for(share):
    held_out = in_part(map(str, range(20_000)), share, "held_out").mean()
    assert held_out == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)


def test_a_sample_is_in_one_part_whatever_the_layout(make_shards):
    layouts = [parts(make_shards(N, per_shard=n, name=f"{n}")) for n in (7, 64, N)]
    for training, held_out, everything in layouts:
        assert not images_of(training) & images_of(held_out)
        assert images_of(training) | images_of(held_out) == images_of(everything) == set(range(N))
        assert 0.2 * N < len(held_out) < 0.4 * N
    assert len({frozenset(images_of(held_out)) for _, held_out, _ in layouts}) == 1


def test_each_part_and_share_is_other_data(make_shards):
    folder = make_shards(N, per_shard=64)
    readers = [*parts(folder), *parts(folder, 0.2)[:2]]
    assert len({reader.fingerprint for reader in readers}) == 5
    for reader in parts(folder, 0.0):  # what is not split is what it was
        assert reader.fingerprint == ShardReader(folder).fingerprint and len(reader) == N


@pytest.mark.parametrize("mode, workers", [("exact", 0), ("exact", 2), ("stream", 0)])
def test_no_loader_ever_gives_a_held_out_sample(make_shards, mode, workers):
    training, held_out, _ = parts(make_shards(N, per_shard=17))
    seen = []
    with Loader(training, SHAPE, Feed(20, 3), workers=workers, mode=mode) as loader:
        for _ in range(3 * N // 20):
            seen += next(loader).images[:, 0, 0, 0].tolist()
    assert not set(seen) & images_of(held_out)
    if mode == "exact":
        assert set(seen[: len(training)]) == images_of(training)  # an epoch is all of the others


def test_resident_data_and_any_resumption_follow_the_same_order(make_shards):
    training, _, _ = parts(make_shards(N, per_shard=17))
    order = DataOrder(training.counts, 3, 8).sample_indices(0, 400)
    expected = [training.read(int(i))["npy"][-1] for i in order]
    seed = torch.tensor(3)
    cleaning = Cleaning(seed=seed, posterior=False, scale=1.0, shift=0.0, flip=False)
    resident = Resident(training, SHAPE, Feed(20, 3), cleaning)
    pixels = torch.cat([next(resident).images for _ in range(20)])[:, 0, 0, 0]
    assert ((pixels + 1) * 127.5).round().int().tolist() == expected
    with Loader(training, SHAPE, Feed(20, 3, start=200)) as loader:
        assert (
            torch.cat([next(loader).images for _ in range(10)])[:, 0, 0, 0].tolist()
            == (expected[200:])
        )


@pytest.mark.parametrize("share", [-0.1, 0.95, float("nan")])
def test_other_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"data.held_out=.*: is a share in \[0, 0.9\]"):
        DataConfig(held_out=share)


def test_a_share_that_leaves_a_part_empty_is_refused(make_shards):
    folder = make_shards(3, per_shard=3)
    with pytest.raises(ValueError, match="held_out=0.01 leaves no samples for the held_out part"):
        ShardReader(folder, held_out=0.01, part="held_out")
