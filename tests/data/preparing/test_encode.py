import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from speed_engine.data.format.folder import LocalFolder
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.preparing.encode import LatentEncoder, encode
from speed_engine.encoders.text import TextEncoder
from speed_engine.encoders.vae import decode_latents

ROOT = Path(__file__).parents[3]
KILLED = Path(__file__).parent / "killed.py"
CPU = torch.device("cpu")
# Its annotations say less than it takes and gives.
AutoencoderKL: Any = importlib.import_module("diffusers").AutoencoderKL
CAPTIONS = [f"a cat {i}\nanother" for i in range(18)]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A random VAE of the family of Stable Diffusion's, four times as coarse as the pictures."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    """A random CLIP text model of 12 tokens with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("text")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """18 noisy pictures of 16 x 16 with label and captions, in shards of 4."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "x", 4, {"classes": ["a", "b"]}) as writer:
        for i, caption in enumerate(CAPTIONS):
            image = generator.integers(0, 256, (3, 16, 16), dtype=np.uint8)
            label = str(i % 2).encode()
            writer.write(f"{i:04d}", {"npy": npy(image), "cls": label, "txt": caption.encode()})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def test_mean_and_deviation_are_those_of_the_vae(vae, shards, tmp_path):
    encode(shards, tmp_path / "out", LatentEncoder(str(vae), CPU), None, batch_size=3)
    pictures, latents = ShardReader(shards, ("npy",)), ShardReader(tmp_path / "out", ("npy",))
    assert latents.dataset.contents["npy"] == {"dtype": "float16", "shape": [8, 4, 4]}
    assert latents.counts == pictures.counts == (4, 4, 4, 4, 2)
    model = AutoencoderKL.from_pretrained(vae).eval()
    for n in range(18):
        pixels = torch.from_numpy(array(pictures.read(n)["npy"]))[None] / 127.5 - 1
        with torch.no_grad():
            posterior = model.encode(pixels).latent_dist
        expected = torch.cat([posterior.mean, posterior.std], 1)[0]
        stored = torch.from_numpy(array(latents.read(n)["npy"])).float()
        torch.testing.assert_close(stored, expected, atol=1e-5, rtol=2e-3)  # float16


def test_labels_captions_keys_and_facts_are_kept(vae, shards, tmp_path):
    encode(shards, tmp_path / "out", LatentEncoder(str(vae), CPU), None, batch_size=8)
    before, after = (ShardReader(f, ("cls", "txt")) for f in (shards, tmp_path / "out"))
    assert [after.read(n) for n in range(18)] == [before.read(n) for n in range(18)]
    keys = [[reader.describe(n).split()[-1] for n in range(18)] for reader in (before, after)]
    assert keys[0] == keys[1]
    metadata = LocalFolder(tmp_path / "out").load(())[0].metadata
    assert metadata.pop("vae") == str(vae)
    assert metadata == {"classes": ["a", "b"], "latent_scale": 0.25, "latent_shift": 0.5}


def test_tokens_are_those_of_the_first_caption(text_encoder, shards, tmp_path, caplog):
    encode(shards, tmp_path / "out", None, TextEncoder(str(text_encoder), CPU), batch_size=5)
    tokenizer = CLIPTokenizer.from_pretrained(text_encoder)
    model = CLIPTextModel.from_pretrained(text_encoder).eval()
    reader = ShardReader(tmp_path / "out", ("tokens.npy", "npy"))
    null = np.load(tmp_path / "out" / "null_tokens.npy", allow_pickle=False)
    stored = {caption: array(reader.read(n)["tokens.npy"]) for n, caption in enumerate(CAPTIONS)}
    for caption, tokens in {**stored, "": null}.items():
        ids = tokenizer(
            caption.split("\n")[0],
            padding="max_length",
            max_length=12,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            expected = model(ids.input_ids).last_hidden_state[0]
        assert tokens.shape == (12, 16) and tokens.dtype == np.float16
        np.testing.assert_allclose(tokens, expected, atol=2e-3, rtol=2e-3)
    assert array(reader.read(0)["npy"]).shape == (3, 16, 16)  # the picture stays
    assert "null_tokens.npy" in LocalFolder(tmp_path / "out").load(())[0].files
    assert "cut" not in caplog.text


def test_tokens_that_are_there_stay_with_those_of_no_text(vae, tmp_path):
    with ShardWriter(tmp_path / "told", "x", 4, files=["null_tokens.npy"]) as writer:
        tokens, picture = np.zeros((3, 2), np.float16), np.zeros((3, 16, 16), np.uint8)
        writer.write("1", {"npy": npy(picture), "tokens.npy": npy(tokens)})
        (tmp_path / "told/null_tokens.npy").write_bytes(npy(tokens + 1))
    encode(tmp_path / "told", tmp_path / "out", LatentEncoder(str(vae), CPU), None, batch_size=1)
    reader = ShardReader(tmp_path / "out", ["tokens.npy"])
    assert (array(reader.read_file("null_tokens.npy")) == 1).all()


def test_captions_that_are_cut_are_counted(text_encoder, tmp_path, caplog):
    with ShardWriter(tmp_path / "shards", "x", 4) as writer:
        writer.write("1", {"txt": b"short"})
        writer.write("2", {"txt": b"a very long caption of many letters"})
    encode(
        tmp_path / "shards",
        tmp_path / "out",
        None,
        TextEncoder(str(text_encoder), CPU),
        batch_size=2,
    )
    assert "1 captions were longer" in caplog.text


def run(*command: str) -> int:
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment).returncode


