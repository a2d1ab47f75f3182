"""Sources that are files: a folder of pictures, a zip of them, COCO's captions."""

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from speed_engine.data.preparing.pictures import EXTENSIONS, open_picture
from speed_engine.data.preparing.source import Record, digest, numbered_classes
from speed_engine.runtime.checks import UserError

MAX_FILE_BYTES = 2**28  # of one picture's file
MAX_RATIO = 200  # of a zip's member to its compressed form; pictures hardly shrink


class ImageFolder:
    """Pictures below a folder, whose sub-folders, in the order of their names, are the classes.

    Args:
        folder: without sub-folders its pictures are of one class.

    Raises:
        UserError: unreadable, no pictures, a class without pictures, or pictures beside classes.
    """

    channels = 3
    metadata: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        pictures = [entry for entry in inside if _is_picture(entry.name)]
        folders = [entry for entry in inside if entry.is_dir()]
        if pictures and folders:
            raise UserError(
                f"{folder} holds pictures ({pictures[0].name}, ...) beside sub-folders "
                f"({folders[0].name}, ...); needed: one sub-folder per class, or pictures only."
            )
        self._files: list[tuple[str, int]] = []  # path below the folder, label
        sizes: list[int] = []
        self.classes = tuple(_readable_name(entry) for entry in folders) or ("all",)
        for label, class_folder in enumerate(folders or [folder]):
            found = sorted(_pictures_below(class_folder))
            if not found:
                raise UserError(
                    f"{class_folder} holds no pictures ({', '.join(EXTENSIONS)}); every sub-folder "
                    f"of the source is a class: remove it or choose another source."
                )
            self._files += [(os.path.relpath(path, folder), label) for path, _ in found]
            sizes += [size for _, size in found]
        self.identity = digest(("folder", *self.classes), self._files, sizes)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        """The path of the file."""
        return str(self._folder / self._files[i][0])

    def read(self, i: int, channels: int) -> Record:
        """The picture and the class of its folder."""
        path, label = self._files[i]
        return Record(open_picture(file_bytes(self._folder / path), channels), label)


class ZipArchive:
    """Pictures in a zip; labels in its ``dataset.json``, as EDM's preparation writes it.

    ``{"labels": [["00000/img00000000.png", 6], ...]}``; without labels all are of one class.

    Raises:
        UserError: not a zip, no pictures, a label without a picture, a picture without a label, or
            a member that is larger than a picture can be.
    """

    channels = 3
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        members = {info.filename: info for info in self._open().infolist() if not info.is_dir()}
        names = sorted(name for name in members if _is_picture(name))
        if not names:
            raise UserError(f"{path} holds no pictures ({', '.join(EXTENSIONS)}).")
        for name in [*names, *({"dataset.json"} & members.keys())]:
            self._check(members[name])
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


class CocoCaptions:
    """COCO's ``captions_*.json``: every picture with all its captions, in the order of their ids.

    Args:
        path: of the annotations.
        folder: of the pictures.

    Raises:
        UserError: not such a file, a caption of no picture, a picture without caption or file.
    """

    channels = 3
    metadata: Mapping[str, str] = {}
    classes = ()

    def __init__(self, path: Path, folder: Path) -> None:
        self._folder = folder
        try:
            content = json.loads(path.read_bytes())
            names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            annotations = sorted(content["annotations"], key=lambda annotation: annotation["id"])
            pairs = [(int(a["image_id"]), " ".join(a["caption"].split())) for a in annotations]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a file of COCO captions: {error!r}.") from error
        captions: dict[int, list[str]] = {number: [] for number in names}
        for number, caption in pairs:
            if number not in captions or not caption:
                what = "belongs to no picture" if caption else "is empty"
                raise UserError(f"{path}: caption {caption!r} of image {number} {what}.")
            captions[number].append(caption)
        present = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        for number, name in names.items():
            if name not in present or not captions[number]:
                what = f"is not in {folder}" if captions[number] else "has no caption"
                raise UserError(f"{path}: picture {name!r} {what}; correct one of the two.")
        if not names:
            raise UserError(f"{path} lists no pictures.")
        self._samples = [(names[number], tuple(captions[number])) for number in sorted(names)]
        sizes = [present[name] for name, _ in self._samples]
        self.identity = digest(("captions",), self._samples, sizes)

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, i: int) -> str:
        """The path of the picture."""
        return str(self._folder / self._samples[i][0])

    def read(self, i: int, channels: int) -> Record:
        """The picture and its captions."""
        name, captions = self._samples[i]
        return Record(open_picture(file_bytes(self._folder / name), channels), None, captions)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.rpartition("/")[2].startswith(".")


def _pictures_below(folder: Path) -> Iterable[tuple[str, int]]:
    """(path, bytes) of each."""
    for root, _, names in os.walk(folder, onerror=_raise):
        for name in filter(_is_picture, names):
            path = os.path.join(root, name)
            yield path, os.stat(path).st_size


def _raise(error: OSError) -> None:
    raise error


def _readable_name(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of class folder {path!r} is not UTF-8; rename it.") from None
    return path.name


def file_bytes(path: Path) -> bytes:
    """The content of a file of a size that a picture can have."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{size} bytes; at most {MAX_FILE_BYTES} are accepted.")
    return path.read_bytes()
