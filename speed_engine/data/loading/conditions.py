"""Members of a sample that its image is conditioned on, by the first part of their extension.

    cls                       labels           the class, as decimal text
    tokens.npy                tokens           (L, D) floats of a text encoder
    low.npy, low.png, ...     low_resolution   a smaller version of the image, (C, h, w)

What stands for "no text" is the empty prompt's tokens, in ``null_tokens.npy`` beside the shards.
"""

from pathlib import Path

import numpy as np

from speed_engine.data.format.decode import Buffer, decode_image, decode_label, decode_npy
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.record import RECORD, dataset_from_json, read_record, verified
from speed_engine.runtime.checks import UserError

NAMES = {"cls": "labels", "tokens": "tokens", "low": "low_resolution"}
NULL_TOKENS = "null_tokens.npy"


def condition_name(member: str) -> str:
    """The model's argument that a member is.

    Raises:
        UserError: it is none.
    """
    name = NAMES.get(member.partition(".")[0])
    if name is None:
        raise UserError(
            f"member {member!r} is no condition; the known are cls, tokens.npy and low.npy, "
            "low.png, low.jpg, low.webp."
        )
    return name


def decode_condition(data: Buffer, member: str, channels: int) -> np.ndarray:
    """A member's bytes to its row of the batch; ``channels`` as in ``decode_image``.

    Raises:
        UserError: they are not what the member should be.
    """
    name = condition_name(member)
    if name == "labels":
        return np.array(decode_label(data), dtype=np.int64)
    if name == "tokens":
        return _checked_tokens(decode_npy(data))
    return decode_image(data, member, channels)


def null_tokens_path(source: Path) -> Path:
    """Of the file beside the shards; ``source`` is their folder, or one of them."""
    source = source.expanduser()
    return (source.parent if source.is_file() else source) / NULL_TOKENS


def load_null_tokens(source: Path) -> np.ndarray:
    """(L, D) of the empty prompt.

    Args:
        source: the folder of the shards, or one of them.

    Raises:
        UserError: the file is missing, holds something else, or is not the recorded one.
    """
    path = null_tokens_path(source)
    if not path.is_file():
        raise ShardError(
            f"{path} does not exist; it holds the text encoder's tokens of the empty prompt, which "
            "stand for no text. `speed-engine shards encode` writes it beside the tokens."
        )
    content, record = path.read_bytes(), path.with_name(RECORD)
    if record.is_file():
        dataset = dataset_from_json(read_record(record), str(record))
        if NULL_TOKENS in dataset.files:  # not where others wrote the shards
            verified(dataset, NULL_TOKENS, str(path), lambda: content)
    return decode_null_tokens(content, str(path))


def decode_null_tokens(data: bytes, where: str) -> np.ndarray:
    """(L, D) of the empty prompt, from its file.

    Raises:
        UserError: it holds something else; ``where`` names it.
    """
    try:
        return _checked_tokens(decode_npy(data)).copy()  # of its own memory
    except ValueError as error:
        raise ShardError(f"{where}: {error}") from error


def _checked_tokens(tokens: np.ndarray) -> np.ndarray:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.floating):
        raise UserError(
            f"text tokens are (length, width) floats, not {tokens.dtype} of shape {tokens.shape}."
        )
    return tokens
