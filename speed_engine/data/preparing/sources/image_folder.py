"""A folder of pictures."""

import os
from collections.abc import Iterator
from pathlib import Path

from speed_engine.data.preparing.pictures import EXTENSIONS, file_size, is_picture, open_file
from speed_engine.data.preparing.source import Record, Source, by_extension, digest
from speed_engine.runtime.checks import UserError


class ImageFolder(Source):
    """Pictures below a folder, whose sub-folders, in the order of their names, are the classes.

    At every depth links are followed and hidden entries are not looked at.

    Args:
        folder: without sub-folders its pictures are of one class.

    Raises:
        UserError: no pictures, a class without pictures, pictures beside classes, or a link to a
            folder that it is in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        pictures = [entry for entry in inside if is_picture(entry.name)]
        folders = [entry for entry in inside if entry.is_dir()]
        if pictures and folders:
            raise UserError(
                f"{folder} holds pictures ({pictures[0].name}, ...) beside sub-folders "
                f"({folders[0].name}, ...); needed: one sub-folder per class, or pictures only."
            )
        self._files: list[tuple[str, int]] = []  # path below the folder, label
        sizes: list[int] = []
        others = [entry.name for entry in inside if folders and not entry.is_dir()]
        self.classes = tuple(_readable_name(entry) for entry in folders) or ("all",)
        for label, class_folder in enumerate(folders or [folder]):
            paths = sorted(_files_below(class_folder))
            found = [path for path in paths if is_picture(path)]
            if not found:
                raise UserError(
                    f"{class_folder} holds no pictures ({', '.join(EXTENSIONS)}); every sub-folder "
                    f"of the source is a class: remove it or choose another source."
                )
            self._files += [(os.path.relpath(path, folder), label) for path in found]
            sizes += map(file_size, found)
            others += [path for path in paths if not is_picture(path)]
        self.left_out = by_extension(others)
        self.identity = digest(("folder", *self.classes), self._files, sizes)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        """The path of the file."""
        return str(self._folder / self._files[i][0])

    def read(self, i: int, channels: int) -> Record:
        """The picture and the class of its folder."""
        path, label = self._files[i]
        return Record(open_file(self._folder / path, channels), label)


def _files_below(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(root, name) for name in folders):
            real = os.path.join(os.path.realpath(path), "")
            if os.path.islink(path) and os.path.join(os.path.realpath(root), "").startswith(real):
                raise UserError(f"{path} links to a folder that it is in; remove the link.")
        yield from (os.path.join(root, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _readable_name(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of class folder {path!r} is not UTF-8; rename it.") from None
    return path.name
