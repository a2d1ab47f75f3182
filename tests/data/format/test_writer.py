import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter as WebDatasetWriter

from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.tar import scan_index, scan_tar
from speed_engine.data.format.writer import ShardWriter, each_shard

ROOT = Path(__file__).parents[3]


def read_everything(folder, keys=("npy", "cls")):
    reader = ShardReader(folder, keys)
    return [reader.read(i) for i in range(len(reader))]


def without_indices(folder):
    for path in (*folder.glob("*.index.safetensors"), folder / "dataset.json"):
        path.unlink()
    return folder


def test_webdataset_reads_what_was_written(make_shards):
    folder = make_shards(10, per_shard=4)
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    theirs = list(WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [f"{i:04d}" for i in range(10)]
    assert [{k: s[k] for k in ("npy", "cls")} for s in theirs] == read_everything(folder)


def test_shards_of_webdatasets_own_writer_are_read(tmp_path):
    samples = [{"__key__": f"a/{i}", "npy": b"%d" % i, "cls": b"1"} for i in range(7)]
    with WebDatasetWriter(f"{tmp_path}/w-%03d.tar", maxcount=3, verbose=False) as writer:
        for sample in samples:
            writer.write(sample)
    assert [s["npy"] for s in read_everything(tmp_path)] == [s["npy"] for s in samples]
    assert ShardReader(tmp_path).counts == (3, 3, 1)


def test_samples_come_in_the_order_of_writing(make_shards):
    folder = make_shards(10, per_shard=4)
    reader = ShardReader(folder)
    assert (len(reader), reader.counts) == (10, (4, 4, 2))
    assert [reader.read(i)["npy"][-1] for i in (9, 0, 3, 4, 8)] == [9, 0, 3, 4, 8]
    with pytest.raises(IndexError, match="sample 10 of 10"):
        reader.read(10)


def test_equal_samples_give_equal_bytes(make_shards):
    a, b = make_shards(5, per_shard=3, name="a"), make_shards(5, per_shard=3, name="b")
    shards = [f"x-00000{n}.{suffix}" for n in (0, 1) for suffix in ("index.safetensors", "tar")]
    names = ["dataset.json", *shards]
    assert sorted(os.listdir(a)) == sorted(os.listdir(b)) == names
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_the_index_is_that_of_the_tar(make_shards):
    tar = make_shards(5, per_shard=5) / "x-000000.tar"
    index, _ = load_index(index_path(tar))
    for n, (key, members) in enumerate(scan_tar(tar).items()):
        assert index.key(n) == key
        columns = zip(index.offset[n], index.size[n], index.crc32[n], strict=True)
        assert dict(zip(index.extensions, columns, strict=True)) == members
    assert index_path(tar).read_bytes() == scan_index(tar).to_bytes()


def test_the_fingerprint_is_that_of_the_content(make_shards):
    a, b = make_shards(5, per_shard=3, name="a"), make_shards(6, per_shard=3, name="b")
    known = ShardReader(a).fingerprint
    assert ShardReader(without_indices(a)).fingerprint == known
    assert ShardReader(b).fingerprint != known


def test_a_flipped_byte_in_a_header_is_never_silent_without_an_index(make_shards):
    folder = without_indices(make_shards(8, per_shard=8))
    truth, rng = read_everything(folder), random.Random(0)
    (path,) = folder.glob("*.tar")
    intact, detected = path.read_bytes(), 0
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for _ in range(300):
        damaged = bytearray(intact)
        damaged[rng.choice(headers) + rng.randrange(512)] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert read_everything(folder) == truth  # for example another filler of a number
        except ShardError:
            detected += 1
    assert detected > 290


@pytest.mark.parametrize("indexed, why", [(True, " has .* bytes, its index says"), (False, "")])
def test_a_truncated_shard_is_refused(make_shards, indexed, why):
    folder = make_shards(4, per_shard=4)
    if not indexed:
        without_indices(folder)
    path = folder / "x-000000.tar"
    data = path.read_bytes()
    for size in (0, 512, 1536, len(data) // 2, len(data) - 512, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ShardError, match=rf"x-000000\.tar{why}"):
            ShardReader(folder)


KILLED_AT_EACH_CALL = """
import os, signal, sys
from pathlib import Path
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter, each_shard

def write_and_die(folder, calls_to_live):
    calls = 0
    def counted(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls > calls_to_live:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call
    os.fsync, Path.rename, Path.unlink = map(counted, (os.fsync, Path.rename, Path.unlink))
    with ShardWriter(folder, "x", 2) as writer:
        for i in range(5):
            writer.write(str(i), {"npy": b"data", "cls": b"1"})
    os._exit(0)

for n in range(1000):
    folder = Path(sys.argv[1]) / str(n)
    pid = os.fork()
    if pid == 0:
        write_and_die(folder, n)
    status = os.waitpid(pid, 0)[1]
    try:
        outcome = len(ShardReader(folder))
    except (OSError, ValueError) as error:
        outcome = str(error)
    print(os.WIFSIGNALED(status), outcome, sep="\\t")
    if status == 0:
        break
"""


def test_a_writer_killed_anywhere_leaves_nothing_that_is_accepted(tmp_path):
    command = [sys.executable, "-c", KILLED_AT_EACH_CALL, str(tmp_path)]
    output = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    *killed, committed, finished = [line.split("\t") for line in output.splitlines()]
    assert len(killed) == 24
    for signaled, outcome in killed:
        assert signaled == "True" and "did not finish" in outcome
    assert committed == ["True", "5"]  # the marker is gone, only its durability was pending
    assert finished == ["False", "5"]


def test_an_exception_leaves_nothing_that_is_accepted(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "x", 2) as writer:
        for key in "abc":
            writer.write(key, {"npy": b"", "cls": b"1"})
        raise KeyboardInterrupt
    with pytest.raises(ShardError, match=r"x\.incomplete marks a data set whose writer did not"):
        ShardReader(tmp_path)


def test_existing_shards_are_never_overwritten(make_shards):
    folder = make_shards(3, per_shard=2)
    with pytest.raises(FileExistsError, match=r"x-000000\.tar exists"):
        ShardWriter(folder, "x", 2)
    assert len(ShardReader(folder)) == 3


@pytest.mark.parametrize(
    "key, extensions",
    [
        ("a", ["npy"]), ("b.c", ["npy"]), ("/b", ["npy"]), ("../b", ["npy"]), ("", ["npy"]),
        ("__b__", ["npy"]), ("b\0", ["npy"]), ("b", []), ("b", ["NPY"]), ("b", [""]),
        ("b", ["x/npy"]), ("b" * 101, ["npy"]),
    ],
)  # fmt: skip
def test_keys_that_could_not_be_read_back_are_refused(tmp_path, key, extensions):
    writer = ShardWriter(tmp_path, "x", 9)
    writer.write("a", {"npy": b""})
    with pytest.raises(ValueError):
        writer.write(key, dict.fromkeys(extensions, b""))


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="data folder /no/such does not exist"):
        ShardReader("/no/such")


def test_a_folder_without_shards_says_how_to_make_some(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.tar shards; `speed-engine shards make`"):
        ShardReader(tmp_path)


def test_a_missing_member_is_named(make_shards):
    folder = make_shards(3, per_shard=2)
    expected = r"x-000000\.tar: sample '0000' has no member 'png', only \['cls', 'npy'\]"
    with pytest.raises(ShardError, match=expected):
        ShardReader(folder, keys=("png", "cls"))


def test_a_data_set_without_samples_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(ShardError, match="holds no samples"):
        ShardReader(tmp_path)


def damaged(name, change):
    """A copy of an index in which one field is another."""
    return lambda index: replace(index, **{name: change(getattr(index, name))})


@pytest.mark.parametrize(
    "change, reason",
    [
        (damaged("tar_bytes", lambda n: n + 512), r"has \d+ bytes, its index says \d+"),
        (damaged("offset", lambda a: a + 10**6), "names bytes outside"),
        (damaged("offset", lambda a: a - 10**6), "names bytes outside"),
        (damaged("size", lambda a: a[:-1]), "is not a shard index .*size has shape"),
        (damaged("crc32", lambda a: a.astype(np.int64)), "is not a shard index .*crc32 is int64"),
        (damaged("crc32", lambda a: a + np.uint32(1)), "is of another data set"),
        (damaged("key_ends", lambda a: a.reshape(1, -1)), "is not a shard index .*key_ends is"),
    ],
)
def test_an_index_that_is_not_of_its_tar_is_refused(make_shards, change, reason):
    path = index_path(make_shards(3, per_shard=3) / "x-000000.tar")
    path.write_bytes(change(load_index(path)[0]).to_bytes())
    with pytest.raises(ShardError, match=reason):
        ShardReader(path.parent)


@pytest.mark.parametrize(
    "metadata, reason",
    [
        (None, "is not a shard index"),
        ({"index": "[1]"}, "is not a shard index"),
        ({"index": "[" * 100_000}, "is not a shard index"),
        ({"index": json.dumps({"version": 1})}, "has version 1; this program reads 2"),
    ],
)
def test_a_file_of_another_kind_is_no_index(make_shards, metadata, reason):
    path = index_path(make_shards(3, per_shard=3) / "x-000000.tar")
    index, _ = load_index(path)
    columns = ("key_bytes", "key_ends", "offset", "size", "crc32")
    path.write_bytes(save({name: getattr(index, name) for name in columns}, metadata))
    with pytest.raises(ShardError, match=reason):
        ShardReader(path.parent)


def test_pickles_beside_the_members_are_ignored(tmp_path):
    with ShardWriter(tmp_path, "x", 2) as writer:
        writer.write("a", {"npy": b"1", "cls": b"2", "pkl": b"cos\nsystem\n(S'exit 1'\ntR."})
    assert read_everything(tmp_path) == [{"npy": b"1", "cls": b"2"}]


def test_paths_are_never_commands(make_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("pipe:touch executed", "pipe://touch executed", "file:///etc", "ssh://x/y"):
        with pytest.raises(ValueError, match="commands and other schemes are never opened"):
            ShardReader(command)
    folder = make_shards(2, per_shard=2)
    without_indices(folder)
    (folder / "x-000000.tar").rename(folder / "pipe:touch executed|{0..3}::#.tar")
    assert len(read_everything(folder)) == 2
    assert not list(tmp_path.rglob("executed"))


def open_files(folder):
    """How many files below it this process has open."""
    paths = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    return sum(path.startswith(f"{folder}/") for path in paths)


def test_a_reader_keeps_few_files_open(tmp_path):
    with ShardWriter(tmp_path, "x", 1) as writer:
        for i in range(100):
            writer.write(str(i), {"npy": b"%d" % i, "cls": b"0"})
    reader = ShardReader(tmp_path)
    for _ in range(2):
        assert [reader.read(i)["npy"] for i in range(100)] == [b"%d" % i for i in range(100)]
    assert 0 < open_files(tmp_path) <= 64
    reader.close()
    assert open_files(tmp_path) == 0
    assert reader.read(7)["npy"] == b"7"


def test_a_pickled_reader_opens_its_own_files(make_shards):
    reader = ShardReader(make_shards(3, per_shard=2))
    before = [reader.read(i) for i in range(3)]
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert [copy.read(i) for i in range(3)] == before


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_said(make_shards):
    paths = sorted(make_shards(4, per_shard=2).glob("*.tar"))
    with pytest.raises(ChildProcessError, match="worker process was killed.*again"):
        list(each_shard(die, paths, workers=2))
