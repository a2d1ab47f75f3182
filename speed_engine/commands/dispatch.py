"""Commands and other choices by name, listed for a person."""

import shutil
import textwrap
from collections.abc import Mapping


def usage(program: str, commands: Mapping[str, tuple[str, str]]) -> str:
    """The list of the commands of a program, one line each.

    Args:
        program: its name.
        commands: name -> (how it is called, what it does).
    """
    calls = {f"{name} {call}".strip(): does for name, (call, does) in commands.items()}
    return f"usage: {program} COMMAND ...\n\n{columns(calls)}"


def columns(texts: Mapping[str, str]) -> str:
    """Names and what they are, in two columns that fit the terminal."""
    first = max(map(len, texts)) + 4
    width = max(shutil.get_terminal_size().columns - first, 40)
    lines = []
    for name, text in texts.items():
        begin, *rest = textwrap.wrap(text, width, break_on_hyphens=False)
        lines += [f"  {name}".ljust(first) + begin, *(" " * first + line for line in rest)]
    return "".join(f"{line}\n" for line in lines)
