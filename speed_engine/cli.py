"""The command line of ``speed-engine``: which module each command is in, and how errors end."""

import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from speed_engine import __version__
from speed_engine.commands.dispatch import usage
from speed_engine.runtime.checks import UserError, printable, unknown
from speed_engine.runtime.files import CONTINUED, cache_folder, in_words

# name -> (how it is called, what it does); each is a module of speed_engine/commands
COMMANDS = {
    "train": ("PRESET [options]", "train a model; speed-engine train --help lists the presets"),
    "sample": ("RUN", "generate images with a trained model"),
    "evaluate": ("RUN", "measure a trained model against its data"),
    "compare": ("PRESET", "train methods at equal budget, several seeds each, and report"),
    "consistency": ("RUN_A RUN_B", "how alike the images are that two models make of one noise"),
    "export": ("RUN --out PATH", "write a model's weights for DiT's own code or diffusers"),
    "plan": ("PRESET --gpus N", "what a run would take on N GPUs: memory, communication, time"),
    "shards": ("COMMAND", "prepare, index and verify data"),
    "methods": ("", "which methods there are, on which processes, and what they do"),
    "doctor": ("", "what will be used on this machine, and why"),
}
EXAMPLES = """\
speed-engine train --resume RUN continues a run exactly where its newest checkpoint stands.
Each command explains its options with --help; speed-engine --version prints the version.
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``speed-engine``; bad input exits with status 2 and one message."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _prepare_process()
    _interrupt_when_terminated()
    _repeat_lost_interrupts()
    try:
        if run := _chosen(arguments):
            run(arguments[1:], Console(markup=False, emoji=False))  # users' names are no markup
            if world := sys.modules.get("speed_engine.runtime.world"):  # not every command needs it
                world.leave()
        _flush()
    except BrokenPipeError:  # whoever reads the output has enough
        _print_no_more()
        sys.exit(1)
    except (UserError, OSError, FloatingPointError) as error:
        _fail(in_words(error))
    except KeyboardInterrupt:
        again = CONTINUED if arguments[:1] == ["train"] else "run the same command again to go on."
        _fail(f"interrupted; {again}")


def _chosen(arguments: list[str]) -> Callable[[list[str], Console], None] | None:
    """The command that is named first; none where a help or a version was asked for, and printed.

    Raises:
        UserError: there is no command of that name.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage("speed-engine", COMMANDS) + "\n" + EXAMPLES, end="")
        return None
    if arguments[0] == "--version":
        print(f"speed-engine {__version__}")
        return None
    name = arguments[0]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    return importlib.import_module(f"speed_engine.commands.{name}").run


def _flush() -> None:
    """A full disk is met here, and not when the interpreter ends."""
    if sys.stdout is None:  # it was closed
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _print_no_more()
        raise


def _print_no_more() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt_when_terminated() -> None:
    """SIGTERM and SIGUSR1, by which clusters announce the end of a job, end a command as Ctrl-C
    does: what it started is stopped, what is done is kept.
    """
    own = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a forked worker just ends
        os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, interrupt)


def _repeat_lost_interrupts() -> None:
    """Ctrl-C in a callback of the interpreter, such as those of imports, is lost: send it again."""
    known = sys.unraisablehook

    def repeat(lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type is KeyboardInterrupt:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            known(lost)

    sys.unraisablehook = repeat


def _prepare_process() -> None:
    # Before torch loads OpenMP: its threads wait for each other spinning, and on a machine that is
    # busy elsewhere would spin most of the time (two cores, one neighbour: 240 images/s of the
    # digits preset against 1,300 with this limit; alone, 4,000 either way).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Compiled code is kept from run to run; Inductor's own default is in /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    # A name that the terminal cannot show is shown by its numbers.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Plain lines: a path that is wrapped can neither be copied nor searched for.
    logging.basicConfig(level=logging.WARNING, handlers=[_handler()])
    if os.environ.get("RANK", "0") == "0":  # what takes long is said once
        logging.getLogger("speed_engine.runtime.progress").setLevel(logging.INFO)


def _handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(_LowerCaseLevel("%(levelname)s: %(message)s"))
    return handler


class _LowerCaseLevel(logging.Formatter):
    """Writes ``warning: ...``; the level's own name stays as it is, other libraries print it.

    What is done now, at the level INFO, is written without a level.
    """

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno == logging.INFO:
            return f"{_lines(record.getMessage())} ..."
        own = logging.makeLogRecord(record.__dict__ | {"levelname": record.levelname.lower()})
        return _lines(super().format(own))


def _lines(message: str) -> str:
    """A message in which names of files and classes steer no terminal."""
    return "\n".join(map(printable, message.expandtabs().split("\n")))


def _fail(message: str) -> NoReturn:
    text = Text.assemble(("error:", "red"), " ", _lines(message))
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    sys.exit(2)
