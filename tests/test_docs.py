"""The pages and the README: every code block, command, option and link in them.

Shell blocks are the fenced ones without a language. Commands are read by the real command line,
which would notice a misspelt option, command, preset or method, and are not carried out; whole runs
are what the other tests are for. Python blocks are run, but for those in ``NOT_RUN``.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

from speed_engine import cli
from speed_engine.arena.contestants import expand, resolve
from speed_engine.arena.recipes import RECIPES
from speed_engine.arena.request import within_budget
from speed_engine.build import build_process
from speed_engine.commands import shards
from speed_engine.config import from_json, to_json
from speed_engine.diffusion.solvers import check_solver
from speed_engine.planning import cost
from speed_engine.planning.cost import estimate
from speed_engine.planning.gpus import GPUS
from speed_engine.planning.memory import USED_SHARE
from speed_engine.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md")]
    + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    + [*(ROOT / "benchmarks").glob("*.md"), *(ROOT / "kernels").glob("*.md")]
)
LANGUAGES = {
    "": "commands",
    "bash": "whole scripts",
    "console": "commands after $, and what they print",
    "python": "Python",
    "toml": "data",
    "json": "data",
    "text": "what something prints",
}
# First words of commands that are not ours, and what a test could not notice.
FOREIGN = {
    "apt-get": "Debian's packages",
    "pre-commit": "the hooks of a clone",
    "source": "the shell of the reader",
}
# Python blocks that are compiled, and whose imports of ours are tried, but which are not run.
NOT_RUN = {
    "DiTPipeline.from_pretrained": "needs an exported run; tests/commands/test_export.py makes one",
    "se.train(": "trains and compares; tests/api/notebook.py does so at a smaller size",
}


@dataclass(frozen=True)
class Block:
    """A fenced code block: where it begins, its language, its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    text = page.read_text()
    fenced = re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return tuple(Block(page, text.count("\n", 0, of.start()) + 1, of[1], of[2]) for of in fenced)


