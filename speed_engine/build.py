"""The objects of a run, made from its configuration.

Training, generation and evaluation all build through here, so that they agree on the model and the
process.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine.config import TrainConfig
from speed_engine.data.opening import condition_names, condition_shapes, null_conditions, open_data
from speed_engine.diffusion.conditions import (
    ConditionChange,
    ConditionDropout,
    LowResolutionNoise,
)
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.grammar import Spelling, Value, read_spelling
from speed_engine.diffusion.learned_variance import SquaredErrorAndBound
from speed_engine.diffusion.method import build_method, options_of
from speed_engine.diffusion.objective import Objective, training_passes
from speed_engine.diffusion.processes import build_schedule
from speed_engine.encoders.clip import ClipScore
from speed_engine.encoders.vae import Decoder, load_vae
from speed_engine.evaluation.conditions import (
    generation_conditions,
    generation_settings,
    generation_texts,
)
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.evaluation.references import RealImages, real_images, validation_of
from speed_engine.evaluation.validation import IMAGES, Validation
from speed_engine.models.families import Shape, build_network
from speed_engine.models.layers.blocks import compile_each, compiled
from speed_engine.runtime.attention_check import AttentionShape, AttentionShapes, settle_attention
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.kernels import settle_kernels
from speed_engine.runtime.machine import Choices, torch_device
from speed_engine.runtime.memory import check_memory
from speed_engine.runtime.precision import COMPUTE_DTYPES
from speed_engine.runtime.sharding import blocks, distribute
from speed_engine.runtime.world import ALONE, World
from speed_engine.training.configured import build_averages, build_update
from speed_engine.training.ema import EMA, Ema
from speed_engine.training.engine import Engine

log = logging.getLogger(__name__)


def build_process(config: TrainConfig) -> Method:
    """The configured method on its process.

    Raises:
        UserError: an unknown schedule, method or prediction, or an option out of range.
    """
    spelling = read_spelling(config.method)
    options = dict(spelling.options)
    if "ramp_steps" in options_of(spelling.method):
        options.setdefault("ramp_steps", config.steps)
    schedule = build_schedule(config.schedule, config.num_timesteps)
    return build_method(spelling.method, schedule, config.prediction, seed=config.seed, **options)


def spelled(config: TrainConfig) -> str:
    """How a run is trained, as a comparison would spell it: method, process, target, optimizer.

    Raises:
        UserError: an unknown process.
    """
    method, optimizer = read_spelling(config.method), config.optimizer
    process = build_schedule(config.schedule, config.num_timesteps)
    options: dict[str, Value] = {
        **method.options,
        "optimizer.name": optimizer.name,
        "optimizer.schedule": optimizer.schedule,
    }
    if optimizer.weight_decay:
        options["optimizer.weight_decay"] = optimizer.weight_decay
    target = config.prediction or process.prediction
    return str(Spelling(method.method, options, config.schedule, target))


def build_objective(
    config: TrainConfig, process: Method, model: nn.Module, store_noise: bool = False
) -> Objective:
    """The objective of the configured method for a model, on the CPU.

    Args:
        config: of the run.
        process: its method.
        model: what will be trained.
        store_noise: as in ``Objective``.

    Raises:
        UserError: a learned variance is asked for where there is none.
    """
    changes: list[ConditionChange] = [
        ConditionDropout(null_conditions(config.data), config.condition_dropout),
        LowResolutionNoise(config.low_resolution_noise),
    ]
    error = None
    if getattr(config.model, "learn_sigma", False):  # families of models need not have it
        error = SquaredErrorAndBound(process)
    return Objective(
        process, config.seed, network=model, changes=changes, error=error, store_noise=store_noise
    )


def build_model(config: TrainConfig, attention: str = "sdpa") -> nn.Module:
    """The configured model, initialised from the run's seed, on the current default device.

    Attention is not taken from the configuration, since what trained a model need not be there
    where it is used.

    Raises:
        UserError: its parameters alone are more than this machine's memory.
    """
    data, conditions = config.data, condition_names(config.data)
    channels, height, width = data.image_shape
    shape = Shape(
        input_size=(height, width),
        channels=channels,
        num_classes=data.num_classes if "labels" in conditions else None,
        token_dim=data.token_shape[1] if "tokens" in conditions else None,
        low_channels=data.low_shape[0] if "low_resolution" in conditions else None,
        attention=attention,
    )
    if torch.get_default_device().type != "meta":
        with torch.device("meta"):
            sketch = build_network(config.model, shape)
        check_memory(
            f"the model's {sum(p.numel() for p in sketch.parameters()):,} parameters",
            sum(p.nbytes for p in sketch.parameters()),
            f"choose a smaller model, or fewer classes than data.num_classes={data.num_classes:,}",
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_network(config.model, shape)


def training_inputs(model: nn.Module, config: TrainConfig, images: int) -> list[dict[str, Tensor]]:
    """The model's arguments in every forward pass of a step, on the current default device."""
    conditions = {
        name: torch.zeros(images, *shape, dtype=torch.int64 if name == "labels" else torch.float32)
        for name, shape in condition_shapes(config.data).items()
    }
    inputs = {
        "x": torch.zeros(images, *config.data.image_shape),
        "t": torch.zeros(images),
        **conditions,
    }
    return [
        inputs
        | {name: torch.zeros(images, count, dtype=torch.int64) for name, count in words.items()}
        for words in training_passes(model)
    ]


