"""Named runs: what each trains, and what to expect of it.

The experiments of SpeeD (arXiv 2405.17403) have its recipe: AdamW, rate 1e-4, no decay, 256 images
a step, EMA decay 0.9999 from the first step on, horizontal flips, T = 1000 linear, latents of
sd-vae-ft-ema (its section 3 and tables 7 and 8), DDPM sampling with 250 steps, neither warm-up nor
clipping, as in its released configurations; k = 5 everywhere, as the paper says (the release has
k = 2 for FFHQ). MDT trains for 1,000K steps (A.5), super-resolution on 32 images a step (table 9),
text to image is sampled with guidance 1.5 (A.7). Not from the paper:

    ffhq-unet, imagenet256-unet  network of the released configurations
    imagenet256-*                guidance 1.5 as for texts, where the paper names none
    imagenet256-mdt-s2           network of the MDT paper; the release trains MDTv2-XL/2
    coco-t2i-dit-xl2             attention to all tokens of CLIP ViT-L/14; the release conditions on
                                 the pooled vector of ViT-B/32
    metfaces512-superres         our own: latents of 64 x 64, conditioned on 64 x 64 pixels
    dit-s, dit-b, unet-s         our own, for your own images: a rectified flow with logit-normal
                                 timesteps (SD3); shape and classes are those of the data. Time
                                 features as in diffusers, where exports then answer equally
    cifar10-edm, cifar10-fdm     flips in place of EDM's augmentation, and a warm-up of the EMA
                                 like that of EDM's code; A.6 has the dropout, 0.13, and 50,000
                                 images by EDM's Heun sampler, whose 18 steps are 35 evaluations

Flips of latents mirror what was encoded, an approximation of the paper's, which encodes mirrored
pictures.

Expected results are FID of 10,000 images as the paper states them; none is reproduced here.
"""

import math
from typing import Any

from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig, EdmUNetConfig, MDTConfig, ModelConfig, UNetConfig
from speed_engine.training.config import OptimizerConfig

RECIPE = OptimizerConfig(
    learning_rate=1e-4, warmup_steps=0, weight_decay=0.0, grad_clip=math.inf, ema_decay=0.9999,
    ema_warmup=False,
)  # fmt: skip
# EDM's for CIFAR-10 (appendix A.6): 200 million images, 10 million of warm-up; the half-life of the
# EMA is half a million images.
EDM_BATCH = 512
EDM_RECIPE = OptimizerConfig(
    learning_rate=1e-3,
    warmup_steps=10_000_000 // EDM_BATCH,
    grad_clip=math.inf,
    ema_decay=0.5 ** (EDM_BATCH / 500_000),
)

CLASS, TEXT, LOW = "cls", "tokens.npy", "low.npy"
DIT_XL = DiTConfig(size="DiT-XL/2", learn_sigma=True)
UNET = UNetConfig(size="speed", learn_sigma=True)
MDT_S = MDTConfig(size="MDT-S/2", learn_sigma=True)


def _speed(
    source: str,
    model: ModelConfig,
    steps: int,
    *conditions: str,
    latent: int = 32,
    batch_size: int = 256,
) -> TrainConfig:
    """A run of SpeeD's recipe on latents of ``latent`` x ``latent`` x 4."""
    guided = CLASS in conditions or TEXT in conditions
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        checkpoint_every=10_000,
        log_every=100,
        model=model,
        data=DataConfig(
            source=f"shards/{source}",
            members=("npy", *conditions),
            image_shape=(4, latent, latent),
            latents=True,
            num_classes=1000,
            workers=8,
            flip=True,
        ),
        optimizer=RECIPE,
        evaluation=EvaluationConfig(
            every=10_000,
            num_images=100,
            solver="ddpm",
            solver_steps=250,
            guidance=1.5 if guided else 1.0,
            features="none",
        ),
    )


