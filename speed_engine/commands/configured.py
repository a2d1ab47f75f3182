"""Commands that begin with a preset and take every field of its configuration as an option."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import tyro

from speed_engine.config import TrainConfig
from speed_engine.runtime.checks import UserError

Command = TypeVar("Command")


def configured(
    presets: Mapping[str, tuple[str, Command]], arguments: list[str], program: str
) -> Command:
    """The command of the preset that is named first, with the options that follow.

    Args:
        presets: name -> (one line of help, the command with the preset's configuration).
        arguments: of the command line.
        program: name of the command in its help.

    Raises:
        UserError: an option belongs to the method.
    """
    _, command = next(iter(presets.values()))
    _refuse_options_of_methods(arguments, type(command))
    return tyro.extras.overridable_config_cli(
        dict(presets),
        args=arguments,
        prog=program,
        config=(tyro.conf.AvoidSubcommands,),  # the preset has chosen the family of the model
    )


def _refuse_options_of_methods(arguments: list[str], command: type) -> None:
    """``--k 3`` is no option of a command; this says how it is written."""
    fields = {field.name for kind in (command, TrainConfig) for field in dataclasses.fields(kind)}
    given = [text[2:].partition("=")[0] for text in arguments if text.startswith("--")]
    names = [name for name in given if "." not in name and name.replace("-", "_") not in fields]
    if not names:
        return
    # Not at the top: they need torch, which the help does without.
    from speed_engine.diffusion.method import options_of
    from speed_engine.diffusion.methods import METHODS

    for option in (name.replace("-", "_") for name in names):
        for method in METHODS:
            if option in options_of(method):
                raise UserError(
                    f"--{option} is an option of the method: write --method METHOD+{option}=VALUE, "
                    f"such as {method}+{option}=VALUE."
                )
