"""The Python API: what a notebook does, and what is refused."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import speed_engine as se
from speed_engine import cli
from speed_engine.api.card import nearest_preset
from speed_engine.build import build_process
from speed_engine.config import TrainConfig, to_json
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.presets import PRESETS
from speed_engine.runtime.checks import UserError

ROOT = Path(__file__).parents[2]
NOTEBOOK = Path(__file__).parent / "notebook.py"
QUIET = Console(file=io.StringIO())
TINY = {"dim": 16, "depth": 1, "num_heads": 2}
NO_FEATURES = {"features": "none", "num_images": 20, "solver_steps": 2}


def python(*arguments: object) -> str:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def wrong(value: Any) -> Any:
    """What no type allows."""
    return value


def write_shards(folder: Path, count: int, names: tuple[str, ...] = ()) -> str:
    """Pictures like CIFAR's, smaller, one colour for each of two classes."""
    random = np.random.default_rng(0)
    metadata = {"classes": list(names)} if names else {}
    with ShardWriter(folder, "x", 100, metadata) as writer:
        for i in range(count):
            image = random.integers(0, 60, (3, 8, 8)).astype(np.uint8)
            image[i % 2] += 150
            writer.write(f"{i:04}", {"npy": npy_bytes(image), "cls": str(i % 2).encode()})
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> se.Run:
    shards = write_shards(tmp_path_factory.mktemp("data") / "shards", 40, ("bird", "frog"))
    return se.train(
        "digits",
        tmp_path_factory.mktemp("runs") / "run",
        console=QUIET,
        steps=4,
        batch_size=8,
        log_every=2,
        data={"source": shards},
        model=TINY,
        optimizer={"averages": ["power=1"], "learning_rate": 0.05, "warmup_steps": 0},
        evaluation=NO_FEATURES,
    )


def test_a_notebook_of_fifteen_lines_trains_measures_saves_and_another_process_has_its_images(
    tmp_path,
):
    lines = [line for line in NOTEBOOK.read_text().splitlines() if line.strip()]
    assert len(lines) <= 15
    shards = write_shards(tmp_path / "shards", 400, ("bird", "frog"))
    assert python(NOTEBOOK, shards, tmp_path).splitlines()[-1] == "True True"
    again = (
        "import sys, torch, speed_engine as se\n"
        "images = se.load(sys.argv[1]).generate(4, labels=['frog'], seed=7)\n"
        "print(torch.equal(images, torch.load(sys.argv[2])))"
    )
    assert python("-c", again, tmp_path / "model", tmp_path / "images.pt") == "True\n"


def test_a_model_generates_the_images_of_the_command(run, tmp_path):
    out = tmp_path / "images.npz"
    how = "--count 5 --seed 3 --solver heun --solver-steps 5 --guidance 1.5 --batch-size 5"
    cli.main(["sample", str(run.folder), "--out", str(out), *how.split()])
    images = run.model().generate(5, seed=3, solver="heun", steps=5, guidance=1.5)
    archive = np.load(out)["arr_0"]
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), archive)


def test_what_is_saved_generates_without_its_run_or_its_data(run, tmp_path):
    model = run.model()
    folder = model.save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["data"]["source"] = "/nowhere"
    (folder / "config.json").write_text(json.dumps(config))
    again = se.load(folder)
    assert again.facts == model.facts and again.facts.step == 4
    choices: list[dict[str, Any]] = [{}, {"labels": [1, 0, 0]}, {"labels": "frog", "guidance": 2.0}]
    for options in choices:
        assert torch.equal(again.generate(7, **options), model.generate(7, **options))


