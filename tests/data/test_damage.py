"""What each kind of damage does, as docs/data.md promises: nothing is silent, nothing hangs."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.tar import scan_tar
from speed_engine.data.format.writer import ShardWriter, index_folder, write_shard
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.decoding import BatchReader, read_all
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import DataOrder, Feed
from speed_engine.data.loading.resident import Resident
from speed_engine.data.preparing.check import check_folder
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.runtime.checks import UserError

ROOT = Path(__file__).parents[2]
SHAPE = (1, 2, 3)
N = 40


@pytest.fixture
def folder(make_shards):
    return make_shards(N, per_shard=8)


def damage(folder, *samples):
    """Flip a bit in the pixels of these samples."""
    for i in samples:
        path = folder / f"x-{i // 8:06d}.tar"
        index, _ = load_index(index_path(path))
        data = bytearray(path.read_bytes())
        data[int(index.offset[i % 8, index.extensions.index("npy")]) + 130] ^= 1
        path.write_bytes(data)


def batches(folder, count, start=0, rank=0, world=1, **options):
    feed = Feed(8, 5, start, rank, world, window=2)
    with Loader(ShardReader(folder), SHAPE, feed, **options) as loader:
        return [next(loader) for _ in range(count)]


def pixels(batch):
    return batch.images[:, 0, 0, 0].tolist()


def test_no_flipped_byte_is_silent_whatever_the_policy(folder):
    truth = read_all(ShardReader(folder), SHAPE)[0]
    rng, detected = random.Random(1), 0
    paths = sorted(folder.iterdir())
    for _ in range(250):
        path = rng.choice(paths)
        intact = path.read_bytes()
        bad = bytearray(intact)
        place = rng.randrange(len(bad))
        bad[place] ^= rng.randrange(1, 256)
        path.write_bytes(bad)
        try:
            reader = ShardReader(folder)
            skipping = BatchReader(reader, SHAPE, None, "skip")
            read = skipping.read(range(N), lambda place, _: (place + 8) % N)
            wrong = [i for i in range(N) if (read.images[i].numpy() != truth[i]).any()]
            assert len(wrong) == len(read.replaced) <= 1  # the damaged one, and it is reported
            if read.replaced:
                assert f"sample '{wrong[0]:04d}'" in read.replaced[0]
                detected += 1
            elif path.suffix == ".tar":  # a header or padding, which only scans read
                members = scan_of(intact, path).values()
                places = [m for sample in members for m in sample.values()]
                assert not any(m.offset <= place < m.offset + m.size for m in places)
            else:
                raise AssertionError(f"byte {place} of {path.name} does not matter")
        except ShardError as error:
            assert str(folder) in str(error)
            detected += 1
        path.write_bytes(intact)
    assert detected > 100


def scan_of(data, path):
    copy = path.with_suffix(".copy")
    copy.write_bytes(data)
    samples = scan_tar(copy)
    copy.unlink()
    return samples


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_replaced_in_place_and_counted(folder, workers, caplog):
    intact = batches(folder, 15)
    bad = {3, 5, 17}
    damage(folder, *bad)
    seen = batches(folder, 15, workers=workers, on_bad_sample="skip")
    order, count = DataOrder((8,) * 5, 5, 2), 0
    for before, after in zip(intact, seen, strict=True):
        assert (before.ids == after.ids).all()
        for image, was, now in zip(after.ids.tolist(), pixels(before), pixels(after), strict=True):
            if was not in bad:
                assert now == was
            else:
                count += 1
                options = (order.substitute(image, attempt) for attempt in range(1, 9))
                assert now == next(sample for sample in options if sample not in bad)
    assert count == 9 == sum(len(batch.replaced) for batch in seen)  # three epochs
    warnings = [message for message in caplog.messages if "takes its place" in message]
    assert len(warnings) == 2  # one for each damaged shard
    assert "x-000000.tar: sample" in " ".join(warnings) and "x-000002.tar" in " ".join(warnings)


def test_replacing_depends_on_neither_ranks_nor_workers_nor_resuming(folder):
    damage(folder, *range(0, N, 3))
    whole = [pixels(batch) for batch in batches(folder, 10, on_bad_sample="skip")]
    for world_size, workers, done in ((2, 0, 0), (4, 1, 3), (8, 0, 7)):
        parts = [
            batches(folder, 10 - done, start=8 * done, workers=workers, rank=rank,
                    world=world_size, on_bad_sample="skip")
            for rank in range(world_size)
        ]  # fmt: skip
        joined = [sum(map(pixels, part), []) for part in zip(*parts, strict=True)]
        assert joined == whole[done:]


def test_stopping_names_the_sample(folder):
    damage(folder, 11)
    with pytest.raises(ShardError, match=r"x-000001\.tar: sample '0011': CRC-32 mismatch"):
        batches(folder, 5, on_bad_sample="stop")


def test_a_data_set_that_is_damaged_everywhere_stops_the_run(folder):
    damage(folder, *range(N))
    with pytest.raises(ShardError, match="None of 100 samples elsewhere could take its place"):
        batches(folder, 1, on_bad_sample="skip")


def test_intact_bytes_that_no_decoder_accepts_are_damage(tmp_path, make_shards):
    folder = make_shards(N, per_shard=8)
    samples = [("zz", {"npy": b"no array", "cls": b"1"}), ("zzz", {"npy": b"", "cls": b"1"})]
    write_shard(folder / "y-000000.tar", samples)
    (folder / "dataset.json").unlink()
    seen = batches(folder, 6, on_bad_sample="skip")
    replaced = sorted({reason for batch in seen for reason in batch.replaced})
    assert len(replaced) == 2 and "not an npy file" in replaced[0]


def test_a_sample_that_is_only_unlike_the_others_always_stops_the_run(folder):
    with pytest.raises(ValueError, match="Correct image_shape or the data"):
        Loader(ShardReader(folder), (1, 3, 2), Feed(8, 5), on_bad_sample="skip")
    with pytest.raises(ValueError, match="Correct num_classes or the data"):
        batches(folder, 2, num_classes=5, on_bad_sample="skip")


def test_a_file_of_no_bytes_is_no_shard(folder):
    (folder / "x-000002.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"x-000002\.tar has 0 bytes"):
        ShardReader(folder)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_of_no_samples_is_sound(folder, indexed):
    (folder / "dataset.json").unlink()
    with tarfile.open(folder / "x-000001b.tar", "w"):  # between others
        pass
    if indexed:
        index_folder(folder)
    reader = ShardReader(folder)
    assert reader.counts == (8, 8, 0, 8, 8, 8) and len(reader) == N
    assert read_all(reader, SHAPE)[0][:, 0, 0, 0].tolist() == list(range(N))
    for workers in (0, 2):
        with Loader(reader, SHAPE, Feed(8, 5), workers=workers) as loader:
            assert sorted(sum((pixels(next(loader)) for _ in range(5)), [])) == list(range(N))
    with Loader(reader, SHAPE, Feed(8, 5), mode="stream") as loader:
        assert all(len(pixels(next(loader))) == 8 for _ in range(5))
    assert not check_folder(folder).repair


def test_a_missing_index_is_made_in_memory_and_said(folder, caplog):
    known = ShardReader(folder)
    index_path(folder / "x-000002.tar").unlink()
    reader = ShardReader(folder)
    assert reader.fingerprint == known.fingerprint and reader.read(16) == known.read(16)
    assert "1 of 5 shards" in caplog.text and "shards index" in caplog.text


def test_an_index_of_another_data_set_is_refused(folder, make_shards):
    with ShardWriter(folder.parent / "other", "x", 8) as writer:
        for i in range(N):
            writer.write(f"{i:04d}", {"npy": b"x" * 134, "cls": str(i % 10).encode()})
    other = index_path(folder.parent / "other" / "x-000001.tar")
    shutil.copy(other, index_path(folder / "x-000001.tar"))
    with pytest.raises(ShardError, match=r"x-000001\.tar is of another data set"):
        ShardReader(folder)
    (folder / "dataset.json").unlink()  # nothing says which is right, but every read does
    reader = ShardReader(folder)
    with pytest.raises(ShardError, match="CRC-32 mismatch"):
        reader.read(8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_deleted_during_training_ends_it_with_its_name(folder, workers, monkeypatch):
    monkeypatch.setattr("speed_engine.data.format.reader.MAX_OPEN_FILES", 1)
    whole = [pixels(batch) for batch in batches(folder, 12)]
    away = folder.parent / "away.tar"
    done = 0
    with (
        pytest.raises(FileNotFoundError, match=r"x-000003\.tar is gone .*put it back and resume"),
        Loader(
            ShardReader(folder), SHAPE, Feed(8, 5, window=2), workers=workers, on_bad_sample="skip"
        ) as loader,
    ):
        for batch in loader:
            assert pixels(batch) == whole[done]
            done += 1
            if away.exists():
                continue
            (folder / "x-000003.tar").rename(away)
    away.rename(folder / "x-000003.tar")
    resumed = batches(folder, 12 - done, start=8 * done)
    assert [pixels(batch) for batch in resumed] == whole[done:]


def test_an_open_shard_survives_its_deletion(folder):
    reader = ShardReader(folder)
    known = [reader.read(i) for i in range(N)]
    for path in folder.glob("*.tar"):
        path.unlink()
    assert [reader.read(i) for i in range(N)] == known


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_cut_short_during_training_is_damage(folder, workers):
    """In place, as by a copy over it; memory that is mapped from it would end the process."""
    whole = [pixels(batch) for batch in batches(folder, 12)]
    with Loader(
        ShardReader(folder), SHAPE, Feed(8, 5, window=2), workers=workers, on_bad_sample="skip"
    ) as loader:
        seen = [pixels(next(loader)) for _ in range(5)]  # an epoch: it is open
        os.truncate(folder / "x-000003.tar", 0)
        # What workers had read before is still in their queues.
        later = [next(loader) for _ in range(20)]
    assert seen == whole[:5]
    epoch = later[10:15]
    assert all(sample // 8 != 3 for batch in epoch for sample in pixels(batch))
    replaced = [text for batch in epoch for text in batch.replaced]
    assert len(replaced) == 8 and all("x-000003.tar: sample" in text for text in replaced)


FULL_DISK = """
import resource, signal, sys
from speed_engine.data.format.writer import ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # each file; a write past it fails
with ShardWriter(sys.argv[1], "x", 30) as writer:
    for i in range(100):
        writer.write(str(i), {"npy": bytes(200 + 40 * i), "cls": b"1"})
