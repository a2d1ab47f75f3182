"""Checkpoints: complete or invisible, verified on load, never unpickled.

    RUN/checkpoints/step-00000500/
        NAME.safetensors ...   tensors
        state.json             counters
        manifest.json          size and sha256 of every file above; written last

Written into a temporary folder, flushed to disk, then renamed; an existing checkpoint is never
touched. The newest folder whose manifest holds is the one to resume from.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

SCHEMA = 1
_MANIFEST = "manifest.json"


class InvalidCheckpoint(Exception):
    """A checkpoint is incomplete or damaged; the message names the file."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write ``folder/step-NNNNNNNN``, one safetensors file per entry of ``tensors``.

    Returns:
        The new checkpoint.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints stay as they were.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            cpu = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(cpu, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        manifest = {"schema": SCHEMA, "step": step, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if final.exists():  # left by a run that went on from an earlier checkpoint
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, state) of a checkpoint, on the CPU.

    Raises:
        InvalidCheckpoint: a file is missing, or its size or checksum differs from the manifest.
    """
    files = _verify(checkpoint)
    tensors = {
        Path(name).stem: load_file(checkpoint / name)
        for name in files
        if name.endswith(".safetensors")
    }
    return tensors, json.loads((checkpoint / "state.json").read_text())


def newest(folder: Path) -> Path:
    """The newest checkpoint that is complete; damaged ones are reported and passed over.

    Raises:
        FileNotFoundError: there is none.
    """
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        try:
            _verify(checkpoint)
        except InvalidCheckpoint as damage:
            log.warning("%s; falling back to the checkpoint before it.", damage)
        else:
            return checkpoint
    raise FileNotFoundError(f"{folder} holds no complete checkpoint; train from the start.")


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for checkpoint in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(checkpoint)


def _verify(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Files of the manifest, after comparing each with it."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidCheckpoint(f"{checkpoint / _MANIFEST} cannot be read ({error})") from error
    if manifest.get("schema") != SCHEMA:
        raise InvalidCheckpoint(
            f"{checkpoint} has schema {manifest.get('schema')}; this version reads {SCHEMA}"
        )
    for name, expected in files.items():
        path = checkpoint / name
        if Path(name).name != name:
            raise InvalidCheckpoint(f"{checkpoint / _MANIFEST} names a file outside it: {name!r}")
        if not path.is_file():
            raise InvalidCheckpoint(f"{path} is missing")
        if _describe(path) != expected:
            raise InvalidCheckpoint(f"{path} does not match its checksum")
    return files


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
