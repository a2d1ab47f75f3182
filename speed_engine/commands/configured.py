"""Commands that begin with a preset and take every field of its configuration as an option."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from speed_engine.arena.recipes import RECIPES, values_of
from speed_engine.commands.config_file import Origin, origin
from speed_engine.commands.dispatch import columns
from speed_engine.commands.options import Group, read_options
from speed_engine.config import TrainConfig, check_whole
from speed_engine.presets import OWN_IMAGES, PRESETS
from speed_engine.runtime.checks import UserError

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
        ("log_every", "logger", "checkpoint_every", "keep_checkpoints", "keep_every"),
    ),
    "distributed": Group(
        "How several processes, started by torchrun, share the work and the memory.",
        ("microbatch_size", "parallel", "reshard", "offload", "hang_timeout"),
    ),
}


def configured(
    command: Callable[[str, TrainConfig], Command],
    arguments: Sequence[str],
    program: str,
    *,
    first: Sequence[str] = (),
    presets: Mapping[str, tuple[str, TrainConfig]] = PRESETS,
    check: Callable[[TrainConfig, TrainConfig], None] = lambda config, base: None,
) -> Command:
    """The command of the preset or file that is named first, with the options that follow.

    Where another ``--data.source`` is given, what its record knows (members, shape, classes) takes
    the place of the preset's own. What a file says holds before it, what ``--recipe`` sets before
    that, and what another option says before all. A source alone, without a preset, is trained on
    by the first preset for own images.

    Args:
        command: makes the command of a name and a configuration.
        arguments: of the command line.
        program: the name of the command in its help.
        first: names of the options that the help shows before all others.
        presets: name -> (what it trains, its configuration).
        check: is called with the configuration and with that of the preset or file alone.

    Raises:
        SystemExit: the help was printed (status 0), or an option is unknown or unreadable (2).
        UserError: no preset or file of that name, an option that belongs to the method, or a value
            that the configuration refuses.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        _print_help(command, presets, program, first)
        raise SystemExit(0)
    if any(argument.partition("=")[0] == "--data.source" for argument in arguments[:1]):
        arguments = [OWN_IMAGES[0], *arguments]
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            f"a preset is missing: {program} PRESET [options], or, to train on your own images, "
            f"{program} --data.source SHARDS [options]; choose from {', '.join(presets)}."
        )
    name, *options = arguments
    start = origin(name, presets, _following("--recipe", options))

    def with_options(config: TrainConfig) -> Command:
        made = _made(command, start, config)
        if hasattr(made, "recipe"):
            _refuse_recipe_as_method(options)
        _refuse_options_of_methods(options, type(made))
        filled = read_options(
            made, arguments, program, description=start.text, first=first, groups=GROUPS
        )
        return dataclasses.replace(cast(Any, filled), preset=start.name)

    source = _following("--data.source", options)
    config = start.config({"data": {"source": source}} if source else {})
    filled = with_options(config)
    check_whole(_config(filled))
    check(_config(filled), config)
    return filled


def _made(
    command: Callable[[str, TrainConfig], Command], start: Origin, config: TrainConfig
) -> Command:
    """The command without options: what it refuses stands in the file, if there is one."""
    try:
        return command(start.name, config)
    except UserError as error:
        if start.file is None:
            raise
        raise UserError(f"{start.file}: {error}") from error


def _print_help(
    command: Callable[[str, TrainConfig], Command],
    presets: Mapping[str, tuple[str, TrainConfig]],
    program: str,
    first: Sequence[str],
) -> None:
    """The options with the defaults of the first preset, then the presets."""
    name, (_, config) = next(iter(presets.items()))
    with contextlib.suppress(SystemExit):
        read_options(command(name, config), ["--help"], program, first=first, groups=GROUPS)
    print(f"The defaults above are {name}'s; `{program} PRESET --help` shows those of another.")
    print("A file FILE.toml or FILE.json takes the place of a preset.")
    print("\nPresets:\n")
    print(columns({name: text for name, (text, _) in presets.items()}), end="")
    print("\nRecipes:\n")
    print(columns({name: text for name, (text, _) in RECIPES.items()}), end="")


def _following(wanted: str, options: Sequence[str]) -> str | None:
    """The last value of an option that sets the defaults of others."""
    found = None
    for option, following in zip(options, [*options, None][1:], strict=True):
        name, _, value = option.partition("=")
        if name == wanted:
            found = value or following
    return found


def _refuse_recipe_as_method(options: Sequence[str]) -> None:
    """``compare --methods`` takes both, and the method that looks most alike is another one."""
    recipe = _following("--method", options)
    if recipe in RECIPES:
        raise UserError(
            f"{recipe!r} is a recipe, which sets the process and the optimizer, too: give "
            f"--recipe {recipe}, or its method alone, --method {values_of(recipe)['method']}."
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
