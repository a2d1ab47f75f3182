"""A folder of pictures."""

import os
from collections.abc import Iterator
from pathlib import Path

from speed_engine.data.preparing.pictures import (
    EXTENSIONS,
    file_digest,
    file_size,
    is_picture,
    open_file,
)
from speed_engine.data.preparing.source import (
    Record,
    Source,
    by_extension,
    digest,
    is_hidden,
    is_sample,
)
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
        entries = sorted(folder.iterdir())
        inside = [entry for entry in entries if not is_hidden(entry.name)]
        pictures = [entry for entry in inside if is_picture(entry.name)]
        folders = [entry for entry in inside if entry.is_dir()]
        if pictures and folders:
            raise UserError(
                f"{folder} holds pictures ({pictures[0].name}, ...) beside sub-folders "
                f"({folders[0].name}, ...); needed: one sub-folder per class, or pictures only."
            )
        self._files: list[tuple[str, int]] = []  # path below the folder, label
        sizes: list[int] = []
        # Of a folder without sub-folders, they are among its files below.
        others = [entry.name for entry in entries if folders and entry not in folders]
        self.classes = tuple(_readable_name(entry) for entry in folders) or ("all",)
        for label, class_folder in enumerate(folders or [folder]):
            paths = sorted(files_below(class_folder))
            names = [os.path.relpath(path, folder) for path in paths]
            found = [p for p, name in zip(paths, names, strict=True) if is_sample(name)]
            if not found:
                raise UserError(
                    f"{class_folder} holds no pictures ({', '.join(EXTENSIONS)}); every sub-folder "
                    f"of the source is a class: remove it or choose another source."
                )
            self._files += [(os.path.relpath(path, folder), label) for path in found]
            sizes += map(file_size, found)
            others += [name for name in names if not is_sample(name)]
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

    def content(self, i: int) -> bytes:
        """Of the file."""
        return file_digest(self._folder / self._files[i][0])


def files_below(folder: Path) -> Iterator[str]:
    """Paths of all files at any depth, through links; of a hidden folder its own path instead.

    Raises:
        UserError: a link leads to a folder that it is in, itself or by way of other links.
        OSError: a folder cannot be read.
    """
    top = os.path.realpath(folder)
    inside_of = {str(folder): {top, *map(str, Path(top).parents)}}  # real paths, by path
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        ancestors = inside_of.pop(root)
        yield from (os.path.join(root, name) for name in names)
        yield from (os.path.join(root, name) for name in folders if is_hidden(name))
        folders[:] = [name for name in folders if not is_hidden(name)]
        for path in (os.path.join(root, name) for name in folders):
            real = os.path.realpath(path)
            if real in ancestors:
                raise UserError(f"{path} links to a folder that it is in; remove the link.")
            inside_of[path] = ancestors | {real}


def _raise(error: OSError) -> None:
    raise error


def _readable_name(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of class folder {path!r} is not UTF-8; rename it.") from None
    return path.name
