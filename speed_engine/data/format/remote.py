"""Data sets behind http(s)://, s3:// and gs://: files fetched whole into a bounded local cache.

    CACHE/<hash of the URL>-<name>           a verified file; its time of change is its last use
    CACHE/<hash of the URL>-<name>.N.tmp     being fetched, N bytes of the budget
    CACHE/NN.lock, CACHE/lock                flock: one process fetches a file, the others wait

fsspec does the transfers; URLs are never given to a shell, and its chained URLs are not understood.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from speed_engine.data.format.errors import ShardError
from speed_engine.runtime.checks import UserError

log = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs", "memory")  # memory is fsspec's, of this process only
ATTEMPTS = 3
RECORD_LIMIT = 2**28  # bytes of dataset.json or of one index
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?.*", re.DOTALL)
_LOCKS = 64


def is_url(source: str) -> bool:
    """Whether a data source is a URL rather than a path.

    Raises:
        UserError: a URL of another scheme, such as ``pipe:`` or ``file:``.
    """
    match = _URL.fullmatch(source)
    if match is None or (Path(source).exists() and not match[2]):
        return False
    if match[1].lower() not in SCHEMES or not match[2]:
        raise UserError(
            f"{source!r} is neither a folder nor a URL of {', '.join(SCHEMES[:-1])}; commands and "
            f"other schemes are never opened."
        )
    return True


def fetch(url: str, path: Path, limit: int) -> None:
    """Copy a file to ``path``; three attempts.

    Args:
        url: of one of ``SCHEMES``.
        path: is overwritten, and left as it is by a failure.
        limit: bytes; a longer file is refused when it passes them.

    Raises:
        FileNotFoundError: there is no such file.
        ShardError: it is longer.
        OSError: it cannot be fetched.
    """
    filesystem, callback = _filesystem(url), _limited(url, limit)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            filesystem.get_file(url, str(path), callback=callback())
            return
        except (FileNotFoundError, ShardError):
            raise
        except Exception as error:  # every protocol has its own
            if attempt == ATTEMPTS:
                raise OSError(f"{url} cannot be fetched: {error!r}") from error
            log.warning("%s: attempt %d of %d failed: %r", url, attempt, ATTEMPTS, error)
            time.sleep(2.0**attempt - 1)


class Cache:
    """Files of data sets elsewhere; any number of processes may share it.

    The least recently used files go first. One that is open stays readable when it goes.

    Args:
        folder: created when needed; nothing else may be in it.
        max_bytes: of all files in it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def open(self, url: str, size: int, verify: Callable[[Path], None]) -> int:
        """Descriptor of a file of ``size`` bytes, fetched if it is not there.

        Args:
            url: of the file.
            size: a file of another is damaged.
            verify: raises ShardError if the fetched file is not what it should be.

        Raises:
            ShardError: what was fetched is damaged, twice, or larger than the cache.
            OSError: it cannot be fetched or stored.
        """
        path = self._path(url)
        if (file := _open(path, size)) is not None:
            return file
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._lock_of(path.name)):
            if (file := _open(path, size)) is not None:  # another process was faster
                return file
            try:
                self._fetch(url, path, size, verify)
            except ShardError as error:
                log.warning("%s; fetching it again.", error)
                self._fetch(url, path, size, verify)
            return os.open(path, os.O_RDONLY)

    def discard(self, url: str) -> None:
        """Forget a file, because its bytes have changed."""
        self._path(url).unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path, size: int, verify: Callable[[Path], None]) -> None:
        temporary = path.with_name(f"{path.name}.{size}.tmp")
        self._reserve(temporary, size)
        try:
            fetch(url, temporary, size)
            if temporary.stat().st_size != size:
                raise ShardError(f"{url} has {temporary.stat().st_size} bytes, recorded are {size}")
            verify(temporary)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> None:
        """Make room, and an empty file that claims it."""
        with _locked(self.folder / "lock"):
            files = sorted(self._files(), key=lambda file: file[1])
            total = sum(file[2] for file in files) + size
            for path, _, freed in files:
                if total <= self.max_bytes:
                    break
                if path.suffix != ".tmp" or self._is_abandoned(path, temporary):
                    path.unlink(missing_ok=True)
                    total -= freed
            if total > self.max_bytes:
                raise OSError(
                    f"the cache {self.folder} of {self.max_bytes} bytes has no room for {size} "
                    f"more; raise data.cache_gb."
                )
            temporary.touch()

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """Path, last use and size in the budget."""
        for path in self.folder.iterdir():
            if path.suffix == ".lock" or path.name == "lock":
                continue
            with contextlib.suppress(FileNotFoundError):  # evicted or renamed meanwhile
                status = path.stat()
                claimed = path.suffixes[-2][1:] if path.suffix == ".tmp" else ""
                yield path, status.st_mtime, int(claimed) if claimed else status.st_size

    def _is_abandoned(self, temporary: Path, ours: Path) -> bool:
        """Whether the process that was fetching it is gone: it held the lock, unless we do."""
        path = self._lock_of_temporary(temporary)
        if path == self._lock_of_temporary(ours):
            return True
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False

    def _path(self, url: str) -> Path:
        folder, _, name = url.rpartition("/")
        return self.folder / f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}-{name}"

    def _lock_of_temporary(self, temporary: Path) -> Path:
        return self._lock_of(temporary.name.removesuffix("".join(temporary.suffixes[-2:])))

    def _lock_of(self, name: str) -> Path:
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _LOCKS
        return self.folder / f"{number:02d}.lock"


def _open(path: Path, size: int) -> int | None:
    """Descriptor of a complete file, which counts as a use; None if there is none."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(file).st_size != size:  # cut short by a crash of the machine
        os.close(file)
        path.unlink(missing_ok=True)
        return None
    os.utime(file)
    return file


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel if the process dies
        yield


def _filesystem(url: str) -> Any:
    """fsspec's, made anew: its instances do not survive a fork."""
    scheme = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    try:
        import fsspec

        if scheme in ("http", "https"):
            import aiohttp

            # By default a whole file must arrive within five minutes; only silence is an error.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise UserError(
            f"{url} needs packages that are not installed ({error}); pip install "
            f"'speed-engine[remote]'."
        ) from error


def _limited(url: str, limit: int) -> Callable[[], Any]:
    from fsspec.callbacks import Callback

    def stop(_: int | None, value: int, **__: object) -> None:
        if value > limit:
            raise ShardError(f"{url} is longer than {limit} bytes")

    return lambda: Callback(hooks={"limit": stop})
