"""The loops of examples/ train; those of several processes draw other timesteps on each."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import speed_engine as se

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RANK = Path(__file__).parent / "rank.py"
FEW = ["--batch-size", "4"]


def run(example: str, draws: Path, *options: object, processes: int = 1) -> list[list]:
    """The draws of each process, as (step, timesteps)."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={processes}"] if processes > 1 else []
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, *launcher, str(RANK), str(draws), str(ROOT / "examples" / example)]
        + [str(option) for option in options],
        capture_output=True, text=True, cwd=draws.parent,
        env=os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{draws}-{rank}.pt") for rank in range(processes)]


def same(some: list, others: list) -> bool:
    return len(some) == len(others) and all(
        step == of and torch.equal(t, u) for (step, t), (of, u) in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_marks_two_lines(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 120
    assert re.findall(r"# SpeeD (\d)$", text, re.MULTILINE) == ["1", "2"]


def expected(
    method: str, scheduler: Any, accumulate: int = 1, rank: int = 0, size: int = 1
) -> list:
    """The draws of four steps of a run without a break."""
    built = se.build_method(method, scheduler)
    steps = [step for step in range(4) for _ in range(accumulate)]
    return [(step, built.draw(4, step, rank=rank, world_size=size)[0]) for step in steps]


@pytest.mark.long
@pytest.mark.parametrize(
    "example, scheduler, accumulate, options",
    [
        ("diffusers_accelerate.py", diffusers.DDPMScheduler(), 2, ["--accumulate", "2"]),
        (
            "pytorch_lightning.py",
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            1,
            ["--devices", "2", "--accelerator", "cpu"],
        ),
    ],
)
def test_two_processes_draw_other_timesteps_and_resume_as_if_there_was_no_break(
    example, scheduler, accumulate, options, tmp_path
):
    always = ["--out", tmp_path / "run", *FEW, *options]
    first = run(example, tmp_path / "first", "--steps", 2, *always, processes=2)
    rest = run(example, tmp_path / "rest", "--steps", 4, "--resume", *always, processes=2)
    drawn = [first[rank] + rest[rank] for rank in range(2)]
    for rank in range(2):
        assert same(drawn[rank], expected("speed_paper", scheduler, accumulate, rank, 2))
    assert not any(torch.equal(mine, other) for (_, mine), (_, other) in zip(*drawn, strict=True))


@pytest.mark.long
def test_the_end_of_an_epoch_is_not_the_end_of_a_step(tmp_path):
    options = ["--batch-size", 600, "--accumulate", 3, "--out", tmp_path]  # an epoch is two draws
    (draws,) = run("diffusers_accelerate.py", tmp_path / "draws", "--steps", 2, *options)
    assert [step for step, _ in draws] == [0, 0, 0, 1, 1, 1]
    assert (tmp_path / "checkpoint" / "step").read_text() == "2"


@pytest.mark.long
def test_a_plain_loop_on_timm_resumes_as_if_there_was_no_break(tmp_path):
    out = ["--out", tmp_path / "run", *FEW]
    (first,) = run("timm_vit.py", tmp_path / "first", "--steps", 2, *out)
    (rest,) = run("timm_vit.py", tmp_path / "rest", "--steps", 4, "--resume", *out)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    assert same(first + rest, expected("min_snr", scheduler))


@pytest.mark.long
def test_a_loop_over_sigma_generates_images(tmp_path):
    (draws,) = run("sigma_loop.py", tmp_path / "draws", "--steps", 30, "--out", tmp_path)
    sigmas = torch.cat([4 * t for _, t in draws]).exp()
    assert 0.0019 <= sigmas.min() < 0.1 and 10 < sigmas.max() <= 80.001
    images = torch.load(tmp_path / "trained.pt")["images"]
    assert images.shape == (16, 1, 8, 8) and bool(torch.isfinite(images).all())
    assert images.abs().max() < 5  # of noise of 80 something like pictures is left


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """Stable Diffusion with random weights, very small."""
    clip = importlib.import_module("transformers")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "c": 3, "t</w>": 4, "a": 5}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    config = clip.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    tokenizer = clip.CLIPTokenizer(vocab=words, merges=[], model_max_length=8)
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=clip.CLIPTextModel(config), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None,
    ).save_pretrained(tmp_path / "pipeline")  # fmt: skip
    return tmp_path / "pipeline"


@pytest.mark.long
def test_a_text_to_image_lora_trains_and_the_pipeline_loads_it(pipeline, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")
    out = tmp_path / "lora"
    options = ["--model", pipeline, "--images", folder, "--size", 16, "--batch-size", 2]
    run("text_to_image_lora.py", tmp_path / "draws", *options, "--steps", 3, "--out", out)
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    up = [of for name, of in weights.items() if "lora_B" in name or "lora.up" in name]
    assert up and all(bool((of != 0).any()) for of in up)  # they begin as zero
    diffusers.StableDiffusionPipeline.from_pretrained(pipeline).load_lora_weights(str(out))
