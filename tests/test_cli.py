"""The command line as a person meets it; every failure is one message and status 2."""

import dataclasses
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from speed_engine import cli
from speed_engine.commands.configured import GROUPS
from speed_engine.config import TrainConfig
from speed_engine.data.format.writer import ShardWriter
from speed_engine.diffusion.methods import METHODS
from speed_engine.presets import PRESETS
from speed_engine.runtime import kernels
from speed_engine.runtime.kernel_check import Finding
from speed_engine.runtime.world import join


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.err + captured.out).split())


def test_without_arguments_the_commands_are_listed(capsys):
    cli.main([])
    shown = capsys.readouterr().out
    for command in ("train", "sample", "evaluate", "consistency", "shards", "methods", "doctor"):
        assert command in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_command_as_ctrl_c_does_and_a_forked_worker_without_a_word(
    capfd, monkeypatch, number
):
    from speed_engine.commands import doctor

    ended = []

    def long_command(arguments, console):
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        ended.append(os.waitpid(worker, 0)[1])
        try:
            os.kill(os.getpid(), number)
            time.sleep(600)
        finally:
            ended.append("what it started is stopped")

    monkeypatch.setattr(doctor, "run", long_command)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    assert "error: interrupted" in fails(capfd, "doctor")
    assert ended == [number, "what it started is stopped"]
    for each, handler in before.items():
        signal.signal(each, handler)


def test_an_interrupt_that_a_callback_loses_is_sent_again(capfd, monkeypatch):
    """As importing loses it: an exception in a callback of a weak reference is ignored."""
    from speed_engine.commands import doctor

    class Held:
        pass

    def loses(_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def long_command(arguments, console):
        held = Held()
        reference = weakref.ref(held, loses)
        del held
        assert reference() is None
        time.sleep(600)

    monkeypatch.setattr(doctor, "run", long_command)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        said = fails(capfd, "doctor")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "error: interrupted" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT=: needed is a whole number"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two: needed is a whole number"),
        ({"WORLD_SIZE": "1", "RANK": "1", "MASTER_PORT": "29500"}, "RANK=1, WORLD_SIZE=1"),
    ],
)
def test_an_environment_that_torchrun_does_not_make_is_named(
    capsys, monkeypatch, tmp_path, environment, said
):
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    message = fails(capsys, "train", "digits", "--run", str(tmp_path / "run"))
    assert said in message and "by torchrun; for one, unset" in message


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"WORLD_SIZE": "2"}, "RANK=: needed is a whole number"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two: needed is a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, WORLD_SIZE=2: the rank lies below the size"),
    ],
)
def test_processes_that_encode_are_those_that_torchrun_makes(
    capsys, monkeypatch, tmp_path, environment, said
):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with ShardWriter(tmp_path / "shards", "x", 3) as writer:
        writer.write("1", {"cls": b"1"})
    arguments = ["encode", str(tmp_path / "shards"), str(tmp_path / "out"), "--vae", "none"]
    assert said in fails(capsys, "shards", *arguments)


def test_methods_are_listed_for_as_many_timesteps_as_take_seconds(capsys):
    message = fails(capsys, "methods", "--num-timesteps", "1000000")
    assert "num_timesteps=1000000: must be at most 20,000." in message


