"""The batches that a run trains on."""

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch

from speed_engine.data.batch import Batch
from speed_engine.data.config import DataConfig
from speed_engine.data.facts import refuse_unlike
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.decoding import BatchReader, Shape
from speed_engine.data.loading.device import on_device
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.resident import Resident, resident_bytes
from speed_engine.data.opening import build_cleaning, condition_shapes, open_data, stored_shape
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import World

_LOOKED_AT = 64  # samples


class TrainingData:
    """The shards of a run, and batches of clean images of them on the device.

    Args:
        data: configuration.
        batch_size: images of a step, of all processes together.
        seed: of the run; root of the order, of flips and of latents.
        world: the processes that train together.
        device: of this one.

    Raises:
        UserError: the data set is damaged, or does not fit the configuration.
    """

    def __init__(
        self, data: DataConfig, batch_size: int, seed: int, world: World, device: torch.device
    ) -> None:
        self.data, self.device = data, device
        self.feed = Feed(batch_size, seed, 0, world.rank, world.size, data.window)
        self.source, self.reader = data.source, open_data(data)
        refuse_unlike(data, self.reader.dataset)
        self.stored_shape = stored_shape(data, self.reader)
        _refuse_unlike_values(data, self.reader, self.stored_shape)
        self._loader(start=0).close()  # an unfit data set fails here
        self.cleaning = build_cleaning(data, self.reader, seed, device)
        self.num_bytes = resident_bytes(self.reader, self.stored_shape)

    def batches(self, start: int, resident: bool) -> Generator[Batch]:
        """This process's, endlessly.

        Args:
            start: images consumed before, by all processes.
            resident: whether all images are kept on the device.
        """
        if resident:
            yield from Resident(
                self.reader,
                self.stored_shape,
                replace(self.feed, start=start),
                self.cleaning,
                num_classes=self.data.num_classes,
                on_bad_sample=self.data.on_bad_sample,
            )
        else:
            with self._loader(start) as loader:
                yield from map(self.cleaning.batch, on_device(loader, self.device))

    def _loader(self, start: int) -> Loader:
        data = self.data
        return Loader(
            self.reader,
            self.stored_shape,
            replace(self.feed, start=start),
            workers=data.workers,
            num_classes=data.num_classes,
            condition_shapes=condition_shapes(data),
            on_bad_sample=data.on_bad_sample,
            mode=data.mode,
            pinned=self.device.type == "cuda",
        )


def _refuse_unlike_values(data: DataConfig, reader: ShardReader, stored_shape: Shape) -> None:
    """Look at some samples, spread over the data set, whether they can be pictures.

    Raises:
        UserError: numbers outside of [-1, 1] are taken for pictures.
    """
    if data.latents or not f".{data.members[0]}".endswith(".npy"):
        return
    numbers = np.unique(np.linspace(0, len(reader) - 1, _LOOKED_AT).astype(int))
    batches = BatchReader(reader, stored_shape, on_bad_sample="skip")
    images = batches.read(numbers, lambda _, attempt: attempt % len(reader)).images
    if images.is_floating_point() and float(images.abs().max()) > 1.001:  # of a rounded 1
        raise UserError(
            f"{data.source} holds numbers from {images.min():.3g} to {images.max():.3g}; pictures "
            f"are uint8, or floats in [-1, 1]. If these are latents, add "
            f"--data.latents --evaluation.features none."
        )
