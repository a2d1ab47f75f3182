"""Commands by name: their list, and what is said to a name that is none of them."""

import difflib
from collections.abc import Mapping

from speed_engine.runtime.checks import UserError


def usage(program: str, commands: Mapping[str, tuple[str, str]]) -> str:
    """The list of commands, one line each."""
    calls = {name: f"{name} {arguments}".strip() for name, (arguments, _) in commands.items()}
    width = max(map(len, calls.values())) + 2
    lines = (f"  {calls[name]:{width}}{does}\n" for name, (_, does) in commands.items())
    return f"usage: {program} COMMAND ...\n\n{''.join(lines)}"


def known(name: str, commands: Mapping[str, object], what: str) -> str:
    """The name, if there is such a command.

    Raises:
        UserError: there is none; names the most similar one.
    """
    if name in commands:
        return name
    similar = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    raise UserError(f"unknown {what} {name!r}; {hint}choose from {', '.join(commands)}.")
