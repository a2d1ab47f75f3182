"""How bad input is refused: one exception and one sentence for all of it."""

import difflib
import importlib
import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

MOST = 10**12  # of steps, images, files: no run comes near
MOST_TIMESTEPS = 10**6  # of a process, whose tables are in memory
_LISTED = 3  # tensors of a model in a message
_SHOWN = 60  # characters of a value in a message


class UserError(ValueError):
    """Input that cannot be used; the message names it, what is needed, and the next move.

    The command line prints the message alone. Any other exception is a defect of this library and
    keeps its traceback.
    """


def check(name: str, value: object, valid: bool, need: str) -> None:
    """Refuse an option that is not valid.

    Args:
        name: of the option, as in ``config.json``.
        value: what it was set to.
        valid: whether that is possible.
        need: what is needed instead.

    Raises:
        UserError: it is not valid.
    """
    if not valid:
        raise UserError(f"{name}={shortened(value)}: {need}.")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high], and NaN.

    Raises:
        UserError: it lies outside.
    """
    check(name, value, value >= low, f"must be at least {low:,}")
    check(name, value, value <= high, f"must be at most {high:,}")


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number in [low, high]; those of NumPy are some, too.

    Raises:
        UserError: it is none.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    check(name, value, is_whole, "must be a whole number")
    check_between(name, cast(int, value), low, high)


def check_path(name: str, value: object) -> Path:
    """A path as a person gives it, with ``~`` for the home directory.

    Raises:
        UserError: it is neither text nor a path, or no path can be it.
    """
    is_path = isinstance(value, str | Path) and "\0" not in str(value)
    check(name, value, is_path, "must be a path, as text or a Path")
    return Path(cast(str, value)).expanduser()


def check_seed(seed: object) -> None:
    """Refuse a seed that is no whole number of 64 bits with a sign.

    Raises:
        UserError: it is none.
    """
    check_whole("seed", seed, -(2**63), 2**63 - 1)


def check_counts(section: str, config: object, *names: str) -> None:
    """Refuse fields that count something and are not from 1 to 10^12; None is allowed.

    Args:
        section: what their names begin with, such as ``evaluation.``.
        config: what they are attributes of.
        names: of the fields.

    Raises:
        UserError: a number outside.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None:
            check_between(section + name, value, 1, MOST)


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is zero, negative, infinite or NaN.

    Raises:
        UserError: it is one of these.
    """
    check(name, value, 0 < value < math.inf, "must be positive and finite")


def check_installed(what: str, extra: str, *libraries: str) -> None:
    """Refuse what needs libraries that are not installed.

    Args:
        what: needs them, such as ``the report of a comparison``.
        extra: of this package, which has them.
        libraries: names of modules, which are imported.

    Raises:
        UserError: one of them cannot be imported.
    """
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UserError(
                f"{what} needs the library {library} ({error}): "
                f"pip install 'speed-engine[{extra}]'."
            ) from error


def shortened(value: object) -> str:
    """A value as a message shows it: its text in one line, cut where it is long."""
    text = printable(str(value)[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def printable(text: str) -> str:
    """A text of others, such as the name of a class, for a line on a terminal.

    Line breaks and what else steers a terminal become escapes, such as ``\\n``.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Which of the known names, at least one, is most like the given one."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error to raise where a name is not among the known ones; it proposes a similar name."""
    known = list(known)
    similar = difflib.get_close_matches(name, known, n=1)
    proposal = f"did you mean {similar[0]!r}? Choose" if similar else "choose"
    return UserError(f"unknown {kind} {shortened(name)!r}; {proposal} from {', '.join(known)}.")


def require_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: object
) -> None:
    """Compare names and shapes.

    Args:
        expected: shapes by name.
        found: shapes by name.
        source: what holds them, for the message.

    Raises:
        UserError: tensors are missing, left over or of another shape; names some of each.
    """
    if found == expected:
        return
    missing, unexpected = sorted(expected.keys() - found), sorted(found.keys() - expected)
    reshaped = [
        f"{name} is {found[name]} there and {expected[name]} here"
        for name in sorted(expected.keys() & found)
        if expected[name] != found[name]
    ]
    raise UserError(
        f"{source} is a checkpoint of another model: missing {_some(missing)}, "
        f"unexpected {_some(unexpected)}, reshaped {_some(reshaped)}."
    )


def _some(names: list[str]) -> str:
    """The first of many, and how many there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{names[:_LISTED]}{more}"
