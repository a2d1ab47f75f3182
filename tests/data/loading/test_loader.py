import io
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import combinations, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from speed_engine.data import training_data
from speed_engine.data.batch import Batch, StoredBatch
from speed_engine.data.config import DataConfig
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading import loader as loading
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.decoding import read_all
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import DataOrder, Feed
from speed_engine.data.preparing.pictures import encode_picture
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import ALONE

ROOT = Path(__file__).parents[3]
SHAPE = (1, 2, 3)
N = 50  # samples; batches of 8 straddle epochs


@pytest.fixture
def reader(make_shards):
    return ShardReader(make_shards(N, per_shard=7))


def take(loader, count):
    """Batches as the device gets them."""
    with loader:
        return [Cleaning(torch.tensor(0)).batch(next(loader)) for _ in range(count)]


def expected_batches(reader, start, count, batch_size=8, seed=5, window=2):
    """From the definition: sample i is an image full of i with label i % 10."""
    order = DataOrder(reader.counts, seed, window).sample_indices(start, count * batch_size)
    for k, indices in enumerate(torch.from_numpy(order).split(batch_size)):
        pixels = (indices.numpy().astype(np.float32) / np.float32(127.5) - 1)[:, None, None, None]
        images = torch.from_numpy(np.broadcast_to(pixels, (batch_size, *SHAPE)).copy())
        first = start + k * batch_size
        yield Batch(images, {"labels": indices % 10}, torch.arange(first, first + batch_size))


def parts(batch: Batch | StoredBatch) -> list[torch.Tensor]:
    return [batch.images, *batch.conditions.values(), batch.ids]


