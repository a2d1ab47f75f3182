"""Folders that one command writes at a time."""

import errno
import fcntl
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import ALONE, World

log = logging.getLogger(__name__)

LOCK_FILE = "lock"
_NOT_OFFERED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # by some file systems of clusters


@contextmanager
def held(folder: Path, doing: str, world: World = ALONE) -> Iterator[None]:
    """No other command does the same in the folder meanwhile.

    Args:
        folder: which exists; the file ``lock`` in it stays, and is locked no longer than the
            process lives.
        doing: what is done to the folder, for the message.
        world: the processes that do it together.

    Raises:
        UserError: another command is at it.
    """
    with ExitStack() as stack:

        def take() -> bool:
            return _locked(stack.enter_context((folder / LOCK_FILE).open("w")))

        if not world.from_first(take):
            raise UserError(
                f"{folder} is being {doing} by another command; stop that one, or wait for its end."
            )
        yield


def _locked(file: IO[str]) -> bool:
    """Whether it is locked for this process now, and not for another.

    By lockf: a child that outlives its parent does not inherit the lock, as it would flock's.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        log.warning("%s cannot be locked here: start no second command on it.", file.name)
    return True
