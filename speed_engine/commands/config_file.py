"""Configuration files: TOML or JSON, with the names that a run's ``config.json`` has.

    preset = "digits"          # what the file starts from; by default every field's own default
    recipe = "flow_muon"       # and how it is trained; by default as the preset says
    steps = 500

    [optimizer]
    learning_rate = 2e-3

What is said later holds: a preset with the recipe that the file names, then what the record of the
data set knows, then the file, then a recipe on the command line or in a call, then other options or
arguments there.
"""

import codecs
import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speed_engine.arena.recipes import RECIPES, values_of
from speed_engine.config import TrainConfig, parsed, to_json, with_values
from speed_engine.presets import OWN_IMAGES, PRESETS
from speed_engine.runtime.checks import UserError, shortened, unknown
from speed_engine.runtime.files import write_durably

SUFFIXES = (".toml", ".json")


class Origin(NamedTuple):
    """What a configuration starts from."""

    name: str  # of the preset or the file, which names the run
    text: str  # one line about it
    preset: TrainConfig  # with the recipe that the file names
    values: Mapping[str, Any]  # of the file, in place of the preset's
    recipe: Mapping[str, Any] = {}  # what a recipe sets that is asked for, in place of the file's
    own_images: bool = False  # whether the preset takes any images, of which a record tells
    file: Path | None = None  # that the values are of

    def config(self, *later: Mapping[str, Any]) -> TrainConfig:
        """The configuration, with further values that hold before the file and the recipe.

        Where they name another ``data.source`` than the preset, what its record knows (members,
        shape, classes) takes the place of the preset's own.

        Args:
            later: values as ``with_values`` takes them; of two, the last one holds.

        Raises:
            UserError: a name that does not exist, or a value that the configuration refuses.
        """
        source = self._named_source(later)
        if source == self.preset.data.source and not self.own_images:
            return self._layered(self.preset, later)
        return self._layered(_of_data_set(self.preset, source), later)

    def _named_source(self, later: Sequence[Mapping[str, Any]]) -> str:
        """Of the data, before other values are read, which may fit what its record knows only."""
        source: Any = self.preset.data.source
        for values in (self.values, *later):
            data = values.get("data", {})
            named = data.get("source") if isinstance(data, Mapping) else getattr(data, "source", "")
            source = named or source
        return str(source)

    def _layered(self, config: TrainConfig, later: Sequence[Mapping[str, Any]]) -> TrainConfig:
        try:
            config = with_values(config, self.values) if self.values else config
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error
        for values in (self.recipe, *later):
            config = with_values(config, values) if values else config
        return config


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


def origin(
    of: str | Path | TrainConfig,
    presets: Mapping[str, tuple[str, TrainConfig]] = PRESETS,
    recipe: str | None = None,
) -> Origin:
    """A preset by its name, a file of a configuration by its path, or a configuration itself.

    Args:
        of: a key of ``presets``, a path that ends in .toml or .json, or a configuration, which is
            called as its family of models.
        presets: name -> (what it trains, its configuration).
        recipe: a key of ``RECIPES``, which holds before a file, in place of the one that it names.

    Raises:
        UserError: neither, or the file cannot be read, or there is no such preset or recipe.
    """
    if isinstance(of, TrainConfig):
        return Origin(of.model.family, "A configuration", of, {}, _recipe(recipe))
    if not isinstance(of, str | Path):
        raise UserError(
            f"{shortened(of)} is neither the name of a preset, nor the path of a configuration "
            "file, nor a TrainConfig; values follow the preset by name, such as steps=500."
        )
    name, path = str(of), Path(of).expanduser()
    if name in presets:
        return Origin(name, *presets[name], {}, _recipe(recipe), name in OWN_IMAGES)
    if path.suffix not in SUFFIXES:
        if path.is_dir():
            raise UserError(
                f"{name} is a folder, not a preset; --data.source {name} trains on shards in it, "
                "--resume continues a run, and a run's config.json starts another one like it."
            )
        raise unknown("preset", name, presets)
    values = _read(path)
    preset, filed = values.pop("preset", None), values.pop("recipe", None)
    asked = _recipe(recipe)
    named = {} if asked else _recipe(filed)
    if preset is None:
        text, config = f"The configuration of {path}", TrainConfig()
    elif isinstance(preset, str) and preset in presets:
        text, config = f"{preset} as {path} changes it", presets[preset][1]
    else:
        raise UserError(f"{path}: {unknown('preset', str(preset), presets)}")
    config = with_values(config, named) if named else config
    return Origin(path.stem, text, config, values, asked, preset in OWN_IMAGES, path)


def _recipe(name: object) -> dict[str, Any]:
    if name is None:
        return {}
    if not isinstance(name, str) or name not in RECIPES:
        raise unknown("recipe", str(name), RECIPES)
    return values_of(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give a preset, or the path of a configuration file."
        ) from None
    content = content.removeprefix(codecs.BOM_UTF8)  # editors of Windows begin a file with it
    try:
        return tomllib.loads(content.decode()) if path.suffix == ".toml" else parsed(content)
    except RecursionError:
        raise UserError(f"{path}: it is nested too deeply for a configuration.") from None
    except ValueError as error:  # UserErrors are ValueErrors
        raise UserError(f"{path}: {error}") from None


def write(config: TrainConfig, path: Path) -> None:
    """Write a whole configuration, which ``origin`` reads.

    Args:
        config: every field is written, but for those of TOML that are None, which it has no word
            for: they are the defaults.
        path: ends in .toml or .json; a file that is there is replaced.

    Raises:
        UserError: another suffix, or a name in the configuration is no Unicode text.
        OSError: the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a configuration is written as FILE.toml or FILE.json.")
    text = to_json(config)
    if path.suffix == ".toml":
        text = _toml(json.loads(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())


def _toml(values: Mapping[str, Any]) -> str:
    """Fields first, for what follows the name of a section belongs to it."""
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    plain = {name: value for name, value in values.items() if name not in sections}
    return _lines(plain) + "".join(f"\n[{name}]\n{_lines(of)}" for name, of in sections.items())


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_value(v)}\n" for name, v in values.items() if v is not None)


def _value(value: Any) -> str:
    """A value of JSON as TOML writes it: DEL must be escaped, and infinity has another name."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value).replace("Infinity", "inf")
