"""A folder of pictures whose labels or captions a file in it lists."""

import os
from collections import Counter
from pathlib import Path

from speed_engine.data.preparing.labels import (
    LABELS,
    LISTS,
    MAX_LIST,
    Listed,
    edm_labels,
    normalised,
    read_list,
)
from speed_engine.data.preparing.pictures import file_digest, file_size, open_file
from speed_engine.data.preparing.source import (
    Record,
    Source,
    by_extension,
    digest,
    is_sample,
    numbered_classes,
)
from speed_engine.data.preparing.sources.image_folder import files_below
from speed_engine.runtime.checks import UserError


class ListedFolder(Source):
    """The pictures that a list in their folder names, see labels.py.

    Labels are numbers, or names of classes, which are then numbered in alphabetical order. Without
    labels and captions all are of one class.

    Args:
        folder: of the list.
        list_name: of one of ``LISTS``, or ``LABELS``.

    Raises:
        UserError: the list is not of its kind, names what is not there, or labels only some.
    """

    def __init__(self, folder: Path, list_name: str) -> None:
        self._folder, path = folder, folder / list_name
        if (size := path.stat().st_size) > MAX_LIST:
            raise UserError(f"{path} has {size:,} bytes; at most {MAX_LIST:,} are read.")
        found = {normalised(os.path.relpath(file, folder)): file for file in files_below(folder)}
        if list_name == LABELS:
            labels = edm_labels(path.read_bytes(), str(path))
            if labels is None:
                labels = dict.fromkeys(filter(is_sample, found), 0)
            listed = {name: Listed(label, ()) for name, label in labels.items()}
        else:
            listed = read_list(path.read_bytes(), str(path))
        if absent := sorted(listed.keys() - found.keys()):
            raise UserError(f"{path}: picture {absent[0]!r} ({len(absent)} such) is not there.")
        self._files = sorted(listed)
        self._listed = listed
        self.classes = self._class_names(path)
        self._labels = {name: n for n, name in enumerate(self.classes)}
        others = [name for name in found if name not in listed]
        unlisted = sum(map(is_sample, others))
        self.left_out = Counter(by_extension(n for n in others if not is_sample(n)))
        self.left_out.pop(Path(list_name).suffix, None)  # itself
        if unlisted:
            self.left_out[f"pictures that {list_name} does not list"] = unlisted
        sizes = [file_size(found[name]) for name in self._files]
        entries = [(name, *listed[name]) for name in self._files]
        self.identity = digest(("listed", *self.classes), entries, sizes)

    def _class_names(self, path: Path) -> tuple[str, ...]:
        labels = [entry.label for entry in self._listed.values()]
        captions = [bool(entry.captions) for entry in self._listed.values()]
        if not labels:
            raise UserError(f"{path} lists no pictures.")
        if any(captions) and not all(captions):
            raise UserError(
                f"{path}: {captions.count(False):,} pictures have no caption, others do."
            )
        if all(label is None for label in labels):
            return () if all(captions) else ("all",)
        kinds = {type(label) for label in labels}
        if len(kinds) > 1:
            raise UserError(
                f"{path}: labels are {sorted(kind.__name__ for kind in kinds)}; every picture "
                f"needs one, and all a number or all a name."
            )
        if kinds == {str}:
            return tuple(sorted({str(label) for label in labels}))
        return numbered_classes(max(label for label in labels if isinstance(label, int)) + 1)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, i: int) -> str:
        """The path of the file."""
        return str(self._folder / self._files[i])

    def read(self, i: int, channels: int) -> Record:
        """The picture, its label and its captions."""
        label, captions = self._listed[self._files[i]]
        picture = open_file(self._folder / self._files[i], channels)
        if isinstance(label, str):
            return Record(picture, self._labels[label], captions)
        return Record(picture, 0 if label is None and self.classes else label, captions)

    def content(self, i: int) -> bytes:
        """Of the file."""
        return file_digest(self._folder / self._files[i])


def list_of(folder: Path) -> str | None:
    """Name of the list in a folder, if it has one.

    Raises:
        UserError: it has several.
    """
    names = [name for name in (*LISTS, LABELS) if (folder / name).is_file()]
    if len(names) > 1:
        raise UserError(f"{folder} holds {' and '.join(names)}; leave one of them.")
    return names[0] if names else None
