"""A strict reading of tars: every member is found and named, or the scan fails.

Python's ``tarfile`` takes a damaged header in mid-archive for the end of the archive and silently
drops what follows. So what it leaves must be the end marker: blocks of zeros, to the end of the
file. Understood: ustar (with prefix), GNU long names, pax ``path`` and ``size``.

Members are grouped into samples as WebDataset does: ``folder/key.ext`` belongs to the sample
``folder/key``; the extension starts at the first dot of the file name and is lower-cased. Names are
compared and reported, never opened or created.
"""

import mmap
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from speed_engine.data.format.checksums import crc32
from speed_engine.data.format.decode import describe_member
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import Contents, Member, Samples, ShardIndex, merge_member

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 2**22  # of one tar
MAX_NAME = 4096  # bytes of a member's name
MAX_EXTENSION_HEADER = 2**20  # bytes of a long name or of pax records
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset keeps such names for itself
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_EXTENSION_HEADERS = (b"L", b"K", b"x", b"g")
_TYPES = {b"\0", *(b"%d" % digit for digit in range(8)), *_EXTENSION_HEADERS}


def scan_index(path: Path) -> ShardIndex:
    """The index of a tar, from the tar itself.

    Raises:
        ShardError: the tar is damaged.
    """
    contents: Contents = {}

    def describe(_: str, extension: str, data: memoryview) -> None:
        merge_member(contents, extension, describe_member(data, extension))

    samples = scan_tar(path, describe)
    return ShardIndex.of(samples, path.stat().st_size, contents)


def scan_tar(
    path: Path,
    visit: Callable[[str, str, memoryview], object] | None = None,
    *,
    adjacent: bool = True,
) -> Samples:
    """Find every member of a tar, reading all of it once.

    Args:
        path: of the tar; a compressed one is refused.
        visit: called with key, extension and data of each member, in the tar's order; the data must
            not be kept.
        adjacent: whether all members of a sample must lie together, as reading in order needs.

    Raises:
        ShardError: damaged header, missing end, a key whose members are not adjacent, one member
            twice, or more members or longer names than any data set has; names file, offset and
            reason.
    """
    samples: Samples = {}
    last, num_members = None, 0
    with open(path, "rb") as file:
        if path.stat().st_size < 2 * BLOCK:
            raise ShardError(f"{path}: shorter than the end marker of an empty tar.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            if (kind := compression(tar[:6])) is not None:
                raise ShardError(
                    f"{path}: compressed by {kind}, which allows no reading at random; unpack it "
                    f"first: {kind} -d, or pack it again without compression."
                )
            for at, name, offset, size in _regular_members(path, tar):
                named = key_and_extension(name)
                if named is None:
                    continue
                key, extension = named
                if adjacent and key != last and key in samples:
                    raise ShardError(
                        f"{path}: members of sample {key!r} are not adjacent, at byte {at}; "
                        f"`speed-engine shards make` writes such pictures in order, and "
                        f"`tar --sort=name` packs any files so."
                    )
                members = samples.setdefault(key, {})
                if extension in members:
                    raise _error(path, at, f"{name!r} is there twice")
                num_members += 1
                if num_members > MAX_MEMBERS:
                    raise _error(path, at, f"more than {MAX_MEMBERS} members")
                with memoryview(tar) as view, view[offset : offset + size] as data:
                    members[extension] = Member(offset, size, crc32(data))
                    if visit is not None:
                        visit(key, extension, data)
                last = key
    return samples


def compression(start: bytes) -> str | None:
    """The program that made a compressed file, by its first bytes; None of others."""
    return next((kind for magic, kind in _COMPRESSIONS.items() if start.startswith(magic)), None)


def key_and_extension(name: str) -> tuple[str, str] | None:
    """Sample and member that a name in a tar stands for; None where it is of no sample."""
    match = _NAME.fullmatch(name)
    return None if not match or _META.match(name) else (match[1], match[2].lower())


class _Header(tarfile.TarInfo):
    """A header, with its checksum, whose claims are judged before they are followed."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type not in _TYPES:
            raise tarfile.ReadError(f"unsupported member type {header.type!r}")
        is_bounded = 0 <= header.size <= MAX_EXTENSION_HEADER
        if header.type in _EXTENSION_HEADERS and not is_bounded:
            raise tarfile.ReadError(f"an extension header of {header.size} bytes")
        if buf[257:263] != b"ustar\0":  # old GNU headers have other fields in place of the prefix
            header.name = bytes(buf[:100]).split(b"\0")[0].decode(encoding, errors)
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        tar: Any = archive.fileobj
        at = tar.tell()
        member = super().fromtarfile(archive)
        if tar[at + 156] == ord("x"):
            start = at + BLOCK
            _check_records(tar[start : start + int(tar[at + 124 : at + 136].strip(b" \0"), 8)])
        return member


def _check_records(records: bytes) -> None:
    """Of a pax header, each "<length> <keyword>=<value>\\n"; Python 3.11.9 drops malformed ones."""
    while records.strip(b"\0"):
        record = records[: int(records.partition(b" ")[0])]
        if b"=" not in record or not record.endswith(b"\n"):
            raise tarfile.ReadError("malformed pax header")
        records = records[len(record) :]


def _regular_members(path: Path, tar: mmap.mmap) -> Iterator[tuple[int, str, int, int]]:
    """(header offset, name, data offset, data size) of each regular file."""
    at = 0
    try:
        with tarfile.open(fileobj=tar, mode="r:", tarinfo=_Header, encoding="utf-8") as archive:
            of_all, kept = archive.pax_headers, vars(archive)["members"]
            while (member := archive.next()) is not None:
                kept.clear()  # nobody reads them, and they would grow
                if "path" in of_all or "size" in of_all or member.sparse is not None:
                    raise tarfile.ReadError("a path or size of all members, or a sparse file")
                if member.isreg():
                    _check(member, len(tar))
                    yield member.offset, member.name, member.offset_data, member.size
                at = archive.offset
    # Beside its own errors, tarfile meets names of no encoding, seeks past the end of the file and
    # pax headers without end.
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise _error(path, at, str(error)) from error
    if tar[at : at + 2 * BLOCK] != bytes(2 * BLOCK) or tar[at:].strip(b"\0"):
        raise _error(path, at, "neither a sound header nor the end marker (truncated?)")


def _check(member: tarfile.TarInfo, end: int) -> None:
    if member.size < 0 or member.offset_data + member.size > end:
        raise tarfile.ReadError(f"a member of {member.size} bytes passes the end of the file")
    num_bytes = len(member.name.encode())  # raises ValueError for what was no UTF-8
    if num_bytes > MAX_NAME or "\0" in member.name:
        raise tarfile.ReadError(f"name {member.name[:40]!r}... of {num_bytes} bytes, or with \\0")


def _error(path: Path, at: int, reason: str) -> ShardError:
    return ShardError(f"{path}: {reason}, at byte {at}; the shard is damaged, write it again.")
