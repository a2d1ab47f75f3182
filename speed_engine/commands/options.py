"""The options of a command: fields of a dataclass, nested ones too, shown by --help in groups."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from speed_engine.runtime.checks import UserError

Command = TypeVar("Command")


class Group(NamedTuple):
    """Options that the help shows together, under a title."""

    text: str  # what they have in common
    names: tuple[str, ...]  # fields


# What other programs call an option, and it is called here.
MEANINGS = {
    "lr": ("optimizer.learning_rate",),
    "optimizer.lr": ("optimizer.learning_rate",),
    "wd": ("optimizer.weight_decay",),
    "ema": ("optimizer.ema_decay",),
    "max_steps": ("steps",),
    "iterations": ("steps",),
    "num_steps": ("solver_steps", "evaluation.solver_steps"),
    "bs": ("batch_size",),
    "batch": ("batch_size",),
    "data": ("data.source",),
    "dataset": ("data.source",),
    "data_dir": ("data.source",),
    "num_workers": ("data.workers", "workers"),
    "labels": ("class",),
    "label": ("class",),
    "max_train_steps": ("steps",),
    "warmup": ("optimizer.warmup_steps",),
    "lr_schedule": ("optimizer.schedule",),
    "lr_scheduler": ("optimizer.schedule",),
    "optim": ("optimizer.name",),
    "clip": ("optimizer.grad_clip",),
    "image_size": ("data.image_shape", "size"),
    "resolution": ("data.image_shape", "size"),
    "classes": ("data.num_classes", "class"),
    "arch": ("model.size",),
    "hidden_size": ("model.dim",),
    "model.hidden_size": ("model.dim",),
    "cfg": ("guidance", "evaluation.guidance"),
    "cfg_scale": ("guidance", "evaluation.guidance"),
    "guidance_scale": ("guidance", "evaluation.guidance"),
    "num_inference_steps": ("solver_steps", "evaluation.solver_steps"),
    "sampler": ("solver", "evaluation.solver"),
    "num": ("count",),
    "num_images": ("count", "evaluation.num_images"),
    "num_samples": ("count", "evaluation.num_images"),
    "output": ("out", "run"),
    "output_dir": ("out", "run"),
    "outdir": ("out", "run"),
    "out": ("run",),
    "out_dir": ("out", "run"),
    "run_dir": ("run",),
    "run_name": ("run",),
    "name": ("run",),
    "folder": ("run", "out"),
    "save_every": ("checkpoint_every",),
    "save_steps": ("checkpoint_every",),
    "logging_steps": ("log_every",),
    "eval_steps": ("evaluation.every",),
    "eval_every": ("evaluation.every",),
    "device_batch_size": ("microbatch_size",),
    "per_device_batch_size": ("microbatch_size",),
    "train_batch_size": ("batch_size",),
    "micro_batch": ("microbatch_size",),
    "micro_batch_size": ("microbatch_size",),
    "process": ("schedule",),
    "noise_schedule": ("schedule",),
    "ckpt": ("checkpoint", "init_from"),
    "pretrained": ("init_from",),
    "finetune": ("init_from",),
}

# How ours differs from what other programs call so.
DIFFERENCES = {"num_inference_steps": "which counts model evaluations"}

# What no option changes, since other options follow from it, and what does.
NO_OPTIONS = {
    "model.family": "a preset has the family of models that it starts from, such as unet-s or "
    'emoji32-unet; in a file, [model] family = "unet" chooses another one'
}

NO_GROUPS: Mapping[str, Group] = types.MappingProxyType({})


def read_options(
    command: type[Command] | Command,
    arguments: Sequence[str],
    program: str,
    *,
    description: str = "",
    first: Sequence[str] = (),
    groups: Mapping[str, Group] = NO_GROUPS,
) -> Command:
    """The command that the arguments ask for; an option that is not given keeps its default.

    The help begins with the options named in ``first`` and those of no group. The groups follow,
    and each nested dataclass as a group of its own, its name before the names of its options. A
    nested dataclass that is called ``config`` has no such name.

    Args:
        command: a dataclass whose fields are the options, or an instance of one, whose values are
            their defaults; what is positional is required all the same.
        arguments: of the command line, without the name of the command.
        program: the name of the command in the help.
        description: the first paragraph of the help; by default the docstring of the dataclass.
        first: names of options, such as ``data.source``, that the help shows before all others.
        groups: title -> group.

    Raises:
        SystemExit: the help was printed (status 0), or an option is unknown or unreadable (2).
        UserError: the dataclass refuses a value.
    """
    titles = {name: title for title, group in groups.items() for name in group.names}
    options = {option.name: option for option in _options(command)}
    _refuse_other_names(arguments, [option.written for option in options.values()])
    boxes: dict[str, list[_Option]] = {"": [options[name] for name in first]}
    boxes |= {title: [] for title in groups}
    for name, option in options.items():
        if name not in first:
            boxes.setdefault(titles.get(name, option.section), []).append(option)
    texts = {option.section: option.about_section for option in options.values()}
    texts |= {title: group.text for title, group in groups.items()}
    form = [option.as_field() for option in boxes.pop("")]
    for title, box in boxes.items():
        part = _dataclass(texts[title], [option.as_field() for option in box])
        kind = Annotated[part, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name=title)]
        form.append((_identifier(title), kind, dataclasses.field(default_factory=part)))
    filled = tyro.cli(
        _dataclass(inspect.getdoc(command) or "", form),
        args=list(arguments),
        prog=program,
        description=description or None,
        config=(tyro.conf.AvoidSubcommands,),
    )
    values = vars(filled)
    for title in boxes:
        values |= vars(values.pop(_identifier(title)))
    return _built(command, {option.path: values[option.identifier] for option in options.values()})


def _refuse_other_names(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Of an option that means one of ours, or leaves its section out, say how it is called here."""
    for argument in arguments:
        given = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if not argument.startswith("--") or given in known:
            continue
        if given in NO_OPTIONS:
            raise UserError(f"--{given} is no option: {NO_OPTIONS[given]}.")
        meant = [name for name in MEANINGS.get(given, ()) if name in known]
        meant = meant or [name for name in known if name.endswith(f".{given}")]
        if meant:
            spelled = " or ".join(f"--{name.replace('_', '-')}" for name in meant)
            spelled += f", {DIFFERENCES[given]}" if given in DIFFERENCES else ""
            raise UserError(f"unknown option {argument.partition('=')[0]}; did you mean {spelled}?")