def attention_shapes(config: TrainConfig) -> set[AttentionShape]:
    """In which the configured model calls PyTorch's attention; nothing is computed."""
    with torch.device("meta"), torch.no_grad(), AttentionShapes() as shapes:
        model = build_model(config)
        for inputs in training_inputs(model, config, 1):
            model(**inputs)
    return shapes.found


def settle_operators(
    config: TrainConfig, kernels: str, device: torch.device, world: World = ALONE
) -> None:
    """Choose what computes a model's operators and its attention, by trying them on a GPU.

    Args:
        config: of the model.
        kernels: ``auto``, ``on`` or ``off``.
        device: of this process.
        world: the processes of the run.

    Raises:
        UserError: kernels are demanded and fail, or attention does not run.
    """
    if device.type == "cuda":  # before the kernels, whose trials call attention, too
        dtype = COMPUTE_DTYPES[device.type]
        settle_attention(attention_shapes(config), device, dtype, quiet=not world.is_first)
    settle_kernels(kernels, device.type, world)


def build_engine(
    config: TrainConfig,
    process: Method,
    model: nn.Module,
    choices: Choices,
    world: World,
    device: torch.device,
) -> Engine:
    """A model's objective and optimizer on the device, laid out over the processes.

    Args:
        config: of the run.
        process: its method.
        model: what is trained, on the device, with the weights that it starts from.
        choices: of the machine.
        world: the processes that train together.
        device: of this one.

    Raises:
        UserError: an option does not fit another.
    """
    averages = build_averages(config.optimizer, model)
    forward = _laid_out(config, model, averages, choices, world, device)
    store_noise = choices.noise.value == "stored"
    objective = build_objective(config, process, model, store_noise).to(device)
    update = build_update(
        config.optimizer,
        model,
        objective,
        averages,
        steps=config.steps,
        update=choices.update.value,
        momentum_decay=process.momentum_decay,
        loss_learning_rate=process.batch_loss.learning_rate,
    )
    return Engine(
        model,
        objective,
        update,
        forward=forward,
        microbatch_size=config.microbatch_size,
        world=world,
        seed=config.seed,
    )


def _laid_out(
    config: TrainConfig,
    model: nn.Module,
    averages: dict[str, Ema],
    choices: Choices,
    world: World,
    device: torch.device,
) -> Any:
    """Compile a model and its EMA, distribute them with the other averages over the processes, and
    return what is called in the model's place.
    """
    how, generating = choices.compile.value, choices.generation.value
    if world.size == 1:
        compiled(averages[EMA].model, generating)
        return compiled(model, how)
    # The gathering of parameters between blocks cannot be compiled.
    for called, chosen in ((model, how), (averages[EMA].model, generating)):
        if chosen != "off":
            compile_each(blocks(called))
    for laid_out in (model, *(average.model for average in averages.values())):
        distribute(
            laid_out,
            world,
            choices.parallel.value,
            device.type,
            reshard_after_forward=config.reshard,
            offload=config.offload,
        )
    for average in averages.values():
        average.follow(model)
    return model


