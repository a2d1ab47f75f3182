"""What this machine offers, what a run will use of it, and why.

``doctor`` prints these choices and training acts on them, so that the two cannot disagree.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from speed_engine.runtime.checks import UserError, unknown
from speed_engine.runtime.choice import Choice
from speed_engine.runtime.environment import package_version
from speed_engine.runtime.kernels import choose_kernels
from speed_engine.runtime.memory import can_keep_freed_memory
from speed_engine.runtime.world import ALONE, World

# benchmarks/results/x86-64-2-cores/compile.json: 31 s of C++ compilation against 12 ms a step saved
# is even after 2,500 steps of the digits preset. Other models and machines differ, hence a margin.
COMPILE_PAYS_ON_CPU = 5000
RESIDENT_SHARE = 0.5  # of the free device memory that a data set may take; the rest is for training
# Bytes. The steps of models for small data are so short that 5 us of loading per image count; a
# larger data set is of larger images, or lies in the page cache anyway.
RESIDENT_ON_CPU = 2**26


_DEVICES = ("auto", "cpu", "cuda")


def choose_device(wanted: str) -> Choice:
    """``cuda`` or ``cpu``.

    Raises:
        UserError: CUDA was asked for and is not there, or another device is.
    """
    if wanted not in _DEVICES:
        raise unknown("device", str(wanted), _DEVICES)
    if torch.cuda.is_available():
        if wanted == "cpu":
            return Choice("cpu", "asked for, although a GPU is present")
        return Choice("cuda", torch.cuda.get_device_name())
    if wanted == "cuda":
        raise UserError("device=cuda, but PyTorch finds no GPU here; use cpu or auto.")
    return Choice("cpu", f"PyTorch finds no GPU; {torch.get_num_threads()} threads")


def choose_precision(device: str) -> Choice:
    """The dtype of matrix products; parameters are float32 everywhere."""
    if device == "cuda":
        return Choice("bfloat16", "autocast, with float32 parameters")
    return Choice("float32", "exact, and as fast as bfloat16 on a CPU at these sizes")


class Launching(NamedTuple):
    """Estimates of a training step on a GPU.

    Attributes:
        host_seconds: that the host takes to launch it, block by block.
        device_seconds: that the device takes to compute it.
        compile_seconds: that compiling the whole model takes longer than compiling its blocks.
    """

    host_seconds: float
    device_seconds: float
    compile_seconds: float


def choose_compile(
    wanted: str, device: str, steps: int, world: World = ALONE, launching: Launching | None = None
) -> Choice:
    """``on``, ``graphs``, ``blocks`` or ``off``.

    Args:
        wanted: the option.
        device: ``cuda`` or ``cpu``.
        steps: of the run.
        world: its processes.
        launching: of its step; None where CUDA graphs are no choice.

    Raises:
        UserError: CUDA graphs were asked for and cannot be made here.
    """
    if wanted == "graphs" and (device != "cuda" or world.size > 1):
        where = "a CPU has none" if device != "cuda" else f"there are {world.size} processes"
        raise UserError(
            f"compile=graphs replays CUDA graphs of one process, and {where}; use blocks or auto."
        )
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device == "cuda":
        return _blocks_or_graphs(steps, launching)
    measured = f"on a CPU it pays from about {COMPILE_PAYS_ON_CPU:,} steps on; here {steps:,}"
    return Choice("on" if steps >= COMPILE_PAYS_ON_CPU else "off", measured)


def _blocks_or_graphs(steps: int, launching: Launching | None) -> Choice:
    """Graphs where the host would hold the device up for longer than the whole model compiles."""
    if launching is None:
        return Choice(
            "blocks",
            "equal blocks share a compilation; DiT-XL/2 on an H200: the step as fast as compiled "
            "whole, the first one in 3 to 16 s instead of 46. Blocks that differ, as a U-Net's, "
            "take one each, which compile=off spares a short run",
        )
    host, device, more = launching
    estimate = (
        f"the host would launch a step in about {1e3 * host:.0f} ms, which the GPU computes in "
        f"{1e3 * device:.3g}"
    )
    if host <= device:
        return Choice("blocks", f"{estimate}, by an estimate")
    if steps * (host - device) <= more:
        return Choice(
            "blocks", f"{estimate}, but {steps:,} steps do not win {more:.0f} s of compiling back"
        )
    return Choice("graphs", f"{estimate}, by an estimate; {more:.0f} s more of compiling first")


def choose_generation(compile: str, device: str) -> Choice:
    """``blocks`` or ``off``, of the averaged model that is evaluated.

    Args:
        compile: the run's own choice, or its option.
        device: ``cuda`` or ``cpu``.
    """
    if compile == "off":
        return Choice("off", "the EMA is not compiled, as training is not")
    if device == "cuda":
        return Choice("blocks", "the EMA is compiled block by block")
    return Choice("off", "the EMA stays eager on a CPU, where compiling rarely pays")


def choose_attention(wanted: str, device: str) -> Choice:
    """``sdpa``, PyTorch's, or ``xformers``.

    Raises:
        UserError: xFormers was asked for and cannot run here.
    """
    obstacle = _xformers_obstacle(device)
    if wanted == "xformers":
        if obstacle:
            raise UserError(f"attention=xformers, but {obstacle}; use sdpa or auto.")
        return Choice("xformers", "asked for")
    if wanted == "sdpa":
        return Choice("sdpa", "PyTorch's; asked for")
    return Choice("sdpa", f"PyTorch's; {obstacle or 'xFormers would run, too'}")


def choose_noise(device: str) -> Choice:
    """``stored`` from input to loss, or ``drawn again`` there: the bits are the same."""
    if device == "cuda":
        # benchmarks/results/nvidia-h200/gpu_defaults.json, "noise"
        return Choice("drawn again", "needs no memory, and takes an H200 no longer than reading")
    return Choice("stored", "drawing takes a CPU longer than reading")


def choose_resident(
    wanted: str, device: str, num_bytes: int | None, mode: str = "exact", workers: int = 0
) -> Choice:
    """``on`` or ``off``.

    Args:
        wanted: the option.
        device: ``cuda`` or ``cpu``.
        num_bytes: of the data set; None if it is not known yet.
        mode: in which it is read.
        workers: processes that are asked to read it.
    """
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if mode == "stream":
        return Choice("off", "data.mode=stream reads shards from end to end")
    if device != "cuda":
        small = f"{RESIDENT_ON_CPU / 1e6:.0f} MB without data workers"
        if workers or (num_bytes or 0) > RESIDENT_ON_CPU:
            return Choice("off", f"a CPU keeps data sets of at most {small}")
        return Choice("on", f"at most {small}: images cost no reading and checking again")
    free, _ = torch.cuda.mem_get_info()
    limit = f"{RESIDENT_SHARE:.0%} of {free / 1e9:.1f} GB of free GPU memory"
    if num_bytes is None:
        return Choice("on", f"where the data set fits in {limit}")
    fits = num_bytes <= RESIDENT_SHARE * free
    word = "fit" if fits else "do not fit"
    return Choice("on" if fits else "off", f"{num_bytes / 1e9:.3g} GB of data {word} in {limit}")


def choose_update(wanted: str, kernel: Choice) -> Choice:
    """``separate`` or ``one_sweep``.

    Args:
        wanted: the option.
        kernel: what would compute the latter, see ``choose_kernels``.
    """
    if wanted == "auto":
        return Choice(
            "separate",
            "PyTorch's fused AdamW, then the EMA, move 40 bytes per parameter; one sweep moves "
            "36 and made DiT-XL/2's step 1 % faster on an H200, which is within its spread",
        )
    if wanted == "separate":
        return Choice(wanted, "asked for")
    return Choice(wanted, f"asked for; by {kernel.value}: {kernel.reason}")


def choose_jpeg_decoder() -> Choice:
    """What decodes JPEGs; the pixels are the same."""
    if obstacle := _import_error("simplejpeg"):
        return Choice("Pillow", f"half as fast as simplejpeg ({obstacle})")
    return Choice("simplejpeg", "straight into the batch; Pillow where libjpeg warns")


def choose_checksums() -> Choice:
    """What computes CRC-32; the sums are the same."""
    if obstacle := _import_error("zlib_ng.zlib_ng"):
        return Choice("zlib", f"a tenth as fast as zlib-ng ({obstacle})")
    return Choice("zlib-ng", "of every member that is read or written")


def choose_host_memory() -> Choice:
    """What becomes of memory that is freed between steps."""
    if can_keep_freed_memory():
        return Choice("kept", "freed memory waits for the next step, without page faults")
    return Choice("returned", "to the system after every step; only glibc can keep it")


def choose_parallel(wanted: str, world: World, device: str) -> Choice:
    """A key of ``sharding.LAYOUTS``.

    Raises:
        UserError: hsdp on one node.
    """
    nodes = world.size // world.local_size
    if wanted == "hsdp" and nodes == 1:
        raise UserError("parallel=hsdp shards within nodes, and there is one; use fsdp.")
    if world.size == 1:
        return Choice("none", "one process; torchrun starts several")
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device == "cpu":
        return Choice("ddp", "processes on one host share its memory anyway")
    return Choice("fsdp" if nodes == 1 else "hsdp", "optimizer state and EMA are sharded")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Everything that depends on the machine; ``doctor`` prints it and training acts on it."""

    device: Choice
    parallel: Choice
    precision: Choice
    compile: Choice
    generation: Choice
    attention: Choice
    random_kernels: Choice
    objective_kernels: Choice
    block_kernels: Choice
    norm_kernels: Choice
    noise: Choice
    resident: Choice
    update: Choice
    host_memory: Choice
    workers: Choice
    jpeg_decoder: Choice
    checksums: Choice

    def shown(self) -> dict[str, Choice]:
        """By the names that a person reads."""
        names = {
            "compile": "torch.compile",
            "resident": "resident data",
            "update": "optimizer",
            "workers": "data workers",
            "jpeg_decoder": "JPEG decoder",
        }
        return {names.get(name, name.replace("_", " ")): c for name, c in vars(self).items()}