@dataclass(frozen=True)
class _Option:
    path: tuple[str, ...]  # of the field, such as config, data, source
    section: str  # what the name begins with, such as data; "" for none
    about_section: str
    kind: Any  # with its annotations
    default: Any  # MISSING where the option is required
    text: str | None

    @property
    def name(self) -> str:
        return f"{self.section}.{self.path[-1]}" if self.section else self.path[-1]

    @property
    def written(self) -> str:
        """As a person writes it: its own annotation may name it otherwise."""
        own = [a.name for a in getattr(self.kind, "__metadata__", ()) if getattr(a, "name", None)]
        return own[0] if own else self.name

    @property
    def identifier(self) -> str:
        return _identifier(self.name)

    def as_field(self) -> tuple[str, Any, Any]:
        """As tyro reads it."""
        kind, *annotations = (
            typing.get_args(self.kind)
            if typing.get_origin(self.kind) is Annotated
            else (self.kind,)
        )
        is_switch = len(self.path) == 1 and self.default is False  # no preset turns it on
        if is_switch:
            annotations.append(tyro.conf.FlagCreatePairsOff)
        positional = tyro.conf.Positional in annotations
        shown = tyro.conf.arg(
            name=self.name,
            help=self.text,
            metavar=self.name.upper() if positional else _without_none(kind),
            help_behavior_hint="" if is_switch else _default_text,
        )
        field = (
            dataclasses.field()
            if self.default is MISSING
            else dataclasses.field(default=self.default)
        )
        # Its own annotations come last and count.
        return self.identifier, Annotated[kind, shown, *annotations], field


def _options(owner: Any, path: tuple[str, ...] = (), section: str = "") -> Iterator[_Option]:
    """All options of a dataclass, or of an instance with its values as defaults."""
    of_type = owner if isinstance(owner, type) else type(owner)
    texts, kinds = _texts(of_type), typing.get_type_hints(of_type, include_extras=True)
    for field in dataclasses.fields(of_type):
        kind, default = kinds[field.name], field.default
        annotations = getattr(kind, "__metadata__", ())
        if owner is not of_type and tyro.conf.Positional not in annotations:
            default = getattr(owner, field.name)
        here = (*path, field.name)
        if dataclasses.is_dataclass(default):
            yield from _options(default, here, "" if field.name == "config" else field.name)
        elif tyro.conf.Suppress not in annotations:
            about = inspect.getdoc(of_type) or ""
            yield _Option(here, section, about, kind, default, texts.get(field.name))


@functools.cache
def _texts(of_type: type) -> dict[str, str]:
    """The string below each field, in one line; tyro would keep the line breaks of some."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(of_type))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                texts[name] = " ".join(text.split())
    return texts


def _without_none(kind: Any) -> str | None:
    """How a value is shown that may be left at None; as tyro shows it if it may not."""
    rest = [of for of in typing.get_args(kind) if of is not types.NoneType]
    if typing.get_origin(kind) not in (types.UnionType, typing.Union) or len(rest) != 1:
        return None
    inner, parts = rest[0], typing.get_args(rest[0])
    if typing.get_origin(inner) is Literal:
        return f"{{{','.join(map(str, parts))}}}"
    if typing.get_origin(inner) is tuple:
        names = [of.__name__.upper() for of in parts if of is not ...]
        return f"[{names[0]} ...]" if ... in parts else " ".join(names)
    return inner.__name__.upper()


def _default_text(default: str) -> str:
    """What follows the text of an option; a default of nothing is explained by the text."""
    return "" if default in ("", "None") else f"(default: {default})"


def _dataclass(text: str, fields: list[tuple[str, Any, Any]]) -> Any:
    made = dataclasses.make_dataclass("Form", fields, kw_only=True)
    made.__doc__ = text
    return made


def _identifier(name: str) -> str:
    return name.replace(".", "__").replace(" ", "_")


def _built(command: Any, values: dict[tuple[str, ...], Any]) -> Any:
    """The dataclass with these values at these paths."""
    given: dict[str, Any] = {path[0]: value for path, value in values.items() if len(path) == 1}
    nested = {path[0] for path in values if len(path) > 1}
    for name in nested:
        inner = {path[1:]: value for path, value in values.items() if path[0] == name}
        given[name] = _built(getattr(command, name), inner)
    return command(**given) if isinstance(command, type) else dataclasses.replace(command, **given)