def build_evaluator(config: TrainConfig, process: Method, world: World = ALONE) -> Evaluator:
    """Evaluation against the training and the held-out images, with the configured features.

    Raises:
        UserError: there are too few images for a metric, or what it needs is missing.
    """
    settings, decode = config.evaluation, build_decoder(config, world)
    shape = picture_shape(config, decode)
    check_memory(
        f"evaluation.num_images={settings.num_images:,} images",
        settings.num_images * math.prod(shape),
        "lower it",
    )
    device = torch_device(config.device, world)
    real, clip, texts = None, None, ()
    if settings.features != "none":
        made: list[RealImages] = []
        on_gpu = device.type == "cuda"
        # The first one reads all images to train a classifier, and the others find what it kept.
        world.from_first(lambda: made.append(real_images(config.data, settings, shape, on_gpu)))
        real = made[0] if made else real_images(config.data, settings, shape, on_gpu)
        if world.is_first and (doubt := real.extractor.doubt()):
            log.warning("%s", doubt)
    if "clip" in settings.metrics and settings.clip_model is not None:
        clip = ClipScore(settings.clip_model, device)
        texts = generation_texts(config.data, settings.num_images)
    return Evaluator(
        table=process.table,
        settings=generation_settings(settings),
        training=real and real.training,
        extractor=real and real.extractor,
        metrics=settings.metrics,
        held_out=real and real.held_out,
        reference=real and real.reference,
        reference_sha256=real and real.reference_sha256,
        clip=clip,
        texts=texts,
        conditions=generation_conditions(config.data, settings.num_images, config.seed),
        null=null_conditions(config.data),
        image_shape=config.data.image_shape,
        latents=config.data.latents,
        decode=decode,
        validation=build_validation(config, process, world) if "loss" in settings.metrics else None,
        num_images=settings.num_images,
        batch_size=settings.batch_size,
        seed=config.seed,
        world=world,
    )


def build_validation(
    config: TrainConfig, process: Method, world: World = ALONE, images: int = IMAGES
) -> Validation:
    """The validation loss on the configured data; arguments as of ``validation_of``.

    Raises:
        UserError: a sample is damaged and the policy is to stop.
    """
    return validation_of(
        config.data, process, config.seed, torch_device(config.device, world), world, images
    )


def build_decoder(
    config: TrainConfig, world: World = ALONE, metadata: Mapping[str, Any] | None = None
) -> Decoder | None:
    """Generated latents to pictures, by the configured VAE; None where there is none.

    Args:
        config: of the run.
        world: the processes, of which each decodes on its own device.
        metadata: what the data set records; by default it is asked.

    Raises:
        UserError: the VAE cannot be loaded or is of other latents, or the data set does not say how
            latents are scaled.
    """
    if config.data.vae is None:
        return None
    if metadata is None:
        metadata = open_data(config.data).dataset.metadata
    if "latent_scale" not in metadata:
        raise UserError(
            f"{config.data.source} does not record its latent_scale, which decoding needs; "
            "`speed-engine shards index --metadata` records it."
        )
    vae = load_vae(config.data.vae, torch_device(config.device, world))
    channels = config.data.image_shape[0]
    if vae.config.latent_channels != channels:
        raise UserError(
            f"data.vae={config.data.vae} decodes latents of {vae.config.latent_channels} channels, "
            f"those of {config.data.source} have {channels}; name the VAE that encoded them."
        )
    return Decoder(vae, metadata["latent_scale"], metadata.get("latent_shift", 0.0))


def picture_shape(config: TrainConfig, decode: Decoder | None) -> tuple[int, int, int]:
    """(channels, height, width) of what is generated, decoded where there is a decoder."""
    shape = config.data.image_shape
    return shape if decode is None else decode.picture_shape(shape)