@pytest.mark.long
def test_killed_and_continued_by_two_ranks_the_result_is_that_of_one(
    vae, text_encoder, shards, tmp_path
):
    options = [f"--vae={vae}", f"--text-encoder={text_encoder}", "--batch-size=3"]
    encoding = ["encode", str(shards), str(tmp_path / "killed"), *options]
    assert run(str(KILLED), "4", *encoding) == -signal.SIGKILL
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert run("-m", *launcher, "-m", "speed_engine", "shards", *encoding) == 0
    models = LatentEncoder(str(vae), CPU), TextEncoder(str(text_encoder), CPU)
    torch.set_num_threads(1)
    encode(shards, tmp_path / "whole", *models, batch_size=3)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_rank_takes_its_own_shards_only_and_the_last_one_completes(vae, shards, tmp_path):
    model, done = LatentEncoder(str(vae), CPU), []
    encode(shards, tmp_path / "out", model, None, batch_size=4, rank=1, world_size=2)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        "x-000001.tar",
        "x-000003.tar",
    ]
    assert not (tmp_path / "out" / "dataset.json").exists()
    encode(
        shards,
        tmp_path / "out",
        model,
        None,
        batch_size=4,
        rank=0,
        world_size=2,
        advance=done.append,
    )
    assert done == [0, 4, 4, 2] and (tmp_path / "out" / "dataset.json").exists()


def test_decoding_undoes_scale_and_shift(vae):
    model = LatentEncoder(str(vae), CPU).vae
    latents = torch.randn(2, 4, 4, 4)
    images = decode_latents(model, (latents - 0.5) * 0.25, scale=0.25, shift=0.5)
    with torch.no_grad():
        expected = ((model.decode(latents).sample + 1) * 127.5).clamp(0, 255)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 16, 16)
    assert (images - expected).abs().max() <= 0.51


def test_what_cannot_be_encoded_is_said_before_any_work(vae, text_encoder, tmp_path):
    with ShardWriter(tmp_path / "latents", "x", 4) as writer:
        writer.write("1", {"npy": npy(np.zeros((8, 4, 4), np.float16))})
    out, model = tmp_path / "out", LatentEncoder(str(vae), CPU)
    with pytest.raises(ValueError, match="has no pictures"):
        encode(tmp_path / "latents", out, model, None, batch_size=1)
    with pytest.raises(ValueError, match="has no captions"):
        encode(tmp_path / "latents", out, None, TextEncoder(str(text_encoder), CPU), batch_size=1)
    with pytest.raises(ValueError, match="nothing to encode"):
        encode(tmp_path / "latents", out, None, None, batch_size=1)
    assert not out.exists()
    with pytest.raises(ValueError, match="AutoencoderKL .* cannot be loaded"):
        LatentEncoder(str(tmp_path / "latents"), CPU)
    with pytest.raises(ValueError, match="CLIPTextModel .* cannot be loaded"):
        TextEncoder(str(tmp_path / "latents"), CPU)


def test_a_text_model_without_its_tokenizer_is_refused(text_encoder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((text_encoder / name).read_bytes())
    with pytest.raises(ValueError, match="190 embeddings, its tokenizer . words"):
        TextEncoder(str(tmp_path), CPU)


def test_pickled_weights_are_not_loaded(vae, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((vae / "config.json").read_bytes())
    model = AutoencoderKL.from_pretrained(vae)
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        LatentEncoder(str(folder), CPU)


def test_what_float16_cannot_hold_is_an_error(vae, shards, tmp_path):
    model = LatentEncoder(str(vae), CPU)
    with torch.no_grad():
        model.vae.quant_conv.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"sample '0000': .* float16 cannot hold"):
        encode(shards, tmp_path / "out", model, None, batch_size=4)