def test_names_that_the_terminal_cannot_show_are_no_error(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(
        [sys.executable, "-m", "speed_engine", "train", "--resume", str(tmp_path / "ü")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert shown.returncode == 2 and r"\xfc is not a run folder" in shown.stderr


def test_doctor_says_what_will_be_used_and_why(capsys):
    cli.main(["doctor"])
    shown = capsys.readouterr().out
    topics = ("device", "precision", "torch.compile", "attention", "kernels", "block kernels")
    topics += ("noise", "resident data", "data workers", "JPEG decoder", "checksums")
    for topic in topics:
        assert topic in shown


def test_doctor_says_what_came_of_each_kernel(capsys, monkeypatch):
    cli.main(["doctor"])
    assert "kernels are not tested: the kernels need CUDA" in capsys.readouterr().out
    findings = [
        Finding("adaln", "block", 0.0021, None),
        Finding("gelu", "block", math.nan, "does not run: [out of resource]"),
    ]
    monkeypatch.setattr(kernels, "kernel_obstacle", lambda device: None)
    monkeypatch.setattr(kernels, "kernel_findings", lambda device: findings)
    cli.main(["doctor"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "adaln block passed 0.0021" in lines
    assert "gelu block does not run: [out of resource] nan" in lines


def test_process_groups_are_left_after_success_only(capsys, monkeypatch):
    """After an error a peer may never answer; without one, leaving them to the interpreter aborts
    now and then."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    join("cpu")
    fails(capsys, "train", "digitz")
    assert torch.distributed.is_initialized()
    cli.main(["methods"])
    assert not torch.distributed.is_initialized()
    cli.main(["methods"])  # there is nothing to leave


def test_unknown_words_list_the_known_ones(capsys):
    message = fails(capsys, "trian")
    assert (
        "unknown command 'trian'; did you mean 'train'? Choose from train, sample, evaluate"
        in message
    )
    assert "digits" in fails(capsys, "train", "digitz")
    message = fails(capsys, "train", "digits", "--method", "sped")
    assert "uniform, speed_paper" in message
    assert "linear" in fails(capsys, "train", "digits", "--schedule", "cosin")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "speed_paper+k=0.5"], "k=0.5"),
        (["--method", "speed_paper+lam=0.4"], "lambda=0.4 is outside [0.5, 1]"),
        (["--method", "speed_paper+tau=2000"], "tau=2000.0 is outside [1, 1000]"),
        (["--method", "speed_paper+r=1"], "r=1.0: the suppression factor must be above 1"),
        (["--method", "speed_paper+gamma=1"], "'speed_paper' has no option gamma"),
        (["--method", "speed_paper k=1"], "write METHOD[+OPTION=VALUE ...]"),
        (["--method", "speed_paper@flow"], "schedule"),
        (["--k", "3"], "write --method METHOD+k=VALUE, such as speed_paper+k=VALUE"),
        (["--ramp-steps=3"], "write --method METHOD+ramp_steps=VALUE, such as clts+ramp_steps"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--steps", "many"], "many"),
        (["--data.source", "/nowhere"], "/nowhere"),
        (["--data.image-shape", "1", "16", "16"], "(1, 16, 16)"),
        (["--model.patch-size", "3"], "patch_size=3 does not divide"),
        (["--evaluation.features", "inception", "--evaluation.inception-weights", "/no"], "/no"),
    ],
)
def test_bad_options_are_named(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("SPEED_ENGINE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    assert message in fails(capsys, "train", "digits", "--run", str(run), *options)
    assert not run.exists()


@pytest.mark.parametrize("preset", ["ffhq-dit-xl2", "ffhq-unet", "imagenet256-mdt-s2"])
def test_a_variance_that_a_recipe_cannot_learn_is_refused_with_the_option_that_leaves_it_out(
    capsys, tmp_path, preset
):
    arguments = ["train", preset, "--recipe", "flow_muon"]
    path = tmp_path / "mine.toml"
    for what in (["--dry-run"], ["--save-config", str(path)]):
        message = fails(capsys, *arguments, *what)
        assert "prediction epsilon, not velocity; train without it by --model.no-learn" in message
    assert "schedule 'vp' is none: train without it by --model.no-learn-sigma." in fails(
        capsys, "train", preset, "--schedule", "vp", "--dry-run"
    )
    cli.main([*arguments, "--model.no-learn-sigma", "--save-config", str(path)])
    assert "learn_sigma = false" in path.read_text()


def test_shards_that_do_not_fit_are_named(capsys, tmp_path):
    run, empty, unlabelled = tmp_path / "run", tmp_path / "empty", tmp_path / "unlabelled"
    empty.mkdir()
    message = fails(capsys, "train", "digits", "--run", str(run), "--data.source", str(empty))
    assert str(empty) in message and ".tar" in message

    from webdataset.writer import TarWriter

    unlabelled.mkdir()
    with TarWriter(str(unlabelled / "x.tar")) as writer:
        writer.write({"__key__": "picture", "txt": "hello"})
    message = fails(capsys, "train", "digits", "--run", str(run), "--data.source", str(unlabelled))
    assert "picture" in message and "npy" in message


def test_what_is_not_a_run_is_said(capsys, tmp_path):
    for command in (["train", "--resume"], ["sample"], ["evaluate"]):
        assert "not a run folder" in fails(capsys, *command, str(tmp_path))


def test_compiled_code_is_kept_in_the_cache_unless_the_user_has_another_place(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SPEED_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    cli.main([])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_the_module_runs_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "speed_engine", "--help"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0 and "train PRESET" in done.stdout


def shown_help(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def in_one_line(shown: str) -> str:
    return " ".join(shown.replace("│", " ").split())


def test_the_help_names_every_method_and_where_their_options_are_explained(capsys):
    shown = in_one_line(shown_help(capsys, "train", "digits"))
    assert "METHOD[+OPTION=VALUE ...]" in shown and "`speed-engine methods` explains" in shown
    assert f"Methods: {', '.join(METHODS)}." in shown


def test_the_help_begins_with_what_matters_first_and_ends_with_the_presets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = shown_help(capsys, "train")
    order = ["PRESET", "--method STR", "--data.source", "--steps", "--batch-size", "--run PATH"]
    titles = ["training", "diffusion", "machine", "checkpoint", "distributed", "model", "data"]
    order += [f" {title} options " for title in (*titles, "optimizer", "evaluation")]
    places = [shown.index(text) for text in order]
    assert places == sorted(places)
    presets = shown[shown.index("Presets:") :]
    assert places[-1] < shown.index("Presets:") and all(f"  {name} " in presets for name in PRESETS)


def test_every_option_of_training_is_in_the_help_once_with_a_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = shown_help(capsys, "train", "imagenet256-unet").splitlines()
    option = re.compile(r"[│ ] (--[a-z0-9.-]*[a-z0-9])")
    options = [found[1] for line in lines if (found := option.match(line))]
    config = PRESETS["imagenet256-unet"][1]
    expected = {"--recipe", "--run", "--save-config", "--dry-run", "--gpu"}
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            of_section = (of.name for of in dataclasses.fields(section) if of.name != "family")
            expected |= {f"--{field.name}.{name}".replace("_", "-") for name in of_section}
        else:
            expected.add("--" + field.name.replace("_", "-"))
    assert sorted(options) == sorted(expected)
    for line, below in itertools.pairwise(lines):
        assert not option.match(line) or len(below.strip("│ ")) > 20, line


def test_the_groups_of_the_help_hold_every_plain_field_of_the_configuration_once():
    grouped = [name for group in GROUPS.values() for name in group.names]
    config = TrainConfig()
    plain = [
        field.name
        for field in dataclasses.fields(config)
        if not dataclasses.is_dataclass(getattr(config, field.name))
    ]
    assert sorted(grouped) == sorted(plain)


def test_options_reach_their_fields_and_leave_the_others_at_the_presets_values(monkeypatch):
    started = []
    monkeypatch.setattr("speed_engine.run.starting.start", lambda *run: started.append(run[:2]))
    preset = PRESETS["imagenet256-unet"][1]
    cli.main(
        ["train", "imagenet256-unet", "--run", "somewhere", "--data.members", "npy", "--steps=7"]
        + ["--model.no-learn-sigma", "--evaluation.guidance", "1", "--optimizer.beta1", "0.5"]
        + ["--evaluation.guidance-interval", "0.1", "inf"]
    )
    config, folder = started[0]
    assert folder == Path("somewhere")
    assert config == dataclasses.replace(
        preset,
        steps=7,
        model=dataclasses.replace(preset.model, learn_sigma=False),
        data=dataclasses.replace(preset.data, members=("npy",)),
        optimizer=dataclasses.replace(preset.optimizer, beta1=0.5),
        evaluation=dataclasses.replace(
            preset.evaluation, guidance=1.0, guidance_interval=(0.1, math.inf)
        ),
    )


@pytest.mark.parametrize(
    "command, parts",
    [
        (["sample"], ["[OPTIONS] RUN", "Number of images", "--solver-steps INT"]),
        (["evaluate"], ["[OPTIONS] RUN", "--metrics [STR ...]", "fid (Fréchet distance"]),
        (["consistency"], ["RUN_A RUN_B", "--json"]),
        (["export"], ["RUN", "--layout {original,diffusers}"]),
        (["shards", "make"], ["SOURCE OUT", "--skip-bad"]),
        (["shards", "check"], ["FOLDER", "--members"]),
        (["compare"], ["PRESET", "--methods STR", "--budget-images INT", "Presets:", "emoji32"]),
        (["plan"], ["PRESET", "--gpus INT", "metfaces512-superres"]),
    ],
)
def test_the_help_of_a_command_names_its_arguments_and_hides_empty_defaults(
    capsys, monkeypatch, command, parts
):
    monkeypatch.setenv("COLUMNS", "100")
    shown = in_one_line(shown_help(capsys, *command))
    assert all(part in shown for part in parts)
    assert not any(
        noise in shown for noise in ("default: None", "default: )", "{None}", "--no-json")
    )


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["train", "digits", "--lr", "1e-4"], "--optimizer.learning-rate"),
        (["train", "digits", "--model.hidden-size", "32"], "--model.dim"),
        (["train", "digits", "--optimizer.lr=1e-4"], "--optimizer.learning-rate"),
        (["train", "digits", "--learning-rate", "1e-4"], "--optimizer.learning-rate"),
        (["train", "digits", "--num_workers", "2"], "--data.workers"),
        (["train", "digits", "--guidance-scale", "2"], "--evaluation.guidance"),
        (
            ["sample", "runs/x", "--num-inference-steps", "9"],
            "--solver-steps, which counts model evaluations",
        ),
        (["train", "digits", "--out", "x"], "--run"),
        (["train", "digits", "--run-dir", "x"], "--run"),
        (["train", "digits", "--run_name", "x"], "--run"),
        (["train", "digits", "--name", "x"], "--run"),
        (["train", "digits", "--device-batch-size", "4"], "--microbatch-size"),
        (["train", "digits", "--micro-batch", "4"], "--microbatch-size"),
        (["train", "digits", "--workers", "4"], "--data.workers"),
        (["shards", "make", "digits", "x", "--num-workers", "2"], "--workers"),
        (["sample", "runs/x", "--labels", "2"], "--class"),
        (["train", "digits", "--depth", "2"], "--model.depth"),
        (["compare", "digits", "--lr", "2"], "--optimizer.learning-rate"),
        (["sample", "runs/x", "--num-samples", "2"], "--count"),
        (["sample", "runs/x", "--classes", "2"], "--class"),
        (["sample", "runs/x", "--cfg-scale", "2"], "--guidance"),
    ],
)
def test_an_option_by_the_name_of_other_programs_is_understood(capsys, arguments, meant):
    assert f"did you mean {meant}?" in fails(capsys, *arguments)


@pytest.mark.parametrize("option", ["--epochs", "--gradient-accumulation-steps"])
def test_a_number_that_means_something_else_here_is_not_taken_for_ours(capsys, option):
    assert "did you mean" not in fails(capsys, "train", "digits", option, "2")


def test_the_family_of_models_is_no_option_and_the_message_says_what_chooses_it(capsys):
    message = fails(capsys, "train", "digits", "--model.family", "unet")
    assert "--model.family is no option: a preset has the family of models" in message
    assert '[model] family = "unet"' in message


def test_a_command_that_needs_a_preset_names_the_presets(capsys):
    message = fails(capsys, "train")
    assert "a preset is missing: speed-engine train PRESET" in message
    assert "choose from digits, dit-s" in message
    assert "unknown preset 'digitz'; did you mean 'digits'? Choose from digits, dit-s" in fails(
        capsys, "train", "digitz"
    )


def test_a_folder_in_place_of_a_preset_is_answered_with_what_takes_folders(capsys, tmp_path):
    message = fails(capsys, "train", str(tmp_path))
    assert f"{tmp_path} is a folder, not a preset; --data.source {tmp_path} trains on" in message
    assert "--resume continues a run" in message


def test_the_methods_are_listed_as_they_are_spelled(capsys):
    cli.main(["methods"])
    shown = capsys.readouterr().out
    assert "min_snr+gamma=5: Min-SNR weighting" in shown
    assert (
        "+stratified=None+normalised=False+weight_on=definition+max_weight=inf+weigh_bound=False"
        in shown
    )


def test_a_run_is_named_after_its_method_in_letters_that_shells_leave_alone(monkeypatch):
    started = []
    monkeypatch.setattr(
        "speed_engine.run.starting.start", lambda config, folder, _: started.append(folder)
    )
    cli.main(["train", "digits", "--method", "speed_paper+lam=0.70+k=3.0", "--seed", "4"])
    assert started == [Path("runs/digits-speed_paper-k=3-lam=0.7-4")]


def test_runs_of_recipes_of_one_method_are_named_after_the_recipe(monkeypatch):
    started = []
    monkeypatch.setattr(
        "speed_engine.run.starting.start", lambda config, folder, _: started.append(folder)
    )
    for options in (["flow"], ["flow_muon"], ["flow", "--method", "speed_paper+k=3"]):
        cli.main(["train", "digits", "--recipe", *options])
    expected = ["digits-flow-0", "digits-flow_muon-0", "digits-flow-speed_paper-k=3-0"]
    assert started == [Path("runs") / name for name in expected]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], [], ["methods", "--help"]])
def test_output_that_cannot_be_written_is_one_error(arguments):
    command = [sys.executable, "-m", "speed_engine", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr == "error: [Errno 28] No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
