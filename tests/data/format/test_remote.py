"""Data sets behind URLs: a real HTTP server, fsspec's memory, and a cache that processes share."""

import multiprocessing
import sys
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from speed_engine.data.format import remote
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.folder import RemoteFolder
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.record import Dataset
from speed_engine.data.format.remote import Cache, is_url
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed

SHAPE = (1, 2, 3)
# The server is a thread of this process, of which forked workers take no notice.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts requests, and fails the first ones of some files."""

    requests: Counter[str] = Counter()
    failures: dict[str, int] = {}

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        type(self).requests[name] += 1
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(make_shards, monkeypatch):
    """(URL, folder behind it, handler) of 40 samples in shards of 8."""
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=lambda _: None))
    folder = make_shards(40, per_shard=8)
    handler = type("ThisHandler", (Handler,), {"requests": Counter(), "failures": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder, handler
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 10**9)


def read_everything(reader):
    return [reader.read(i) for i in range(len(reader))]


def test_what_is_read_over_http_is_what_lies_there(server, cache):
    url, folder, handler = server
    there, here = ShardReader(url, cache=cache), ShardReader(folder)
    assert there.fingerprint == here.fingerprint and there.counts == here.counts
    assert read_everything(there) == read_everything(here)
    again = ShardReader(url + "/", cache=cache)
    assert read_everything(again) == read_everything(here)
    assert all(handler.requests[f"x-00000{n}.tar"] == 1 for n in range(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_over_http_gives_the_same_batches(server, cache, workers):
    url, folder, _ = server
    with (
        Loader(ShardReader(folder), SHAPE, Feed(8, 5, window=2)) as here,
        Loader(
            ShardReader(url, cache=cache), SHAPE, Feed(8, 5, window=2), workers=workers
        ) as there,
    ):
        for _ in range(12):
            a, b = next(here), next(there)
            assert (a.images == b.images).all() and (a.ids == b.ids).all()


def test_fsspecs_other_file_systems_are_read(make_shards, cache):
    folder = make_shards(6, per_shard=3)
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    try:
        reader = ShardReader("memory://bucket/set", cache=cache)
        assert read_everything(reader) == read_everything(ShardReader(folder))
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_transfer_that_fails_is_repeated(server, cache, caplog):
    url, folder, handler = server
    handler.failures |= {"x-000001.tar": 2, "dataset.json": 1}
    assert read_everything(ShardReader(url, cache=cache)) == read_everything(ShardReader(folder))
    assert handler.requests["x-000001.tar"] == 3
    assert any("attempt 2 of 3 failed" in message for message in caplog.messages)


def test_a_transfer_that_goes_on_failing_is_an_error_that_names_the_url(server, cache):
    url, _, handler = server
    handler.failures["x-000001.tar"] = 99
    reader = ShardReader(url, cache=cache)
    with pytest.raises(OSError, match=r"x-000001\.tar cannot be fetched"):
        reader.read(8)
    assert not list(cache.folder.glob("*.tmp"))


def test_a_damaged_file_is_fetched_twice_and_then_refused(server, cache):
    url, folder, handler = server
    path = folder / "x-000002.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 130] ^= 1
    path.write_bytes(data)
    reader = ShardReader(url, cache=cache)
    with pytest.raises(ShardError, match=r"x-000002\.tar is not what its index says, at byte"):
        reader.read(16)
    assert handler.requests["x-000002.tar"] == 2
    assert not list(cache.folder.glob("*x-000002*"))


@pytest.mark.parametrize("name", ["dataset.json", "x-000001.index.safetensors"])
def test_a_damaged_record_or_index_is_refused(server, cache, name):
    url, folder, _ = server
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)
    with pytest.raises(ShardError):
        ShardReader(url, cache=cache)


def test_a_shard_that_is_longer_than_recorded_is_cut_off(server, cache):
    url, folder, _ = server
    with (folder / "x-000000.tar").open("ab") as file:
        file.truncate(2**26)
    with pytest.raises(ShardError, match="is longer than"):
        ShardReader(url, cache=cache).read(0)


def test_damage_in_the_cache_heals(server, cache):
    url, folder, handler = server
    reader, truth = ShardReader(url, cache=cache), read_everything(ShardReader(folder))
    reader.read(0)
    (cached,) = cache.folder.glob("*x-000000.tar")
    data = bytearray(cached.read_bytes())
    data[data.index(b"NUMPY") + 130] ^= 1
    cached.write_bytes(data)
    assert reader.read(0) == truth[0]
    assert handler.requests["x-000000.tar"] == 2
    cached.write_bytes(data[:700])  # cut short while nobody had it open
    assert ShardReader(url, cache=cache).read(0) == truth[0]


def test_the_cache_stays_within_its_bounds(server, tmp_path):
    url, folder, _ = server
    size = (folder / "x-000000.tar").stat().st_size
    cache = Cache(tmp_path / "cache", 3 * size)
    reader, truth = ShardReader(url, cache=cache), read_everything(ShardReader(folder))
    for i in [0, 8, 16, 24, 32, 1, 9, 17, 25, 33, 2]:
        reader.close()  # so that every read opens its shard
        assert reader.read(i) == truth[i]
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 3 * size
    used = {path.name[-5] for path in cache.folder.glob("*.tar")}
    assert used == {"0", "3", "4"}  # the last three that were read


def test_a_cache_that_is_too_small_says_so(server, tmp_path):
    url, _, _ = server
    with pytest.raises(OSError, match="has no room for .*raise data.cache_gb"):
        ShardReader(url, cache=Cache(tmp_path / "cache", 1000)).read(0)


def read_all_of(url, cache, queue):
    queue.put(len(read_everything(ShardReader(url, cache=cache))))


def test_processes_share_a_cache_and_fetch_each_shard_once(server, cache):
    url, _, handler = server
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_all_of, args=(url, cache, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=600) for _ in processes] == [40] * 3
    for process in processes:
        process.join()
    assert all(handler.requests[f"x-00000{n}.tar"] == 1 for n in range(5))


@pytest.mark.parametrize("shard", ["x-000000.tar", "y.tar"], ids=["of this", "of another"])
def test_what_a_killed_process_left_is_removed_for_room(server, tmp_path, shard):
    url, folder, _ = server
    size = (folder / "x-000000.tar").stat().st_size
    cache = Cache(tmp_path / "cache", 2 * size)
    cache.folder.mkdir()
    abandoned = cache.folder / f"{cache._path(f'{url}/{shard}').name}.{2 * size}.tmp"
    abandoned.touch()
    assert ShardReader(url, cache=cache).read(0)
    assert not abandoned.exists()


def test_the_next_window_is_fetched_ahead(server, cache, monkeypatch):
    url, _, handler = server
    done, prefetch = threading.Event(), RemoteFolder._prefetch
    monkeypatch.setattr(
        RemoteFolder, "_prefetch", lambda self, shard: (prefetch(self, shard), done.set())
    )
    reader = ShardReader(url, cache=cache)
    reader.prefetch([3])
    assert done.wait(600) and list(cache.folder.glob("*x-000003.tar"))
    assert handler.requests["x-000003.tar"] == 1
    reader.read(24)
    assert handler.requests["x-000003.tar"] == 1


def test_a_closed_reader_fetches_nothing_more(server, cache, monkeypatch):
    url, _, _ = server
    begun, may_end, fetched = threading.Event(), threading.Event(), []

    def fetch(self, shard):
        fetched.append(shard)
        begun.set()
        may_end.wait(600)

    monkeypatch.setattr(RemoteFolder, "_prefetch", fetch)
    reader = ShardReader(url, cache=cache)
    reader.prefetch(range(5))
    folder: Any = reader._folder
    threads = folder._pool[1]
    assert begun.wait(600)
    reader.close()
    may_end.set()
    threads.shutdown(wait=True)
    assert len(fetched) == 1


def test_a_loader_that_ends_fetches_nothing_more(server, cache, monkeypatch):
    url, _, _ = server
    closed = []
    monkeypatch.setattr(RemoteFolder, "close", lambda self: closed.append(self))
    reader = ShardReader(url, cache=cache)
    with Loader(reader, SHAPE, Feed(8, 5, window=2)) as loader:
        next(loader)
        assert not closed
    assert closed


def test_names_are_quoted_where_urls_are(make_shards, tmp_path, cache):
    folder = tmp_path / "set"
    with ShardWriter(folder, "a b#1%20?x", 8) as writer:
        writer.write("a", {"npy": b"1", "cls": b"2"})
    handler = partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}"
        try:
            assert ShardReader(url, cache=cache).read(0) == {"npy": b"1", "cls": b"2"}
        finally:
            running.shutdown()
            thread.join()


