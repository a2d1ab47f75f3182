"""Models from where they are: a run, a folder that ``save_pretrained`` wrote, or the hub."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from speed_engine.api.card import Facts
from speed_engine.api.model import CARD, FACTS, NULL, WEIGHTS, Model
from speed_engine.data.facts import classes_with_samples
from speed_engine.data.opening import condition_names, null_conditions
from speed_engine.evaluation.conditions import known_dataset
from speed_engine.evaluation.metrics import is_figure
from speed_engine.run.averages import load_average, load_network
from speed_engine.run.folder import CONFIG_FILE, newest_checkpoint, read_config
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError, check_installed, check_path
from speed_engine.runtime.machine import torch_device
from speed_engine.runtime.records import read_records
from speed_engine.training import checkpoint
from speed_engine.training.ema import EMA

Device = Literal["auto", "cpu", "cuda"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT = ("latent_scale", "latent_shift", "classes")  # of what a data set records


def load(
    source: str | Path,
    *,
    average: str = EMA,
    checkpoint: int | None = None,
    device: Device = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
) -> Model:
    """Load a trained model.

    Args:
        source: the folder of a run, a folder that ``Model.save_pretrained`` wrote, or OWNER/NAME of
            a model on the Hugging Face hub.
        average: of a run: which EMA of the parameters, ``ema`` or one that its
            ``optimizer.averages`` names.
        checkpoint: of a run: the step of the checkpoint, one of those that it keeps. By default the
            newest.
        device: where to compute; auto takes a GPU if there is one.
        revision: of a model on the hub: branch, tag or commit. By default main.
        token: of the hub. By default the one of ``hf auth login``.

    Raises:
        UserError: there is no such folder, model or checkpoint, or a file is damaged.

    Examples:
        >>> model = se.load("runs/mine")
        >>> model.facts.step, model.config.method
        (20, 'speed_paper')
    """
    folder = check_path("source", source)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(source)):
            raise UserError(
                f"{source} is no folder; give the folder of a run or of a saved model, or the name "
                "of a model on the Hugging Face hub, OWNER/NAME."
            )
        folder = _fetch(str(source), revision, token)
    if not (folder / FACTS).is_file():
        return of_run(folder, average, device, checkpoint)
    if average != EMA or checkpoint is not None:
        asked = f"average={average!r}" if checkpoint is None else f"checkpoint={checkpoint}"
        raise UserError(
            f"{asked}: {source} is a saved model, which has one set of parameters; load the run, "
            "or save the model of that one."
        )
    return _saved(folder, device)


def of_run(
    run: Path, average: str = EMA, device: Device = "auto", asked_step: int | None = None
) -> Model:
    """The model of a run's checkpoint, by default the newest; see ``load``."""
    config = read_config(run)
    network, step = load_average(run, config, torch_device(device), average, asked_step)
    dataset = known_dataset(config.data)
    has_classes = "labels" in condition_names(config.data)
    metadata = {} if dataset is None else dataset.metadata
    records = [of for of in read_records(run) if of.get("average", EMA) == average]
    measured = [of for of in records if any(map(is_figure, of)) and of["step"] <= step]
    facts = Facts(
        step=step,
        data=checkpoint.read_state(newest_checkpoint(run)).data,
        classes=tuple(classes_with_samples(config.data, dataset)) if has_classes else (),
        metadata={name: metadata[name] for name in _KEPT if name in metadata},
        figures=max(reversed(measured), key=lambda of: of["step"], default={}),
        command=_command(run / "environment.json"),
    )
    return Model(config, network, null_conditions(config.data), facts)


def _command(environment: Path) -> tuple[str, ...]:
    """That started a run, if its record can be read: nothing but the card needs it."""
    try:
        return strict.read(tuple[str, ...], json.loads(environment.read_text())["command"])
    except (OSError, ValueError, TypeError, KeyError):
        return ()


def _saved(folder: Path, device: Device) -> Model:
    config = read_config(folder)
    try:
        content: Any = json.loads((folder / FACTS).read_text())
        tensors, null = (load_file(folder / name) for name in (WEIGHTS, NULL))
    except Exception as error:  # of JSON, of safetensors, of the disk
        raise UserError(
            f"{folder} holds no whole model: {error}; save or fetch it again."
        ) from error
    network = load_network(tensors, config, torch_device(device), folder / WEIGHTS)
    return Model(config, network, null, strict.read(Facts, content, FACTS))


def _fetch(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """The files of a model on the hub, in the cache of the hub's library."""
    check_installed(f"loading {repo_id} from the Hugging Face hub", "hub", "huggingface_hub")
    from huggingface_hub import snapshot_download

    files = [WEIGHTS, NULL, CONFIG_FILE, FACTS, CARD]
    try:
        folder = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files)
    except Exception as error:  # of many kinds: no such model, no access, no network
        reason = " ".join(str(error).split())  # one line
        raise UserError(
            f"{repo_id} is no folder here, and cannot be fetched from the Hugging Face hub: "
            f"{reason}"
        ) from error
    if not (Path(folder) / FACTS).is_file():
        raise UserError(
            f"{repo_id} on the Hugging Face hub is no model of speed_engine: it has no {FACTS}; "
            "Model.push_to_hub writes one."
        )
    return Path(folder)
