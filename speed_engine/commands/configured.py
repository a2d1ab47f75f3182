"""Commands that begin with a preset and take every field of its configuration as an option."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from speed_engine.commands.dispatch import columns
from speed_engine.commands.options import Group, read_options
from speed_engine.config import TrainConfig
from speed_engine.presets import OWN_IMAGES
from speed_engine.runtime.checks import UserError, unknown

Command = TypeVar("Command")

# Fields of TrainConfig that are no section of their own, as the help groups them.
GROUPS = {
    "training": Group(
        "How long a run trains, from which weights and random numbers.",
        ("method", "steps", "batch_size", "seed", "init_from", "on_nonfinite"),
    ),
    "diffusion": Group(
        "What noise images are mixed with, and what the model learns to predict.",
        ("schedule", "num_timesteps", "prediction", "condition_dropout", "low_resolution_noise"),
    ),
    "machine": Group(
        "Where the run computes, and by which implementations.",
        ("device", "compile", "attention", "kernels", "deterministic"),
    ),
    "checkpoint": Group(
        "How often a run is recorded and saved, and which checkpoints stay.",
        ("log_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
    ),
    "distributed": Group(
        "How several processes, started by torchrun, share the work and the memory.",
        ("microbatch_size", "parallel", "reshard", "offload", "hang_timeout"),
    ),
}


def configured(
    presets: Mapping[str, tuple[str, Command]],
    arguments: Sequence[str],
    program: str,
    *,
    first: Sequence[str] = (),
) -> Command:
    """The command of the preset that is named first, with the options that follow.

    Where another ``--data.source`` is given, what its record knows (members, shape, classes) takes
    the place of the preset's own; options that are given hold before both. A source alone, without
    a preset, is trained on by the first preset for own images.

    Args:
        presets: name -> (what it trains, the command with the preset's configuration).
        arguments: of the command line.
        program: the name of the command in its help.
        first: names of the options that the help shows before all others.

    Raises:
        SystemExit: the help was printed (status 0), or an option is unknown or unreadable (2).
        UserError: no preset of that name, an option that belongs to the method, or a value that
            the configuration refuses.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        _print_help(presets, program, first)
        raise SystemExit(0)
    if any(argument.partition("=")[0] == "--data.source" for argument in arguments[:1]):
        arguments = [OWN_IMAGES[0], *arguments]
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            f"a preset is missing: {program} PRESET [options], or, to train on your own images, "
            f"{program} --data.source SHARDS [options]; choose from {', '.join(presets)}."
        )
    name, *options = arguments
    if name not in presets:
        raise unknown("preset", name, presets)
    text, preset = presets[name]
    _refuse_options_of_methods(options, type(preset))

    def parsed(command: Command) -> Command:
        return read_options(
            command, arguments, program, description=text, first=first, groups=GROUPS
        )

    command = parsed(preset)
    source = _config(command).data.source
    if source == _config(preset).data.source and name not in OWN_IMAGES:
        return command
    config = _of_data_set(_config(preset), source)
    known: Any = dataclasses.replace(cast(Any, preset), config=config)
    return parsed(known)


def _of_data_set(config: TrainConfig, source: str) -> TrainConfig:
    """A preset's configuration on a data set, as far as its record says what is there."""
    # Not at the top: it needs numpy, which the help does without.
    from speed_engine.data.facts import has_several_classes, recorded, with_recorded_facts

    dataset = recorded(source)
    if dataset is None:
        return config
    data = with_recorded_facts(dataclasses.replace(config.data, source=source), dataset)
    features = config.evaluation.features
    if data.latents or (features == "classifier" and not has_several_classes(data, dataset)):
        features = "none"  # there is nothing to train a classifier of
    return dataclasses.replace(
        config, data=data, evaluation=dataclasses.replace(config.evaluation, features=features)
    )


def _print_help(
    presets: Mapping[str, tuple[str, object]], program: str, first: Sequence[str]
) -> None:
    """The options with the defaults of the first preset, then the presets."""
    name, (_, command) = next(iter(presets.items()))
    with contextlib.suppress(SystemExit):
        read_options(command, ["--help"], program, first=first, groups=GROUPS)
    print(f"The defaults above are {name}'s; `{program} PRESET --help` shows those of another.")
    print("\nPresets:\n")
    print(columns({name: text for name, (text, _) in presets.items()}), end="")


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
