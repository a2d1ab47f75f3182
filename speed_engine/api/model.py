"""A trained model: it generates, and is written to a folder or to the Hugging Face hub.

FOLDER/model.safetensors  the EMA of the parameters
FOLDER/null.safetensors   one row of each condition that can be hidden, as it is when hidden
FOLDER/config.json        of the run, whole; `speed-engine train` takes it in place of a preset
FOLDER/speed_engine.json  what else is known of the model: ``Facts``
FOLDER/README.md          the model card, see card.py

Letters: N images; C channels and H, W of an image.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from speed_engine.api.card import Facts, model_card
from speed_engine.build import build_decoder, build_process
from speed_engine.config import TrainConfig, to_json, with_values
from speed_engine.data.opening import condition_names
from speed_engine.diffusion.conditions import Conditions
from speed_engine.diffusion.table import TimestepTable
from speed_engine.evaluation.conditions import (
    generation_conditions,
    generation_settings,
    prompted,
)
from speed_engine.evaluation.generate import generate
from speed_engine.run.folder import CONFIG_FILE
from speed_engine.runtime.checks import (
    MOST,
    UserError,
    check_installed,
    check_path,
    check_whole,
    unknown,
)
from speed_engine.runtime.files import replacing, write_durably

WEIGHTS, NULL, FACTS, CARD = (
    "model.safetensors",
    "null.safetensors",
    "speed_engine.json",
    "README.md",
)


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained model, of ``speed_engine.load`` or of a run's ``model()``.

    Attributes:
        config: of the run that trained it.
        network: ``network(x, t, **conditions)`` with the EMA of the parameters, in evaluation mode.
        null: one row of each condition that guidance hides, as it is when hidden.
        facts: what else is known of it.
    """

    config: TrainConfig
    network: nn.Module
    null: Mapping[str, Tensor]
    facts: Facts

    def __repr__(self) -> str:
        """One line, as a notebook shows it; ``config`` and ``facts`` have the rest."""
        parameters = sum(p.numel() for p in self.network.parameters())
        conditions = ", ".join(condition_names(self.config.data)) or "nothing"
        return (
            f"<Model {self.config.model.family}, {parameters:,} parameters, images of shape "
            f"{self.config.data.image_shape}, conditioned on {conditions}, "
            f"step {self.facts.step:,}>"
        )

    def generate(
        self,
        n: int,
        *,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        prompts: str | Sequence[str] = (),
        text_encoder: str | None = None,
        seed: int = 0,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 500,
    ) -> Tensor:
        """Generate images: those of ``speed-engine sample``, but for rounding where that compiles.

        Image i is a function of the model, the seed, i and its conditions.

        Args:
            n: N, 1 or more.
            labels: classes of the images, in turn, as numbers or by the names that the data set
                records. By default all classes that have samples.
            prompts: texts of the images, in turn; needs ``text_encoder``. By default those of the
                first samples of the data set, which must be at hand.
            text_encoder: the CLIP text model that encoded the data, as a folder or a name on the
                Hugging Face hub.
            seed: of the noise.
            solver: SOLVER[+OPTION=VALUE ...], such as ``heun``. By default that of the run.
            steps: model evaluations per image, without those of guidance. By default as the run.
            guidance: scale of classifier-free guidance; 1 is without. By default as the run.
            batch_size: images at a time; changes nothing but memory and rounding.

        Returns:
            (N, C, H, W) on the CPU: uint8 pixels; float32 of a latent model whose run names no
            ``data.vae`` that decodes.

        Raises:
            UserError: an option out of range, a class that does not exist, or a condition that the
                model does not have.

        Examples:
            >>> model = se.load("runs/mine")
            >>> images = model.generate(4, labels=[3, 7], seed=1, solver="heun", steps=6)
            >>> images.shape, images.dtype
            (torch.Size([4, 1, 8, 8]), torch.uint8)
        """
        check_whole("n", n, 1, MOST)
        wanted = {"solver": solver, "solver_steps": steps, "guidance": guidance}
        given = {name: value for name, value in wanted.items() if value is not None}
        config = with_values(self.config, {"evaluation": {"num_images": n, **given}})
        n = int(n)
        prompts = (prompts,) if isinstance(prompts, str) else prompts
        null = self.null
        if prompts and labels is not None:
            raise UserError("labels and prompts: a model is conditioned on one of them; leave one.")
        if prompts:
            conditions, null = prompted(config.data, n, prompts, text_encoder)
        else:
            conditions = self._conditions(n, labels)
        images = generate(
            self.network,
            self._table,
            conditions,
            torch.arange(n),
            generation_settings(config.evaluation),
            image_shape=config.data.image_shape,
            null=null,
            seed=seed,
            latents=config.data.latents,
            batch_size=batch_size,
        )
        return images if self._decode is None else self._decode(images)

    def save_pretrained(self, folder: str | Path, *, name: str | None = None) -> Path:
        """Write the model to a folder, which ``speed_engine.load`` reads on any machine.

        Args:
            folder: made if it is missing; files of another model there are replaced.
            name: of the model in its card. By default the path of the folder.

        Returns:
            The folder.

        Raises:
            OSError: a file cannot be written.

        Examples:
            >>> folder = se.load("runs/mine").save_pretrained("digits-model")
            >>> sorted(path.name for path in folder.iterdir() if path.suffix != ".json")
            ['README.md', 'model.safetensors', 'null.safetensors']
        """
        folder = check_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {WEIGHTS: self.network.state_dict(), NULL: dict(self.null)}
        for file, values in tensors.items():
            with replacing(folder / file) as path:
                save_file({key: v.cpu().contiguous() for key, v in values.items()}, path)
        facts = json.dumps(dataclasses.asdict(self.facts), indent=2) + "\n"
        parameters = sum(p.numel() for p in self.network.parameters())
        card = model_card(name or str(folder), self.config, self.facts, parameters)
        texts = {CONFIG_FILE: to_json(self.config), FACTS: facts, CARD: card}
        for file, text in texts.items():
            write_durably(folder / file, text.encode())
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model of speed-engine",
    ) -> str:
        """Upload the model to the Hugging Face hub, from where ``speed_engine.load`` fetches it.

        Args:
            repo_id: OWNER/NAME; made if it is missing.
            private: whether a repository that is made is private. By default as the owner's
                settings say.
            token: of the hub. By default the one of ``hf auth login``.
            revision: branch. By default main.
            commit_message: of the upload.

        Returns:
            The URL of the commit.

        Raises:
            UserError: the library huggingface_hub is not installed, or the hub cannot be reached or
                refuses.

        Examples:
            >>> model = se.load("runs/mine")
            >>> model.push_to_hub("me/digits", private=True)  # doctest: +SKIP
        """
        check_installed("push_to_hub", "hub", "huggingface_hub")
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="speed-engine")
        with _writing(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, name=repo_id)
            with _writing(repo_id):
                done = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                )
        return str(done)

    def _conditions(self, n: int, labels: Any) -> Conditions:
        names = condition_names(self.config.data)
        classes = self.facts.classes
        if labels is not None:
            if "labels" not in names:
                raise UserError(
                    f"labels={labels}: this model is conditioned on "
                    f"{', '.join(names) or 'nothing'}, and not on classes; leave the labels out."
                )
            classes = self._classes(labels)
        turns = {"labels": torch.tensor(classes)[torch.arange(n) % len(classes)]} if classes else {}
        if set(names) <= {"labels"}:
            return turns
        return {**generation_conditions(self.config.data, n, self.config.seed), **turns}

    def _classes(self, labels: Any) -> tuple[int, ...]:
        """Numbers of the classes that are asked for."""
        if isinstance(labels, Tensor):
            labels = labels.flatten().tolist()
        several = isinstance(labels, Iterable) and not isinstance(labels, str)
        asked = list(labels) if several else [labels]
        known: list[str] = self.facts.metadata.get("classes", [])
        for label in asked:
            if isinstance(label, str) and label not in known:
                if known:
                    raise unknown("class", label, known)
                raise UserError(
                    f"labels={label!r}: the data set records no names of classes; give numbers."
                )
        wanted = [known.index(of) if isinstance(of, str) else of for of in asked]
        count = self.config.data.num_classes
        sound = [isinstance(of, Integral) and 0 <= int(of) < count for of in wanted]
        if not sound or not all(sound):
            raise UserError(f"labels={labels}: needed are classes from 0 to {count - 1}.")
        return tuple(int(cast(int, of)) for of in wanted)

    @cached_property
    def _table(self) -> TimestepTable:
        return build_process(self.config).table

    @cached_property
    def _decode(self) -> Callable[[Tensor], Tensor] | None:
        device: Any = next(self.network.parameters()).device.type  # what trained it may be another
        config = dataclasses.replace(self.config, device=device)
        return build_decoder(config, metadata=self.facts.metadata)


@contextmanager
def _writing(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds: no token, no such owner, no network
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{repo_id} cannot be written on the Hugging Face hub: {reason}. Log in by `hf auth "
            "login`, or give a token that may write there; save_pretrained keeps the model here."
        ) from error
