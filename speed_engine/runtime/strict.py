"""Strict reading: values of exactly the declared types, or a sentence about the first other.

The types are those of the annotations, dataclasses among them; pydantic compares. A whole number is
a valid float; a truth value is no number, a number no text, and nothing is rounded.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from speed_engine.runtime.checks import UserError, nearest, shortened

MAX_BYTES = 2**28  # of one document


def read(kind: Any, value: Any, where: str = "") -> Any:
    """A value that JSON can hold, as one of ``kind``: lists become tuples, texts paths.

    Args:
        kind: a type as in an annotation; of dataclasses every field may be left out that has a
            default, and none may be added.
        value: dicts, lists, texts, numbers, truth values and None.
        where: name of the value in messages, a dotted path.

    Raises:
        UserError: a part of the value has another type, or what its dataclass refuses.
    """
    try:
        text = json.dumps([value])
    except TypeError as error:
        raise UserError(
            f"{where or 'this'}={shortened(value)}: {error}; only what JSON can hold is one of its "
            "kind."
        ) from None
    try:
        (result,) = _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise _refusal(error.errors(), kind, value, where) from None
    for path, found in _taken_for_numbers(value, result):
        raise UserError(f"{_joined(where, *path)}={json.dumps(found)}: should be a whole number.")
    return result


def read_file(kind: Any, path: Path, remedy: str = "") -> Any:
    """A JSON file as one of ``kind``, see ``read``.

    Args:
        kind: a type as in an annotation.
        path: of the file.
        remedy: what to do about one that is none; a sentence, or nothing.

    Raises:
        OSError: it cannot be read.
        UserError: it is longer than any, no JSON, or of another shape; names file and field.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        text = f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read. {remedy}"
        raise UserError(text.rstrip())
    try:
        return read(kind, parse(path.read_bytes()))
    except UserError as error:
        raise UserError(f"{path}: {error} {remedy}".rstrip()) from error


def parse(content: bytes | str, number: Callable[[str], Any] = float) -> Any:
    """A JSON document.

    Args:
        content: of the document.
        number: makes something of the text of NaN, of infinities, and of every number with a point
            or an exponent.

    Raises:
        UserError: it is none, is nested too deeply, or is refused by ``number``.
    """
    try:
        document = json.loads(content, parse_constant=number, parse_float=number)
        json.dumps(document)
    except UserError:
        raise
    # RecursionError: brackets nested ten thousand deep. ValueError: a number of too many digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON of this kind: {shortened(error)}.") from error
    return document


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    # The tuple takes the settings, which a dataclass does not, and hands them on.
    alone: Any = types.GenericAlias(tuple, (kind,))
    return TypeAdapter(alone, config=ConfigDict(strict=True, extra="forbid"))


def _refusal(errors: list[Any], kind: Any, value: Any, where: str) -> UserError:
    """What pydantic says of the first part that is wrong, in words of this library."""
    first = errors[0]
    if first["type"] == "value_error":  # of the dataclass itself
        refused = first["ctx"]["error"]
        if isinstance(refused, UserError):
            return UserError(str(refused))
        raise refused
    if first["type"] == "json_invalid":
        return UserError(
            f"{where or 'this'} is nested too deeply, or holds text that is no Unicode."
        )
    path, found = _part(first["loc"], value)
    name = _joined(where, *path)
    if first["type"] == "unexpected_keyword_argument":
        if "." in str(path[-1]):
            section, _, field = str(path[-1]).partition(".")
            return UserError(
                f"{shortened(name)} is no single name: nest {shortened(field)} in its section, "
                f"as in {{{json.dumps(shortened(section))}: "
                f"{{{json.dumps(shortened(field))}: ...}}}}."
            )
        known = nearest(name, [_joined(where, *of) for of in _fields(kind)])
        return UserError(
            f"{shortened(name)} is unknown, the nearest is {known}; was it written by another "
            "version?"
        )
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        return UserError(f"{name or 'it'} has no field {first['loc'][-1]!r}.")
    if first["type"] == "union_tag_invalid":
        name += f".{first['ctx']['discriminator'].strip(chr(39))}"
        found = first["ctx"]["tag"]
    # Where there are several types, there is an error of each.
    needs = dict.fromkeys(_need(error) for error in errors if _part(error["loc"], value)[0] == path)
    shown = f"{name}={shortened(json.dumps(found))}" if name else f"it is {shortened(found)}"
    return UserError(f"{shown}: should be {' or '.join(needs)}.")


def _need(error: Any) -> str:
    """What should be there."""
    if error["type"] == "missing":  # of fields all have defaults
        return "longer"
    if error["type"] == "too_long":
        return f"of {error['ctx']['max_length']} items"
    if error["type"] == "union_tag_invalid":
        return f"one of {error['ctx']['expected_tags']}"
    return error["msg"].removeprefix("Input should be ")


def _part(location: tuple[Any, ...], value: Any) -> tuple[list[Any], Any]:
    """(path, content) of the part of a value that an error is about."""
    path = []
    for step in location[1:]:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):  # name of a choice, or an item that is missing
            continue
        path.append(step)
    return path, value


def _fields(kind: Any) -> Iterator[tuple[str, ...]]:
    """Paths of all fields of a dataclass, those of its sections and of their choices among them."""
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            yield from ((name, *path) for path in _fields(hint))
    elif sections := [of for of in typing.get_args(kind) if dataclasses.is_dataclass(of)]:
        for section in sections:
            yield from _fields(section)
    else:
        yield ()


def _taken_for_numbers(
    value: Any, result: Any, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What is no whole number but became one: pydantic takes true and 1.0 for a choice 1."""
    if dataclasses.is_dataclass(result):
        for name, item in value.items():
            yield from _taken_for_numbers(item, getattr(result, name), (*path, name))
    elif isinstance(result, tuple):
        for i, (item, of) in enumerate(zip(value, result, strict=True)):
            yield from _taken_for_numbers(item, of, (*path, i))
    elif isinstance(result, int) and type(value) is not type(result):
        yield path, value


def _joined(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part != "")
