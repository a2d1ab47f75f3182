"""The loaders that ``bench_loader.py`` compares, one per process, which takes orders from it.

    python loader_providers.py PROVIDER DATA             serve: one JSON line in, one out
    python loader_providers.py write-streaming DATA      the data in mosaicml-streaming's format

Imports only what its provider needs, so that one of another Python environment can be served. Each
provider gives batches without end, every epoch shuffled: images as stored, (B, C, H, W) uint8 or
float16, and labels (B,), as PyTorch tensors.

DATA holds jpg/ and latents/, each with ``shards`` (tar), ``files`` (one per sample) and
``streaming`` (MDS); latents/files as fast-DiT has them, features and labels apart.
"""

import importlib
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

JPG_SHAPE, LATENT_SHAPE = (3, 256, 256), (8, 32, 32)
BATCH = {"jpg": 128, "latents": 256}
SEED = 0
Batches = Iterator[Any]


def speed_engine(data: Path, kind: str, workers: int) -> Batches:
    """This project's loader, with every checksum verified, in a process set up as the trainer's."""
    from speed_engine.data.format.reader import ShardReader
    from speed_engine.data.loading.loader import Loader
    from speed_engine.data.loading.order import Feed
    from speed_engine.runtime.memory import keep_freed_memory

    keep_freed_memory()
    member, shape = ("jpg", JPG_SHAPE) if kind == "jpg" else ("npy", LATENT_SHAPE)
    reader = ShardReader(data / kind / "shards", (member, "cls"))
    return Loader(reader, shape, Feed(BATCH[kind], SEED), workers=workers)


