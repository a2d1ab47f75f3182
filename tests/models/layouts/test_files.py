"""Weights from and for other code: facebookresearch/DiT's files and diffusers' own class."""

import argparse
import io
import json
import pickle
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from speed_engine.api.loading import load
from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.models.dit import DiT
from speed_engine.models.edm_unet import SongUNet
from speed_engine.models.layouts.dit import set_frequency_shift
from speed_engine.models.layouts.files import (
    DIFFUSERS_FILE,
    load_pretrained,
    save_pretrained,
)
from speed_engine.models.layouts.unet import from_diffusers
from speed_engine.models.super_resolution import SuperResolution
from speed_engine.models.unet import UNet
from speed_engine.run.folder import read_config
from speed_engine.run.starting import start
from speed_engine.runtime.checks import UserError

SMALL = {
    "input_size": (8, 8), "channels": 4, "patch_size": 2, "dim": 32, "depth": 3, "num_heads": 4,
    "num_classes": 5, "learn_sigma": True,
}  # fmt: skip


def model(**changes) -> DiT:
    torch.manual_seed(1)
    net = DiT(**(SMALL | changes))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval().requires_grad_(False)


def inputs():
    torch.manual_seed(2)
    return torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def of_diffusers(**changes) -> Any:
    """As someone made and saved it, random; one embedding in every block, as when converted."""
    torch.manual_seed(3)
    net: Any = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=5, norm_eps=1e-6, **changes,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net.eval().requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert b.abs().max() > 1
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
def test_diffusers_answers_as_the_exported_model(tmp_path, shift):
    ours = model(frequency_shift=shift)
    save_pretrained(ours, tmp_path / "out", "diffusers")
    loaded: Any = DiTTransformer2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    theirs, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x, t, labels = inputs()
    before = theirs(x, t, labels).sample
    set_frequency_shift(theirs, shift)
    close(theirs(x, t, labels).sample, ours(x, t, labels))
    # 1 is what diffusers has by itself; without the call a model trained with 0 answers otherwise
    assert torch.equal(before, theirs(x, t, labels).sample) == (shift == 1)


@pytest.mark.parametrize("as_folder", [True, False])
def test_what_diffusers_saved_answers_the_same_here(tmp_path, as_folder):
    theirs, ours = of_diffusers(), model(frequency_shift=1)
    theirs.save_pretrained(tmp_path)
    load_pretrained(ours, tmp_path if as_folder else tmp_path / DIFFUSERS_FILE)
    x, t, labels = inputs()
    close(ours(x, t, labels), theirs(x, t, labels).sample)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_export_then_import_changes_nothing(tmp_path, layout):
    ours, out = model(), tmp_path / "a" / "out.safetensors"
    written = save_pretrained(ours, out, layout)
    assert written and all(path.is_file() for path in written)
    back = DiT(**SMALL)
    load_pretrained(back, out)
    assert same_state(back, ours)
    with pytest.raises(ValueError, match="out.safetensors exists already"):
        save_pretrained(ours, out, layout)