@cache
def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def in_code(page: Path) -> list[str]:
    """What the prose of a page has between backticks, in one line each."""
    return [" ".join(of.split()) for of in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def of_language(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command; of what may be left out or chosen, all and the first.

    ``...`` is a value after an option, and else what may follow; N is a number.
    """
    text = re.sub(r"(--\S+) \.\.\.", r"\1 VALUE", text).replace(" ...", "")
    text = re.sub(r"(--\S+) N\b", r"\1 1", text)
    text = re.sub(r"\[(--[^\]]*)\]", r"\1", text.replace("\\\n", " "))
    text = re.sub(r"\b([a-z]+)(?:\|[a-z]+)+", r"\1", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "|", "&&", "&"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=\S*", word):  # the environment comes first
                command.append(word)


class Read(Exception):
    """The options of a command were read; what it would do next is left out."""


@pytest.fixture
def read(monkeypatch, tmp_path) -> Callable[[list[str]], Any]:
    """What a command line asks for, or an AssertionError with what it says instead."""
    monkeypatch.chdir(tmp_path)
    for name in (*cli.COMMANDS, "configured"):
        module = importlib.import_module(f"speed_engine.commands.{name}")
        if real := getattr(module, "read_options", None):

            def stop(*arguments: Any, _real: Any = real, **options: Any) -> None:
                raise Read(_real(*arguments, **options))

            monkeypatch.setattr(module, "read_options", stop)

    def command_of(arguments: list[str]) -> Any:
        if all(word in {*cli.COMMANDS, *shards.USES} for word in arguments):
            return None  # the name alone, as a sentence has it
        arguments = ["digits" if word == "PRESET" else word for word in arguments]
        _make_what_is_read(arguments, tmp_path)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                cli.main(arguments)
        except Read as done:
            _check_names(done.args[0])
            return done.args[0]
        except SystemExit as stopped:
            assert not stopped.code, f"{shlex.join(arguments)}: {said.getvalue()}"
        return None

    return command_of


def _make_what_is_read(arguments: list[str], folder: Path) -> None:
    """Runs that are resumed, and files of configurations, which are read with the options."""
    digits = to_json(PRESETS["digits"][1])
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--resume":
            (folder / following).mkdir(parents=True, exist_ok=True)
            (folder / following / "config.json").write_text(digits)
    if arguments[0] == "train" and arguments[1:] and not (folder / arguments[1]).exists():
        path = folder / arguments[1]
        if path.suffix in (".toml", ".json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('preset = "digits"' if path.suffix == ".toml" else digits)


def _check_names(command: Any) -> None:
    """Names that are looked up after the options were read."""
    if hasattr(command, "config"):
        from_json(to_json(command.config))
        build_process(command.config)
    if hasattr(command, "methods"):
        config = within_budget(command)
        for name in expand(command.contestants, config):
            resolve(name, config)
    if solver := getattr(command, "solver", None):
        check_solver(solver)


@pytest.fixture
def check(read) -> Callable[[list[str]], None]:
    """Whether a command exists as it is written."""

    def torchrun(words: list[str]) -> None:
        named = "-m" not in words  # in a sentence, without what it starts
        asked = get_args_parser().parse_args([*words, "script"] if named else words)
        if asked.module:
            assert asked.training_script == "speed_engine", words
            read(asked.training_script_args)

    def python(words: list[str]) -> None:
        if words[:2] == ["-m", "speed_engine"]:
            read(words[2:])
        else:
            assert (ROOT / words[0]).is_file(), words[0]

    def pip(words: list[str]) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for group in re.findall(r"\[(.*?)\]", " ".join(words)):
            assert {*group.split(",")} <= extras["optional-dependencies"].keys(), words

    def pytest_(words: list[str]) -> None:
        assert (ROOT / words[0]).exists(), words[0]

    checks = {
        "speed-engine": read, "torchrun": torchrun, "python": python, "pip": pip,
        "pytest": pytest_,
    }  # fmt: skip

    def of(words: list[str]) -> None:
        name, *rest = words
        name = "python" if name.endswith("bin/python") else name
        if name.startswith("scripts/"):
            assert os.access(ROOT / name, os.X_OK), f"{name} is no script"
        elif name not in FOREIGN:
            assert name in checks, f"{shlex.join(words)}: no check is known for {name}"
            checks[name](rest)

    return of


def test_every_block_is_of_a_kind_that_is_checked():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{block} has the language {block.language}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_the_command_line_takes(page, check):
    for block in blocks(page):
        text = block.text
        if block.language == "console":
            text = "\n".join(re.findall(r"^\$ (.*)", text, re.MULTILINE))
        elif block.language:
            continue
        for words in commands(text):
            try:
                check(words)
            except Exception as error:
                raise AssertionError(f"{block}: {shlex.join(words)}: {error}") from error
    for code in in_code(page):
        if page.name == "paper.md" and code.startswith("speed-engine train"):
            continue  # those have a test of their own below
        if re.match(r"(speed-engine|torchrun|pip install) ", code):
            code = re.sub(r" --[\w.-]+$", "", code)  # an option that is only named
            for words in commands(code):
                try:
                    check(words)
                except Exception as error:
                    raise AssertionError(f"{page}: {code}: {error}") from error


@pytest.mark.parametrize(
    "wrong",
    [
        "speed-engine trian digits",
        "speed-engine train digitz",
        "speed-engine train digits --stepz 3",
        "speed-engine train digits --method sped_paper",
        "speed-engine train digits --method speed_paper+lambda=0.6",
        "speed-engine train digits --method edm2 --prediction velocities",
        "speed-engine compare digits --methods uniform,logit_normal@flows",
        "speed-engine sample RUN --solver huen",
        "speed-engine shards make FOLDER SHARDS --sizes 64",
        "torchrun --nproc 8 --standalon -m -- speed_engine train digits",
        "torchrun --standalone -m -- speed_engine train digits --stepz 3",
        "pip install 'speed-engine[plot]'",
        "scripts/tset",
        "python scripts/haus.py",
        "spede-engine train digits",
    ],
)
def test_a_misspelt_command_would_be_noticed(wrong, check, capsys):
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(*commands(wrong))


def test_shell_blocks_are_sound_shell():
    for block in of_language("", "bash"):
        done = subprocess.run(
            ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{block}: {done.stderr}"


def test_every_option_that_a_page_names_exists(read, capsys):
    known = {*get_args_parser()._option_string_actions}
    known |= {"--help", "--version", "--resume", "--max-restarts"}
    helps = [["shards", name] for name in shards.USES]
    helps += [[name] for name in cli.COMMANDS if name not in ("train", "shards")]
    families = ("digits", "ffhq-unet", "imagenet256-mdt-s2", "cifar10-edm")
    for arguments in helps + [["train", preset] for preset in families]:
        with contextlib.suppress(SystemExit):
            cli.main([*arguments, "--help"])
    known |= {*re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)}
    tools = [*(ROOT / "scripts").iterdir(), *(ROOT / "benchmarks").glob("*.py")]
    tools += [ROOT / "tests/data/fuzz.py"]
    of_tools = " ".join(path.read_text() for path in tools if path.is_file())
    known |= {*re.findall(r"--[a-z][\w.-]*", of_tools)}
    known |= {
        "--" + name.replace("_", "-")
        for name in re.findall(r"add_argument\(\"--([\w-]+)", of_tools)
    }
    slurm = dict.fromkeys(("--ntasks-per-node", "--cpus-per-task", "--requeue"), "SLURM")
    foreign = {"--shm-size": "docker", **slurm}
    # The changelog names what was, and what people type.
    gone = {"--k", "--gamma", "--lr", "--epochs", "--gradient-accumulation-steps"}
    for page in PAGES:
        for code in in_code(page):
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code):
                assert option.rstrip(".") in known | foreign.keys() | gone, f"{page}: {code}"


def test_data_blocks_can_be_read():
    for block in of_language("json"):
        json.loads(block.text)
    for block in of_language("toml"):
        tomllib.loads(block.text)


def given(text: str) -> dict[str, Any]:
    """What the loops have that the blocks of a page are put into."""
    image = torch.zeros(4, 1, 8, 8)
    names = {
        "batch_size": 4, "step": 0, "device": "cpu",
        "prediction": image, "target": image + 1, "F": torch.nn.functional,
    }  # fmt: skip
    if "noise_scheduler" in text:
        from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

        names["noise_scheduler"] = DDPMScheduler()
    return names


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(block.text)
    if any(text in block.text for text in NOT_RUN):
        tree.body = [
            of
            for of in tree.body
            if isinstance(of, ast.Import | ast.ImportFrom) and "speed_engine" in ast.unparse(of)
        ]
    exec(compile(tree, str(block), "exec"), given(block.text))


def headings(page: Path) -> set[str]:
    """The anchors of a page."""
    titles = re.findall(r"^#+ +(.*?) *$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_what_is_there(page):
    without_code = re.sub(r"`[^`]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page}: {target} is not there"
        if anchor and there.suffix == ".md":
            assert anchor in headings(there), f"{page}: {target}: no such heading"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}\n" in navigation, f"{page} is not in mkdocs.yml"


@pytest.mark.long  # it counts a network of 675 million parameters twice
def test_the_console_shows_what_the_command_prints(capsys):
    """Of a command that needs no data; lines may be left out from ``...`` on."""
    for block in of_language("console"):
        command, _, shown = block.text.removeprefix("$ ").partition("\n")
        cli.main(shlex.split(command)[1:])
        printed = capsys.readouterr().out
        for line in shown.partition("...")[0].splitlines():
            assert line in printed.splitlines(), f"{block}: {line}"


# The paper's page


def paper_commands() -> list[list[str]]:
    found = [code for code in in_code(DOCS / "paper.md") if code.startswith("speed-engine train")]
    return [shlex.split(code)[1:] for code in dict.fromkeys(found)]


def test_the_paper_s_page_has_every_table_and_figure():
    text = (DOCS / "paper.md").read_text()
    titles = re.findall(r"^## Table (\d+)", text, re.MULTILINE)
    assert [*map(int, titles)] == [2, 3, 4, 5, 6, 9, 10, 11, 12, 13]
    figures = text.partition("\n## Figures")[2]
    assert re.findall(r"^\| (\d+(?: and \d+)?)[,:]", figures, re.MULTILINE) == [
        "1", "3", "5 and 7", "6", "6",
    ]  # fmt: skip


def test_every_command_of_the_paper_s_page_passes_a_dry_run(monkeypatch, capsys):
    """The counting itself, which takes seconds, is left to the test below."""
    configs = []
    monkeypatch.setattr(cost, "describe", lambda config, gpu: configs.append(config) or {})
    for words in paper_commands():
        cli.main([*words, "--dry-run"])
    assert len(configs) > 40
    table_10 = [
        config
        for config, words in zip(configs, paper_commands(), strict=True)
        if words[1] == "ffhq-dit-xl2" and len(words) == 4
    ]
    assert len(table_10) == 8
    configs += [replace(of, schedule=name) for of in table_10 for name in ("quadratic", "cosine")]
    for config in configs:
        build_process(config)


@pytest.mark.long
def test_the_dry_runs_of_the_paper_s_page_count_every_network(capsys):
    by_network = {}
    for words in paper_commands():
        preset, size = words[1], [w for w in words if w.startswith("DiT-")]
        by_network.setdefault((preset, *size), words)
    assert len(by_network) == 12
    for words in by_network.values():
        cli.main([*words, "--dry-run"])
        assert "parameters" in capsys.readouterr().out
    data = (DOCS / "paper.md").read_text().partition("## Data")[2].partition("\n## ")[0]
    row = r"^\| `([\w-]+)` .* \| ([\d.]+) GB: (.*) \| ([\d.]+) \|$"
    rows = re.findall(row, data, re.MULTILINE)
    assert len(rows) == 10
    for preset, memory, gpus, least in rows:
        cli.main(["train", preset, "--dry-run", "--gpu", "h200"])
        assert f"at least {least} hours" in capsys.readouterr().out
        config = PRESETS[preset][1]
        held = estimate(config).gpu_bytes(config.batch_size)
        fits = [gpu.memory for gpu in GPUS.values() if held <= USED_SHARE * gpu.memory]
        smallest = [name for name, gpu in GPUS.items() if gpu.memory == min(fits)]
        assert (memory, gpus) == (f"{held / 1e9:.1f}", ", ".join(smallest)), preset


def test_what_was_measured_here_is_what_the_report_says():
    report = (DOCS / "results/digits/report.md").read_text()
    section = report.partition("## Speed-up over uniform, by held-out FID")[2]
    in_images = section.partition("In images:")[2].partition("In sec")[0].replace("\\<", "<")
    table = (DOCS / "paper.md").read_text().partition("## What was measured here")[2]
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    assert len(rows) == 8
    for method, median, interval, largest in rows:
        (line,) = re.findall(rf"^\| {re.escape(method)} \|.*$", in_images, re.MULTILINE)
        cells = [cell.strip() for cell in line.split("|")]
        assert (cells[3], cells[4], cells[6]) == (median, interval, largest), method


# The launch scripts


@pytest.fixture
def launch(tmp_path, monkeypatch, read) -> Callable[[str], subprocess.Popen[bytes]]:
    """Start a script of docs/slurm.md where torchrun and SLURM write down how they are called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    said = tmp_path / "said"
    programs = {
        "srun": '[ "$1" = --cpus-per-task=64 ] && shift && exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo node-1 || echo "scontrol $*" >> {said}',
        "torchrun": f'printf "%s\\n" "$*" >> {said}\n'
        'trap "echo saved >> ' + str(said) + '; exit 1" USR1\n'
        "while [ -e wait ]; do sleep 0.05; done",
    }
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    of_slurm = {"NNODES": "2", "JOB_ID": "7", "JOB_NODELIST": "node-[1-2]", "CPUS_PER_TASK": "64"}
    for name, value in of_slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["bash", "-c", launch_script(name)])

    return start


def launch_script(name: str) -> str:
    one, slurm = (block.text for block in blocks(DOCS / "slurm.md") if block.language == "bash")
    return {"one": one, "slurm": slurm}[name]


@pytest.mark.parametrize("name", ["one", "slurm"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_launch_script_starts_a_run_or_continues_it(launch, read, tmp_path, name, begun):
    if begun:
        (tmp_path / "runs/xl").mkdir(parents=True)
        (tmp_path / "runs/xl/config.json").write_text(to_json(PRESETS["digits"][1]))
    assert launch(name).wait(timeout=60) == 0
    (call,) = (tmp_path / "said").read_text().splitlines()
    asked = get_args_parser().parse_args(call.split())
    assert (asked.nproc_per_node, asked.max_restarts) == ("8", 3)
    assert "SIGUSR1" in asked.signals_to_handle.split(",")
    if name == "slurm":
        assert (asked.nnodes, asked.rdzv_id, asked.rdzv_endpoint) == ("2", "7", "node-1:29500")
    arguments = asked.training_script_args
    assert ("--resume" in arguments) == begun
    assert read(arguments) is not None


def test_before_its_time_is_over_the_job_saves_and_queues_itself_again(launch, tmp_path):
    (tmp_path / "wait").touch()
    job, said = launch("slurm"), tmp_path / "said"
    deadline = time.monotonic() + 60
    while not said.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert said.read_text().splitlines()[1:] == ["saved", "scontrol requeue 7"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["one", "slurm"])
def test_two_processes_train_by_a_launch_script_and_continue_when_it_runs_again(
    launch, tmp_path, name
):
    """With the digits in place of the run, and torchrun itself."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    torchrun = f'PYTHONPATH={paths} exec {sys.executable} -m torch.distributed.run "$@"'
    (tmp_path / "bin/torchrun").write_text(f"#!/bin/bash\n{torchrun}\n")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    quick = "--steps 2000 --checkpoint-every 5 --device cpu --evaluation.features none"
    changes = {
        "imagenet256-dit-xl2": f"digits {quick} --model.depth 1",
        "--nproc-per-node 8": "--nproc-per-node 2",
        '"$SLURM_NNODES"': "1",
        "$first:29500": f"localhost:{port}",
    }
    script = launch_script(name)
    for old, new in changes.items():
        script = script.replace(old, new)
    job = subprocess.Popen(["bash", "-c", script], start_new_session=True)
    checkpoints = tmp_path / "runs/xl/checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    if name == "slurm":
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=120) == 0
        assert (tmp_path / "said").read_text() == "scontrol requeue 7\n"
    else:
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(timeout=120) != 0
    saved = max(int(of.name.split("-")[1]) for of in checkpoints.glob("step-*"))
    assert saved < 2000
    again = script.replace('--resume "$run"', f'--resume "$run" --steps {saved + 3}')
    assert subprocess.run(["bash", "-c", again], timeout=300, check=False).returncode == 0
    assert (checkpoints / f"step-{saved + 3:08d}").is_dir()


def test_the_page_of_recipes_spells_every_recipe_as_it_is():
    text = (DOCS / "recipes.md").read_text()
    written = re.findall(r"^\| `(\w+)` \| `(.*?)` \|$", text, re.MULTILINE)
    assert written == [(name, spelled) for name, (_, spelled) in RECIPES.items()]
