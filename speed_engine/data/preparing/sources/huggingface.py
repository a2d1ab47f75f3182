"""Data sets of the Hugging Face hub, or in a local folder, through the library ``datasets``.

Local are folders that ``Dataset.save_to_disk`` wrote and folders of parquet files.
"""

from pathlib import Path
from typing import Any

from speed_engine.data.preparing.pictures import open_file, open_picture
from speed_engine.data.preparing.source import Record, Source, digest, numbered_classes
from speed_engine.runtime.checks import UserError

_LABELS, _CAPTIONS = ("label", "labels"), ("text", "caption", "captions")


class HuggingFace(Source):
    """One split: its column of pictures, that of the labels and that of the captions.

    Pictures are found by the type of the column, labels too or by the name label(s), captions by
    the name text or caption(s); several captions are a list of strings.

    Args:
        name: of the data set on the hub, or the path of a local folder.
        split: of it.

    Raises:
        UserError: ``datasets`` is missing, the data set cannot be loaded, or its columns do not
            say what is what.
    """

    def __init__(self, name: str, split: str) -> None:
        self._name = f"hf:{name}, split {split}"
        dataset = _load(name, split)
        kinds = {column: type(feature).__name__ for column, feature in dataset.features.items()}
        pictures = [column for column, kind in kinds.items() if kind == "Image"]
        if len(pictures) != 1 or not len(dataset):
            raise UserError(
                f"{self._name} has {len(dataset)} rows with the columns {kinds}; needed: one "
                f"column of kind Image."
            )
        labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
        self._picture = pictures[0]
        self._label = next((c for c in (*labels, *_LABELS) if c in kinds), None)
        self._caption = next((c for c in _CAPTIONS if c in kinds), None)
        self.classes = self._class_names(dataset)
        # The library's hash of the content, a name of its own making but stable between processes.
        self.identity = digest(("hf", dataset._fingerprint, *self.classes), list(kinds.items()))
        undecoded = _datasets().Image(decode=False)
        self._dataset = dataset.cast_column(self._picture, undecoded)

    def _class_names(self, dataset: Any) -> tuple[str, ...]:
        if self._label is None:
            return () if self._caption else ("all",)
        if names := getattr(dataset.features[self._label], "names", None):
            return tuple(names)
        labels = set(dataset[self._label][:])
        if not all(type(label) is int and label >= 0 for label in labels):
            raise UserError(
                f"{self._name}: column {self._label!r} holds {sorted(map(repr, labels))[:3]}; "
                f"needed: the numbers of classes."
            )
        return numbered_classes(max(labels) + 1)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, i: int) -> str:
        """The data set and the row."""
        return f"{self._name}, row {i}"

    def read(self, i: int, channels: int) -> Record:
        """The picture, its label and its captions."""
        row = self._dataset[i]
        stored = row[self._picture] or {}
        if stored.get("bytes") is None and stored.get("path") is None:
            raise UserError("there is no picture.")
        label = row[self._label] if self._label else 0 if self.classes else None
        if self._label and label is None:
            raise UserError("there is no label.")
        if label is not None and not 0 <= label < len(self.classes):
            raise UserError(f"label {label} is none of the {len(self.classes)} classes.")
        captions = row[self._caption] if self._caption else ()
        captions = [captions] if isinstance(captions, str) else captions or ()
        lines = tuple(line for of in captions if (line := " ".join((of or "").split())))
        if self._caption and not lines:
            raise UserError("there is no caption.")
        if data := stored["bytes"]:
            picture = open_picture(data, channels)
        else:
            picture = open_file(Path(stored["path"]), channels)
        return Record(picture, label, lines)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"hf: sources need the library datasets ({error}): pip install 'speed-engine[prepare]'."
        ) from error
    return datasets


def _load(name: str, split: str) -> Any:
    datasets, folder = _datasets(), Path(name).expanduser()
    try:
        if not folder.is_dir():
            return datasets.load_dataset(name, split=split)
        if any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(folder))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset("parquet", data_dir=str(folder), split=split)
    except Exception as error:  # of many kinds, by library, network and content
        raise UserError(f"hf:{name}, split {split!r}, cannot be loaded: {error!r}") from error
