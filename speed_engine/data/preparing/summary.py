"""What a prepared data set holds, for a person to look at: counts, sizes, classes, pictures.

Letters: N samples, K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from speed_engine.data.format.decode import decode_image, decode_label
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.folder import LocalFolder
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.record import Dataset
from speed_engine.data.preparing.pictures import FORMATS
from speed_engine.runtime.checks import UserError, printable
from speed_engine.runtime.files import replacing

CONTACT_SHEET = "contact-sheet.png"
_ROWS, _COLUMNS, _CELL, _GAP, _NAME = 12, 12, 96, 4, 140  # of the sheet; the last three in pixels
_BATCH = 10_000  # labels read at a time


@dataclass(frozen=True, eq=False)
class Summary:
    """Of one folder of shards."""

    folder: Path
    dataset: Dataset
    class_names: tuple[str, ...]  # (K,)
    labels: np.ndarray  # (N,) int64; empty if there are none

    @property
    def num_samples(self) -> int:
        """N."""
        return sum(shard.samples for shard in self.dataset.shards)

    def lines(self) -> list[str]:
        """Sentences of at most a line."""
        size = sum(shard.bytes for shard in self.dataset.shards)
        contents = [f"{name} {_content(facts)}" for name, facts in self.dataset.contents.items()]
        shards = len(self.dataset.shards)
        lines = [
            f"{self.num_samples:,} samples in {shards:,} {'shard' if shards == 1 else 'shards'}, "
            f"{size / 1e6:,.1f} MB, {size / max(self.num_samples, 1):,.0f} bytes a sample",
            f"members: {', '.join(map(str.strip, contents))}",
        ]
        if len(self.labels):
            counts = np.bincount(self.labels, minlength=len(self.class_names))
            order = np.argsort(counts, kind="stable").tolist()
            named = [f"{printable(self.class_names[c])} {counts[c]:,}" for c in order]
            few = named if len(named) <= 12 else [*named[:3], "...", *named[-3:]]
            if len(named) == 1:
                lines.append(f"1 class: {few[0]}")
            else:
                lines.append(f"{len(named):,} classes, smallest first: {', '.join(few)}")
        return lines

    def draw_contact_sheet(self) -> Path:
        """Write ``contact-sheet.png`` beside the shards: a row per class, at most twelve classes.

        Classes are taken evenly; without labels, samples are.

        Raises:
            UserError: the data set has no pictures.
        """
        picture = next((kind for kind in FORMATS if kind in self.dataset.contents), None)
        if picture is None:
            raise UserError(f"{self.folder} has no pictures, only {[*self.dataset.contents]}.")
        reader, rows = ShardReader(self.folder, [picture]), self._rows()
        margin, step = (_NAME if len(self.labels) else _GAP), _CELL + _GAP
        sheet = Image.new("RGB", (margin + _COLUMNS * step, _GAP + len(rows) * step), "white")
        draw = ImageDraw.Draw(sheet)
        for row, (name, numbers) in enumerate(rows):
            top = _GAP + row * step
            draw.text((_GAP, top + _CELL // 3), printable(name)[:22], fill="black")
            for column, number in enumerate(numbers):
                pixels = decode_image(reader.read(number)[picture], picture, 3)
                sheet.paste(_cell(pixels), (margin + column * step, top))
        path = self.folder / CONTACT_SHEET
        with replacing(path) as temporary:
            sheet.save(temporary, "PNG")
        return path

    def _rows(self) -> list[tuple[str, list[int]]]:
        """(name of the row, numbers of its samples)."""
        if not len(self.labels):
            chosen = _evenly(np.arange(self.num_samples), _ROWS * _COLUMNS)
            return [("", chosen[i : i + _COLUMNS]) for i in range(0, len(chosen), _COLUMNS)]
        return [
            (self._row_name(c), np.flatnonzero(self.labels == c)[:_COLUMNS].tolist())
            for c in _evenly(np.unique(self.labels), _ROWS)
        ]

    def _row_name(self, c: int) -> str:
        name = self.class_names[c]
        return name if name == str(c) else f"{c} {name}"


def summarise(folder: Path) -> Summary:
    """Count a data set, reading all of its labels."""
    dataset, _ = LocalFolder(folder).load(())
    if "cls" not in dataset.contents:
        return Summary(folder, dataset, (), np.empty(0, np.int64))
    labels = _labels(folder)
    names = dataset.metadata.get("classes") or map(str, range(int(labels.max()) + 1))
    return Summary(folder, dataset, tuple(names), labels)


def _labels(folder: Path) -> np.ndarray:
    """(N,) int64."""
    reader = ShardReader(folder, ["cls"])
    labels: list[int] = []
    for start in range(0, len(reader), _BATCH):
        for sample in reader.stream(range(start, min(start + _BATCH, len(reader)))):
            if isinstance(sample, ShardError):
                raise sample
            labels.append(decode_label(sample["cls"]))
    return np.array(labels, dtype=np.int64)


def _evenly(values: np.ndarray, count: int) -> list[int]:
    """At most ``count`` of them, first and last among them."""
    chosen = np.unique(np.linspace(0, len(values) - 1, count).astype(int))
    return values[chosen].tolist()


def _cell(pixels: np.ndarray) -> Image.Image:
    """(C, H, W) uint8 as a picture that fits a cell; small ones by enlarging whole pixels."""
    picture = Image.fromarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))
    if max(picture.size) > _CELL:
        picture.thumbnail((_CELL, _CELL))
        return picture
    factor = _CELL // max(picture.size)
    width, height = picture.size
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _content(facts: dict[str, Any]) -> str:
    if "shape" not in facts:
        return ""
    shape = facts["shape"]
    size = "x".join(map(str, shape)) if shape else "of several shapes"
    return f"{facts.get('dtype') or 'of several types'} {size}"
