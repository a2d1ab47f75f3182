"""Hostile bytes against everything that reads them: only the documented error may come out.

    python tests/data/fuzz.py --inputs 100000 --seed 0 --report benchmarks/results/MACHINE/fuzz.json

Inputs are random bytes, and valid files that were cut, spliced, and overwritten in places, tar
headers with their checksum made right again. Every target gets an equal share.
"""

import argparse
import io
import json
import platform
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from speed_engine.data.format.decode import decode_image, decode_label, decode_npy, describe_member
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.record import dataset_from_json
from speed_engine.data.format.repair import RepairList, load_repair_list
from speed_engine.data.format.tar import BLOCK, scan_tar
from speed_engine.data.format.writer import ShardWriter
from speed_engine.runtime.checks import UserError

PACKAGES = ("hypothesis", "numpy", "pillow", "safetensors", "simplejpeg", "torch", "zlib-ng")


@cache
def temporary_folder() -> tempfile.TemporaryDirectory:
    """In memory, where the machine has a file system there; removed when the program ends."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None)


def workplace() -> Path:
    return Path(temporary_folder().name)


@cache
def shards() -> Path:
    folder = workplace() / "valid"
    with ShardWriter(folder, "x", 3) as writer:
        for i in range(3):
            writer.write(str(i), {"npy": npy(), "cls": b"%d" % i})
    return folder


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    return file.getvalue()


def picture(kind: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def repair_list() -> bytes:
    path = workplace() / "seed.json"
    RepairList({"a.tar": "cut"}, {"b.tar": {"1": "CRC"}}).save(path)
    return path.read_bytes()


def read_shards(index: bytes) -> None:
    """A reader of good tars with a hostile index: what it reads is what was written."""
    folder = workplace() / "hostile"
    if not folder.exists():
        folder.mkdir()
        for path in shards().glob("*.tar"):
            (folder / path.name).write_bytes(path.read_bytes())
    index_path(folder / "x-000000.tar").write_bytes(index)
    reader = ShardReader(folder)
    known = [{"npy": npy(), "cls": b"%d" % i} for i in range(3)]
    assert all(reader.read(i) in known for i in range(len(reader)))


def read_columns(noise: bytes) -> None:
    """The same with an index whose checksums are right and whose columns are not."""
    index, _ = load_index(index_path(shards() / "x-000000.tar"))
    columns = {}
    for name in ("key_ends", "offset", "size", "crc32", "key_bytes"):
        column = getattr(index, name)
        mask = np.frombuffer((noise + bytes(column.nbytes))[: column.nbytes], dtype=np.uint8)
        flipped = column.view(np.uint8).reshape(-1) ^ mask
        columns[name] = flipped.view(column.dtype).reshape(column.shape)
        noise = noise[column.nbytes // 2 :]
    read_shards(replace(index, **columns).to_bytes())


def describe(data: bytes) -> None:
    for extension in ("npy", "cls", "png", "jpg", "webp", "txt"):
        describe_member(data, extension)


def from_file(read: Callable[[Path], object], name: str) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        path = workplace() / name
        path.write_bytes(data)
        read(path)

    return target


def with_checksums(data: bytes) -> bytes:
    """A tar whose headers, wherever they may be, have the right checksum."""
    tar = bytearray(data)
    for at in range(0, len(tar) - BLOCK + 1, BLOCK):
        header = tar[at : at + BLOCK]
        if any(header):
            total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
            tar[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(tar)


def targets() -> dict[str, tuple[Callable[[bytes], object], list[bytes]]]:
    """What reads bytes, and valid bytes for it."""
    tar = (shards() / "x-000000.tar").read_bytes()
    index = index_path(shards() / "x-000000.tar").read_bytes()
    record = (shards() / "dataset.json").read_bytes()
    scan = from_file(scan_tar, "scanned.tar")
    jpegs = [picture("jpeg"), picture("jpeg", progressive=True)]
    return {
        "tar": (scan, [tar]),
        "tar with right checksums": (lambda data: scan(with_checksums(data)), [tar]),
        "index": (from_file(load_index, "loaded.index.safetensors"), [index]),
        "reader": (read_shards, [index]),
        "columns": (read_columns, [bytes(300)]),
        "record": (lambda data: dataset_from_json(data, "record"), [record]),
        "repair list": (from_file(load_repair_list, "repair.json"), [repair_list()]),
        "npy": (decode_npy, [npy()]),
        "label": (decode_label, [b"17"]),
        "png": (lambda data: decode_image(data, "png", 3), [picture("png")]),
        "jpeg": (lambda data: decode_image(data, "jpg", 3), jpegs),
        "webp": (lambda data: decode_image(data, "webp", 3), [picture("webp")]),
        "description": (describe, [npy(), b"17", picture("png"), *jpegs]),
    }


@st.composite
def hostile(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Random bytes, or damage to valid ones."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=2048))
    data = bytearray(draw(st.sampled_from(seeds)))
    # One draw stands for all the places: hypothesis is slow where there are many.
    rng = random.Random(draw(st.integers(0, 2**64)))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(200)
        change = rng.choice(["overwrite", "overwrite", "overwrite", "cut", "insert", "repeat"])
        piece = rng.choice([rng.randbytes(rng.randint(1, 8)), b"\xff" * 4, b"\0" * 8, b"9" * 12])
        if change == "overwrite":
            data[place : place + len(piece)] = piece
        elif change == "cut":
            del data[place : place + rng.choice([1, 4, 512, len(data)])]
        elif change == "insert":
            data[place:place] = piece
        else:
            data[place:place] = data[place : place + 512]
    return bytes(data)


def run(inputs: int, start: int) -> dict[str, Any]:
    """Feed ``inputs`` to all targets together and describe what happened."""
    figures: dict[str, dict[str, int]] = {}
    crashes: list[dict[str, str]] = []
    all_targets = targets()
    for name, (target, seeds) in all_targets.items():
        count = {"inputs": 0, "accepted": 0, "refused": 0, "crashes": 0}

        once = partial(_feed, name, target, count, crashes)

        options = settings(
            max_examples=-(-inputs // len(all_targets)),
            database=None,
            deadline=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
        )
        options(seed(start)(given(hostile(seeds))(_one_argument(once))))()
        figures[name] = count
    return {"targets": figures, "crashes": crashes}


def _one_argument(feed: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """hypothesis wants a function without defaults."""

    def feed_one(data: bytes) -> None:
        feed(data)

    return feed_one


def _feed(
    name: str,
    target: Callable[[bytes], object],
    count: dict[str, int],
    crashes: list[dict[str, str]],
    data: bytes,
) -> None:
    count["inputs"] += 1
    try:
        target(data)
        count["accepted"] += 1
    except UserError:
        count["refused"] += 1
    except Exception:
        count["crashes"] += 1
        if len(crashes) < 20:
            crashes.append({"target": name, "input": data.hex(), "trace": traceback.format_exc()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    begun = time.perf_counter()
    outcome = run(options.inputs, options.seed)
    total = {
        key: sum(count[key] for count in outcome["targets"].values())
        for key in ("inputs", "accepted", "refused", "crashes")
    }
    report = {
        "command": f"python tests/data/fuzz.py --inputs {options.inputs} --seed {options.seed}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "seconds": round(time.perf_counter() - begun),
        **total,
        **outcome,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.report:
        options.report.write_text(text)
    print(text)
    raise SystemExit(1 if total["crashes"] else 0)


if __name__ == "__main__":
    main()