def test_another_average_is_another_model_and_the_name_of_a_class_its_number(run):
    model, other = run.model(), se.load(run.folder, average="power=1")
    assert not torch.equal(model.generate(2), other.generate(2))
    frogs = model.generate(2, labels="frog")
    assert torch.equal(frogs, model.generate(2, labels=torch.tensor([1])))
    assert not torch.equal(frogs, model.generate(2, labels=0))
    assert torch.equal(model.generate(2), model.generate(2, labels=["bird", "frog"]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": "frok"}, "unknown class 'frok'; did you mean 'frog'?"),
        ({"labels": [0, 2]}, "labels=[0, 2]: needed are classes from 0 to 1."),
        ({"labels": []}, "labels=[]: needed are classes from 0 to 1."),
        ({"prompts": "a frog"}, "this model is conditioned on labels; a prompt needs one"),
        ({"n": 0}, "n=0: must be at least 1"),
        ({"steps": 5000}, "evaluation.solver_steps=5000: must be at most num_timesteps=1000"),
        ({"n": 2.5}, "n=2.5: must be a whole number."),
        ({"labels": [0.5]}, "labels=[0.5]: needed are classes from 0 to 1."),
        ({"labels": 0.5}, "labels=0.5: needed are classes from 0 to 1."),
        ({"labels": [None]}, "labels=[None]: needed are classes from 0 to 1."),
        ({"seed": 2**63}, "seed=9223372036854775808: must be at most 9,223,372,036,854,775,807."),
        ({"seed": 1.5}, "seed=1.5: must be a whole number."),
        ({"batch_size": 0}, "batch_size=0: must be at least 1."),
        ({"steps": 2.0}, "evaluation.solver_steps=2.0: should be a valid integer."),
        ({"guidance": "2"}, 'evaluation.guidance="2": should be a valid number.'),
        ({"solver": "heum"}, "solver 'heum' is unknown; choose from ddim, euler, heun,"),
    ],
)
def test_what_a_model_cannot_generate_is_refused(run, options, message):
    asked: dict[str, Any] = {"n": 2, **options}
    with pytest.raises(UserError) as refused:
        run.model().generate(**asked)
    assert message in str(refused.value)


def test_an_unconditional_model_takes_no_labels(tmp_path):
    options: dict[str, Any] = {"console": QUIET, "steps": 1, "batch_size": 4, "model": TINY}
    run = se.train(
        "digits", tmp_path / "run", data={"members": ["npy"]},
        evaluation={**NO_FEATURES, "guidance": 1}, **options,
    )  # fmt: skip
    model = se.load(run.model().save_pretrained(tmp_path / "model"))
    assert model.generate(3).shape == (3, 1, 8, 8)
    with pytest.raises(UserError, match="conditioned on nothing, and not on classes"):
        model.generate(3, labels=1)


def test_a_saved_latent_model_decodes_by_what_its_data_recorded(run, tmp_path, monkeypatch):
    model = run.model()
    data = dataclasses.replace(model.config.data, latents=True, vae="some/vae")
    none = dataclasses.replace(model.config, data=data)
    facts = dataclasses.replace(model.facts, metadata={"latent_scale": 0.5, "latent_shift": 2.0})
    folder = se.Model(none, model.network, model.null, facts).save_pretrained(tmp_path / "model")
    channels = model.config.data.image_shape[0]
    vae = SimpleNamespace(name="some/vae", config=SimpleNamespace(latent_channels=channels))
    monkeypatch.setattr("speed_engine.build.load_vae", lambda name, device: vae)
    monkeypatch.setattr(
        "speed_engine.encoders.vae.decode_latents",
        lambda vae, latents, scale, shift: (vae.name, latents.shape, scale, shift),
    )
    decoded = se.load(folder).generate(3)
    assert decoded == ("some/vae", (3, channels, 8, 8), 0.5, 2.0)


