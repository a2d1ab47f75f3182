"""COCO's captions, with the pictures in a folder."""

import json
import os
from pathlib import Path, PurePosixPath

from speed_engine.data.preparing.labels import MAX_LIST
from speed_engine.data.preparing.pictures import file_digest, file_size, open_file
from speed_engine.data.preparing.source import Record, Source, digest
from speed_engine.runtime.checks import UserError


class CocoCaptions(Source):
    """COCO's ``captions_*.json``: every picture with all its captions, in the order of their ids.

    Args:
        path: of the annotations.
        folder: of the pictures.

    Raises:
        UserError: not such a file, a caption of no picture, a picture without caption or file.
    """

    def __init__(self, path: Path, folder: Path | None) -> None:
        if folder is None or not folder.is_dir():
            raise UserError(f"captions need the folder of their pictures: --images {folder}.")
        self._folder = folder
        if (size := path.stat().st_size) > MAX_LIST:
            raise UserError(f"{path} has {size:,} bytes; at most {MAX_LIST:,} are read.")
        try:
            content = json.loads(path.read_bytes())
            names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            annotations = sorted(content["annotations"], key=lambda annotation: annotation["id"])
            pairs = [(int(a["image_id"]), " ".join(a["caption"].split())) for a in annotations]
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise UserError(f"{path} is not a file of COCO captions: {error!r}.") from error
        captions: dict[int, list[str]] = {number: [] for number in names}
        for number, caption in pairs:
            if number not in captions or not caption:
                what = "belongs to no picture" if caption else "is empty"
                raise UserError(f"{path}: caption {caption!r} of image {number} {what}.")
            captions[number].append(caption)
        present = {name: _size_below(folder, name) for name in names.values()}
        for number, name in names.items():
            if present[name] is None or not captions[number]:
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
        return Record(open_file(self._folder / name, channels), None, captions)

    def content(self, i: int) -> bytes:
        """Of the picture's file."""
        return file_digest(self._folder / self._samples[i][0])


def _size_below(folder: Path, name: str) -> int | None:
    """Bytes of the file of this name at any depth of a folder; None if there is none."""
    path = PurePosixPath(name)
    is_below = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return file_size(str(folder / name)) if is_below and os.path.lexists(folder / name) else None