def choose(
    *,
    device: str,
    steps: int,
    compile: str,
    attention: str,
    kernels: str,
    parallel: str,
    update: str,
    resident: str,
    data_mode: str,
    workers: int,
    world: World = ALONE,
    num_bytes: int | None = None,
    launching: Launching | None = None,
) -> Choices:
    """Every choice of a run.

    Args:
        device: the option of that name, as are the next nine.
        steps: of the run, see ``choose_compile``.
        compile: see ``choose_compile``.
        attention: see ``choose_attention``.
        kernels: see ``choose_kernels``.
        parallel: see ``choose_parallel``.
        update: of the optimizer, see ``choose_update``.
        resident: of the data, see ``choose_resident``.
        data_mode: in which the data are read.
        workers: processes that read the data.
        world: the processes of the run.
        num_bytes: of its data set, if known.
        launching: see ``choose_compile``.

    Raises:
        UserError: an option asks for what this machine does not offer.
    """
    chosen = choose_device(device)
    kind = chosen.value
    by_family = choose_kernels(kernels, kind, world)
    compiling = choose_compile(compile, kind, steps, world, launching)
    return Choices(
        device=chosen,
        parallel=choose_parallel(parallel, world, kind),
        precision=choose_precision(kind),
        compile=compiling,
        generation=choose_generation(compiling.value, kind),
        attention=choose_attention(attention, kind),
        random_kernels=by_family["random"],
        objective_kernels=by_family["objective"],
        block_kernels=by_family["block"],
        norm_kernels=by_family["norms"],
        noise=choose_noise(kind),
        resident=choose_resident(resident, kind, num_bytes, data_mode, workers),
        update=choose_update(update, by_family["update"]),
        host_memory=choose_host_memory(),
        workers=_workers(workers),
        jpeg_decoder=choose_jpeg_decoder(),
        checksums=choose_checksums(),
    )


def torch_device(wanted: str, world: World = ALONE) -> torch.device:
    """The device of this process, of ``auto``, ``cpu`` or ``cuda``."""
    kind = choose_device(wanted).value
    return torch.device(f"cuda:{world.local_rank}" if kind == "cuda" else kind)


def _workers(count: int) -> Choice:
    if count == 0:
        return Choice("0", "the training process reads by itself, enough for small images")
    return Choice(str(count), f"processes that read ahead, of {os.cpu_count()} cores")


def _xformers_obstacle(device: str) -> str | None:
    """Why xFormers cannot compute attention here; None if it just did, forward and backward."""
    if importlib.util.find_spec("xformers") is None:
        return "xFormers is not installed (the extra `xformers`)"
    if device == "cpu":
        return f"xFormers {package_version('xformers')} has operators for CUDA only"
    try:
        from xformers.ops import fmha

        x = torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        fmha.memory_efficient_attention(x, x, x).sum().backward()
    except Exception as error:  # whatever a binary built for another machine may raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"xFormers {package_version('xformers')} does not run here: {lines[0]}"
    return None


def _import_error(module: str) -> str | None:
    """Why it cannot be imported; asking whether it is installed would miss a broken build."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None
