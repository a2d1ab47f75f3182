import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_engine.data.loading.order import DataOrder, epoch_order

COUNTS = (5, 3, 8, 1, 4)
N = sum(COUNTS)


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    seed=st.integers(0, 2**62),
    epoch=st.integers(0, 2**40),
    window=st.integers(1, 15),
)
def test_an_epoch_is_a_permutation(counts, seed, epoch, window):
    order = epoch_order(counts, seed, epoch, window)
    assert sorted(order) == list(range(sum(counts)))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(epoch_order(COUNTS, seed, epoch, window=8))
        for seed in range(20)
        for epoch in range(5)
    }
    assert len(orders) == 100


def test_the_order_is_frozen():
    order = DataOrder((100, 7, 50, 50, 50, 93), seed=2**40 + 17, window=4)
    indices = order.sample_indices(0, 1000).astype("<i8")
    digest = hashlib.sha256(indices.tobytes()).hexdigest()
    assert digest == "e33a3205a0bc0e021e5f86812412f8929e8958a2ce7304dca182d02052db5703"


def test_a_window_is_finished_before_the_next_begins():
    counts = (10,) * 12
    order = epoch_order(counts, seed=3, epoch=0, window=4)
    groups = [set(part // 10) for part in order.reshape(3, 40)]
    assert [len(group) for group in groups] == [4, 4, 4]
    assert set.union(*groups) == set(range(12))


def test_images_are_shuffled_across_the_shards_of_a_window():
    shards = epoch_order((50, 50, 50, 50), seed=0, epoch=0, window=4) // 50
    assert np.count_nonzero(np.diff(shards)) > 120  # expected: 3/4 of 199


def test_every_sample_comes_first_equally_often():
    first = [epoch_order((2, 4), seed, 0, window=2)[0] for seed in range(3000)]
    frequencies = np.bincount(first, minlength=6)
    assert np.square(frequencies - 500).sum() / 500 < 20.5  # chi-square, 5 degrees, p = 0.001


@given(start=st.integers(0, 5 * N), count=st.integers(0, 3 * N))
@settings(max_examples=100)
def test_a_slice_may_start_anywhere_and_straddle_epochs(start, count):
    stream = np.concatenate([epoch_order(COUNTS, 9, epoch, 2) for epoch in range(9)])
    order = DataOrder(COUNTS, seed=9, window=2)
    assert order.sample_indices(start, count).tolist() == stream[start : start + count].tolist()


def test_slices_do_not_depend_on_what_was_asked_before():
    used, starts = DataOrder(COUNTS, seed=9, window=2), [100, 0, 19, 21, 60, 40, 0]
    for start in starts:
        fresh = DataOrder(COUNTS, seed=9, window=2)
        assert (used.sample_indices(start, 30) == fresh.sample_indices(start, 30)).all()


def test_consecutive_batches_compute_each_epoch_once(monkeypatch):
    computed = []

    def counting(counts, seed, epoch, window):
        computed.append(epoch)
        return epoch_order(counts, seed, epoch, window)

    monkeypatch.setattr("speed_engine.data.loading.order.epoch_order", counting)
    order = DataOrder(COUNTS, seed=9, window=2)
    for start in range(0, 4 * N - 6, 3):
        order.sample_indices(start, 6)
        order.sample_indices(start, 3)
    assert computed == [0, 1, 2, 3]


@pytest.mark.parametrize("counts, window", [((), 1), ((0,), 1), ((3,), 0)])
def test_an_empty_data_set_or_window_is_refused(counts, window):
    with pytest.raises(ValueError, match="must be at least 1"):
        DataOrder(counts, seed=0, window=window)


def test_the_stream_has_no_negative_images():
    with pytest.raises(ValueError, match="start=-1"):
        DataOrder(COUNTS, seed=0, window=1).sample_indices(-1, 1)


@given(image=st.integers(0, 4 * N - 1), size=st.integers(1, 6))
def test_a_window_holds_the_images_up_to_its_end(image, size):
    order = DataOrder(COUNTS, seed=9, window=size)
    end, shards = order.window_at(image)
    assert len(shards) <= size and image < end <= (image // N + 1) * N
    bounds = np.concatenate([[0], np.cumsum(COUNTS)])
    members = {i for s in shards for i in range(bounds[s], bounds[s + 1])}
    read = order.sample_indices(image, end - image).tolist()
    assert members.issuperset(read)
    begin = end - len(members)
    assert begin <= image and sorted(order.sample_indices(begin, len(members))) == sorted(members)


def test_substitutes_come_from_elsewhere_and_reach_everything():
    counts = (10,) * 100
    order = DataOrder(counts, seed=4, window=2)
    for image in (0, 999, 1000, 123_456):
        (bad,) = order.sample_indices(image, 1)
        substitutes = [order.substitute(image, attempt) for attempt in range(1, 1000)]
        assert bad not in substitutes[:50] and substitutes[0] // 10 != bad // 10
        assert len(set(substitutes)) > 450
        fresh = DataOrder(counts, seed=4, window=2)
        assert fresh.substitute(image, 3) == substitutes[2]
