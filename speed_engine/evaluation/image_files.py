"""Files of generated images: an archive as ADM's evaluator reads it, or one picture each.

Both are complete or not there at all, and are written a part at a time.

Letters: N images, C channels (1 or 3), H x W pixels.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from speed_engine.evaluation.parts import ImageParts
from speed_engine.runtime.files import new_folder, replacing


def write_archive(images: ImageParts, labels: np.ndarray | None, path: Path) -> None:
    """The layout of ADM's evaluator (openai/guided-diffusion, evaluations).

    ``arr_0`` is (N, H, W, 3) uint8, for its network reads colours: grey images are repeated.
    ``arr_1`` is (N,) int64, where there are classes.

    Args:
        images: uint8, on disk.
        labels: (N,), or None.
        path: ``.npz``; numpy reads it.
    """
    _, height, width = images.image_shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            shape = (images.num_images, height, width, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in images.parts():
                colours = np.broadcast_to(part, (len(part), 3, height, width))
                file.write(colours.transpose(0, 2, 3, 1).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.astype(np.int64), allow_pickle=False)


def write_pictures(images: ImageParts, labels: np.ndarray | None, folder: Path) -> None:
    """One PNG each, named by its number and, where there are classes, its class.

    Args:
        images: uint8, on disk.
        labels: (N,), or None.
        folder: one that is there is whole, and stays.
    """
    if folder.exists():
        return
    with new_folder(folder) as partial:
        for i, image in enumerate(_one_by_one(images)):
            of_class = "" if labels is None else f"-class-{labels[i]}"
            Image.fromarray(image).save(partial / f"{i:06d}{of_class}.png")


def _one_by_one(images: ImageParts) -> Iterator[np.ndarray]:
    """(H, W) of grey ones, (H, W, 3) of others."""
    for part in images.parts():
        for image in part:
            yield image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
