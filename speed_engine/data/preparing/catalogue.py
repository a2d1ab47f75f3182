"""Collections of pictures as they are published, sample by sample, to be written as shards.

    digits                      1,797 scans, 8 x 8, ten classes; part of the package (licence beside
                                it), so that everything can be tried without a download
    emoji                       about 1,900 drawings of Noto Color Emoji, from its font
    FOLDER                      one sub-folder of pictures per class, or pictures of one class
    FILE.zip                    pictures and a dataset.json of labels, as EDM has them
    captions_FILE.json          COCO's captions of the pictures in another folder
    cifar-10-binary.tar.gz      CIFAR-10 as published for C programs
    hf:NAME, hf:PATH            a Hugging Face data set

Nothing is unpacked to disk and nothing unpickled.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from speed_engine.data.format.index import VERSION
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.data.preparing.source import Record, Source
from speed_engine.data.preparing.sources.cifar import Cifar10
from speed_engine.data.preparing.sources.emoji import Emoji
from speed_engine.data.preparing.sources.files import CocoCaptions, ImageFolder, ZipArchive
from speed_engine.data.preparing.sources.huggingface import HuggingFace
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import cache_folder

_DIGITS = Path(__file__).with_name("digits.npz")  # images (1797, 8, 8) uint8 in 0..16, labels


class Digits:
    """The digits as grey pictures of 8 x 8."""

    channels = 1
    classes = tuple(map(str, range(10)))
    identity = "digits"
    metadata: Mapping[str, str] = {
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


def open_source(name: str, images: Path | None = None, split: str = "train") -> Source:
    """The source that a name stands for, see the head of this module.

    Args:
        name: as a person wrote it.
        images: folder of the pictures, for captions.
        split: of CIFAR-10 and Hugging Face data sets.

    Raises:
        UserError: unknown, unreadable or unusable; says why.
    """
    path = Path(name).expanduser()
    if name == "digits":
        return Digits()
    if name == "emoji":
        return Emoji()
    if name.startswith("hf:"):
        return HuggingFace(name.removeprefix("hf:"), split)
    if not path.exists():
        raise UserError(
            f"source {name!r} does not exist; needed: digits, emoji, a folder of "
            f"pictures, cifar-10-binary.tar.gz, a .zip, captions_*.json or hf:NAME."
        )
    if path.is_dir():
        return ImageFolder(path)
    if path.name.endswith((".tar.gz", ".tgz")):
        return Cifar10(path, split)
    if path.suffix == ".zip":
        return ZipArchive(path)
    if path.suffix == ".json":
        if images is None or not images.is_dir():
            raise UserError(f"captions need the folder of their pictures: --images {images}.")
        return CocoCaptions(path, images)
    raise UserError(f"source {name!r}: files of kind {path.suffix!r} are not known.")


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
    with np.load(_DIGITS, allow_pickle=False) as digits:
        images, labels = digits["images"], digits["labels"]
    return np.round(images * (255 / 16)).astype(np.uint8)[:, None], labels