def assert_equal(actual, expected):
    for a, e in zip(parts(actual), parts(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)  # values, shapes and dtypes


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_do_not_depend_on_ranks_or_workers(reader, world_size, workers):
    start, count = 37, 16
    ranks = [
        take(
            Loader(
                reader,
                SHAPE,
                Feed(8, 5, world=world_size, rank=rank, start=start, window=2),
                workers=workers,
            ),
            count,
        )
        for rank in range(world_size)
    ]
    for of_ranks, expected in zip(
        zip(*ranks, strict=True), expected_batches(reader, start, count), strict=True
    ):
        images, labels, ids = map(torch.cat, zip(*map(parts, of_ranks), strict=True))
        assert_equal(Batch(images, {"labels": labels}, ids), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_anywhere(reader, workers):
    whole = take(Loader(reader, SHAPE, Feed(8, 5)), 30)
    for done in (1, 6, 7, 23):
        resumed = take(Loader(reader, SHAPE, Feed(8, 5, start=8 * done), workers=workers), 5)
        for actual, expected in zip(resumed, whole[done : done + 5], strict=True):
            assert_equal(actual, expected)


def test_another_batch_size_continues_the_same_stream(reader):
    small, large = (
        take(Loader(reader, SHAPE, Feed(size, 5, start=13)), 36 // size) for size in (4, 12)
    )
    for column in range(3):
        torch.testing.assert_close(
            torch.cat([parts(b)[column] for b in small]),
            torch.cat([parts(b)[column] for b in large]),
        )


def test_an_epoch_holds_every_sample_once_and_a_batch_straddles_it(reader):
    images = torch.cat([batch.images for batch in take(Loader(reader, SHAPE, Feed(8, 5)), 25)])
    samples = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().reshape(4, N)
    assert (samples.sort(dim=1).values == torch.arange(N)).all()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(folder, images, labels=None):
    with ShardWriter(folder, "x", 4) as writer:
        for i, image in enumerate(images):
            label = labels[i] if labels else 0
            writer.write(str(i), {"npy": npy(image), "cls": str(label).encode()})
    return ShardReader(folder)


def test_pixels_are_scaled_to_minus_one_to_one(tmp_path):
    reader = write(tmp_path, [np.full(SHAPE, v, np.uint8) for v in (0, 255, 51)])
    (batch,) = take(Loader(reader, SHAPE, Feed(3, 0)), 1)
    values = sorted(batch.images[:, 0, 0, 0].tolist())
    assert values == [-1.0, pytest.approx(-0.6, abs=1e-7), 1.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_pass_unchanged(tmp_path, dtype):
    latent = np.linspace(-30, 30, 6).astype(dtype).reshape(SHAPE)
    (batch,) = take(Loader(write(tmp_path, [latent]), SHAPE, Feed(1, 0)), 1)
    expected = torch.from_numpy(latent.astype(np.float32))[None]
    torch.testing.assert_close(batch.images, expected, rtol=0, atol=0)


def test_read_all_returns_the_stored_bytes_in_order(reader):
    images, conditions = read_all(reader, SHAPE)
    labels = conditions["labels"]
    assert images.shape == (N, *SHAPE) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert images[:, 0, 1, 2].tolist() == list(range(N))
    assert labels.tolist() == [i % 10 for i in range(N)]


def test_read_all_is_for_pixels(tmp_path):
    with pytest.raises(ValueError, match="holds float32; needed: uint8"):
        read_all(write(tmp_path, [np.zeros(SHAPE, np.float32)]), SHAPE)


def test_a_batch_moves_between_devices_as_it_is_stored(reader, device):
    with Loader(reader, SHAPE, Feed(8, 5)) as loader:
        stored = next(loader)
    moved = stored.to(device)
    assert isinstance(moved, StoredBatch) and moved.images.dtype == torch.uint8
    assert {tensor.device.type for tensor in parts(moved)} == {device.type}
    assert_equal(moved.to("cpu"), stored)


def test_parts_of_a_batch_have_its_rows():
    ids, targets = torch.arange(5), {"features": torch.rand(5, 3)}
    batch = Batch(torch.rand(5, *SHAPE), {"labels": ids % 2}, ids, targets, replaced=("0: bad",))
    first, second = batch.split(3)
    assert len(first.ids) == 3 and len(second.ids) == 2 and second.replaced == ()
    for name, whole in (("conditions", batch.conditions), ("targets", batch.targets)):
        for key, value in whole.items():
            pieces = [getattr(part, name)[key] for part in (first, second)]
            assert torch.equal(torch.cat(pieces), value)
    assert torch.equal(torch.cat([first.images, second.images]), batch.images)
    assert Batch(batch.images, {}, ids).targets == {}


def test_a_wrong_image_shape_is_refused_at_once(reader):
    with pytest.raises(
        ValueError, match=r"sample '\d+': the image is uint8 of shape \(1, 2, 3\); expe"
    ):
        Loader(reader, (3, 2, 3), Feed(8, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_one_image_of_another_shape_is_named(tmp_path, workers):
    images = [np.zeros(SHAPE, np.uint8)] * 5 + [np.zeros((1, 3, 2), np.uint8)]
    loader = Loader(write(tmp_path, images), SHAPE, Feed(6, 0), workers=workers)
    with pytest.raises(ValueError, match=r"x-000001\.tar: sample '5': the image .*\(1, 3, 2\)"):
        take(loader, 1)


def test_pixels_and_latents_are_never_mixed(tmp_path):
    images = [np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.float16)]
    with pytest.raises(ValueError, match="needs one dtype"):
        take(Loader(write(tmp_path, images), SHAPE, Feed(2, 0)), 1)


def test_a_label_out_of_range_is_named(tmp_path):
    reader = write(tmp_path, [np.zeros(SHAPE, np.uint8)] * 3, labels=[0, 9, 10])
    with pytest.raises(ValueError, match="sample '2' has label 10; needed: less than num_classes"):
        take(Loader(reader, SHAPE, Feed(3, 0), num_classes=10), 1)
    assert sorted(take(Loader(reader, SHAPE, Feed(3, 0)), 1)[0].conditions["labels"].tolist()) == [
        0,
        9,
        10,
    ]


def test_a_damaged_sample_stops_the_run_in_a_worker_too(reader, make_shards):
    path = make_shards(N, per_shard=7, name="damaged") / "x-000003.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 130] ^= 1
    path.write_bytes(data)
    loader = Loader(ShardReader(path.parent), SHAPE, Feed(50, 0), workers=2)
    with pytest.raises(ValueError, match=r"x-000003\.tar: sample '0021': CRC-32"):
        next(loader)
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="closed"):  # not the batches of the other worker
        next(loader)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (
            {"batch_size": 6, "world": 4},
            "batch_size=6 does not spread evenly over 4 processes; start a number of processes "
            "that divides it, or, in a new run, set batch_size to 4 or 8",
        ),
        ({"batch_size": 2, "world": 3}, "in a new run, set batch_size to 3."),
        ({"batch_size": 0}, "batch_size=0"),
        ({"start": -1}, "start=-1"),
        ({"rank": 2, "world": 2}, "rank=2"),
        ({"window": 0}, "window=0"),
    ],
)
def test_a_feed_that_cannot_be_is_named(arguments, reason):
    with pytest.raises(UserError, match=reason):
        Feed(**{"batch_size": 8, "seed": 0} | arguments)


def test_fewer_than_no_workers_are_refused(reader):
    with pytest.raises(UserError, match="workers=-1"):
        Loader(reader, SHAPE, Feed(8, 0), workers=-1)


def test_images_alone_have_no_conditions(make_shards):
    reader = ShardReader(make_shards(3, per_shard=2), keys=("npy",))
    (batch,) = take(Loader(reader, SHAPE, Feed(2, 0)), 1)
    assert batch.conditions == {}


def test_a_member_that_conditions_nothing_is_refused(tmp_path):
    with ShardWriter(tmp_path, "x", 4) as writer:
        writer.write("0", {"npy": npy(np.zeros(SHAPE, np.uint8)), "json": b"{}"})
    with pytest.raises(ValueError, match="'json' is no condition; the known are cls, tokens.npy"):
        Loader(ShardReader(tmp_path, ("npy", "json")), SHAPE, Feed(1, 0))


def conditioned(folder, tokens, low):
    with ShardWriter(folder, "x", 2) as writer:
        for i, (text, small) in enumerate(zip(tokens, low, strict=True)):
            image = np.full(SHAPE, i, np.uint8)
            members = {"npy": image, "tokens.npy": text, "low.npy": small}
            writer.write(str(i), {name: npy(array) for name, array in members.items()})
    return ShardReader(folder, ("npy", "tokens.npy", "low.npy"))


def test_text_and_low_resolution_come_with_their_image(tmp_path):
    tokens = [np.full((4, 3), i, np.float16) for i in range(3)]
    reader = conditioned(tmp_path, tokens, [np.full((1, 1, 1), i, np.uint8) for i in range(3)])
    with Loader(reader, SHAPE, Feed(3, 0)) as loader:
        stored = next(loader)
    batch = Cleaning(torch.tensor(0)).batch(stored)
    which = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round()
    assert stored.conditions["tokens"].dtype == torch.float16
    torch.testing.assert_close(batch.conditions["tokens"][:, 0, 0].float(), which)
    torch.testing.assert_close(batch.conditions["low_resolution"], batch.images[:, :, :1, :1])


def test_texts_of_two_lengths_are_named(tmp_path):
    tokens = [np.zeros((length, 3), np.float16) for length in (4, 4, 5)]
    reader = conditioned(tmp_path, tokens, [np.zeros((1, 1, 1), np.uint8)] * 3)
    with pytest.raises(ValueError, match=r"has tokens of float16 and shape .*needs one dtype"):
        take(Loader(reader, SHAPE, Feed(3, 0)), 1)


@pytest.mark.parametrize("together", [2**28, 0], ids=["a batch at once", "one by one"])
@pytest.mark.parametrize("member", ["npy", "png", "jpg"])
def test_a_batch_in_hand_is_not_overwritten_by_the_next(tmp_path, monkeypatch, member, together):
    monkeypatch.setattr("speed_engine.data.loading.decoding.TOGETHER", together)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    with ShardWriter(tmp_path, "x", 5) as writer:
        for i, image in enumerate(pixels):
            stored = npy(image.transpose(2, 0, 1).copy())
            if member != "npy":
                stored = encode_picture(Image.fromarray(image), member, 90)
            writer.write(str(i), {member: stored, "cls": b"%d" % i})
    reader = ShardReader(tmp_path, (member, "cls"))
    with Loader(reader, (3, 16, 16), Feed(4, 0)) as loader:
        batches = [(batch, list(map(torch.clone, parts(batch)))) for batch in islice(loader, 3)]
    for batch, copies in batches:
        assert all(map(torch.equal, parts(batch), copies))
    for one, other in combinations([batch for batch, _ in batches], 2):
        assert not any(map(np.may_share_memory, map(np.asarray, parts(one)), parts(other)))


def test_memory_is_pinned_for_a_gpu_that_is_trained_on_alone(reader, monkeypatch):
    """Pinning it takes a context on a GPU, which a run on the CPU leaves to others."""
    pinned = []

    def made(source, **options):
        pinned.append(options["pin_memory"])
        return source

    monkeypatch.setattr(loading, "DataLoader", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for workers in (0, 1):
        Loader(reader, SHAPE, Feed(8, 5), workers=workers).close()
    assert pinned == [False]  # nothing is made without workers
    Loader(reader, SHAPE, Feed(8, 5), pinned=True).close()
    assert pinned == [False, True]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_batches_of_a_run_are_pinned_for_its_own_device(monkeypatch, kind):
    given = []

    def loader(*_, **options):
        given.append(options["pinned"])
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(training_data, "Loader", loader)
    monkeypatch.setattr(training_data, "build_cleaning", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    training_data.TrainingData(DataConfig(), 8, 0, ALONE, torch.device(kind))
    assert given == [kind == "cuda"]


def test_iterating_again_continues(reader):
    loader = Loader(reader, SHAPE, Feed(8, 5))
    firsts = [next(iter(loader)).ids[0].item() for _ in range(3)]
    assert firsts == [0, 8, 16]


def test_close_ends_the_workers_promptly(reader, monkeypatch):
    # One that did not end by itself would be waited for, 5 seconds otherwise, and then terminated.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 600)
    loader = Loader(reader, SHAPE, Feed(8, 5), workers=2)
    next(loader)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    loader.close()
    loader.close()
    assert [worker.exitcode for worker in workers] == [0, 0]
    with pytest.raises(RuntimeError, match="this Loader is closed; make another"):
        next(loader)


# DataLoader reports the death from a signal handler, which can strike inside a destructor.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_death_of_a_worker_is_an_error(reader):
    loader = Loader(reader, SHAPE, Feed(8, 5), workers=2)
    next(loader)
    with pytest.raises(ChildProcessError, match="DataLoader worker .*(killed|exited)"):
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        for _ in range(100):
            next(loader)
    loader.close()
    assert not multiprocessing.active_children()


def test_workers_may_be_spawned(make_shards, tmp_path):
    """As on systems that do not fork: what workers get is pickled."""
    script = tmp_path / "spawning.py"
    script.write_text(f"""
import multiprocessing
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.format.reader import ShardReader
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    reader = ShardReader({str(make_shards(N, 7))!r})
    with Loader(reader, {SHAPE}, Feed(8, 5), workers=1) as loader:
        print([next(loader).ids.tolist() for _ in range(3)])
""")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{[list(range(8 * k, 8 * k + 8)) for k in range(3)]}\n", done.stderr


def test_a_process_that_forgets_to_close_exits_cleanly(make_shards):
    script = f"""
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.format.reader import ShardReader
loader = Loader(ShardReader({str(make_shards(N, 7))!r}), {SHAPE}, Feed(8, 5), workers=2)
print(next(loader).ids.tolist())
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, f"{list(range(8))}\n")
    assert not any(word in done.stderr for word in ("Traceback", "Error", "leaked")), done.stderr
