"""Every family trains for real at a reduced size, whatever it is told, and draws images."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from speed_engine import build, cli
from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.data.config import DataConfig
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.preparing.sources.digits import digits_folder
from speed_engine.evaluation.conditions import generation_conditions, prompted
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig, EdmUNetConfig, MDTConfig, ModelConfig, UNetConfig
from speed_engine.models.families import FAMILIES, Shape, build_network
from speed_engine.models.layers.open_sum import opened
from speed_engine.run.folder import read_config
from speed_engine.run.starting import resume, start
from speed_engine.runtime.sharding import blocks
from speed_engine.training.checkpoint import EMA_FILE
from speed_engine.training.config import OptimizerConfig

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    method="uniform",
    steps=50,
    batch_size=16,
    log_every=10,
    checkpoint_every=50,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=10),
    evaluation=EvaluationConfig(every=1000, num_images=20, solver_steps=2, features="none"),
)
SMALL: dict[str, ModelConfig] = {
    "dit": DiTConfig(dim=32, depth=2, num_heads=2),
    "dit-modern": DiTConfig(dim=32, depth=2, num_heads=2, variant="modern"),
    "dit-sigma": DiTConfig(dim=32, depth=2, num_heads=2, learn_sigma=True, checkpointing=0.5),
    "dit-bfloat16": DiTConfig(dim=32, depth=2, num_heads=2, residual_dtype="bfloat16"),
    "mdt": MDTConfig(dim=32, depth=3, num_heads=2, decode_layers=1),
    "mdt-v2": MDTConfig(version=2, dim=32, depth=3, num_heads=2, decode_layers=1, learn_sigma=True),
    "unet": UNetConfig(dropout=0.1, learn_sigma=True),
    "ddpm++": EdmUNetConfig(model_channels=16, attention_resolutions=(4,), dropout=0.1),
    "adm": EdmUNetConfig(network="adm", model_channels=64, channel_mult=(1,)),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP text encoder of random weights, with its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    end = vocabulary["<|endoftext|>"]
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=12, bos_token_id=end - 1,
            eos_token_id=end, pad_token_id=end,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def told_shards(tmp_path_factory, clip) -> Path:
    """The digits, with their names as text tokens and their halved selves as low resolution."""
    from speed_engine.encoders.text import TextEncoder

    names = "zero one two three four five six seven eight nine".split()
    tokens = TextEncoder(str(clip), torch.device("cpu"))(["", *names])
    folder = tmp_path_factory.mktemp("told")
    np.save(folder / "null_tokens.npy", tokens[0])
    digits = ShardReader(digits_folder())
    with ShardWriter(folder, "digits", 300) as writer:
        for i in range(600):
            sample = digits.read(i)
            image = np.load(io.BytesIO(sample["npy"]))
            low = image.reshape(1, 4, 2, 4, 2).mean((2, 4)).astype(np.uint8)
            members = {"tokens.npy": tokens[1 + int(sample["cls"])], "low.npy": low}
            writer.write(str(i), sample | {name: npy(array) for name, array in members.items()})
    return folder


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def trained(config: TrainConfig, run: Path) -> tuple[float, float]:
    """First and last mean loss of a run that has drawn images."""
    start(config, run, Console(file=io.StringIO()))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (run / "samples" / f"step-{config.steps:08d}.png").read_bytes().startswith(b"\x89PNG")
    losses = [record["loss"] for record in records if "loss" in record]
    return losses[0], losses[-1]


def told(folder: Path, *members: str) -> DataConfig:
    return DataConfig(
        source=str(folder), members=("npy", *members), token_shape=(12, 16), low_shape=(1, 4, 4)
    )


@pytest.mark.parametrize("name", ["dit", "dit-modern", "mdt", "mdt-v2"])
def test_the_first_block_gets_its_tokens_one_after_the_other_as_the_kernels_read_them(name):
    model = build_network(SMALL[name], Shape((8, 8), 3))
    seen: list[torch.Tensor] = []

    def look(_: torch.nn.Module, given: tuple) -> None:
        seen.append(opened(given[0]).closed())

    blocks(model)[0].register_forward_pre_hook(look)
    model(torch.randn(2, 3, 8, 8), torch.zeros(2))
    assert seen[0].shape == (2, 16, 32) and seen[0].is_contiguous()


@pytest.mark.parametrize("name", SMALL)
def test_every_family_learns_the_digits_and_draws(tmp_path, name):
    schedule = "edm" if isinstance(SMALL[name], EdmUNetConfig) else "linear"
    config = dataclasses.replace(CONFIG, model=SMALL[name], schedule=schedule)
    first, last = trained(config, tmp_path / "run")
    assert last < 0.9 * first


@pytest.mark.parametrize("name", ["dit", "mdt", "unet", "ddpm++"])
def test_every_family_learns_images_without_labels(tmp_path, told_shards, name):
    config = dataclasses.replace(CONFIG, model=SMALL[name], steps=30, data=told(told_shards))
    first, last = trained(config, tmp_path / "run")
    assert last < first


@pytest.mark.parametrize("name", ["dit-modern", "unet"])
def test_a_text_conditioned_model_trains_and_draws_from_prompts(tmp_path, told_shards, clip, name):
    run, out = tmp_path / "run", tmp_path / "drawn.png"
    data = told(told_shards, "tokens.npy")
    config = dataclasses.replace(CONFIG, model=SMALL[name], data=data)
    first, last = trained(config, run)
    assert last < 0.9 * first
    cli.main(
        ["sample", str(run), "--prompt", "three", "seven", "--text-encoder", str(clip)]
        + ["--count", "4", "--guidance", "2", "--out", str(out)]
    )
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name", ["dit", "mdt-v2", pytest.param("unet", marks=pytest.mark.long), "ddpm++"]
)
def test_super_resolution_trains_and_draws_from_smaller_images(tmp_path, told_shards, name):
    data = told(told_shards, "low.npy", "cls")
    config = dataclasses.replace(CONFIG, model=SMALL[name], data=data)
    first, last = trained(config, tmp_path / "run")
    assert last < 0.9 * first


@pytest.mark.parametrize("low_channels", [None, 1], ids=["plain", "super-resolution"])
@pytest.mark.parametrize("name", SMALL)
def test_nearly_all_parameters_are_in_blocks(name, low_channels):
    """Several processes gather, and compile, block by block: what is in none is gathered whole."""
    shape = Shape((8, 8), 1, num_classes=None, low_channels=low_channels)
    with torch.device("meta"):
        network = build_network(SMALL[name], shape)
    inside = [p for block in blocks(network) for p in block.parameters()]
    assert len(inside) == len(set(inside))
    sizes = [sum(p.numel() for p in of) for of in (inside, network.parameters())]
    assert sizes[0] > 0.6 * sizes[1]


def recorded(run: Path, *names: str) -> list[tuple[float, ...]]:
    """Figures of every record of training."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(of[name] for name in names) for of in records if "loss" in of]


