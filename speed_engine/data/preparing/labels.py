"""Labels and captions of pictures that a file beside them lists.

    dataset.json     EDM's: {"labels": [["00000/img00000000.png", 6], ...]}, or null for labels
    metadata.jsonl   of Hugging Face's image folders: a line {"file_name": ..., "label": ...,
                     "text": ...} per picture; metadata.csv has the same as columns, where
                     labels that are all whole numbers are numbers of classes

Names are relative to the folder of the list.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError, shortened

LABELS = "dataset.json"
LISTS = ("metadata.jsonl", "metadata.csv")
MAX_LIST = 2**30  # bytes of a list
_LABEL_FIELDS, _CAPTION_FIELDS = ("label", "labels"), ("text", "caption", "captions")


class Listed(NamedTuple):
    """What a list says of one picture."""

    label: int | str | None
    captions: tuple[str, ...]


def edm_labels(content: bytes, where: str) -> dict[str, int] | None:
    """By name of a picture; None where the file says that there are no labels.

    Raises:
        UserError: it is no such file.
    """
    needed = f'{where} is not {{"labels": [[name, class], ...]}}'
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{needed}: {shortened(error)}.") from error
    if not isinstance(document, dict) or "labels" not in document:
        raise UserError(f"{needed}.")
    try:
        pairs = strict.read(list[tuple[str, Any]] | None, document["labels"], "labels")
    except UserError as error:
        raise UserError(f"{needed}: {error}") from error
    for name, label in pairs or ():
        if type(label) is not int or not 0 <= label < 2**31:
            raise UserError(
                f"{where} gives {name!r} the label {shortened(label)}; needed: the number of a "
                f"class."
            )
    labels = None if pairs is None else {normalised(name): label for name, label in pairs}
    if labels is not None and pairs and len(labels) < len(pairs):
        raise UserError(f"{where} lists {len(pairs) - len(labels)} pictures twice.")
    return labels or None


def read_list(content: bytes, where: str) -> dict[str, Listed]:
    """What a ``metadata.jsonl`` or ``metadata.csv`` says, by name of a picture.

    Raises:
        UserError: it is no such file; names the line.
    """
    try:
        text = content.decode("utf-8-sig")
        if where.endswith(".csv"):
            rows = list(enumerate(csv.DictReader(io.StringIO(text)), start=2))
        else:
            lines = enumerate(text.split("\n"), start=1)  # JSON may hold other line breaks
            rows = [(n, json.loads(line)) for n, line in lines if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{where} is not a list of pictures, a line for each: {shortened(error)}."
        ) from error
    listed: dict[str, Listed] = {}
    for n, row in rows:
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f'{where}, line {n}: needed: {{"file_name": "a.png", ...}}.')
        if normalised(name) in listed:
            raise UserError(f"{where}, line {n}: {name!r} is there twice.")
        line = f"{where}, line {n}"
        listed[normalised(name)] = Listed(_label(row, line), _captions(row, line))
    if where.endswith(".csv") and all(_is_whole(entry.label) for entry in listed.values()):
        return {name: of._replace(label=int(of.label or 0)) for name, of in listed.items()}
    return listed


def _is_whole(label: int | str | None) -> bool:
    """Whether a text is a number of a class as it is written; 007 is a name."""
    return isinstance(label, str) and re.fullmatch("0|[1-9][0-9]{0,8}", label) is not None


def normalised(name: str, listed: str = "") -> str:
    """A name relative to the folder of the list ``listed``, without ``./``."""
    folder = PurePosixPath(listed).parent
    path = PurePosixPath(name)
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def fitting(labels: Mapping[str, int], names: Mapping[str, str], where: str) -> dict[str, int]:
    """By a picture's own name: the label of the name that the list has for it.

    Raises:
        UserError: a label without a picture, or a picture without a label.
    """
    if odd := labels.keys() ^ names.keys():
        have = "a label but no picture" if min(odd) in labels else "a picture but no label"
        raise UserError(f"{where}: {min(odd)!r} ({len(odd)} such) has {have}.")
    return {name: labels[short] for short, name in names.items()}


def _label(row: Mapping[str, Any], where: str) -> int | str | None:
    label = next((row[field] for field in _LABEL_FIELDS if row.get(field) is not None), None)
    if label is None or (isinstance(label, str) and label):
        return label
    if type(label) is int and 0 <= label < 2**31:
        return label
    raise UserError(f"{where}: label {shortened(label)}; needed: the number or name of a class.")


def _captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    captions = next((row[field] for field in _CAPTION_FIELDS if row.get(field) is not None), ())
    captions = (captions,) if isinstance(captions, str) else captions
    if not isinstance(captions, (list, tuple)) or not all(isinstance(c, str) for c in captions):
        raise UserError(f"{where}: captions {shortened(captions)}; needed: text.")
    return tuple(line for caption in captions if (line := " ".join(caption.split())))
