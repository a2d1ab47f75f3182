"""Tars as WebDataset has them, whoever wrote them: their pictures, labels and captions."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from speed_engine.data.format.checksums import crc32
from speed_engine.data.format.decode import decode_label
from speed_engine.data.format.index import Member
from speed_engine.data.format.record import RECORD, dataset_from_json, read_record
from speed_engine.data.format.tar import scan_tar
from speed_engine.data.preparing.pictures import EXTENSIONS, MAX_FILE_BYTES, open_picture
from speed_engine.data.preparing.source import Record, Source, digest, numbered_classes
from speed_engine.runtime.checks import UserError

_CAPTIONS = "txt"
_MAX_CAPTIONS = 2**20  # bytes of the captions of one picture


class _Entry(NamedTuple):
    """One sample."""

    tar: int
    key: str
    picture: Member
    label: int | None
    captions: Member | None


class Tars(Source):
    """Samples ``key.jpg`` (or another picture), ``key.cls``, ``key.txt``, in the tars' order.

    The members of a sample need not be adjacent, nor the pictures of one size. Samples without a
    picture are left out and counted, as are other members.

    Args:
        paths: of the tars.
        folder: whose ``dataset.json``, if there is one, names the classes.

    Raises:
        UserError: a tar is damaged, there are no pictures, or only some of them have a label or
            captions.
    """

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        self._paths = [*paths]
        self._entries: list[_Entry] = []
        left_out: Counter[str] = Counter()
        for number, path in enumerate(paths):
            labels: dict[str, int] = {}

            def visit(key: str, extension: str, data: memoryview, path=path, labels=labels) -> None:
                if extension == "cls":
                    try:
                        labels[key] = decode_label(data)
                    except UserError as error:
                        raise UserError(f"{path}: sample {key!r}: {error}") from error

            for key, members in scan_tar(path, visit, adjacent=False).items():
                pictures = [e for e in members if f".{e}" in EXTENSIONS]
                left_out.update(e for e in members if e not in (*pictures[:1], "cls", _CAPTIONS))
                if not pictures:
                    left_out["samples without a picture"] += 1
                    continue
                picture, captions = members[pictures[0]], members.get(_CAPTIONS)
                self._entries.append(_Entry(number, key, picture, labels.get(key), captions))
        self.left_out = left_out
        self._check()
        self.classes = self._class_names(folder)
        content = [
            (e.key, e.label, e.picture[1:], e.captions and e.captions[1:]) for e in self._entries
        ]
        self.identity = digest(("tars", *self.classes), content)

    def _check(self) -> None:
        where = f"{self._paths[0]} (and {len(self._paths) - 1} more)"
        if not self._entries:
            kinds = ", ".join(e.removeprefix(".") for e in EXTENSIONS)
            raise UserError(f"{where}: no sample has a picture ({kinds}).")
        for what, has in (
            ("label (cls)", [entry.label is not None for entry in self._entries]),
            ("caption (txt)", [entry.captions is not None for entry in self._entries]),
        ):
            if any(has) and not all(has):
                raise UserError(
                    f"{where}: {has.count(False):,} of {len(has):,} pictures have no {what}, the "
                    f"first is {self.name(has.index(False))}; all need one, or none."
                )

    def _class_names(self, folder: Path) -> tuple[str, ...]:
        labels = [entry.label for entry in self._entries if entry.label is not None]
        if not labels:
            return () if self._entries[0].captions is not None else ("all",)
        count = max(labels) + 1
        record = folder / RECORD
        names: list[str] = []
        if record.is_file():
            names = (
                dataset_from_json(read_record(record), str(record)).metadata.get("classes") or []
            )
        return tuple(names) if len(names) >= count else numbered_classes(count)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, i: int) -> str:
        """The tar and the key."""
        entry = self._entries[i]
        return f"{self._paths[entry.tar]}: sample {entry.key!r}"

    def read(self, i: int, channels: int) -> Record:
        """The picture, its label and its captions."""
        entry = self._entries[i]
        picture = open_picture(self._bytes(entry.tar, entry.picture, MAX_FILE_BYTES), channels)
        label = 0 if entry.label is None and self.classes else entry.label
        if entry.captions is None:
            return Record(picture, label)
        text = self._bytes(entry.tar, entry.captions, _MAX_CAPTIONS).decode()
        lines = tuple(line for line in (" ".join(of.split()) for of in text.split("\n")) if line)
        if not lines:
            raise UserError("its caption is empty.")
        return Record(picture, label, lines)

    def _bytes(self, tar: int, member: Member, limit: int) -> bytes:
        if member.size > limit:
            raise UserError(f"a member of {member.size:,} bytes; at most {limit:,} are accepted.")
        with self._paths[tar].open("rb") as file:
            data = os.pread(file.fileno(), member.size, member.offset)
        if crc32(data) != member.crc32:
            raise UserError("its bytes have changed since the tar was opened.")
        return data
