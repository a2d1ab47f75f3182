import io
from itertools import islice

import numpy as np
import torch

from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.device import on_device
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed

SHAPE = (1, 2, 3)


def test_batches_arrive_on_the_device_whole_and_in_order(make_shards, device):
    reader = ShardReader(make_shards(50, per_shard=7))
    with Loader(reader, SHAPE, Feed(8, 5), workers=1) as loader:
        expected = [next(loader) for _ in range(30)]
    with Loader(reader, SHAPE, Feed(8, 5), workers=1) as loader:
        arrived = islice(on_device(loader, device), len(expected))
        for before, batch in zip(expected, arrived, strict=True):
            assert batch.images.device.type == device.type
            work = batch.images
            for _ in range(50):  # on a GPU the next copy runs beside this
                work = work * 1
            torch.testing.assert_close(work.cpu(), before.images, rtol=0, atol=0)
            assert batch.ids.tolist() == before.ids.tolist()
            assert batch.conditions["labels"].tolist() == before.conditions["labels"].tolist()


def test_a_finite_iterable_ends_with_its_last_batch(make_shards, device):
    reader = ShardReader(make_shards(10, per_shard=7))
    with Loader(reader, SHAPE, Feed(2, 5)) as loader:
        batches = [next(loader) for _ in range(4)]
    assert [b.ids.tolist() for b in on_device(batches, device)] == [b.ids.tolist() for b in batches]


def test_bfloat16_latents_keep_their_values(tmp_path, device):
    truth = torch.randn(4, 2, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with ShardWriter(tmp_path, "x", 3) as writer:
        for i, latent in enumerate(truth):
            file = io.BytesIO()
            np.save(file, latent.view(torch.uint16).numpy())
            writer.write(str(i), {"bf16.npy": file.getvalue(), "cls": str(i).encode()})
    reader = ShardReader(tmp_path, keys=("bf16.npy", "cls"))
    with Loader(reader, (2, 2, 3), Feed(4, 0)) as loader:
        stored = next(loader)
    assert stored.images.dtype == torch.bfloat16
    batch = Cleaning(torch.tensor(0, device=device)).batch(stored.to(device))
    assert batch.images.dtype == torch.float32
    labels = stored.conditions["labels"]
    torch.testing.assert_close(batch.images.cpu(), truth[labels].float(), rtol=0, atol=0)