"""


def test_a_full_disk_while_writing_leaves_nothing_that_is_accepted(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "set")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stderr
    left = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert left == ["x-000000.index.safetensors", "x-000000.tar", "x.incomplete"]
    with pytest.raises(ShardError, match=r"x\.incomplete marks a data set whose writer did not"):
        ShardReader(tmp_path / "set")


def test_names_inside_a_tar_are_never_paths(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    names = ["../../up.npy", "/absolute.npy", "a/../b.npy", "c.npy"]
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, __import__("io").BytesIO(b"data"))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../secret")):
            info = tarfile.TarInfo("link.npy")
            info.type, info.linkname = kind, target
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    reader = ShardReader(folder, keys=("npy",))
    assert [reader.read(i) for i in range(len(reader))] == [{"npy": b"data"}] * len(reader)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/absolute.npy").exists()


def test_a_tar_of_millions_of_members_or_endless_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("speed_engine.data.format.tar.MAX_MEMBERS", 5)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(6):
            tar.addfile(tarfile.TarInfo(f"{i}.npy"))
    with pytest.raises(ShardError, match="more than 5 members"):
        scan_tar(tmp_path / "x.tar")
    for size, reason in ((5000, "of 5004 bytes"), (2**21, "extension header of 2097")):
        with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo("n" * size + ".npy"))
        with pytest.raises(ShardError, match=reason):
            scan_tar(tmp_path / "y.tar")


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_compressed_archives_are_refused_unread(tmp_path, mode):
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        info = tarfile.TarInfo("bomb.npy")
        info.size = 2**24
        tar.addfile(info, open("/dev/zero", "rb"))
    with pytest.raises(ShardError, match=r"x\.tar: "):
        scan_tar(tmp_path / "x.tar")


def test_reading_hostile_shards_needs_little_memory(tmp_path):
    """Headers that claim terabytes are refused before anything of that size is allocated."""
    with ShardWriter(tmp_path, "x", 2) as writer:
        for i, claim in enumerate((b"(99999999, 99999999)", b"(9223372036854775807,)")):
            header = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + claim + b", }"
            header += b" " * (118 - len(header)) + b"\n"
            npy = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
            writer.write(str(i), {"npy": npy, "cls": b"1"})
    tracemalloc.start()
    for number in range(2):
        with pytest.raises(ShardError, match="needs .* bytes"):
            BatchReader(ShardReader(tmp_path), SHAPE).read(np.array([number]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_an_error_and_the_run_resumes_exactly(folder):
    import multiprocessing

    whole = [pixels(batch) for batch in batches(folder, 12)]
    loader, seen = Loader(ShardReader(folder), SHAPE, Feed(8, 5, window=2), workers=2), []
    with pytest.raises(ChildProcessError, match="DataLoader worker"), loader:
        for batch in loader:
            seen.append(pixels(batch))
            if len(seen) == 3:
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    seen += [pixels(b) for b in batches(folder, 12 - len(seen), start=8 * len(seen))][:12]
    assert seen[:12] == whole


@pytest.mark.parametrize("resident", [True, False])
def test_a_latent_that_is_not_finite_is_named_and_replaced(tmp_path, caplog, resident):
    with ShardWriter(tmp_path, "x", 4) as writer:
        for i in range(16):
            latent = np.full(SHAPE, i, np.float16)
            latent[0, 0, 1] = np.nan if i == 5 else i
            writer.write(f"{i:04d}", {"npy": npy_bytes(latent), "cls": b"0"})
    reader, feed = ShardReader(tmp_path), Feed(16, 5)
    said = r"x-000001.tar: sample '0005': 1 of 6 values are NaN or infinite"
    if resident:
        cleaning = Cleaning(torch.tensor(0))
        batch = next(Resident(reader, SHAPE, feed, cleaning, on_bad_sample="skip"))
    else:
        batch = next(Loader(reader, SHAPE, feed, on_bad_sample="skip"))
    assert batch.images.isfinite().all() and len(batch.replaced) == 1
    assert said in batch.replaced[0] and said in caplog.text and "shards check" in caplog.text
    with pytest.raises(ShardError, match=said):
        next(Loader(reader, SHAPE, feed, on_bad_sample="stop"))
    found = check_folder(tmp_path).repair.samples
    assert list(found["x-000001.tar"]) == ["0005"] and len(found) == 1
    assert "1 of 6 values are NaN" in found["x-000001.tar"]["0005"]


def test_one_huge_array_does_not_enlarge_the_rows_of_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("speed_engine.data.loading.decoding.TOGETHER", 2**16)
    with ShardWriter(tmp_path, "x", 16) as writer:
        for i in range(16):
            shape = (1, 2**10, 2**10) if i == 5 else SHAPE
            writer.write(f"{i:04d}", {"npy": npy_bytes(np.zeros(shape, np.uint8)), "cls": b"0"})
    asked = []
    allocate = lambda size: asked.append(size) or np.empty(size, np.uint8)
    with pytest.raises(UserError, match=r"'0005'.*\(1, 1024, 1024\)"):
        BatchReader(ShardReader(tmp_path), SHAPE).read(range(16), allocate=allocate)
    assert not asked
