"""1,797 scanned digits, 8 x 8: part of the package, so that all can be tried without a download.

``digits.npz`` holds images (1797, 8, 8) uint8 in 0..16, and labels; its licence lies beside it.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from speed_engine.data.format.index import VERSION
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.data.preparing.source import Record, Source
from speed_engine.runtime.files import cache_folder

_FILE = Path(__file__).with_name("digits.npz")


class Digits(Source):
    """The digits as grey pictures of 8 x 8."""

    channels = 1
    classes = tuple(map(str, range(10)))
    identity = "digits"
    metadata = {
        "licence": "CC BY 4.0",
        "authors": "E. Alpaydin and C. Kaynak, 1998",
    }

    def __init__(self) -> None:
        self._images, self._labels = _load_digits()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        """Its number."""
        return f"digit {i}"

    def read(self, i: int, channels: int) -> Record:
        """Grey levels from 0 to 255."""
        picture = Image.fromarray(self._images[i, 0])
        return Record(picture if channels == 1 else picture.convert("RGB"), int(self._labels[i]))


def write_digits(folder: str | Path) -> None:
    """Write the digits as shards: npy (1, 8, 8) uint8 in 0..255 and cls."""
    with ShardWriter(folder, "digits", samples_per_shard=300) as writer:
        for i, (image, label) in enumerate(zip(*_load_digits(), strict=True)):
            writer.write(f"{i:06d}", {"npy": npy_bytes(image), "cls": str(label).encode()})


def digits_folder(cache: str | Path | None = None) -> Path:
    """The folder of the digits' shards, written at the first call.

    Args:
        cache: parent folder; by default ``cache_folder()``.
    """
    cache = cache_folder() if cache is None else Path(cache).expanduser()
    folder = cache / f"digits-{VERSION}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".digits-", dir=cache))
        try:
            write_digits(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 1, 8, 8) uint8 in 0..255, labels (1797,)."""
    with np.load(_FILE, allow_pickle=False) as digits:
        images, labels = digits["images"], digits["labels"]
    return np.round(images * (255 / 16)).astype(np.uint8)[:, None], labels
