"""A strict reading of tar headers: every member is found and named, or the scan fails.

Python's ``tarfile`` takes a damaged header in mid-archive for the end of the archive and silently
drops what follows; here each header must pass its checksum and the end marker must be there.
Understood: ustar (with prefix), GNU long names, pax ``path`` and ``size``.

Members are grouped into samples as WebDataset does: ``folder/key.ext`` belongs to the sample
``folder/key``; the extension starts at the first dot of the file name and is lower-cased. Names are
compared and reported, never opened or created.
"""

import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from speed_engine.data.format.checksums import crc32
from speed_engine.runtime.checks import UserError

BLOCK = 512
MAX_MEMBERS = 2**22  # of one tar
MAX_NAME = 4096  # bytes of a member's name
MAX_EXTENSION_HEADER = 2**20  # bytes of a long name or of pax records
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset keeps such names for itself
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_REGULAR, _LINKS_AND_FOLDERS = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")


class ShardError(UserError):
    """A shard or its index is damaged or unusable; the message names the file and the reason."""


class Member(NamedTuple):
    """Where the bytes of one member lie in the tar, and their CRC-32."""

    offset: int
    size: int
    crc32: int


Samples = dict[str, dict[str, Member]]  # sample key -> extension -> member, in the tar's order


def scan_tar(path: Path, visit: Callable[[str, str, memoryview], object] | None = None) -> Samples:
    """Find every member of a tar, reading all of it once.

    Args:
        path: of the tar; a compressed one is refused as damaged.
        visit: called with key, extension and data of each member, in the tar's order; the data must
            not be kept.

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
            for at, name, offset, size in _regular_members(path, tar):
                match = _NAME.fullmatch(name)
                if not match or _META.match(name):
                    continue
                key, extension = match[1], match[2].lower()
                if key != last and key in samples:
                    raise _error(path, at, f"members of sample {key!r} are not adjacent")
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


def _regular_members(path: Path, tar: mmap.mmap) -> Iterator[tuple[int, str, int, int]]:
    """(header offset, name, data offset, data size) of each regular file."""
    at, end = 0, len(tar)
    override: dict[str, str] = {}  # name or size given by a preceding extension header
    while True:
        header = tar[at : at + BLOCK]
        if len(header) < BLOCK:
            raise _error(path, at, "the file ends without an end marker (truncated?)")
        if header == bytes(BLOCK):
            if end < at + 2 * BLOCK or tar[at:].strip(b"\0"):
                raise _error(path, at, "the end marker is cut short or followed by data")
            return
        _verify_checksum(path, at, header)
        kind, size, data = header[156:157], _number(path, at, header[124:136]), at + BLOCK
        if kind in _REGULAR and "size" in override:
            size = int(override["size"])
        if kind in _LINKS_AND_FOLDERS:
            size = 0
        if data + size > end:
            raise _error(path, at, f"a member of {size} bytes passes the end of the file")
        if kind in (b"L", b"x") and size > MAX_EXTENSION_HEADER:
            raise _error(path, at, f"an extension header of {size} bytes")
        if kind == b"L":
            override["path"] = _text(path, at, tar[data : data + size].rstrip(b"\0"))
        elif kind == b"x":
            override |= _pax_records(path, at, tar[data : data + size])
        elif kind in _REGULAR:
            yield at, override.get("path") or _name(path, at, header), data, size
            override = {}
        elif kind in _LINKS_AND_FOLDERS:
            override = {}
        elif kind not in (b"g", b"K"):  # global comments and long link targets say nothing to us
            raise _error(path, at, f"unsupported member type {kind!r}")
        at = data + -(-size // BLOCK) * BLOCK


def _verify_checksum(path: Path, at: int, header: bytes) -> None:
    expected = _number(path, at, header[148:156])
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
        raise _error(path, at, "header checksum mismatch")


def _number(path: Path, at: int, field: bytes) -> int:
    if field[0] == 0x80:  # GNU: big-endian binary, for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if not match:
        raise _error(path, at, f"not an octal number: {field!r}")
    return int(match[1] or b"0", 8)


def _name(path: Path, at: int, header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], b""
    if header[257:263] == b"ustar\0":  # old GNU headers have other fields in place of the prefix
        prefix = header[345:500].split(b"\0")[0]
    return _text(path, at, prefix + b"/" + name if prefix else name)


def _pax_records(path: Path, at: int, data: bytes) -> dict[str, str]:
    """Records are "<length of the record> <keyword>=<value>\\n"."""
    records = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        record = data[: int(length)] if length.isdigit() else b""
        keyword, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise _error(path, at, "malformed pax header")
        if keyword in (b"path", b"size"):
            records[keyword.decode()] = _text(path, at, value)
        data = data[len(record) :]
    if not records.get("size", "0").isdecimal():
        raise _error(path, at, f"pax size {records['size']!r} is not a number")
    return records


def _text(path: Path, at: int, name: bytes) -> str:
    if len(name) > MAX_NAME or b"\0" in name:
        raise _error(path, at, f"name {name[:40]!r}... of {len(name)} bytes, or with a zero byte")
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _error(path, at, f"name {name!r} is not UTF-8") from None


def _error(path: Path, at: int, reason: str) -> ShardError:
    return ShardError(f"{path}: {reason}, at byte {at}; the shard is damaged, write it again.")
