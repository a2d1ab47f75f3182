"""The repair list: what ``speed-engine shards check`` found wanting, and training can leave out.

{"version": 2, "shards": {"x-000003.tar": "the reason"},
 "samples": {"x-000001.tar": {"0017": "the reason", ...}}}
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from speed_engine.data.format import document
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import VERSION
from speed_engine.data.format.record import Dataset
from speed_engine.runtime.files import write_durably


@dataclass(frozen=True)
class RepairList:
    """Shards and samples that are damaged or unfit, each with a reason."""

    shards: dict[str, str] = field(default_factory=dict)  # by name: unreadable as a whole
    samples: dict[str, dict[str, str]] = field(default_factory=dict)  # by shard, then by key

    def __bool__(self) -> bool:
        return bool(self.shards or any(self.samples.values()))

    def fingerprint(self, dataset: Dataset) -> str:
        """Of a data set without what this list names, hexadecimal; its own if that is nothing."""
        named = {name: sorted(keys) for name, keys in sorted(self.samples.items()) if keys}
        if not named:  # whole shards are not in the record any more
            return dataset.fingerprint
        content = json.dumps([dataset.fingerprint, named])
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        record = {"version": VERSION, "shards": self.shards, "samples": self.samples}
        write_durably(path, (json.dumps(record, indent=1) + "\n").encode())


def load_repair_list(path: Path) -> RepairList:
    """Inverse of ``RepairList.save``.

    Raises:
        FileNotFoundError: there is none.
        ShardError: not a repair list.
    """
    source = f"{path} is not a repair list:"
    remedy = "`speed-engine shards check` writes one."
    record = document.parse(document.read_file(path), source, remedy)
    version = document.field(int, record, "version", source, remedy)
    if version != VERSION:
        raise ShardError(f"{source} version {version}, this program reads {VERSION}; {remedy}")
    return RepairList(
        document.field(dict[str, str], record, "shards", source, remedy),
        document.field(dict[str, dict[str, str]], record, "samples", source, remedy),
    )
