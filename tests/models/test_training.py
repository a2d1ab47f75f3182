"""Every family of models on real digits: loss falls, steps compile into one graph and stay so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from speed_engine.data.batch import Batch
from speed_engine.data.preparing.sources import digits as digits_source
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.objective import Objective
from speed_engine.diffusion.processes import build_schedule
from speed_engine.models.edm_unet import DhariwalUNet, SongUNet
from speed_engine.models.layers.blocks import set_recompute
from speed_engine.models.mdt import MDT, MDTv2
from speed_engine.models.unet import UNet
from speed_engine.training.ema import Ema, warming_up
from speed_engine.training.engine import Engine
from speed_engine.training.optimizers import Hyperparameters, adamw
from speed_engine.training.update import Update

BATCH = 16
UNET: dict[str, Any] = {
    "input_size": (8, 8), "in_channels": 1, "out_channels": 1, "model_channels": 32,
    "channel_mult": (1, 2), "num_classes": 10,
}  # fmt: skip
MDT_SIZE: dict[str, Any] = {
    "input_size": (8, 8), "channels": 1, "patch_size": 2, "dim": 64, "depth": 4, "num_heads": 4,
    "num_classes": 10, "decode_layers": 2,
}  # fmt: skip
FAMILIES = {
    "unet": lambda: UNet(**UNET, num_res_blocks=1, attention_resolutions=(2,)),
    "unet-adm": lambda: UNet(
        **UNET,
        num_res_blocks=1,
        attention_resolutions=(2,),
        scale_shift_norm=True,
        resblock_updown=True,
    ),
    "unet-tokens": lambda: UNet(
        **dict(UNET, num_classes=None),
        num_res_blocks=1,
        attention_resolutions=(2,),
        token_dim=10,
    ),
    "ddpm++": lambda: SongUNet(**UNET, num_blocks=1, attention_resolutions=(4,)),
    "adm-edm": lambda: DhariwalUNet(
        **dict(UNET, channel_mult=(2, 2)), num_blocks=1, attention_resolutions=(4,)
    ),
    "mdt": lambda: MDT(**MDT_SIZE),
    "mdt-v2": lambda: MDTv2(**MDT_SIZE),
}


def digits(start: int, told: str, size: int = BATCH) -> Batch:
    """Real images; a text is one token that says the class."""
    with np.load(Path(digits_source.__file__).with_name("digits.npz")) as stored:
        rows = np.arange(start, start + size) % len(stored["labels"])
        images, labels = stored["images"][rows], torch.from_numpy(stored["labels"][rows]).long()
    pixels = torch.from_numpy(images).float().unsqueeze(1) / 8 - 1
    tokens = nn.functional.one_hot(labels, 10).float().unsqueeze(1)
    conditions = {"labels": labels} if told == "labels" else {"tokens": tokens}
    return Batch(pixels, conditions, torch.arange(start, start + size))


def engine(family: str, **options) -> Engine:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    process = "edm" if isinstance(model, (SongUNet, DhariwalUNet)) else "linear"
    method = build_method("uniform", build_schedule(process, 1000))
    objective = Objective(method, seed=0, network=model)
    return Engine(
        model,
        objective,
        Update(
            model,
            objective,
            adamw(model, objective, Hyperparameters(learning_rate=2e-3)),
            {"ema": Ema(model, warming_up(0.99))},
            learning_rate=lambda step: 2e-3,
            grad_clip=1.0,
        ),
        **{name: make(model) for name, make in options.items()},
    )


def told(family: str) -> str:
    return "tokens" if family == "unet-tokens" else "labels"


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls_on_digits(family):
    trained = engine(family)
    judged = digits(1000, told(family), size=256)  # the training below ends before these

    def error() -> float:
        with torch.no_grad():
            output = trained.objective(
                trained.model, judged.images, judged.conditions, judged.ids, 0
            )
        return float(output.loss)

    before = error()
    for step in range(40):
        trained.step(digits(BATCH * step, told(family)))
    assert error() < 0.75 * before


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_no_step(family):
    """Not even with dropout, whose draws must be the same again; of both kinds, half the blocks."""
    whole, recomputed = engine(family), engine(family)
    for trained in (whole, recomputed):
        for part in trained.model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.5
    set_recompute([m for m in recomputed.model.modules() if hasattr(m, "recompute")], 0.75)
    for step in range(2):
        torch.manual_seed(step)
        expected = whole.step(digits(BATCH * step, told(family)))
        torch.manual_seed(step)
        report = recomputed.step(digits(BATCH * step, told(family)))
        assert torch.equal(report.loss, expected.loss)
        assert torch.equal(report.grad_norm, expected.grad_norm)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_one_graph_and_no_step_after_the_second_compiles(family):
    compile = lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled, eager = engine(family, forward=compile), engine(family)
    for step in range(4):
        batch = digits(BATCH * step, told(family))
        stance = "fail_on_recompile" if step >= 2 else "default"
        with torch.compiler.set_stance(stance):
            report = compiled.step(batch)
        torch.testing.assert_close(report.loss, eager.step(batch).loss, rtol=1e-3, atol=1e-4)
