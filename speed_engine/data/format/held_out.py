"""Which samples are held out of training: a function of their keys alone.

A key's SHA-256, read as a number in [0, 1), is compared with the share. So the split is the same
for any order and layout of the shards, on any machine, and a larger share holds out the same ones
and more.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Literal

import numpy as np

Part = Literal["training", "held_out"]


def is_held_out(key: str, share: float) -> bool:
    """Whether a sample is not trained on; ``share`` in [0, 1) of all samples are not."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def in_part(keys: Iterable[str], share: float, part: Part) -> np.ndarray:
    """(N,) bool of N keys."""
    held_out = np.fromiter((is_held_out(key, share) for key in keys), dtype=bool)
    return held_out if part == "held_out" else ~held_out


def part_fingerprint(fingerprint: str, share: float, part: Part) -> str:
    """Of one part of a data set, hexadecimal."""
    return hashlib.sha256(json.dumps([fingerprint, share, part]).encode()).hexdigest()
