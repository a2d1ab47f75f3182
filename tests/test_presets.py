import torch

from speed_engine.build import build_model
from speed_engine.config import from_json, to_json
from speed_engine.models.config import DiTConfig, EdmUNetConfig, MDTConfig, UNetConfig
from speed_engine.models.edm_unet import EDM_UNET_SIZES
from speed_engine.presets import OWN_IMAGES, PRESETS

EXPERIMENTS = {
    "metfaces-dit-xl2", "ffhq-dit-xl2", "ffhq-unet", "imagenet256-dit-xl2", "imagenet256-unet",
    "imagenet256-mdt-s2", "cifar10-edm", "cifar10-fdm", "coco-t2i-dit-xl2", "metfaces512-superres",
}  # fmt: skip


EMOJI = {"emoji32", "emoji32-unet", "emoji64", "emoji64-unet"}


def test_the_papers_experiments_are_there():
    assert set(PRESETS) == EXPERIMENTS | EMOJI | {"digits", "cifar16", "cifar10-dit", *OWN_IMAGES}
    families = {type(config.model) for _, config in PRESETS.values()}
    assert families == {DiTConfig, MDTConfig, UNetConfig, EdmUNetConfig}


def test_every_preset_survives_its_run_folder():
    assert all(from_json(to_json(config)) == config for _, config in PRESETS.values())


def test_the_paper_trains_with_one_recipe():
    latent = [config for _, config in PRESETS.values() if config.data.latents]
    assert len(latent) == 8
    for config in latent:
        optimizer = config.optimizer
        assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-4, 0)
        assert (optimizer.ema_decay, optimizer.ema_warmup) == (0.9999, False)
        assert config.schedule == "linear" and config.data.flip
        assert (config.evaluation.solver, config.evaluation.solver_steps) == ("ddpm", 250)
        assert config.method == "speed_paper" and config.model.learn_sigma


STEPS_AND_BATCH = {
    "metfaces-dit-xl2": (50_000, 256), "ffhq-dit-xl2": (100_000, 256), "ffhq-unet": (100_000, 256),
    "imagenet256-dit-xl2": (400_000, 256), "imagenet256-unet": (400_000, 256),
    "imagenet256-mdt-s2": (1_000_000, 256), "coco-t2i-dit-xl2": (400_000, 256),
    "metfaces512-superres": (100_000, 32), "cifar10-edm": (390_625, 512),
    "cifar10-fdm": (390_625, 512),
}  # fmt: skip


def test_steps_and_batches_are_the_papers():
    found = {name: (PRESETS[name][1].steps, PRESETS[name][1].batch_size) for name in EXPERIMENTS}
    assert found == STEPS_AND_BATCH
    assert PRESETS["coco-t2i-dit-xl2"][1].evaluation.guidance == 1.5


def test_mdt_is_the_paper_s():
    config = PRESETS["imagenet256-mdt-s2"][1]
    assert isinstance(config.model, MDTConfig)
    assert (config.model.decode_layers, config.model.mask_ratio) == (2, 0.3)
    with torch.device("meta"):
        assert len(list(build_model(config).get_submodule("blocks").children())) == 12


def test_presets_of_one_size_of_emoji_differ_in_the_network_alone():
    for side in (32, 64):
        dit, unet = (PRESETS[f"emoji{side}{network}"][1] for network in ("", "-unet"))
        assert dit.data == unet.data and dit.data.image_shape == (3, side, side)
        assert (type(dit.model), type(unet.model)) == (DiTConfig, UNetConfig)


def test_emoji32_is_small_enough_for_a_cpu():
    _, config = PRESETS["emoji32"]
    parameters = sum(p.numel() for p in build_model(config).parameters())
    assert 1e6 < parameters < 3e6


def test_edm_trains_on_200_million_images():
    for name in ("cifar10-edm", "cifar10-fdm"):
        _, config = PRESETS[name]
        assert isinstance(config.model, EdmUNetConfig)
        assert EDM_UNET_SIZES[str(config.model.size)]["dropout"] == 0.13
        evaluation = config.evaluation
        assert (evaluation.solver, evaluation.solver_steps) == ("heun", 35)
        assert evaluation.num_images == 50_000 and config.data.flip
        assert abs(config.steps * config.batch_size - 200e6) < config.batch_size
        assert round(config.optimizer.warmup_steps * config.batch_size / 1e6) == 10
        kept_of_half_a_million = config.optimizer.ema_decay ** (500_000 / config.batch_size)
        assert abs(kept_of_half_a_million - 0.5) < 1e-9
