"""The batches that a run trains on."""

from collections.abc import Generator
from dataclasses import replace

import torch

from speed_engine.data.batch import Batch
from speed_engine.data.config import DataConfig
from speed_engine.data.facts import refuse_unlike, refuse_unlike_values
from speed_engine.data.loading.device import on_device
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.resident import Resident, resident_bytes
from speed_engine.data.opening import build_cleaning, condition_shapes, open_data, stored_shape
from speed_engine.runtime.world import World


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
        refuse_unlike_values(data, self.reader, self.stored_shape)
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
        )
