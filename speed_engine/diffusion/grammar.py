"""How methods are spelled, on the command line, in configurations and in comparisons.

    METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...]        speed_paper@linear:v+k=3

This file knows the grammar alone: which methods there are, and which options one has, is said in
``methods.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from speed_engine.runtime.checks import UserError, shortened

Value = bool | int | float | str | None

_SPELLING = re.compile(
    r"(?P<method>\w+)(@(?P<schedule>\w+))?(:(?P<prediction>\w+))?"
    r"(?P<options>(\+[\w.]+=[\w.\-/]+)*)",
    re.ASCII,
)
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?|-?inf", re.ASCII | re.IGNORECASE)
_WORDS = {"true": True, "false": False, "none": None}
_LARGEST = 2**53  # up to here, whole numbers and those that a float holds are the same


@dataclass(frozen=True)
class Spelling:
    """A method with what is set of it, taken apart; ``str`` puts it together again.

    The text is canonical: options by name, each number in its shortest form.
    """

    method: str
    options: Mapping[str, Value]
    schedule: str | None = None
    prediction: str | None = None

    def __str__(self) -> str:
        schedule = "" if self.schedule is None else f"@{self.schedule}"
        prediction = "" if self.prediction is None else f":{self.prediction}"
        options = "".join(f"+{name}={_spelled(of)}" for name, of in sorted(self.options.items()))
        return f"{self.method}{schedule}{prediction}{options}"


def read_spelling(text: str) -> Spelling:
    """Inverse of ``str(spelling)``; values are numbers, True, False, None or else words.

    Raises:
        UserError: it does not follow the grammar, or sets an option twice.
    """
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise _refusal(text)
    options: dict[str, Value] = {}
    for name, value in (part.split("=") for part in match["options"].split("+")[1:]):
        if name in options:
            raise UserError(f"method {shortened(text)!r} sets {name} twice; leave one of them out.")
        options[name] = _value(value)
    return Spelling(match["method"], options, match["schedule"], match["prediction"])


def read_options(text: str, kind: str, example: str) -> Spelling:
    """A name with options, without process and prediction; numbers, truth values and words.

    Args:
        text: NAME[+OPTION=VALUE ...].
        kind: what is spelled, for messages.
        example: of a spelling, for messages.

    Raises:
        UserError: it does not follow the grammar, or sets an option twice.
    """
    try:
        spelling = read_spelling(text)
    except UserError:
        spelling = None
    if spelling is None or spelling.schedule is not None or spelling.prediction is not None:
        raise UserError(
            f"{kind} {shortened(text)!r}: write {kind.upper()}[+OPTION=VALUE ...], each option "
            f"once, such as {example}."
        )
    return spelling


def canonical(method: str) -> str:
    """The canonical spelling of a method with its options.

    Raises:
        UserError: it does not follow the grammar, or names a process or a prediction.
    """
    spelling = read_spelling(method)
    if "/" in method:  # of networks' sizes, in comparisons; run folders are called as the method
        raise _refusal(method)
    if spelling.schedule is not None or spelling.prediction is not None:
        raise UserError(
            f"method {shortened(method)!r} names a process or a prediction, which have options "
            "of their own here: schedule and prediction."
        )
    return str(spelling)


def _refusal(text: str) -> UserError:
    return UserError(
        f"method {shortened(text)!r}: write METHOD[+OPTION=VALUE ...], such as "
        "speed_paper+k=3; in comparisons METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...], "
        "such as speed_paper@linear:v+k=3."
    )


def _value(text: str) -> Value:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if not _NUMBER.fullmatch(text):
        return text
    number = float(text)
    return int(number) if abs(number) <= _LARGEST and number.is_integer() else number


def _spelled(value: Value) -> str:
    if isinstance(value, float):
        value = _value(repr(value).replace("e+", "e"))  # as a whole number where it is one
    return repr(value).replace("e+", "e") if isinstance(value, float) else str(value)
