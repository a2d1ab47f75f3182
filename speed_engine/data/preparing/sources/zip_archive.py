"""A zip of pictures."""

import lzma
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePath

from speed_engine.data.preparing.labels import LABELS, edm_labels, fitting, normalised
from speed_engine.data.preparing.pictures import EXTENSIONS, MAX_FILE_BYTES, open_picture
from speed_engine.data.preparing.source import (
    Record,
    Source,
    by_extension,
    digest,
    is_hidden,
    is_sample,
    numbered_classes,
)
from speed_engine.runtime.checks import UserError

MAX_RATIO = 200  # of a member to its compressed form; pictures hardly shrink
# RuntimeError: it is encrypted, or packed in a way that Python does not know.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


class ZipArchive(Source):
    """Pictures in a zip; labels in its ``dataset.json``, as EDM's preparation writes it.

    ``{"labels": [["00000/img00000000.png", 6], ...]}``; without labels all are of one class. Names
    are relative to the folder of ``dataset.json``: archives that were packed again often have all
    in one more folder, or names that begin with ``./``.

    Raises:
        UserError: not a zip that can be read, no pictures, a label without a picture, a picture
            without a label, two pictures of one name, two files of labels, or a member that is
            larger than a picture can be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        members = {info.filename: info for info in self._open().infolist() if not info.is_dir()}
        names = sorted(name for name in members if is_sample(name))
        if not names:
            raise UserError(f"{path} holds no pictures ({', '.join(EXTENSIONS)}).")
        listed = self._file_of_labels(members)
        for name in [*names, *listed]:
            self._check(members[name])
        others = [name for name in members if not is_sample(name) and name not in listed]
        self.left_out = by_extension(others)
        labels = self._labels(listed[0], names) if listed else dict.fromkeys(names, 0)
        self._files = [(name, labels[name]) for name in names]
        self.classes = numbered_classes(max(labels.values()) + 1)
        crcs = [members[name].CRC for name in names]
        self.identity = digest(("zip", *self.classes), self._files, crcs)

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self._path)
            except (*_UNREADABLE, ValueError) as error:  # ValueError: names of no encoding
                raise UserError(
                    f"{self._path} is not a zip archive that can be read: {error}."
                ) from error
        return self._zip

    def _check(self, info: zipfile.ZipInfo) -> None:
        ratio = info.file_size / max(info.compress_size, 1)
        if info.file_size > MAX_FILE_BYTES or (ratio > MAX_RATIO and info.file_size > 2**20):
            raise UserError(
                f"{self._path}: {info.filename} would unpack to {info.file_size} bytes, "
                f"{ratio:.0f} times its size; at most {MAX_FILE_BYTES} and {MAX_RATIO} times are "
                f"accepted."
            )

    def _file_of_labels(self, members: Iterable[str]) -> list[str]:
        """Its name, if there is one."""
        listed = [name for name in members if PurePath(name).name == LABELS and not is_hidden(name)]
        if len(listed) > 1:
            raise UserError(
                f"{self._path} holds several {LABELS}: {sorted(listed)[:3]}; pack each with its "
                f"pictures in a zip of its own."
            )
        return listed

    def _labels(self, listed: str, names: list[str]) -> dict[str, int]:
        try:
            content = self._open().read(listed)
        except _UNREADABLE as error:
            raise UserError(f"{self._path}: {listed} cannot be read: {error}.") from error
        labels = edm_labels(content, f"{self._path}: {listed}")
        if labels is None:
            return dict.fromkeys(names, 0)
        short = {normalised(name, listed): name for name in names}
        if twice := set(names) - set(short.values()):
            raise UserError(
                f"{self._path} holds two pictures named {normalised(min(twice), listed)!r} "
                f"({len(twice)} such); pack each once."
            )
        return fitting(labels, short, str(self._path))

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        """The archive and the member."""
        return f"{self._path}: {self._files[i][0]}"

    def read(self, i: int, channels: int) -> Record:
        """The picture and its label."""
        name, label = self._files[i]
        try:
            data = self._open().read(name)
        except _UNREADABLE as error:
            raise UserError(f"damaged, or not to be read: {error}") from error
        return Record(open_picture(data, channels), label)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_zip": None}