def members_of(told_shards: Path) -> dict[str, DataConfig]:
    """Data by what models are conditioned on."""
    return {
        "labels": DataConfig(),
        "texts": told(told_shards, "tokens.npy"),
        "smaller": told(told_shards, "low.npy", "cls"),
    }


def without_dropout(model: ModelConfig) -> ModelConfig:
    """Each process draws its own dropout."""
    if isinstance(model, (UNetConfig, EdmUNetConfig)):
        return dataclasses.replace(model, dropout=0.0)
    return model


def quiet() -> Console:
    return Console(quiet=True)


def train_together(folder: Path, *options: str) -> None:
    """Train the configurations in a folder by two processes, see train_runs.py."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, ROOT / "tests" / "train_runs.py", folder, *options],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_two_processes_train_every_family_as_one(tmp_path, told_shards):
    """Parameters are shared out block by block, whatever a family calls its blocks."""
    data = members_of(told_shards)
    cases = [(name, "labels") for name in SMALL]
    cases += [("dit-modern", "texts"), ("unet", "texts")]
    cases += [(name, "smaller") for name in ("dit", "mdt-v2", "unet", "ddpm++")]
    cases = [(*case, "adamw") for case in cases]
    cases += [(name, "labels", "muon") for name in ("dit", "mdt-v2", "unet", "ddpm++")]
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    for name, members, optimizer in cases:
        config = dataclasses.replace(
            CONFIG, model=without_dropout(SMALL[name]), data=data[members], steps=4, log_every=1,
            checkpoint_every=4, optimizer=dataclasses.replace(CONFIG.optimizer, name=optimizer),
        )  # fmt: skip
        case = f"{name}-{members}-{optimizer}"
        (together / f"{case}.json").write_text(to_json(config))
        start(config, alone / case, Console(quiet=True))
    train_together(together)
    for case in cases:
        runs = [where / "-".join(case) for where in (together, alone)]
        figures = [recorded(run, "loss", "grad_norm") for run in runs]
        assert len(figures[0]) == 4
        assert np.allclose(*figures, rtol=1e-4), case
        averages = [load_file(run / EMA_FILE) for run in runs]
        for parameter, value in averages[1].items():
            torch.testing.assert_close(averages[0][parameter], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "cases",
    [
        [("dit", "labels")],
        pytest.param(
            [(name, "labels") for name in SMALL if name != "dit"]
            + [("dit-modern", "texts"), ("unet", "texts")]
            + [(name, "smaller") for name in ("dit", "mdt-v2", "unet", "ddpm++")],
            marks=pytest.mark.long,
        ),
    ],
    ids=["dit", "others"],
)
def test_sharded_in_bfloat16_as_on_gpus_runs_train_evaluate_and_are_sampled(
    tmp_path, told_shards, cases
):
    """Every input of every family meets bfloat16 parameters; each evaluation sees the average."""
    data = members_of(told_shards)
    together = tmp_path / "together"
    together.mkdir()
    for name, members in cases:
        config = dataclasses.replace(
            CONFIG,
            model=without_dropout(SMALL[name]),
            data=data[members],
            schedule="edm" if isinstance(SMALL[name], EdmUNetConfig) else "linear",
            steps=6,
            log_every=1,
            checkpoint_every=6,
            parallel="fsdp",
            evaluation=dataclasses.replace(CONFIG.evaluation, every=2),
        )
        case = f"{name}-{members}"
        (together / f"{case}.json").write_text(to_json(config))
        start(dataclasses.replace(config, evaluation=CONFIG.evaluation), tmp_path / case, quiet())
    train_together(together, "--as-on-gpus")
    for name, members in cases:
        case = f"{name}-{members}"
        losses = [recorded(where / case, "loss") for where in (together, tmp_path)]
        assert losses[0] != losses[1] and np.allclose(*losses, rtol=0.01), case
        evaluated = together / case / "samples" / "step-00000006.png"
        of_trainer, of_checkpoint = map(pixels, (evaluated, together / f"{case}.png"))
        assert np.abs(of_trainer - of_checkpoint).mean() < 0.1, case


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


def test_latents_are_drawn_unbounded_and_kept_as_arrays(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "latents", "x", 50) as writer:
        for i in range(100):
            writer.write(str(i), {"npy": npy(3 * rng.normal(size=(4, 4, 4)).astype(np.float16))})
    data = DataConfig(
        source=str(tmp_path / "latents"), members=("npy",), image_shape=(4, 4, 4), latents=True
    )
    config = dataclasses.replace(CONFIG, model=SMALL["dit"], steps=20, data=data)
    start(config, tmp_path / "run", Console(file=io.StringIO()))
    drawn = np.load(tmp_path / "run" / "samples" / "step-00000020.npy")
    assert drawn.shape == (20, 4, 4, 4) and drawn.dtype == np.float32 and abs(drawn).max() > 1


@pytest.mark.parametrize("name", ["unet", "mdt-v2"])
def test_dropout_and_masks_resume_bit_for_bit(tmp_path, name):
    config = dataclasses.replace(CONFIG, model=SMALL[name], steps=6, log_every=1)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    start(config, whole, Console(file=io.StringIO()))
    start(dataclasses.replace(config, steps=3), halved, Console(file=io.StringIO()))
    resume(halved, Console(file=io.StringIO()), steps=6)
    figures = []
    for run in (whole, halved):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures.append([(r["loss"], r["squared_error"]) for r in records if "loss" in r])
    assert figures[0] == figures[1]


@pytest.mark.parametrize("name", ["dit", pytest.param("unet", marks=pytest.mark.long)])
@pytest.mark.parametrize("members", [("tokens.npy",), ("low.npy", "cls")])
def test_the_step_of_a_told_model_is_one_graph_compiled_once(told_shards, name, members):
    settings = without_dropout(SMALL[name])
    config = dataclasses.replace(CONFIG, model=settings, data=told(told_shards, *members))
    model = build.build_model(config)
    objective = build.build_objective(config, build.build_process(config), model)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    eager = lambda *b: objective(model, *b).loss
    step = torch.compile(eager, fullgraph=True, backend="aot_eager")
    conditions = generation_conditions(config.data, config.evaluation.num_images, config.seed)
    before, graphs = counted["unique_graphs"], []
    for done in range(3):
        batch = torch.rand(20, 1, 8, 8), conditions, torch.arange(20) + 20 * done, done
        loss = step(*batch)
        loss.backward()
        torch.testing.assert_close(loss, eager(*batch))
        graphs.append(counted["unique_graphs"] - before)
    assert graphs[0] == 1 and graphs[1] == graphs[2]


@pytest.mark.parametrize("name", SMALL)
def test_every_family_survives_json(name):
    config = dataclasses.replace(CONFIG, model=SMALL[name])
    assert from_json(to_json(config)) == config


def test_a_configuration_without_a_family_is_of_a_dit():
    values = json.loads(to_json(CONFIG))
    del values["model"]["family"]
    assert from_json(json.dumps(values)) == CONFIG


def test_an_unknown_family_is_named():
    values = json.loads(to_json(CONFIG))
    values["model"]["family"] = "gan"
    with pytest.raises(ValueError, match="model.family=.gan.: should be one of 'dit', 'mdt', 'un"):
        from_json(json.dumps(values))


def test_every_configuration_has_a_builder():
    assert set(FAMILIES) == {type(config) for config in SMALL.values()}


@pytest.mark.parametrize(
    "settings, channels, millions",  # of the DiT paper's table 4, EDM's log, ADM's table 4
    [
        (DiTConfig(size="DiT-XL/2", learn_sigma=True), 4, 675),
        (DiTConfig(size="DiT-S/8", learn_sigma=True), 4, 33),
        (EdmUNetConfig(size="ddpm++-cifar10"), 3, 56),
        (UNetConfig(size="adm-64", learn_sigma=True), 3, 296),
    ],
)
def test_published_sizes_take_the_place_of_the_fields(settings, channels, millions):
    with torch.device("meta"):
        network = build_network(settings, Shape((32, 32), channels, num_classes=1000))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


def test_a_size_and_what_it_sets_cannot_both_be_given(capsys):
    with pytest.raises(ValueError, match="model.dim=32: model.size=DiT-S/2 sets it; use --model"):
        DiTConfig(size="DiT-S/2", dim=32)
    with pytest.raises(SystemExit):
        cli.main(["train", "imagenet256-dit-xl2", "--dry-run", "--model.depth", "2"])
    assert "model.depth=2: model.size=DiT-XL/2 sets it" in " ".join(capsys.readouterr().err.split())
    cli.main(
        ["train", "imagenet256-dit-xl2", "--dry-run", "--model.size", "None", "--model.depth", "2"]
    )
    assert "model       dit on 4 x 32 x 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, shape, message",
    [
        (DiTConfig(size="DiT-Q/2"), Shape((8, 8), 1), "'DiT-Q/2' names no DiT"),
        (UNetConfig(size="huge"), Shape((8, 8), 1), "'huge' is unknown; choose from speed"),
        (DiTConfig(patch_size=3), Shape((8, 8), 1), "patch_size=3 does not divide"),
        (DiTConfig(num_heads=3), Shape((8, 8), 1), "num_heads=3 does not divide the width 64"),
        (MDTConfig(), Shape((8, 8), 1, token_dim=8), "family mdt takes no text"),
        (DiTConfig(), Shape((8, 8), 1, num_classes=3, token_dim=8), "a text or a class"),
        (UNetConfig(), Shape((9, 9), 1), "multiple of 2"),
    ],
)
def test_what_does_not_fit_is_said(settings, shape, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_network(settings, shape)


@pytest.mark.parametrize(
    "members, changes, message",
    [
        (("tokens.npy",), {}, r"has no member 'tokens.npy', only .*'cls', 'npy'"),
        (("low.npy",), {}, r"has no member 'low.npy'"),
    ],
)
def test_shards_without_what_the_model_is_told_are_refused(tmp_path, members, changes, message):
    data = dataclasses.replace(CONFIG.data, members=("npy", *members), **changes)
    with pytest.raises(ValueError, match=message):
        start(dataclasses.replace(CONFIG, data=data), tmp_path / "run", Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"token_shape": (77, 768)}, r"has tokens of shape \(12, 16\); expected \(77, 768\)"),
        (
            {"low_shape": (1, 2, 2)},
            r"has low_resolution of shape \(1, 4, 4\); expected \(1, 2, 2\)",
        ),
    ],
)
def test_conditions_of_another_shape_are_refused(tmp_path, told_shards, shapes, message):
    member = "tokens.npy" if "token_shape" in shapes else "low.npy"
    data = dataclasses.replace(told(told_shards, member), **shapes)
    with pytest.raises(ValueError, match=message):
        start(dataclasses.replace(CONFIG, data=data), tmp_path / "run", Console(file=io.StringIO()))


def test_prompts_for_a_model_without_texts_are_refused(tmp_path, clip):
    run = tmp_path / "run"
    trained(dataclasses.replace(CONFIG, steps=5), run)
    config = read_config(run)
    with pytest.raises(ValueError, match="is conditioned on labels; a prompt needs one"):
        prompted(config.data, 3, ["three"], str(clip))


def test_prompts_need_the_encoder_of_the_data(told_shards, clip):
    config = dataclasses.replace(CONFIG, data=told(told_shards, "tokens.npy"))
    with pytest.raises(ValueError, match="needs --text-encoder"):
        prompted(config.data, 3, ["three"], None)
    data = dataclasses.replace(config.data, token_shape=(77, 768))
    with pytest.raises(ValueError, match=r"makes tokens of shape \(12, 16\)"):
        prompted(data, 3, ["three"], str(clip))
    with pytest.raises(ValueError, match="cannot be loaded"):
        prompted(config.data, 3, ["three"], str(told_shards))
