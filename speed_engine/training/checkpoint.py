"""Checkpoints: complete or invisible, verified on load, never unpickled, for any layout.

    RUN/checkpoints/step-00000500/
        shard-00001-....safetensors    tensors of one process, with their place in the whole
        state.json                     counters
        manifest.json                  size and sha256 of every file above; written last

Written beside training by ``torch.distributed.checkpoint`` into a temporary folder, flushed to
disk, then renamed; an existing checkpoint is never touched. The newest folder whose manifest holds
is the one to resume from. Tensors are keyed ``group/name`` and load into any layout on any number
of processes. With several nodes the folder must be on a file system that all of them see.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save

from speed_engine.runtime import strict
from speed_engine.runtime.checks import MOST, UserError, check_between
from speed_engine.runtime.files import sync
from speed_engine.runtime.records import Sums
from speed_engine.runtime.world import ALONE, World

log = logging.getLogger(__name__)
# That there is one process is no news, in a notebook as little as on the command line.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

CHECKPOINTS = "checkpoints"  # of a run: the folder
EMA_FILE = "ema.safetensors"  # of a run that is complete: the EMA of its parameters
SCHEMA = 2
_NAME = re.compile(r"step-\d{8,}")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_DESCRIPTION = ".description"  # beside a file that a process wrote, until the manifest holds it
_REMEDY = "Delete this checkpoint, and the one before it is used; or put its files back."


class InvalidCheckpoint(UserError):
    """A checkpoint is incomplete or damaged; the message names the file."""


@dataclass(frozen=True)
class State:
    """What a run carries on beside its tensors: ``state.json``."""

    step: int  # optimizer steps done
    means: Sums  # of the interval that is not over
    bad_samples: int  # replaced so far
    skipped: tuple[float, float, float]  # steps: all, in a row, most in a row
    seconds: float  # trained
    data: str  # fingerprint of the data set

    def __post_init__(self) -> None:
        counts = {"step": self.step, "bad_samples": self.bad_samples, "seconds": self.seconds}
        for name, value in counts.items():
            check_between(name, value, 0, MOST)
        for value in self.skipped:
            check_between("skipped", value, 0, MOST)


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    schema: int
    step: int
    files: dict[str, _File]

    def __post_init__(self) -> None:
        check_between("schema", self.schema, SCHEMA, SCHEMA)
        for name in self.files:
            if Path(name).name != name:
                raise UserError(f"files names one outside of the checkpoint: {name!r}.")


class Checkpoints:
    """The checkpoints of a run, written by all of its processes together.

    Args:
        folder: of the run's checkpoints.
        world: the processes.
        keep: newest checkpoints that stay.
        keep_every: of the older ones, those at multiples of this step stay; None keeps none.
    """

    def __init__(
        self, folder: Path, world: World = ALONE, keep: int = 3, keep_every: int | None = None
    ) -> None:
        self.folder, self.world, self.keep, self.keep_every = folder, world, keep, keep_every
        self.failures: list[str] = []
        self._pending: tuple[Path, Future] | None = None
        if world.is_first:
            for left in folder.glob(".tmp-*"):
                shutil.rmtree(left)
        world.barrier()

    def save(self, tensors: Mapping[str, Tensor], state: State) -> None:
        """Begin to write ``step-NNNNNNNN``; tensors may change as soon as this returns.

        A disk that is full or read-only costs this checkpoint, not the run and not the checkpoints
        before: the failure is logged and listed in ``failures``.

        Args:
            tensors: by ``group/name``, sharded or equal on every process.
            state: equal on every process.
        """
        self.wait()
        temporary = self.folder / f".tmp-{state.step:08d}"
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            saving = async_save(
                dict(tensors),
                storage_writer=_Writer(self, temporary, state),
                process_group=self.world.background,
                no_dist=self.world.size == 1,
            )
        except (Exception, CheckpointException) as error:
            self._failed(temporary, error)
            return
        written: Any = getattr(saving, "upload_completion", saving)
        self._pending = temporary, written

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete, or has failed."""
        if self._pending is None:
            return
        temporary, saving = self._pending
        self._pending = None
        try:
            saving.result()
        except (Exception, CheckpointException) as error:
            self._failed(temporary, error)

    @property
    def is_saving(self) -> bool:
        """Whether one is being written now."""
        return self._pending is not None and not self._pending[1].done()

    def commit(self, temporary: Path, state: State) -> None:
        """Turn the files of all processes into a checkpoint, and delete old ones."""
        (temporary / _STATE).write_text(json.dumps(asdict(state)))
        files = {_STATE: asdict(describe(temporary / _STATE))}
        for description in sorted(temporary.glob(f"*{_DESCRIPTION}")):
            files[description.name.removesuffix(_DESCRIPTION)] = json.loads(description.read_text())
            description.unlink()
        manifest = {"schema": SCHEMA, "step": state.step, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (temporary / _STATE, temporary / _MANIFEST, temporary):
            sync(path)
        final = self.folder / f"step-{state.step:08d}"
        if final.exists():  # left by a run that went on from an earlier checkpoint
            _delete(final)
        temporary.rename(final)
        sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        for step, checkpoint in list(by_step(self.folder).items())[: -self.keep]:
            if self.keep_every is None or step % self.keep_every:
                _delete(checkpoint)

    def _failed(self, temporary: Path, error: BaseException) -> None:
        cause = _root_cause(error)
        self.failures.append(f"{temporary.name.removeprefix('.tmp-').lstrip('0')}: {cause}")
        if self.world.is_first:
            log.error("no checkpoint of step %s; earlier ones are intact.", self.failures[-1])
            shutil.rmtree(temporary, ignore_errors=True)


class _Writer(HuggingFaceStorageWriter):
    """Safetensors, described by the process that wrote them, committed by the first one."""

    def __init__(self, checkpoints: Checkpoints, temporary: Path, state: State) -> None:
        super().__init__(str(temporary), save_distributed=True)
        self._commit = lambda: checkpoints.commit(temporary, state)
        self._temporary = temporary

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        for name in {str(result.storage_data.relative_path) for result in written.value()}:
            description = json.dumps(asdict(describe(self._temporary / name)))
            (self._temporary / f"{name}{_DESCRIPTION}").write_text(description)
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        self._commit()


def load(checkpoint: Path, tensors: Mapping[str, Tensor], world: World = ALONE) -> State:
    """Fill ``tensors`` in place, whatever layout and number of processes wrote them.

    Args:
        checkpoint: one that ``newest`` returned or ``verify`` accepted.
        tensors: by ``group/name``, sharded or whole; of the names and shapes in ``shapes``.
        world: the processes that load together.

    Returns:
        The checkpoint's state.

    Raises:
        UserError: the state is no such document, or the tensors are damaged or of other dtypes.
    """
    known = _stored(checkpoint)
    stored = {current_name(name): name for name in known}
    for name, tensor in tensors.items():
        there = known[stored.get(name, name)].properties.dtype
        if there != tensor.dtype:
            raise UserError(
                f"{checkpoint}: {name} is {_short(there)} there and {_short(tensor.dtype)} here; "
                f"it is of another model, or damaged. {_REMEDY}"
            )
    load_state_dict(
        {stored.get(name, name): tensor for name, tensor in tensors.items()},
        storage_reader=HuggingFaceStorageReader(str(checkpoint)),
        process_group=world.background,
        no_dist=world.size == 1,
    )
    return read_state(checkpoint)


def load_group(checkpoint: Path, group: str) -> dict[str, Tensor]:
    """The whole tensors of one group, by name, on the CPU.

    Raises:
        UserError: what the files say of their tensors cannot be.
    """
    reader = HuggingFaceStorageReader(str(checkpoint))
    tensors = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in _stored(checkpoint).items()
        if name.startswith(f"{group}/")
    }
    load_state_dict(tensors, storage_reader=reader, no_dist=True)  # pyright: ignore[reportArgumentType]
    return {name.removeprefix(f"{group}/"): tensor for name, tensor in tensors.items()}


