"""Commands that begin with a preset and take every field of its configuration as an option."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import tyro

from speed_engine.config import TrainConfig
from speed_engine.runtime.checks import UserError

Command = TypeVar("Command")


def configured(
    presets: Mapping[str, tuple[str, Command]], arguments: list[str], program: str
) -> Command:
    """The command of the preset that is named first, with the options that follow.

    Where another ``--data.source`` is given, what its record knows (members, shape, classes) takes
    the place of the preset's own; options that are given hold before both.

    Args:
        presets: name -> (one line of help, the command with the preset's configuration).
        arguments: of the command line.
        program: name of the command in its help.

    Raises:
        UserError: an option belongs to the method.
    """
    _, command = next(iter(presets.values()))
    _refuse_options_of_methods(arguments, type(command))
    first = _parsed(presets, arguments, program)
    name = next((argument for argument in arguments if argument in presets), None)
    if name is None or _config(first).data.source == _config(presets[name][1]).data.source:
        return first
    text, preset = presets[name]
    config = _config(preset)
    # Not at the top: it needs torch, which the help does without.
    from speed_engine.data.facts import recorded, with_recorded_facts

    dataset = recorded(_config(first).data.source)
    if dataset is None:
        return first
    data = with_recorded_facts(config.data, dataset)
    known: Any = dataclasses.replace(
        cast(Any, preset), config=dataclasses.replace(config, data=data)
    )
    return _parsed({**presets, name: (text, known)}, arguments, program)


def _parsed(
    presets: Mapping[str, tuple[str, Command]], arguments: list[str], program: str
) -> Command:
    return tyro.extras.overridable_config_cli(
        dict(presets),
        args=arguments,
        prog=program,
        config=(tyro.conf.AvoidSubcommands,),  # the preset has chosen the family of the model
    )


def _config(command: Any) -> TrainConfig:
    return command.config


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
