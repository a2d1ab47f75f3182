"""Where the files of a data set are: in a folder of this machine, or behind a URL."""

import logging
import os
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

from speed_engine.data.format.checksums import crc32
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.forms import refuse_missing, refuse_other_forms, tars_of
from speed_engine.data.format.index import ShardIndex, index_path, load_index
from speed_engine.data.format.record import (
    RECORD,
    Dataset,
    ShardRecord,
    dataset_from_json,
    dataset_of,
    read_record,
    refuse_incomplete,
    verified,
)
from speed_engine.data.format.remote import RECORD_LIMIT, Cache, fetch, is_url
from speed_engine.data.format.tar import scan_index
from speed_engine.runtime.checks import UserError

log = logging.getLogger(__name__)

_TRANSFERS = 16  # indices fetched at a time; shards come one at a time

Loaded = tuple[Dataset, list[ShardIndex]]


def open_folder(source: str | Path, cache: Cache | None) -> "LocalFolder | RemoteFolder":
    """The folder that a path or a URL names.

    Raises:
        FileNotFoundError: no such folder.
        UserError: a URL that cannot be read here.
    """
    refuse_other_forms(str(source))
    if isinstance(source, Path) or not is_url(source):
        return LocalFolder(Path(source))
    if cache is None:
        raise UserError(f"{source} needs a cache to fetch its shards into.")
    return RemoteFolder(source, cache)