def test_the_originals_files_load(tmp_path):
    """Its downloads are a bare dictionary; its training script stores its arguments, too."""
    ours, optimised = model(), model()
    torch.save(ours.state_dict(), tmp_path / "bare.pt")
    stored = {
        "model": optimised.state_dict(),
        "ema": ours.state_dict(),
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", epochs=1400),
    }
    torch.save(stored, tmp_path / "trained.pt")
    for name in ("bare.pt", "trained.pt"):
        back = DiT(**SMALL)
        load_pretrained(back, tmp_path / name)
        assert same_state(back, ours)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": model().state_dict(), "args": Bomb()}, "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(ValueError, match=f"{name} holds more than tensors"):
            load_pretrained(model(), tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("place", ["ema.safetensors", f"transformer/{DIFFUSERS_FILE}"])
def test_weights_are_found_in_the_folder_of_a_run_and_of_a_pipeline(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    save_pretrained(model(), tmp_path / "x.safetensors", "original")
    (tmp_path / "x.safetensors").rename(tmp_path / place)
    net = model()
    torch.nn.init.zeros_(net.final_layer.linear.weight)
    load_pretrained(net, tmp_path)
    assert same_state(net, model())


def test_a_folder_without_weights_or_with_several_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds none of diffusion_pytorch_model"):
        load_pretrained(model(), tmp_path)
    for name in (DIFFUSERS_FILE, "ema.safetensors"):
        save_pretrained(model(), tmp_path / f"{name}.safetensors", "original")
        (tmp_path / f"{name}.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match="safetensors and ema.safetensors of"):
        load_pretrained(model(), tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_every_name_is_left_out(tmp_path, prefix):
    tensors = {prefix + name: value for name, value in model().state_dict().items()}
    torch.save(tensors, tmp_path / "x.pt")
    net = model()
    torch.nn.init.zeros_(net.final_layer.linear.weight)
    load_pretrained(net, tmp_path / "x.pt")
    assert same_state(net, model())


def test_a_file_that_was_cut_is_named(tmp_path):
    torch.save(model().state_dict(), tmp_path / "x.pt")
    for size in (5000, 3, 0):
        (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:size])
        with pytest.raises(ValueError, match="cut.pt holds more than tensors, or is damaged"):
            load_pretrained(model(), tmp_path / "cut.pt")


def test_tensors_of_another_model_are_named_in_a_line(tmp_path):
    torch.save({f"other.{i}": torch.zeros(1) for i in range(500)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="and 497 more") as raised:
        load_pretrained(model(), tmp_path / "x.pt")
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path, layout):
    save_pretrained(model(), tmp_path / "x.safetensors", layout)
    folder = layout == "diffusers"
    path = tmp_path / "x.safetensors" / DIFFUSERS_FILE if folder else tmp_path / "x.safetensors"
    tensors = load_file(path)
    missing, reshaped = sorted(tensors)[-1], sorted(tensors)[0]
    del tensors[missing]
    tensors[reshaped] = torch.zeros(7, 7)
    save_file(tensors | {"added.weight": torch.zeros(1)}, path, {"frequency_shift": "0"})
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        load_pretrained(net, path)
    message = str(raised.value)
    assert f"missing ['{missing}']" in message and "unexpected ['added.weight']" in message
    assert f"{reshaped} is (7, 7) there and" in message
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_frequency_shift_that_is_not_the_models_is_named(tmp_path):
    of_diffusers().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"shift of 1 is that of layout diffusers.*has 0; set"):
        load_pretrained(model(), tmp_path / "theirs")
    save_pretrained(model(), tmp_path / "ours.safetensors", "original")
    with pytest.raises(ValueError, match=r"shift of 0 is recorded for it, and the model has 1"):
        load_pretrained(model(frequency_shift=1), tmp_path / "ours.safetensors")


@pytest.fixture(scope="module")
def shifted_run(tmp_path_factory):
    """A complete run of a DiT with a frequency shift of 1, as the preset dit-s has."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        steps=1,
        batch_size=4,
        device="cpu",
        model=DiTConfig(dim=16, depth=1, num_heads=2, frequency_shift=1),
        evaluation=EvaluationConfig(num_images=10, solver_steps=1, features="none"),
    )
    start(config, run, Console(file=io.StringIO()))
    return run


def test_the_frequency_shift_of_a_run_and_of_a_saved_model_is_their_configurations(
    shifted_run, tmp_path
):
    saved = load(shifted_run).save_pretrained(tmp_path / "saved")
    config = read_config(shifted_run)
    plain = replace(config, model=replace(cast(DiTConfig, config.model), frequency_shift=0))
    for path in (shifted_run, shifted_run / "ema.safetensors", saved / "model.safetensors"):
        net = build_model(config)
        load_pretrained(net, path)
        assert same_state(net, load(shifted_run).network)
        with pytest.raises(ValueError, match=r"shift of 1 is recorded for it, and the model has 0"):
            load_pretrained(build_model(plain), path)
    for text in ("{", "[]", "{}", '{"model": {"frequency_shift": "x"}}'):
        (saved / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json is not the configuration of a run"):
            load_pretrained(build_model(config), saved / "model.safetensors")
    (saved / "speed_engine.json").unlink()  # of some other library, for all that is known
    load_pretrained(build_model(plain), saved / "model.safetensors")


def test_a_model_for_super_resolution_has_the_frequency_shift_of_its_dit(tmp_path):
    def enlarging(shift):
        return SuperResolution(model(channels=3, in_channels=7, frequency_shift=shift))

    save_pretrained(enlarging(1), tmp_path / "x.safetensors", "original")
    load_pretrained(enlarging(1), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"shift of 1 is recorded for it, and the model has 0"):
        load_pretrained(enlarging(0), tmp_path / "x.safetensors")


def test_embeddings_that_blocks_do_not_share_are_refused(tmp_path):
    theirs = of_diffusers()
    theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="copies of y_embedder.embedding_table.weight differ"):
        load_pretrained(model(frequency_shift=1), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": "modern"}, "nothing that is our blocks.0.attn.q_norm.weight"),
        ({"input_size": (8, 4)}, "has 4 x 2 patches"),
        ({"mlp_ratio": 2.0}, "5 classes and 2"),
        ({"num_classes": None}, "None classes and 4"),
    ],
)
def test_what_diffusers_cannot_hold_is_named_and_nothing_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_pretrained(model(**changes), tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


SMALL_UNET: dict[str, Any] = {
    "input_size": (16, 16), "in_channels": 3, "out_channels": 3, "model_channels": 32,
    "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,), "num_classes": 5,
}  # fmt: skip


def test_unets_load_from_their_own_files_latent_diffusions_and_diffusers(tmp_path):
    torch.manual_seed(0)
    ours, rows = UNet(**SMALL_UNET), torch.randn(5, 128)
    diffusers = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=64,
        num_class_embeds=6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).state_dict()
    ours.load_state_dict(from_diffusers(diffusers, ours))
    save_pretrained(ours, tmp_path / "own.safetensors", "original")
    save_file(diffusers, tmp_path / "diffusers.safetensors")
    theirs = {f"model.diffusion_model.{name}": value for name, value in ours.state_dict().items()}
    theirs["model.diffusion_model.label_emb.weight"] = rows
    torch.save({"state_dict": theirs, "global_step": 7}, tmp_path / "ldm.ckpt")
    for name in ("own.safetensors", "diffusers.safetensors", "ldm.ckpt"):
        back = UNet(**SMALL_UNET)
        load_pretrained(back, tmp_path / name)
        if name == "ldm.ckpt":
            assert torch.equal(back.label_emb.weight, torch.cat([rows, torch.zeros(1, 128)]))
            back.label_emb.load_state_dict(ours.label_emb.state_dict())
        assert same_state(back, ours)
    with pytest.raises(ValueError, match="layout diffusers is for DiTs, and this is a UNet"):
        save_pretrained(ours, tmp_path / "out", "diffusers")
    wider: dict[str, Any] = SMALL_UNET | {"learn_sigma": True}
    with pytest.raises(ValueError, match=r"own.safetensors is a checkpoint of another.*reshaped"):
        load_pretrained(UNet(**wider), tmp_path / "own.safetensors")


def test_an_edm_network_loads_from_edms_names(tmp_path):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "input_size": (8, 8), "in_channels": 3, "out_channels": 3, "num_classes": 5,
        "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1,
        "attention_resolutions": (4,), "dropout": 0.0,
    }  # fmt: skip
    ours, back = SongUNet(**sizes), SongUNet(**sizes)
    theirs = {f"model.{name}": value for name, value in ours.state_dict().items()}
    theirs["model.enc.8x8_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    save_file(theirs, tmp_path / "edm.safetensors")
    load_pretrained(back, tmp_path / "edm.safetensors")
    assert same_state(back, ours)


def test_files_that_hold_no_weights_are_named(tmp_path):
    for name in ("damaged.safetensors", "damaged.pt", "weights.npz"):
        (tmp_path / name).write_bytes(b"\x00" * 100)
    (tmp_path / "list.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "config.json").write_text(json.dumps({}))
    for name, message in [
        ("damaged.safetensors", "is no safetensors file"),
        ("damaged.pt", "or is damaged"),
        ("weights.npz", "ends in none of"),
        ("list.pt", "holds no dictionary of tensors"),
        ("nowhere.pt", "is no file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_pretrained(model(), tmp_path / name)
    with pytest.raises(ValueError, match="out.pt must end in .safetensors in layout original"):
        save_pretrained(model(), tmp_path / "out.pt", "original")
    with pytest.raises(ValueError, match="layout='ldm' is unknown; choose from original"):
        save_pretrained(model(), tmp_path / "out", "ldm")
