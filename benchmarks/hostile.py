"""Hostile input, for tests and bench_attacks.py: mutated JSON, and random command lines.

Everything is a function of a ``random.Random``.
"""

import copy
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

DEPTH = 10_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, -1e308, 2**31, 2**63, -(2**63), 2**64,
    10**12, 10**400, float("nan"), float("inf"), float("-inf"), "", "x", "2", "nan", "\x00",
    "\udcff", "../x", "/etc/passwd", "<script>", "[red]", "a" * 5000, [], {}, [[]], [None], [0],
    [-1], [1, 2, 3], {"": 0}, {"x": {}}, [1e308] * 3, ["a"], {"step": 1},
)  # fmt: skip


def mutated(document: Any, rng: random.Random) -> str:
    """JSON text of a document in which one to three places are another thing.

    A value is replaced by a hostile one or one of elsewhere in the document, is left out, doubled,
    renamed, or nested ten thousand deep.
    """
    document = {"": copy.deepcopy(document)}
    deep = rng.random() < 0.05
    for _ in range(rng.randint(1, 3)):
        places = list(_places(document))
        holder, key = rng.choice(places)
        change = rng.choice(["value", "value", "value", "other", "remove", "wrap", "rename", "add"])
        if change == "value":
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif change == "other":
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        elif change == "remove" and holder is not document:
            del holder[key]
        elif change == "wrap":
            holder[key] = rng.choice([[holder[key]], {"x": holder[key]}])
        elif change == "rename" and isinstance(holder, dict) and holder is not document:
            holder[rng.choice(["x", "", "__class__", f"{key} "])] = holder.pop(key)
        elif change == "add" and isinstance(holder[key], dict | list):
            _add(holder[key], copy.deepcopy(rng.choice(VALUES)))
    if deep:
        holder, key = rng.choice(list(_places(document)))
        holder[key] = _DEEP
    text = json.dumps(document[""])
    opened, closed = rng.choice([("[", "]"), ('{"x":', "}")])
    return text.replace(json.dumps(_DEEP), opened * DEPTH + "0" + closed * DEPTH)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes overwritten, cut, stretched or repeated in one to four places, or noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randint(0, 2000))
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.6 else rng.randrange(200)
        piece = rng.choice([rng.randbytes(rng.randint(1, 8)), b"\xff" * 4, b"\0" * 8, b"9" * 12])
        change = rng.choice(["overwrite", "overwrite", "cut", "insert", "repeat"])
        if change == "overwrite":
            data[place : place + len(piece)] = piece
        elif change == "cut":
            del data[place : place + rng.choice([1, 4, 512, len(data)])]
        else:
            data[place:place] = piece if change == "insert" else data[place : place + 512]
    return bytes(data)


# Values for options. Numbers that are valid for most are small: nothing here may take long.
WORDS = (
    "0", "1", "2", "3", "4", "8", "-1", "-3", "0.5", "1.0", "-0.5", "nan", "inf", "-inf", "1e308",
    "1e-308", "10000000000000", "9" * 400, "-" + "9" * 30, "0x10", "1_0", "1,0", "", " ", "x",
    "auto", "on", "off", "none", "None", "True", "False", "true", "ema", "power=1", "../x",
    "/etc/passwd", "/dev/null", "/proc/self/mem", "~", "<script>", "[red]", "[/x]", "$HOME",
    "`id`", "; id", "\n", "\udcff", "é", "\u202e", "a" * 300, "{}", "[]", "uniform",
    "speed_paper", "speed_paper+k=0", "speed_paper+k=nan", "uniform+x=1", "ddim",
    "heun+s_churn=-1", "dpmpp_2m", "fid", "copies", "fid,x", "digits", "linear", "edm", "velocity",
    "v", "--", "-", "--help", "@x", "http://127.0.0.1:1/x", "hf:x", "s3://x/y", "classifier",
    "inception", "webdataset", "random", "png", "npy", "cls",
)  # fmt: skip


def options_of(help_text: str) -> tuple[str, ...]:
    """Names of the options that a help text shows."""
    return tuple(sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", help_text)) - {"--help"}))


def arguments(rng: random.Random, given: Sequence[str], options: Sequence[str]) -> list[str]:
    """``given`` with up to four options of random values, and now and then with less or more."""
    line = list(given)
    if line and rng.random() < 0.1:
        line.pop(rng.randrange(len(line)))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if options:
            line += [
                rng.choice(options),
                *(rng.choice(WORDS) for _ in range(rng.choice([1, 1, 1, 2]))),
            ]
    if not options or rng.random() < 0.1:
        line.insert(rng.randint(0, len(line)), rng.choice(WORDS))
    return line


_DEEP = "nested deep"


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or index) of every value."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _add(holder: Any, value: Any) -> None:
    if isinstance(holder, dict):
        holder["added"] = value
    else:
        holder.append(value)
