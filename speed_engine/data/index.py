"""The index of a shard: where each member lies, and the checksums that make it verifiable.

    {"version": 1, "tar_bytes": n, "sha256": "...", "samples": [{"key": "000123",
     "members": {"cls": [offset, size, crc32], "npy": [...]}}, ...]}

``sha256`` covers keys, extensions, sizes and CRCs: it is the identity of the content, whatever the
layout of the tar, and guards the index itself.
"""

import hashlib
import json
from pathlib import Path

from speed_engine.data.tarscan import Member, Samples, ShardError, scan_tar

VERSION = 1


def index_path(tar_path: Path) -> Path:
    """``digits-000000.tar`` -> ``digits-000000.index.json``."""
    return tar_path.with_suffix(".index.json")


def index_to_json(samples: Samples, tar_bytes: int) -> bytes:
    """The content of the index file of a tar of ``tar_bytes``."""
    index = {
        "version": VERSION,
        "tar_bytes": tar_bytes,
        "sha256": content_hash(samples),
        "samples": [{"key": key, "members": members} for key, members in samples.items()],
    }
    return json.dumps(index, separators=(",", ":")).encode()


def load_index(tar_path: Path) -> tuple[Samples, str]:
    """Samples of a shard and their content hash, from its index or else by a scan of the tar.

    Raises:
        ShardError: the index is damaged or of another tar; names it, the reason and a remedy.
    """
    path = index_path(tar_path)
    if not path.exists():
        samples = scan_tar(tar_path)
        return samples, content_hash(samples)
    try:
        index = json.loads(path.read_bytes())
        version, tar_bytes, sha256 = index["version"], index["tar_bytes"], index["sha256"]
        samples = {
            sample["key"]: {extension: Member(*m) for extension, m in sample["members"].items()}
            for sample in index["samples"]
        }
        intact = content_hash(samples) == sha256
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{path} is not a shard index ({error!r}); delete it if you trust the tar."
        ) from error
    if version != VERSION:
        raise ShardError(f"{path} has version {version!r}; this program reads {VERSION}.")
    if not intact:
        raise ShardError(f"{path} does not match its own checksum; delete it if you trust the tar.")
    if tar_path.stat().st_size != tar_bytes:
        raise ShardError(
            f"{tar_path} has {tar_path.stat().st_size} bytes, its index says {tar_bytes}: it is "
            f"truncated or was replaced; write it again, or delete {path.name} if you trust it."
        )
    return samples, sha256


def content_hash(samples: Samples) -> str:
    """SHA-256 over key and (extension, size, CRC-32) of every member."""
    content = [
        [key, [[extension, m.size, m.crc32] for extension, m in sorted(members.items())]]
        for key, members in samples.items()
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
