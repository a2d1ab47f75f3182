"""Images generated in parts on disk: what was interrupted continues where it stopped.

    FOLDER/settings.json     all that decides the images
    FOLDER/00000500.npy      images 500 and following, one batch (B, C, H, W)

A part appears when it is complete. It is the same batch whichever process generates it, so that any
number of processes, and any interruptions, give the same images: the same bits on a CPU.

Letters: N images, B images of a batch, C channels, H x W pixels.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.locks import LOCK_FILE, held
from speed_engine.runtime.world import ALONE, World

SETTINGS = "settings.json"


@dataclass(frozen=True)
class ImageParts:
    """Images on disk.

    Attributes:
        folder: of the parts.
        num_images: N.
        batch_size: B, but for the last part.
    """

    folder: Path
    num_images: int
    batch_size: int

    @property
    def starts(self) -> range:
        """First image of each part."""
        return range(0, self.num_images, self.batch_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), of the first part."""
        return next(self.parts()).shape[1:]

    def path(self, start: int) -> Path:
        """Of the part that begins there."""
        return self.folder / f"{start:08d}.npy"

    def ids(self, start: int) -> Tensor:
        """(B,) int64 images of the part that begins there."""
        return torch.arange(start, min(start + self.batch_size, self.num_images))

    def parts(self) -> Iterator[np.ndarray]:
        """(B, C, H, W) in the order of the images, one part in memory at a time.

        Raises:
            UserError: a part is missing or damaged.
        """
        for start in self.starts:
            path = self.path(start)
            try:
                images = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise _unreadable(path, str(error)) from error
            if len(images) != len(self.ids(start)):
                raise _unreadable(path, f"{len(images)} images for {len(self.ids(start))}")
            yield images

    def images(self) -> Tensor:
        """(N, C, H, W), all in memory."""
        return torch.cat([torch.from_numpy(part) for part in self.parts()])

    def remove(self) -> None:
        """The parts, once their images are elsewhere."""
        (self.folder / SETTINGS).unlink()  # first: parts without it are never taken up
        _empty(self.folder)
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        with suppress(OSError):  # NFS keeps a file in it until the lock is given back
            self.folder.rmdir()


@contextmanager
def held_parts(folder: Path, world: World = ALONE) -> Iterator[None]:
    """No other command generates in a folder of parts, which is made, nor removes it meanwhile.

    Args:
        folder: of the parts.
        world: the processes; each calls this.

    Raises:
        UserError: another command is at it.
    """
    world.from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    with held(folder, "filled", world):
        yield


def generate_in_parts(
    generate: Callable[[Tensor], Tensor],
    num_images: int,
    batch_size: int,
    folder: Path,
    settings: dict[str, Any],
    world: World = ALONE,
    advance: Callable[[int], object] = lambda count: None,
) -> ImageParts:
    """Generate what is missing in a folder; the processes share it.

    Args:
        generate: (B,) int64 images on the CPU -> (B, C, H, W) on the CPU, a function of these ids.
        num_images: N.
        batch_size: B.
        folder: of the parts, made or continued.
        settings: JSON-like, all that decides the images, beside those above.
        world: the processes; each calls this, and returns when all parts are there.
        advance: called first with its share of what is there, and then with the number of images
            of each part that this process generated.

    Raises:
        UserError: the folder holds images of other settings.
    """
    images = ImageParts(folder, num_images, batch_size)
    settings = {"num_images": num_images, "batch_size": batch_size, **settings}
    missing: list[int] = world.from_first(lambda: _begin(images, settings))
    there = (start for start in images.starts if start not in missing)
    advance(sum(len(images.ids(start)) for start in there) // world.size)
    for start in missing[world.rank :: world.size]:
        ids = images.ids(start)
        _write(images.path(start), generate(ids).numpy())
        advance(len(ids))
    world.barrier()
    return images


def is_begun(folder: Path) -> bool:
    """Whether a folder holds parts that can be continued."""
    return (folder / SETTINGS).is_file()


def _begin(images: ImageParts, settings: dict[str, Any]) -> list[int]:
    """Make the folder, or check that it is of these settings; the parts to generate."""
    folder, settings = images.folder, json.loads(json.dumps(settings))
    if is_begun(folder) and any(folder.glob("[0-9]*.npy")):
        _check_settings(folder, settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _empty(folder)
        write_durably(folder / SETTINGS, json.dumps(settings, indent=2).encode() + b"\n")
    return [start for start in images.starts if not images.path(start).exists()]


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    there: dict[str, Any] = strict.read_file(
        dict[str, Any], folder / SETTINGS, "Delete the folder, and its images are made anew."
    )
    differing = sorted(
        name for name in {*there, *settings} if there.get(name) != settings.get(name)
    )
    if differing:
        changes = ", ".join(
            f"{name} {there.get(name)} (now {settings.get(name)})" for name in differing
        )
        raise UserError(
            f"{folder} holds the first of other images, with {changes}; finish those with their "
            "own settings, delete the folder, or write elsewhere."
        )


def _write(path: Path, images: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, images, allow_pickle=False)
    write_durably(path, file.getvalue())


def _empty(folder: Path) -> None:
    """Of parts, and of nothing else that may be there."""
    for pattern in ("[0-9]*.npy", "[0-9]*.npy.tmp"):
        for part in folder.glob(pattern):
            part.unlink()


def _unreadable(path: Path, cause: str) -> UserError:
    return UserError(f"{path} cannot be used: {cause}. Delete it; the same command makes it again.")