class LocalFolder:
    """Tars on a file system; what their writer did not record is made in memory.

    Args:
        path: of the folder, or of one tar in it, which is then all that is read; ``~`` is the home
            folder.
    """

    def __init__(self, path: Path) -> None:
        path = path.expanduser()
        is_tar = path.name.endswith(".tar") and path.is_file()
        self._path, self._only = (path.parent, path.name) if is_tar else (path, None)
        self._dataset = Dataset(())

    def load(self, without: Collection[str]) -> Loaded:
        """The record of the shards not in ``without``, and their indices.

        Raises:
            FileNotFoundError: no such folder, or no shards in it.
            ShardError: shards, indices and record are not of each other; names file and remedy.
        """
        refuse_other_forms(str(self._path))
        refuse_missing(self._path)
        refuse_incomplete(self._path)
        found = [path.name for path in tars_of(self._path) if self._only in (None, path.name)]
        names = [name for name in found if name not in without]
        if not names:
            raise FileNotFoundError(f"{self._path}: the list of what is excluded leaves no shard.")
        record, known = self._path / RECORD, None
        if record.exists():
            known = dataset_from_json(read_record(record), str(record)).without(without)
            if self._only is not None:
                others = [shard.name for shard in known.shards if shard.name != self._only]
                known = known.without(others)
            self._refuse_other_shards(known, names)
        if lacking := [name for name in names if not index_path(self._path / name).exists()]:
            log.warning(
                "%d of %d shards in %s have no index and are read whole to make one; "
                "`speed-engine shards index %s` keeps it.",
                len(lacking),
                len(names),
                self._path,
                self._path,
            )
        loaded = [self._load_shard(self._path / name) for name in names]
        self._dataset = known or dataset_of(zip(names, loaded, strict=True))
        for shard, (index, sha256) in zip(self._dataset.shards, loaded, strict=True):
            _refuse_other_content(shard, index, sha256, str(self._path / shard.name))
        return self._dataset, [index for index, _ in loaded]

    def describe(self, name: str) -> str:
        """Path of a file."""
        return str(self._path / name)

    def open(self, shard: int) -> int:
        """A file descriptor of a shard, by its place in the record."""
        path = self._path / self._dataset.shards[shard].name
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} is gone since the data set was opened; put it back and resume."
            ) from error

    def prefetch(self, shards: Sequence[int]) -> None:
        """Say that these shards are read next; the kernel reads ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        for shard in shards:
            file = self.open(shard)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(file)

    def close(self) -> None:
        """Prefetch no more."""

    def refetch(self, shard: int) -> bool:
        """Drop a copy of a shard whose bytes are damaged; False where there is no other."""
        return False

    def read_file(self, name: str) -> bytes:
        """A file of the record beside the shards, verified."""
        path = self._path / name
        return verified(self._dataset, name, str(path), path.read_bytes)

    def _load_shard(self, path: Path) -> tuple[ShardIndex, str]:
        """Index and content hash, checked against the size of the tar."""
        try:
            index, sha256 = load_index(index_path(path))
        except FileNotFoundError:
            index = scan_index(path)
            return index, index.content_hash()
        tar_bytes = path.stat().st_size
        if tar_bytes != index.tar_bytes:
            raise ShardError(
                f"{path} has {tar_bytes} bytes, its index says {index.tar_bytes}: it is truncated "
                f"or was replaced; write it again, or delete {index_path(path).name} if you trust "
                f"it."
            )
        return index, sha256

    def _refuse_other_shards(self, known: Dataset, names: list[str]) -> None:
        listed = [shard.name for shard in known.shards]
        if names != listed:
            missing, extra = sorted(set(listed) - set(names)), sorted(set(names) - set(listed))
            raise ShardError(
                f"{self._path} lacks {missing[:3]} and has {extra[:3]} against its {RECORD}; put "
                f"the folder back as it was, or run `speed-engine shards index {self._path}` to "
                f"record it as it is."
            )


class RemoteFolder:
    """Shards behind a URL, with their record and indices; fetched whole when first needed.

    Args:
        url: of the folder.
        cache: for the shards and their indices.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self._url, self._cache = url.rstrip("/"), cache
        self._dataset, self._indices = Dataset(()), list[ShardIndex]()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # process, threads

    def load(self, without: Collection[str]) -> Loaded:
        """As of a local folder.

        Raises:
            FileNotFoundError: there is no record or index; shards of others need them, too.
            ShardError: a file is not what the record says; names it.
            OSError: a file cannot be fetched.
        """
        url = self.describe(RECORD)
        try:
            record = self._fetch_bytes(url, RECORD_LIMIT)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{url} does not exist; `speed-engine shards index` on a local copy writes it."
            ) from error
        self._dataset = dataset_from_json(record, url).without(without)
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            self._indices = list(pool.map(self._load_index, self._dataset.shards))
        return self._dataset, self._indices

    def describe(self, name: str) -> str:
        """URL of a file."""
        is_http = self._url.partition(":")[0].lower() in ("http", "https")
        return f"{self._url}/{quote(name) if is_http else name}"

    def open(self, shard: int) -> int:
        """As of a local folder; fetches the shard if need be."""
        record, index = self._dataset.shards[shard], self._indices[shard]
        url = self.describe(record.name)
        return self._cache.open(url, record.bytes, partial(_verify_members, index, url))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, each worker from another shard on."""
        process = os.getpid()
        if self._pool is None or self._pool[0] != process:  # threads do not survive a fork
            self._pool = process, ThreadPoolExecutor(1)
        first = process % max(len(shards), 1)
        for shard in [*shards[first:], *shards[:first]]:
            self._pool[1].submit(self._prefetch, shard)

    def close(self) -> None:
        """Prefetch no more; the end of the process would wait for all that is still to come."""
        if self._pool is not None and self._pool[0] == os.getpid():
            self._pool[1].shutdown(wait=False, cancel_futures=True)
        self._pool = None

    def refetch(self, shard: int) -> bool:
        """Drop the copy of a shard."""
        self._cache.discard(self.describe(self._dataset.shards[shard].name))
        return True

    def read_file(self, name: str) -> bytes:
        url = self.describe(name)
        return verified(self._dataset, name, url, partial(self._fetch_bytes, url, RECORD_LIMIT))

    def _prefetch(self, shard: int) -> None:
        try:
            os.close(self.open(shard))
        except (OSError, ValueError) as error:  # whoever needs the shard meets it, too
            log.warning("%s", error)

    def _load_index(self, shard: ShardRecord) -> ShardIndex:
        url = self.describe(index_path(Path(shard.name)).name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index"
            fetch(url, path, RECORD_LIMIT)
            index, sha256 = load_index(path)
        _refuse_other_content(shard, index, sha256, url)
        return index

    def _fetch_bytes(self, url: str, limit: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            fetch(url, path, limit)
            return path.read_bytes()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pool": None}


def _verify_members(index: ShardIndex, url: str, path: Path) -> None:
    """Every member of a fetched shard against its checksum."""
    with path.open("rb") as file:
        tar = memoryview(file.read())
    for _, members in index.members():
        for offset, size, expected in members.values():
            if crc32(tar[offset : offset + size]) != expected:
                raise ShardError(f"{url} is not what its index says, at byte {offset}")


def _refuse_other_content(shard: ShardRecord, index: ShardIndex, sha256: str, where: str) -> None:
    if (shard.sha256, shard.bytes, shard.samples) != (sha256, index.tar_bytes, len(index)):
        raise ShardError(
            f"{where} is of another data set than {RECORD}: its content is {sha256[:12]}, recorded "
            f"is {shard.sha256[:12]}; put the shard and its index back."
        )
