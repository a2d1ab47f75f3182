"""A zip of pictures."""

import json
import zipfile
from pathlib import Path

from speed_engine.data.preparing.pictures import (
    EXTENSIONS,
    MAX_FILE_BYTES,
    is_picture,
    open_picture,
)
from speed_engine.data.preparing.source import (
    Record,
    Source,
    by_extension,
    digest,
    numbered_classes,
)
from speed_engine.runtime.checks import UserError

MAX_RATIO = 200  # of a member to its compressed form; pictures hardly shrink


class ZipArchive(Source):
    """Pictures in a zip; labels in its ``dataset.json``, as EDM's preparation writes it.

    ``{"labels": [["00000/img00000000.png", 6], ...]}``; without labels all are of one class.

    Raises:
        UserError: not a zip, no pictures, a label without a picture, a picture without a label, or
            a member that is larger than a picture can be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        members = {info.filename: info for info in self._open().infolist() if not info.is_dir()}
        names = sorted(name for name in members if is_picture(name))
        if not names:
            raise UserError(f"{path} holds no pictures ({', '.join(EXTENSIONS)}).")
        for name in [*names, *({"dataset.json"} & members.keys())]:
            self._check(members[name])
        others = [name for name in members if not is_picture(name) and name != "dataset.json"]
        self.left_out = by_extension(others)
        labels = self._labels(names) if "dataset.json" in members else dict.fromkeys(names, 0)
        self._files = [(name, labels[name]) for name in names]
        self.classes = numbered_classes(max(labels.values()) + 1)
        crcs = [members[name].CRC for name in names]
        self.identity = digest(("zip", *self.classes), self._files, crcs)

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self._path)
            except zipfile.BadZipFile as error:
                raise UserError(f"{self._path} is not a zip archive: {error}.") from error
        return self._zip

    def _check(self, info: zipfile.ZipInfo) -> None:
        ratio = info.file_size / max(info.compress_size, 1)
        if info.file_size > MAX_FILE_BYTES or (ratio > MAX_RATIO and info.file_size > 2**20):
            raise UserError(
                f"{self._path}: {info.filename} would unpack to {info.file_size} bytes, "
                f"{ratio:.0f} times its size; at most {MAX_FILE_BYTES} and {MAX_RATIO} times are "
                f"accepted."
            )

    def _labels(self, names: list[str]) -> dict[str, int]:
        try:
            pairs = json.loads(self._open().read("dataset.json"))["labels"]
            labels = {str(name): label for name, label in pairs or [(name, 0) for name in names]}
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(
                f'{self._path}: dataset.json is not {{"labels": [[name, class], ...]}}: {error!r}.'
            ) from error
        for name, label in labels.items():
            if type(label) is not int or not 0 <= label < 2**31:
                raise UserError(
                    f"{self._path}: dataset.json gives {name!r} the label {label!r}; needed: the "
                    f"number of a class."
                )
        if odd := labels.keys() ^ set(names):
            have = "a label but no picture" if min(odd) in labels else "a picture but no label"
            raise UserError(f"{self._path}: {min(odd)!r} ({len(odd)} such) has {have}.")
        return labels

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
        except zipfile.BadZipFile as error:
            raise UserError(f"damaged: {error}") from error
        return Record(open_picture(data, channels), label)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_zip": None}
