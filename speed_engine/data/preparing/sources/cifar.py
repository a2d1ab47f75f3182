"""CIFAR-10 from ``cifar-10-binary.tar.gz``: records of one byte of label and 3072 of pixels.

Letters: N images, C, H, W as usual.
"""

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from speed_engine.data.preparing.source import Record, Source, digest
from speed_engine.runtime.checks import UserError

_FOLDER = "cifar-10-batches-bin/"
_FILES = {
    "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
    "test": ["test_batch.bin"],
}
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_FILE_BYTES = 10_000 * _RECORD
_NAMES = "batches.meta.txt"
_MAX_UNPACKED = 2**28


class Cifar10(Source):
    """The 50,000 training or the 10,000 test images.

    Args:
        path: of the archive; read into memory, never unpacked.
        split: train or test.

    Raises:
        UserError: not that archive, or damaged. The "python version" is refused: its files are
            pickles, which run code when they are read.
    """

    def __init__(self, path: Path, split: str) -> None:
        if split not in _FILES:
            raise UserError(f"split={split!r}: CIFAR-10 has {', '.join(_FILES)}.")
        members = _read_members(path, [_NAMES, *_FILES[split]])
        self.classes = tuple(members.pop(_NAMES).decode("ascii", "replace").split())
        records = np.frombuffer(b"".join(members.values()), np.uint8).reshape(-1, _RECORD)
        self._labels, self._images = records[:, 0], records[:, 1:].reshape(-1, *_SHAPE)
        if len(self.classes) != 10 or self._labels.max() > 9:
            raise UserError(
                f"{path}: {len(self.classes)} class names, labels to {self._labels.max()}."
            )
        crcs = [zlib.crc32(content) for content in members.values()]
        self.identity = digest(("cifar10", split, *self.classes), crcs)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        """Its number."""
        return f"CIFAR-10 image {i}"

    def read(self, i: int, channels: int) -> Record:
        """The picture and its class."""
        picture = Image.fromarray(self._images[i].transpose(1, 2, 0).copy())
        return Record(picture.convert("L") if channels == 1 else picture, int(self._labels[i]))


def _read_members(path: Path, names: list[str]) -> dict[str, bytes]:
    """The named files in the order of ``names``, each of at most the size it can have."""
    members: dict[str, bytes] = {}
    try:
        with gzip.open(path) as file:
            unpacked = file.read(_MAX_UNPACKED + 1)
        if len(unpacked) > _MAX_UNPACKED:
            raise UserError(f"{path} unpacks to more than CIFAR-10 has, {_MAX_UNPACKED} bytes.")
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
            for info in archive:
                if info.name.startswith("cifar-10-batches-py/"):
                    raise UserError(
                        f"{path} is the python version of CIFAR-10, whose pickles run code when "
                        f"they are read; take cifar-10-binary.tar.gz from the same page, "
                        f"https://www.cs.toronto.edu/~kriz/cifar.html."
                    )
                name = info.name.removeprefix(_FOLDER)
                if name in names and info.isreg():
                    content = archive.extractfile(info)
                    members[name] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is damaged or not a .tar.gz: {error}.") from error
    for name in names:
        expected = _FILE_BYTES if name != _NAMES else len(members.get(name, b""))
        if len(members.get(name, b"")) != expected or not expected:
            raise UserError(
                f"{path} has no {_FOLDER}{name} of {_FILE_BYTES} bytes; needed: "
                f"cifar-10-binary.tar.gz as published."
            )
    return {name: members[name] for name in names}
