"""Real trainings on several processes, to be hurt: for tests/faults and bench_faults.py.

Processes are forked from a server that has imported everything, so that a start takes a fraction of
a second; apart from that each is a process of its own, as torchrun would start it.
"""

import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from speed_engine.training import checkpoint

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["speed_engine.training.trainer", "speed_engine.cli"])
TINY = (
    "digits --batch-size 16 --log-every 1 --model.dim 16 --model.depth 2 --model.num-heads 2 "
    "--evaluation.every 1000000 --evaluation.num-images 100 --evaluation.solver-steps 2 "
    "--optimizer.warmup-steps 10"
).split()


RUNNING: list["Training"] = []


class Fault:
    """Something that happens at the n-th call of a function, in one process or in all.

    Args:
        target: ``module:qualified.name`` of the function.
        call: n, from 1.
        do: what happens before the call; by default the process dies by kill -9.
        rank: where; None is everywhere.
        every: it happens at each call from the n-th on.
    """

    def __init__(
        self,
        target: str,
        call: int,
        do: Callable[[], object] | None = None,
        rank: int | None = None,
        every: bool = False,
    ) -> None:
        self.target, self.call, self.do, self.rank, self.every = target, call, do, rank, every

    def __call__(self, rank: int) -> None:
        """Plant it in this process."""
        if self.rank not in (None, rank):
            return
        module, _, path = self.target.partition(":")
        *holders, name = path.split(".")
        holder = importlib.import_module(module)
        for step in holders:
            holder = getattr(holder, step)
        function, count = getattr(holder, name), itertools.count(1)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            n = next(count)
            if n == self.call or (self.every and n > self.call):
                (self.do or die)()
            return function(*args, **kwargs)

        setattr(holder, name, faulty)


def die() -> None:
    """By kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


class PoisonNext:
    """Makes the next loss of the objective NaN, a number of times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> None:
        from speed_engine.diffusion.objective import Objective

        if self.left == 0:
            return
        self.left -= 1
        forward = Objective.forward

        def poisoned(*args, **kwargs):
            Objective.forward = forward
            output = forward(*args, **kwargs)
            return output._replace(loss=output.loss * torch.nan)

        Objective.forward = poisoned


class Sleep:
    """Seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        time.sleep(self.seconds)


class Training:
    """One start of ``speed-engine train`` on ``world`` processes.

    Args:
        run: folder of the run; what the processes print goes to ``RUN.out`` unless said otherwise.
        arguments: of ``speed-engine train``, or of another command.
        world: processes; 0 waits for ``begin``.
        fault: planted in the processes.
        out: file for what they print.
        environment: variables to set.
    """

    def __init__(
        self,
        run: Path,
        arguments: Sequence[str],
        world: int = 2,
        fault: Fault | None = None,
        out: Path | None = None,
        **environment: str,
    ) -> None:
        self.run, self.out = run, out or run.with_suffix(".out")
        port = str(_free_port())
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1", **environment,
            }  # fmt: skip
            target = (self.out, ["train", *arguments], variables, rank, fault)
            self.processes.append(SERVER.Process(target=_run, args=target))
        self._arguments = list(arguments)
        for process in self.processes:  # not daemons: those may not have loader workers
            process.start()
        RUNNING.append(self)

    def begin(self, command: str, cwd: Path, **environment: str) -> None:
        """Start one process of any command in a folder."""
        variables = {"OMP_NUM_THREADS": "1", **environment}
        target = (self.out, [command, *self._arguments], variables, 0, None, cwd)
        self.processes.append(SERVER.Process(target=_run, args=target))
        self.processes[0].start()

    def wait_for(self, event: Callable[[], bool], seconds: float = 600) -> bool:
        """Until the event, True, or the end of any process, False.

        Raises:
            TimeoutError: neither came.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if event():
                return True
            if any(process.exitcode is not None for process in self.processes):
                return event()
            time.sleep(0.005)
        self.kill()
        raise TimeoutError(f"nothing came in {seconds} s; the processes said:\n{self.said()}")

    def wait_for_step(self, step: int, seconds: float = 600) -> bool:
        """Until the step is in the records."""
        return self.wait_for(lambda: steps(self.run) >= step, seconds)

    def kill(self, number: signal.Signals = signal.SIGKILL, ranks: Iterable[int] = ()) -> None:
        """Send a signal to some processes, or to all."""
        for rank in list(ranks) or range(len(self.processes)):
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].exitcode is None:
                os.kill(pid, number)

    def join(self, seconds: float = 600) -> list[int | None]:
        """Exit statuses, once all have ended; negative ones are signals.

        Raises:
            TimeoutError: one has not; all are killed.
        """
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise TimeoutError(f"exit statuses {codes} after {seconds} s:\n{self.said()}")
        return codes

    def said(self) -> str:
        """All that the processes printed."""
        return self.out.read_text() if self.out.exists() else ""


def kill_all() -> None:
    """End whatever is still running."""
    while RUNNING:
        training = RUNNING.pop()
        training.kill()
        for process in training.processes:
            process.join()


def train(
    run: Path,
    options: Sequence[str] = (),
    world: int = 2,
    fault: Fault | None = None,
    out: Path | None = None,
    **environment: str,
) -> Training:
    """A new tiny run."""
    arguments = [*TINY, *options, "--run", str(run)]
    return Training(run, arguments, world, fault, out, **environment)


def resume(run: Path, world: int = 2, **environment: str) -> Training:
    """The same run again."""
    return Training(run, ["--resume", str(run)], world, None, None, **environment)


def steps(run: Path) -> int:
    """The last step in the records."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    return int(lines[-1].split(b'"step": ')[1].split(b",")[0]) if lines else 0


def checkpoints(run: Path) -> list[str]:
    """Names of the checkpoints that hold; others in the folder are an error."""
    found = sorted((run / "checkpoints").glob("step-*"))
    for path in found:
        checkpoint.verify(path)
    return [path.name for path in found]


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the run's newest checkpoint."""
    newest = checkpoint.newest(run / "checkpoints")
    groups = ("model", "ema", "optimizer")
    return {
        f"{group}/{name}": value
        for group in groups
        for name, value in checkpoint.load_group(newest, group).items()
    }


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _run(
    out: Path,
    arguments: list[str],
    variables: dict[str, str],
    rank: int,
    fault: Fault | None,
    cwd: Path | None = None,
) -> None:
    os.environ.update(variables)
    if cwd is not None:
        os.chdir(cwd)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    from speed_engine.cli import main

    main(arguments)
    sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