def test_the_card_says_how_the_model_was_trained_and_what_was_measured(run, tmp_path):
    model = run.model()
    figures = {"step": 4, "num_generated": 300, "solver": "ddim", "solver_steps": 5}
    figures |= {"guidance": 1.0, "fid": 3.25, "extractor": "x"}
    facts = dataclasses.replace(model.facts, figures=figures, command=("speed-engine", "a b"))
    measured = dataclasses.replace(model, facts=facts)
    card = (measured.save_pretrained(tmp_path, name="me/frogs") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: speed-engine\npipeline_tag: unconditional-image-gen")
    for part in (
        '# me/frogs\n', 'se.load("me/frogs").generate(16)', "`digits` with steps = 4,",
        "`speed_paper` on the process `linear`", f"SHA-256 `{model.facts.data}`", "3.25",
        "| trained | 4 steps of 8 images, 32 images |", "300 images by ddim, 5 steps, guidance 1",
        "`speed-engine 'a b'`", "`speed-engine train config.json` trains it again",
    ):  # fmt: skip
        assert part in card, part


def test_names_in_the_card_are_text(run, tmp_path):
    model = run.model()
    config = dataclasses.replace(
        model.config, data=dataclasses.replace(model.config.data, source="a|`b\nc")
    )
    folder = dataclasses.replace(model, config=config).save_pretrained(tmp_path, name='x"_y_\n# z')
    card = (folder / "README.md").read_text()
    assert '\n# x"\\_y\\_\\\\n\\# z\n' in card
    assert 'se.load("x\\"_y_\\n# z").generate(16)' in card
    assert "| data | `` a\\|`b\\nc ``, images of shape" in card


def test_the_card_has_the_figures_of_its_own_average(tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    records = folder / "metrics.jsonl"
    measured = {"num_generated": 3, "solver": "ddim", "solver_steps": 5, "guidance": 1.0}
    own, other = ({"step": 4, **measured, "fid": fid} for fid in (3.25, 1.5))
    with records.open("a") as file:
        file.write(json.dumps(own) + "\n" + json.dumps(other | {"average": "power=1"}) + "\n")
    (folder / "environment.json").write_text("{")
    model = se.load(folder)
    assert model.facts.figures["fid"] == 3.25 and model.facts.command == ()
    assert se.load(folder, average="power=1").facts.figures["fid"] == 1.5
    later = dataclasses.replace(model, facts=dataclasses.replace(model.facts, step=9))
    card = (later.save_pretrained(tmp_path / "saved") / "README.md").read_text()
    assert "guidance 1, by the model of step 4 |" in card


def test_numbers_of_numpy_are_numbers(run, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("speed_engine.run.starting.start", lambda *run: started.append(run[0]))
    rate = np.logspace(-3, -2, 2, dtype=np.float32)[0]
    se.train("digits", tmp_path, steps=np.int64(7), optimizer={"learning_rate": rate})
    assert started[0].steps == 7 and started[0].optimizer.learning_rate == float(rate)
    images = run.model().generate(np.int64(2), labels=np.int64(1), seed=np.int32(3))
    assert torch.equal(images, run.model().generate(2, labels=1, seed=3))


def test_the_nearest_preset_of_every_preset_is_itself():
    for name, (_, config) in PRESETS.items():
        assert nearest_preset(dataclasses.replace(config, compile="off")) == f"`{name}`"


def test_metrics_are_a_table(run):
    of_training = [record for record in run.metrics if "loss" in record]
    assert [(r["step"], r["images"]) for r in of_training] == [(2, 16), (4, 32)]
    assert all(r["loss"] > 0 for r in of_training)


def test_a_comparison_is_told_the_call_that_makes_it_again(tmp_path, monkeypatch):
    told = []
    run = lambda command, console, called: told.append(called) or tmp_path
    monkeypatch.setattr("speed_engine.api.comparison.run_comparison", run)
    se.compare("digits", ["uniform"], seeds=2, learning_rates=[1e-3], model={"depth": 1})
    assert told == [
        "speed_engine.compare('digits', ['uniform'], seeds=2, evaluations=10, "
        "learning_rates=[0.001], final_solver_steps=[8, 50], model={'depth': 1})"
    ]


def test_a_comparison_takes_a_budget_of_seconds(tmp_path, monkeypatch):
    asked = []
    run = lambda *given: asked.append(given) or tmp_path
    monkeypatch.setattr("speed_engine.api.comparison.run_comparison", run)
    se.compare("digits", budget_seconds=90)
    ((command, _, called),) = asked
    assert command.budget_seconds == 90 and "budget_seconds=90, " in called


def test_a_run_of_a_recipe_is_named_after_the_recipe(monkeypatch):
    started = []
    monkeypatch.setattr("speed_engine.run.starting.start", lambda *run: started.append(run[1]))
    se.train("digits", recipe="flow_muon")
    assert started == [Path("runs/digits-flow_muon-0")]


def test_changes_hold_before_a_file_and_runs_are_named_after_it(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("speed_engine.run.starting.start", lambda *run: started.append(run[:2]))
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('preset = "digits"\nsteps = 7\nseed = 3\n')
    digits = PRESETS["digits"][1]
    se.train(Path("mine.toml"), steps=9, model={"depth": 1})
    model = dataclasses.replace(digits.model, depth=1)
    expected = dataclasses.replace(digits, steps=9, seed=3, model=model)
    assert started.pop() == (expected, Path("runs/mine-speed_paper-3"))
    se.train(TrainConfig(), "somewhere", model=model)
    assert started.pop() == (TrainConfig(model=model), Path("somewhere"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda run: se.train("digitz"), "unknown preset 'digitz'; did you mean 'digits'?"),
        (lambda run: se.train("digits", step=5), "step is unknown, the nearest is steps"),
        (lambda run: se.train("digits", model={"dept": 5}), "model.dept is unknown, the nearest"),
        (lambda run: se.train("digits", run.folder), "run exists already; continue it"),
        (lambda run: se.train("ffhq-unet", recipe="flow"), "train without it by --model.no-learn"),
        (lambda run: run.evaluate(num_image=5), "evaluation.num_image is unknown, the nearest"),
        (lambda run: run.model("ema=0.5"), "holds no EMA 'ema=0.5'; this run keeps ema, power=1"),
        (lambda run: se.load("nothing-here"), "nothing-here is no folder; give the folder of"),
        (lambda run: se.load(ROOT), "is not a run folder: it has no config.json"),
        (lambda run: se.compare("ffhq-unet"), "unknown preset 'ffhq-unet'"),
        (lambda run: se.compare("digits", ["uniforn"]), "uniforn"),
        (lambda run: se.compare("digits", "uniforn"), "unknown method 'uniforn'"),
        (lambda run: se.compare("digits", seeds=wrong(1.5)), "seeds=1.5: must be a whole number."),
        (lambda run: se.compare("digits", wrong([3])), "methods.0=3: should be a valid string."),
        (lambda run: se.compare("digits", learning_rates=wrong(1e-3)), "learning_rates=0.001:"),
        (lambda run: se.compare("digits", final_solver_steps=wrong(8)), "final_solver_steps=8:"),
        (lambda run: se.train(wrong({"steps": 5})), "{'steps': 5} is neither the name of a preset"),
        (lambda run: se.train("digits", **wrong({"optimizer.beta1": 0.5})), "beta1 in its section"),
        (lambda run: se.load(run.folder, device=wrong("tpu")), "unknown device 'tpu'"),
        (lambda run: se.load(run.folder, average="power=nan"), "positive exponent of at most 10^6"),
        (lambda run: se.Run(wrong("nothing-here")).metrics, "nothing-here is not a run folder"),
        (lambda run: se.load(wrong(None)), "source=None: must be a path"),
        (lambda run: se.load("no\0path"), "must be a path"),
        (lambda run: se.load(run.folder, average=wrong(3)), "average=3: must be the name of"),
        (lambda run: run.model(average=wrong(None)), "average=None: must be the name of"),
        (lambda run: run.model().generate(wrong(None)), "n=None: must be a whole number"),
        (
            lambda run: run.model().generate(1, prompts="a", labels=1),
            "labels and prompts: a model is conditioned on one of them",
        ),
        (
            lambda run: se.load(run.model().save_pretrained("saved"), average="power=7"),
            "average='power=7': saved is a saved model, which has one set of parameters",
        ),
        (lambda run: run.model(checkpoint=3), "has no checkpoint of step 3; it keeps those of: 4"),
        (lambda run: run.model(checkpoint=wrong("4")), "checkpoint=4: must be a whole number"),
        (
            lambda run: se.load(run.model().save_pretrained("saved"), checkpoint=4),
            "checkpoint=4: saved is a saved model, which has one set of parameters",
        ),
        (lambda run: run.evaluate(vae="some/vae"), "data.vae=some/vae: is for data.latents True"),
        (lambda run: se.compare("digits", budget_seconds=0), "budget_seconds=0.0: must be posit"),
        (lambda run: se.compare("digits", method="p2"), "method=p2: has no effect in a comparison"),
        (lambda run: run.model().generate(1, seed=True), "seed=True: must be a whole number"),
        (lambda run: run.model().save_pretrained(wrong(3)), "folder=3: must be a path"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(run, call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        call(run)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["model.safetensors", "speed_engine.json", "null.safetensors"])
def test_a_damaged_model_is_refused(run, tmp_path, file):
    folder = run.model().save_pretrained(tmp_path / "model")
    (folder / file).write_bytes(b"{")
    with pytest.raises(UserError, match="model holds no whole model: .*; save or fetch it again"):
        se.load(folder)


def test_weights_of_another_model_are_refused(run, tmp_path):
    folder = run.model().save_pretrained(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"x.{name}": of for name, of in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors is a checkpoint of another model"):
        se.load(folder)


def test_a_model_goes_to_the_hub_and_comes_back(run, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token, library_name):
            calls.append(("api", token, library_name))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            calls.append(("upload", repo_id, sorted(files), revision, commit_message))
            for name, content in files.items():
                (tmp_path / name).write_bytes(content)
            return "https://huggingface.co/me/frogs/commit/1"

    def snapshot_download(repo_id, *, revision, token, allow_patterns):
        calls.append(("download", repo_id, revision, token, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = run.model()
    url = model.push_to_hub("me/frogs", private=True, token="secret", commit_message="first")
    again = se.load("me/frogs", revision="main", token="secret")
    files = ["README.md", "config.json", "model.safetensors", "null.safetensors"]
    files.append("speed_engine.json")
    assert url == "https://huggingface.co/me/frogs/commit/1"
    assert calls == [
        ("api", "secret", "speed-engine"),
        ("create", "me/frogs", True, True),
        ("upload", "me/frogs", files, None, "first"),
        ("download", "me/frogs", "main", "secret", files),
    ]
    assert "# me/frogs" in (tmp_path / "README.md").read_text()
    assert torch.equal(again.generate(3), model.generate(3))


def test_a_model_that_the_hub_does_not_have_is_one_message(tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise OSError("401 Client Error. Repository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="me/gone is no folder here, and cannot be fetched .* Repo"):
        se.load("me/gone")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match="me/other .* is no model of speed_engine: it has no speed"):
        se.load("me/other")


def test_a_hub_that_refuses_an_upload_is_one_message(run, monkeypatch):
    import huggingface_hub

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, *_, **__):
            raise OSError("Token is required\n\n(`token=True`), but no token found.")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError) as refused:
        run.model().push_to_hub("me/frogs")
    message = "me/frogs cannot be written on the Hugging Face hub: Token is required (`token=True`)"
    assert str(refused.value).startswith(message) and "`hf auth login`" in str(refused.value)


def test_a_model_is_shown_in_one_line(run):
    shown = repr(run.model())
    assert shown.startswith("<Model dit, ") and shown.endswith("conditioned on labels, step 4>")
    assert "images of shape (3, 8, 8)" in shown and len(shown) < 120


def test_an_earlier_checkpoint_is_the_model_of_then(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    later = se.Run(folder).resume(console=QUIET, steps=6)
    assert later.model().facts.step == 6
    models = [later.model(checkpoint=4), se.load(folder, checkpoint=4)]
    assert [model.facts.step for model in models] == [4, 4]
    for model in models:
        assert torch.equal(model.generate(2), run.model().generate(2))


def test_a_run_is_resumed_with_what_may_change(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    again = se.Run(folder).resume(console=QUIET, steps=6, optimizer={"learning_rate": 0.01})
    assert again.folder == folder and again.metrics[-1]["step"] == 6
    assert (again.config.steps, again.config.optimizer.learning_rate) == (6, 0.01)
    assert '"optimizer.learning_rate": [0.05, 0.01]' in (folder / "changes.jsonl").read_text()
    with pytest.raises(UserError, match="complete at step 6 of 6"):
        again.resume(console=QUIET)
    with pytest.raises(UserError, match="started with batch_size=8"):
        again.resume(console=QUIET, batch_size=4)


def test_one_process_is_not_warned_that_it_is_one(run):
    code = "import sys, speed_engine as se; se.load(sys.argv[1])"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code, run.folder],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_hub_s_library_its_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: se.load("me/frogs"), lambda: run.model().push_to_hub("me/frogs")):
        with pytest.raises(UserError, match=re.escape("pip install 'speed-engine[hub]'")):
            call()


def test_a_recipe_of_a_call_holds_before_the_file_and_the_changes_before_it(tmp_path, monkeypatch):
    started: list[TrainConfig] = []
    monkeypatch.setattr("speed_engine.run.starting.start", lambda *run: started.append(run[0]))
    digits = dataclasses.replace(PRESETS["digits"][1], steps=7)
    path = tmp_path / "config.json"
    path.write_text(to_json(digits))
    changes: dict[str, Any] = {"schedule": "linear", "optimizer": {"beta1": 0.8}}
    for config in (path, digits):
        se.train(config, tmp_path / "run", recipe="flow_muon", **changes)
        found = started.pop()
        assert (found.method, found.schedule, found.steps) == ("logit_normal", "linear", 7)
        assert build_process(found).prediction == "epsilon"  # not that of the recipe's own process
        assert found.optimizer == dataclasses.replace(
            digits.optimizer, name="muon", schedule="linear", beta1=0.8
        )


def test_names_are_there_before_they_are_used():
    assert set(se.__all__) <= set(dir(se))
    with pytest.raises(AttributeError, match="module 'speed_engine' has no attribute 'lode'"):
        se.lode  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