def test_a_record_of_no_shards_is_said(cache, tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/empty/dataset.json", Dataset(()).to_json().encode())
    with pytest.raises(ShardError, match="memory://empty holds no samples"):
        ShardReader("memory://empty", cache=cache)


def test_files_of_the_record_are_verified(tmp_path, cache):
    folder = tmp_path / "set"
    with ShardWriter(folder, "x", 2, {"latent_scale": 0.5}, ["null_tokens.npy"]) as writer:
        writer.write("a", {"npy": b"1", "cls": b"2"})
        (folder / "null_tokens.npy").write_bytes(b"tokens")
    reader = ShardReader(folder)
    assert reader.dataset.metadata == {"latent_scale": 0.5}
    assert reader.read_file("null_tokens.npy") == b"tokens"
    with pytest.raises(ShardError, match="other is not among the recorded files"):
        reader.read_file("x-000000.tar/../other")
    (folder / "null_tokens.npy").write_bytes(b"Tokens")
    with pytest.raises(ShardError, match="null_tokens.npy is not the recorded file"):
        reader.read_file("null_tokens.npy")


@pytest.mark.parametrize(
    "source, url",
    [
        ("http://host/set", True), ("https://host/set", True), ("s3://bucket/set", True),
        ("gs://bucket/set", True), ("/data/set", False), ("set", False), ("../set", False),
    ],
)  # fmt: skip
def test_urls_are_told_from_paths(source, url):
    assert is_url(source) == url


@pytest.mark.parametrize(
    "source",
    [
        "pipe:cat /etc/passwd", "pipe://cat", "file:///etc", "ftp://host/set", "ssh://host/x",
        "simplecache::http://host/set", "http:host", "hf://user/set", "-:x",
    ],
)  # fmt: skip
def test_other_schemes_are_refused(source):
    if source == "-:x":
        assert not is_url(source)
    else:
        with pytest.raises(ValueError, match="commands and other schemes are never opened"):
            ShardReader(source)


def test_a_missing_package_is_named(monkeypatch, cache):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"speed-engine\[remote\]"):
        ShardReader("https://host/set", cache=cache)