def webdataset(data: Path, kind: str, workers: int, by_hand: bool) -> Batches:
    """Its own decoding, or the cheapest that one can write in its place."""
    wds: Any = importlib.import_module("webdataset")
    urls = [str(path) for path in sorted((data / kind / "shards").glob("*.tar"))]
    member = "jpg" if kind == "jpg" else "npy"
    stages = wds.WebDataset(urls, shardshuffle=len(urls), seed=SEED).shuffle(1000)
    if by_hand:
        decode = _decode_jpeg if kind == "jpg" else _view_npy
        stages = stages.map(lambda s: (decode(s[member]), int(s["cls"])))
    else:
        stages = stages.decode("torchrgb8").to_tuple(member, "cls")
    loader = DataLoader(
        stages.batched(BATCH[kind], collation_fn=_collate, partial=False),
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return _endless(loader)


def image_folder(data: Path, workers: int) -> Batches:
    """torchvision's, with its default loader, Pillow."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import pil_to_tensor

    return _shuffled(ImageFolder(str(data / "jpg" / "files"), pil_to_tensor), "jpg", workers)


def npy_files(data: Path, workers: int) -> Batches:
    """One .npy of features and one of the label per image, as fast-DiT trains."""
    return _shuffled(_NpyFiles(data / "latents" / "files"), "latents", workers)


def streaming(data: Path, kind: str, workers: int) -> Batches:
    """mosaicml-streaming, the picture stored as bytes and decoded as ours are."""
    base: Any = importlib.import_module("streaming").StreamingDataset

    class Decoded(base):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            if kind == "jpg":
                return _decode_jpeg(sample["image"]), sample["label"]
            return torch.from_numpy(sample["image"]), sample["label"]

    dataset = Decoded(
        local=str(data / kind / "streaming"),
        shuffle=True,
        shuffle_seed=SEED,
        batch_size=BATCH[kind],
        num_canonical_nodes=1,
    )
    loader = DataLoader(
        dataset,
        BATCH[kind],
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    return _endless(loader)


def decoder(data: Path, into: str) -> Batches:
    """The JPEG decoder on bytes in memory: no reading, no order, no checksums.

    Args:
        data: folder of the benchmark.
        into: what it decodes to: a new array, dropped at once; one and the same array; or the
            rows of a new batch.
    """
    decode_jpeg = _simplejpeg().decode_jpeg
    contents = [path.read_bytes() for path in sorted((data / "jpg" / "files").rglob("*.jpg"))]
    channels, height, width = JPG_SHAPE
    same = np.empty((height, width, channels), dtype=np.uint8)
    while True:
        for start in range(0, len(contents) - BATCH["jpg"] + 1, BATCH["jpg"]):
            part = contents[start : start + BATCH["jpg"]]
            if into == "batch":
                rows = np.empty((len(part), *same.shape), dtype=np.uint8)
                for content, row in zip(part, rows, strict=True):
                    decode_jpeg(content, buffer=row)
                del row
                yield rows
                del rows
            else:
                out = same if into == "same" else None
                for content in part:
                    decode_jpeg(content, buffer=out)
                yield None


PROVIDERS: dict[str, Callable[[Path, int], Batches]] = {
    "jpg speed_engine": lambda data, workers: speed_engine(data, "jpg", workers),
    "jpg decoder, pictures dropped": lambda data, workers: decoder(data, "dropped"),
    "jpg decoder, into one array": lambda data, workers: decoder(data, "same"),
    "jpg decoder, into a batch": lambda data, workers: decoder(data, "batch"),
    "jpg torchvision ImageFolder": image_folder,
    "jpg webdataset, decode(torchrgb8)": lambda d, w: webdataset(d, "jpg", w, by_hand=False),
    "jpg webdataset, simplejpeg": lambda d, w: webdataset(d, "jpg", w, by_hand=True),
    "jpg mosaicml-streaming": lambda data, workers: streaming(data, "jpg", workers),
    "latents speed_engine": lambda data, workers: speed_engine(data, "latents", workers),
    "latents one .npy per image": npy_files,
    "latents webdataset, decode()": lambda d, w: webdataset(d, "latents", w, by_hand=False),
    "latents webdataset, frombuffer": lambda d, w: webdataset(d, "latents", w, by_hand=True),
    "latents mosaicml-streaming": lambda data, workers: streaming(data, "latents", workers),
}


class _NpyFiles(Dataset):
    def __init__(self, folder: Path) -> None:
        self._names = sorted(os.listdir(folder / "features"))
        self._features, self._labels = str(folder / "features"), str(folder / "labels")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        feature = np.load(os.path.join(self._features, self._names[i]))
        label = np.load(os.path.join(self._labels, self._names[i]))
        return torch.from_numpy(feature), torch.from_numpy(label)


def _shuffled(dataset: Dataset, kind: str, workers: int) -> Batches:
    loader = DataLoader(
        dataset,
        BATCH[kind],
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    return _endless(loader)


def _endless(loader: DataLoader) -> Batches:
    while True:
        yield from loader


def _collate(rows: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*rows, strict=True)
    return torch.stack([torch.as_tensor(image) for image in images]), torch.tensor(labels)


def _decode_jpeg(data: bytes) -> torch.Tensor:
    """(C, H, W), in memory (H, W, C), as this project's."""
    return torch.from_numpy(_simplejpeg().decode_jpeg(data)).permute(2, 0, 1)


@cache
def _simplejpeg() -> Any:
    return importlib.import_module("simplejpeg")  # not in every provider's environment


def _view_npy(data: bytes) -> torch.Tensor:
    start = 10 + int.from_bytes(data[8:10], "little")
    return torch.from_numpy(np.frombuffer(data, np.float16, offset=start).reshape(LATENT_SHAPE))


def write_streaming(data: Path) -> None:
    """The same bytes and labels as MDS."""
    writer_class: Any = importlib.import_module("streaming").MDSWriter
    columns = {"image": "bytes", "label": "int"}
    with writer_class(out=str(data / "jpg" / "streaming"), columns=columns) as writer:
        for path in sorted((data / "jpg" / "files").rglob("*.jpg")):
            writer.write({"image": path.read_bytes(), "label": int(path.parent.name)})
    columns["image"] = f"ndarray:float16:{','.join(map(str, LATENT_SHAPE))}"
    folder = data / "latents" / "files"
    with writer_class(out=str(data / "latents" / "streaming"), columns=columns) as writer:
        for path in sorted((folder / "features").iterdir()):
            label = int(np.load(folder / "labels" / path.name)[0])
            writer.write({"image": np.load(path), "label": label})


def serve(provider: str, data: Path) -> None:
    """Answer every line with what a turn cost.

    {"seconds": s, "images": n, "workers": w}: the turn ends after s seconds or n images, whichever
    comes first; without a limit where it is null.
    """
    import torchvision  # noqa: F401  its operators, before memory is counted

    warnings.simplefilter("ignore")  # arrays that share the memory of bytes, read only
    torch.set_num_threads(1)
    kind, alone = provider.partition(" ")[0], _memory(os.getpid())
    loaders: dict[int, tuple[Batches, float]] = {}
    print(json.dumps({"python": sys.version.split()[0], "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        workers = order["workers"]
        if workers not in loaders:
            batches = PROVIDERS[provider](data, workers)
            next(batches)
            loaders[workers] = batches, _cpu_seconds()
        batches, cpu = loaders[workers]
        # Workers have filled their queues since the last order. Their time is counted from then on;
        # the clock starts when the queues are empty.
        queued = 4 * workers
        for _ in range(queued):
            next(batches)
        begin, wall, timed = time.perf_counter(), 0.0, 0
        while wall < (order["seconds"] or math.inf) and timed < (order["images"] or math.inf):
            next(batches)
            wall, timed = time.perf_counter() - begin, timed + BATCH[kind]
        now = _cpu_seconds()
        loaders[workers] = batches, now
        memory = [_memory(child) for child in _children()] or [_memory(os.getpid()) - alone]
        cost = {
            "images_per_cpu_second": (queued * BATCH[kind] + timed) / (now - cpu),
            "images_per_second": timed / wall,
            "worker_megabytes": max(memory),
        }
        print(json.dumps(cost), flush=True)


def _children() -> list[int]:
    """Processes below this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        parents[int(folder.name)] = int(fields[1])
    found, frontier = [], [os.getpid()]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _cpu_seconds() -> float:
    """Of this process, its threads and its workers."""
    ticks = 0
    for pid in _children():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> float:
    """Megabytes without files' pages; memory shared by n processes counts for 1/n."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(rollup.partition(kind)[2].split()[0]) for kind in kinds) / 1e3


def npy_bytes(array: np.ndarray) -> bytes:
    """The content of an npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


if __name__ == "__main__":
    if sys.argv[1] == "write-streaming":
        write_streaming(Path(sys.argv[2]))
    else:
        serve(sys.argv[1], Path(sys.argv[2]))
