"""Data sets as shards.

digits: 1,797 scans of handwritten digits, 8 x 8 pixels of 17 grey levels, ten classes; part of the
package (licence beside it), so that everything can be tried without a download.
"""

import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from speed_engine.data.index import VERSION
from speed_engine.data.shards import ShardWriter

_DIGITS = Path(__file__).with_name("digits.npz")  # images (1797, 8, 8) uint8 in 0..16, labels


def write_digits(folder: str | Path) -> None:
    """Write the digits as shards: npy (1, 8, 8) uint8 in 0..255 and cls."""
    with np.load(_DIGITS, allow_pickle=False) as digits:
        images, labels = digits["images"], digits["labels"]
    pixels = np.round(images * (255 / 16)).astype(np.uint8)[:, None]
    with ShardWriter(folder, "digits", samples_per_shard=300) as writer:
        for i, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            writer.write(f"{i:06d}", {"npy": _npy_bytes(image), "cls": str(label).encode()})


def digits_folder(cache: str | Path | None = None) -> Path:
    """The folder of the digits' shards, written at the first call.

    Args:
        cache: parent folder; None means $SPEED_ENGINE_CACHE or else ~/.cache/speed_engine.
    """
    cache = Path(cache or os.environ.get("SPEED_ENGINE_CACHE") or "~/.cache/speed_engine")
    cache = cache.expanduser()
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


def _npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