def _edm(process: str) -> TrainConfig:
    """EDM's CIFAR-10 run, on a process."""
    return TrainConfig(
        steps=200_000_000 // EDM_BATCH,
        batch_size=EDM_BATCH,
        schedule=process,
        condition_dropout=0.0,
        checkpoint_every=10_000,
        log_every=100,
        model=EdmUNetConfig(size="ddpm++-cifar10"),
        data=DataConfig(
            source="shards/cifar10",
            members=("png", CLASS),
            image_shape=(3, 32, 32),
            workers=8,
            flip=True,
        ),
        optimizer=EDM_RECIPE,
        evaluation=EvaluationConfig(
            every=25_000, num_images=50_000, solver="heun", solver_steps=35, features="inception"
        ),
    )


def _emoji(side: int, model: ModelConfig, steps: int, rate: float, images: int) -> TrainConfig:
    """A run on emoji of ``side`` pixels, which ten times evaluates ``images`` generated images."""
    return TrainConfig(
        steps=steps,
        checkpoint_every=steps // 10,
        model=model,
        data=DataConfig(
            source=f"shards/emoji{side}",
            members=("png", CLASS),
            image_shape=(3, side, side),
            num_classes=9,
        ),
        optimizer=OptimizerConfig(learning_rate=rate),
        evaluation=EvaluationConfig(every=steps // 10, num_images=images, guidance=1.2),
    )


def _cifar(
    side: int, model: ModelConfig, steps: int, batch_size: int, rate: float, features: Any
) -> TrainConfig:
    """CIFAR-10 at ``side`` pixels; the test split is what generated images are compared with."""
    name = "shards/cifar10" if side == 32 else f"shards/cifar{side}"
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        checkpoint_every=steps // 10,
        schedule="flow",
        method="logit_normal",
        model=model,
        data=DataConfig(
            source=name,
            test_source=f"{name}-test",
            members=("png", CLASS),
            image_shape=(3, side, side),
            flip=True,
            workers=0 if side < 32 else 8,
        ),
        optimizer=OptimizerConfig(learning_rate=rate, schedule="linear"),
        evaluation=EvaluationConfig(
            every=steps // 10, num_images=2000 if side < 32 else 10_000,
            solver="dpmpp_2m", solver_steps=20, features=features,
        ),
    )  # fmt: skip


def _own_images(model: ModelConfig, steps: int, rate: float) -> TrainConfig:
    """A flow on a data set of which only its record knows the shape and the classes."""
    return TrainConfig(
        method="logit_normal",
        schedule="flow",
        steps=steps,
        checkpoint_every=1_000,
        log_every=100,
        model=model,
        data=DataConfig(
            source="shards/own",
            members=("png", CLASS),
            image_shape=(3, 64, 64),
            workers=2,
        ),
        optimizer=OptimizerConfig(learning_rate=rate, ema_decay=0.9999),
        evaluation=EvaluationConfig(every=5_000, num_images=2_000),
    )


OWN_IMAGES = ("dit-s", "dit-b", "unet-s")  # the first is what a source alone is trained by
DIGITS = TrainConfig(
    steps=2500,
    log_every=100,
    optimizer=OptimizerConfig(learning_rate=4e-3),
    evaluation=EvaluationConfig(guidance=1.2),
)
EMOJI_DIT = DiTConfig(patch_size=4, dim=128, depth=4, num_heads=4)
EMOJI64_DIT = DiTConfig(patch_size=4, dim=256, depth=8, num_heads=4)
CIFAR16_DIT = DiTConfig(patch_size=4, dim=128, depth=4, num_heads=4)
EMOJI_UNET = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(2, 4),
    num_head_channels=32,
)  # fmt: skip
OWN_UNET = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(4,),
    num_head_channels=32,
)  # fmt: skip
EMOJI64_UNET = UNetConfig(
    model_channels=64, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(4, 8),
    num_head_channels=32,
)  # fmt: skip
UNKNOWN = "no published result is at hand to compare with"
UNMEASURED = "the whole run is not measured yet"

