"""Many runs, several at a time, each in a process of its own that may fail alone.

What a run prints goes to FOLDER.log beside its folder. A run that is there already is resumed, or
passed over when it is complete, so that an interrupted comparison goes on where it stopped.
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess

import torch
from rich.console import Console

from speed_engine.arena.planned import Run, is_complete, log_file
from speed_engine.run.starting import resume, start
from speed_engine.runtime.workers import end_with_parent
from speed_engine.training.checkpoint import CHECKPOINTS, EMA_FILE

# Imported once, by the process that all others are forked from, instead of once per run.
PRELOADED = ["speed_engine.arena.runs", "torch_fidelity", "torch.utils.tensorboard.writer"]


def execute(
    runs: Sequence[Run], slots: int, threads: int, done: Callable[[Run, bool], None]
) -> None:
    """Complete the runs, ``slots`` at a time, each on one GPU where there are GPUs.

    More slots than GPUs share them: the host holds up the steps of a small model, and meanwhile the
    GPU computes those of another run.

    Args:
        runs: in this order.
        slots: processes at a time.
        threads: of each process on the CPU.
        done: called with each run that ended and whether it is complete.

    Raises:
        KeyboardInterrupt: after the runs that were under way have written a checkpoint.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting = [run for run in runs if not is_complete(run)]
    for run in runs:
        if run not in waiting:
            done(run, True)
    gpus = _gpus()
    free, busy = list(range(slots)), dict[int, tuple[BaseProcess, Run, int]]()
    with _stopped_together(busy):
        while waiting or busy:
            while waiting and free:
                run, slot = waiting.pop(0), free.pop(0)
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                log_file(run).touch()  # a disk that cannot even hold it ends the comparison here
                gpu = gpus[slot % len(gpus)] if gpus else ""
                process = context.Process(target=_work, args=(run, gpu, threads))
                process.start()
                busy[process.sentinel] = process, run, slot
            for sentinel in connection.wait(list(busy)):
                process, run, slot = busy.pop(int(sentinel))  # type: ignore[arg-type]
                process.join()
                if process.exitcode and process.exitcode < 0:
                    name = signal.Signals(-process.exitcode).name
                    with log_file(run).open("a") as log:
                        log.write(f"\nthe process was killed by {name}\n")
                free.append(slot)
                done(run, is_complete(run))


@contextmanager
def _stopped_together(busy: dict[int, tuple[BaseProcess, Run, int]]) -> Iterator[None]:
    """Runs are asked to stop, which they do with a checkpoint, if this process is interrupted."""
    try:
        yield
    finally:
        for process, _, _ in busy.values():
            process.terminate()
        for process, _, _ in busy.values():
            process.join()


def _gpus() -> list[str]:
    """Those that may be used, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _work(run: Run, gpu: str, threads: int) -> None:
    """One run, in its own process, which sees one GPU; none under an empty name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison's process tells when to stop
    end_with_parent(signal.SIGTERM)  # a run that is training then stops with a checkpoint
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    with log_file(run).open("a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        log.write(f"process {os.getpid()}\n")
        try:
            _complete(run, Console(file=log, width=200))
        except Exception as error:
            traceback.print_exc(file=log)
            text = str(error).replace("\n", " ")
            log.write(f"\n{type(error).__name__}: {text}\n")
            raise SystemExit(1) from None


def _complete(run: Run, console: Console) -> None:
    if not _is_trained(run):
        if any((run.folder / CHECKPOINTS).glob("step-*")):
            resume(run.folder, console)
        else:
            shutil.rmtree(run.folder, ignore_errors=True)
            start(run.config, run.folder, console)
    if _is_trained(run) and run.finish is not None:  # else it was asked to stop
        run.finish(run.folder)


def _is_trained(run: Run) -> bool:
    """Whether its EMA is there and its last checkpoint, which a full disk may have cost."""
    last = run.folder / CHECKPOINTS / f"step-{run.config.steps:08d}"
    return (run.folder / EMA_FILE).exists() and last.is_dir()