def read_state(checkpoint: Path) -> State:
    """The counters of a checkpoint.

    Raises:
        UserError: its document is of another shape; names file and field.
    """
    return strict.read_file(State, checkpoint / _STATE, _REMEDY)


def shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by ``group/name``."""
    return {current_name(name): tuple(tensor.size) for name, tensor in _stored(checkpoint).items()}


def current_name(name: str) -> str:
    """The ``group/name`` of a stored tensor; version 0.1 named otherwise what an objective learns.

    It called the timestep distribution ``timesteps.law``, and put ``objective.`` before all that
    the objective of a masked model had.
    """
    name = re.sub(r"^(objective(?:_optimizer)?/)objective\.", r"\1", name)
    return re.sub(r"^objective/timesteps\.law\.", "objective/timesteps.distribution.", name)


def _stored(checkpoint: Path) -> dict[str, Any]:
    """What is stored of each tensor, by the name it was written with.

    Raises:
        UserError: the files cannot be read as tensors, or what they say of their places in the
            whole leaves gaps, or more than memory holds.
    """
    try:
        reader = HuggingFaceStorageReader(str(checkpoint))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        for name, tensor in stored.items():
            parts = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
            if not _is_covered(tuple(tensor.size), parts):
                shape = tuple(tensor.size)
                raise UserError(f"the parts of {name} do not make up its shape {shape}")
    except FileNotFoundError:
        raise
    # Whatever the files provoke: JSON of another structure in their headers, or too deep.
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,  # of a number beyond 64 bits; RecursionError is one
        OverflowError,
        IndexError,
    ) as error:
        raise UserError(
            f"{checkpoint}: its tensors cannot be read ({error!r}). {_REMEDY}"
        ) from error
    return stored


_Part = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def _is_covered(whole: tuple[int, ...], parts: list[_Part]) -> bool:
    """Whether boxes cover a tensor of this shape, every value once."""
    filled = sorted(part for part in parts if math.prod(part[1]))
    inside = all(_is_inside(part, whole) for part in filled)
    if not inside or sum(math.prod(sizes) for _, sizes in filled) != math.prod(whole):
        return False
    for i, (offsets, sizes) in enumerate(filled):
        for others in filled[i + 1 :]:
            if whole and others[0][0] >= offsets[0] + sizes[0]:
                break  # as all that follow: they lie behind it
            if _overlap((offsets, sizes), others):
                return False
    return True


def _is_inside(part: _Part, whole: tuple[int, ...]) -> bool:
    if not len(part[0]) == len(part[1]) == len(whole):
        return False
    sides = zip(*part, whole, strict=True)
    return all(0 <= start <= start + side <= end for start, side, end in sides)


def _overlap(a: _Part, b: _Part) -> bool:
    """Whether two boxes share a value."""
    sides = zip(*a, *b, strict=True)
    return all(start < other + more and other < start + size for start, size, other, more in sides)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder of them, complete or not, the oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in found))


def newest(folder: Path) -> Path:
    """The newest checkpoint that is complete; damaged ones are reported and passed over.

    Raises:
        FileNotFoundError: there is none.
    """
    damages: list[Exception] = []
    for checkpoint in reversed(by_step(folder).values()):
        try:
            verify(checkpoint)
        except (InvalidCheckpoint, FileNotFoundError) as damage:
            if not checkpoint.exists():  # deleted by the run meanwhile, which has newer ones
                return newest(folder)
            damages.append(damage)
        else:
            for damage in damages:
                log.warning("%s; falling back to the checkpoint before it.", damage)
            return checkpoint
    why = f" ({damages[0]})" if damages else ""
    raise FileNotFoundError(f"{folder} holds no complete checkpoint{why}; train from the start.")


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first; damaged ones are reported and passed over."""
    found = []
    for checkpoint in by_step(folder).values():
        try:
            verify(checkpoint)
        except (InvalidCheckpoint, FileNotFoundError) as damage:
            if checkpoint.exists():  # not deleted by the run meanwhile
                log.warning("%s; it is left out.", damage)
        else:
            found.append(checkpoint)
    return found


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        InvalidCheckpoint: one is missing, was added, or its size or checksum differs.
    """
    try:
        manifest: _Manifest = strict.read_file(_Manifest, checkpoint / _MANIFEST)
    except OSError as error:
        raise InvalidCheckpoint(f"{checkpoint / _MANIFEST} cannot be read ({error})") from error
    except UserError as error:
        raise InvalidCheckpoint(str(error).rstrip(".")) from error
    for name, expected in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise InvalidCheckpoint(f"{path} is missing")
        if describe(path) != expected:
            raise InvalidCheckpoint(f"{path} does not match its checksum")
    # A file beside them would be read as tensors of another process, or tempt someone to unpickle.
    if added := {path.name for path in checkpoint.iterdir()} - {*manifest.files, _MANIFEST}:
        raise InvalidCheckpoint(f"{checkpoint} holds files that are not its own: {sorted(added)}")


def _delete(checkpoint: Path) -> None:
    """Out of sight first: one that is killed in between leaves nothing that looks like a whole."""
    hidden = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(hidden))


def _root_cause(error: BaseException) -> str:
    """What went wrong first, in one line; torch reports every process with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (first, _) = next(iter(error.failures.items()))
        return f"{first} (rank {rank})"
    return str(error)


def describe(path: Path) -> _File:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _File(path.stat().st_size, digest)