# name, what it trains, what to expect of it, configuration
_ROWS = (
    ("digits",
     "A DiT with 0.3 M parameters on the UCI digits, 8 x 8 pixels, two minutes on two CPU cores",
     "it reaches FID 0.44 in classifier features, where two halves of the data differ by 0.55",
     DIGITS),
    ("dit-s", "A DiT-S/2 with 33 M parameters on your own images, as a flow",
     UNMEASURED, _own_images(DiTConfig(size="DiT-S/2", frequency_shift=1), 100_000, 2e-4)),
    ("dit-b", "A DiT-B/2 with 130 M parameters on your own images, as a flow",
     UNMEASURED, _own_images(DiTConfig(size="DiT-B/2", frequency_shift=1), 200_000, 1e-4)),
    ("unet-s", "A U-Net with 6 M parameters on your own images, as a flow",
     UNMEASURED, _own_images(OWN_UNET, 50_000, 5e-4)),
    ("emoji32", "A DiT with 1.3 M parameters on emoji of 32 x 32 pixels, for CPU cores, too",
     UNMEASURED, _emoji(32, EMOJI_DIT, 2_000, 2e-3, 500)),
    ("emoji32-unet", "A U-Net with 6 M parameters on emoji of 32 x 32 pixels",
     UNMEASURED, _emoji(32, EMOJI_UNET, 20_000, 5e-4, 2000)),
    ("emoji64", "A DiT with 10 M parameters on emoji of 64 x 64 pixels",
     UNMEASURED, _emoji(64, EMOJI64_DIT, 40_000, 5e-4, 2000)),
    ("emoji64-unet", "A U-Net with 6 M parameters on emoji of 64 x 64 pixels",
     UNMEASURED, _emoji(64, EMOJI64_UNET, 40_000, 5e-4, 2000)),
    ("cifar16", "A flow with 1.3 M parameters on CIFAR-10 at 16 x 16 pixels, for CPU cores",
     "docs/recipes.md compares recipes on it",
     _cifar(16, CIFAR16_DIT, 2_000, 128, 4e-3, "classifier")),
    ("cifar10-dit", "A flow by DiT-S/2 on CIFAR-10 at 32 x 32 pixels, for a GPU",
     UNMEASURED, _cifar(32, DiTConfig(size="DiT-S/2"), 100_000, 256, 1e-3, "inception")),
    ("metfaces-dit-xl2", "An unconditional DiT-XL/2 on MetFaces 256",
     "the paper has FID 21.1, and 29.3 with uniform timesteps",
     _speed("metfaces256", DIT_XL, 50_000)),
    ("ffhq-dit-xl2", "An unconditional DiT-XL/2 on FFHQ 256",
     "the paper has FID 9.9 at 50,000 steps, and 12.9 with uniform timesteps",
     _speed("ffhq256", DIT_XL, 100_000)),
    ("ffhq-unet", "An unconditional U-Net on FFHQ 256",
     "the paper has FID 15.1, and 17.4 with uniform timesteps", _speed("ffhq256", UNET, 100_000)),
    ("imagenet256-dit-xl2", "A class-conditional DiT-XL/2 on ImageNet 256",
     UNKNOWN, _speed("imagenet256", DIT_XL, 400_000, CLASS)),
    ("imagenet256-unet", "A class-conditional U-Net on ImageNet 256",
     UNKNOWN, _speed("imagenet256", UNET, 400_000, CLASS)),
    ("imagenet256-mdt-s2", "A class-conditional MDT-S/2 on ImageNet 256",
     UNKNOWN, _speed("imagenet256", MDT_S, 1_000_000, CLASS)),
    ("cifar10-edm", "A class-conditional DDPM++ on CIFAR-10, by EDM's process",
     UNKNOWN, _edm("edm")),
    ("cifar10-fdm", "A class-conditional DDPM++ on CIFAR-10, by FDM's process",
     UNKNOWN, _edm("fdm")),
    ("coco-t2i-dit-xl2", "A DiT-XL/2 on MS-COCO 256, conditioned on texts",
     "the paper has FID 25.3, and 27.4 with uniform timesteps",
     _speed("coco256", DIT_XL, 400_000, TEXT)),
    ("metfaces512-superres",
     "A DiT-XL/2 on MetFaces 512, conditioned on the image at 64 x 64 pixels",
     UNKNOWN, _speed("metfaces512", DIT_XL, 100_000, LOW, latent=64, batch_size=32)),
)  # fmt: skip

# name: (one line of help, configuration)
PRESETS: dict[str, tuple[str, TrainConfig]] = {
    name: (f"{what}; {expected}", config) for name, what, expected, config in _ROWS
}
