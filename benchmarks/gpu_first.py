"""What everything on a GPU rests on: its rates, and whether ours is right on it."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_rows import Rows
from gpu_xl import timed_steps
from harness import interleaved, matrix_product
from speed_engine.config import TrainConfig
from speed_engine.models.layers.blocks import compiled
from speed_engine.ops import Stream, normal, random_bits
from speed_engine.training.engine import Engine
from train_cases import gpu_cases, make_engine, synthetic_batch

TOKENS = 256 * 256  # of DiT-XL/2 at 256 images
PRODUCTS = {"qkv": (3456, 1152), "proj": (1152, 1152), "fc1": (4608, 1152), "fc2": (1152, 4608)}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GPU = torch.device("cuda")


def measure(rows: Rows) -> None:
    rows.row("copy", 3, copy_rate)
    rows.row("product 8192", 3, large_product)
    rows.row("noise bits", 10, noise_bits)
    rows.row("products", 10, products)
    for width in (72, 64):
        rows.row(f"attention, heads of {width}", 10, partial(attention, width))
    rows.row("attention, heads of 256", 10, partial(attention, 256, 4, 64))
    rows.row("no waiting", 40, no_waiting)
    rows.row("repeats", 30, repeats)
    rows.row("tests of the kernels", 60, lambda: tests(min(rows.left() - 5, 75)))


def copy_rate() -> dict[str, Any]:
    source = torch.randint(100, (2**31,), dtype=torch.int8, device=GPU)
    target = torch.empty_like(source)
    time = interleaved({"copy": lambda: target.copy_(source)}, repeats=20)["copy"]
    return {"gigabytes_per_second": round(2 * source.nbytes / time.median / 1e6, 1)}


def large_product() -> dict[str, Any]:
    call, flops = matrix_product(GPU, 8192)
    time = interleaved({"product": call}, repeats=20)["product"]
    return {"tflops": round(flops / time.median / 1e9, 1), "milliseconds": time._asdict()}


def products() -> dict[str, Any]:
    """Forward, and the gradients of input and weight, of every product of a block."""
    found: dict[str, Any] = {}
    for name, (out, into) in PRODUCTS.items():
        x = torch.randn(TOKENS, into, device=GPU, dtype=torch.bfloat16)
        weight = torch.randn(out, into, device=GPU, dtype=torch.bfloat16)
        dy = torch.randn(TOKENS, out, device=GPU, dtype=torch.bfloat16)
        bias = torch.randn(out, device=GPU, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(torch.matmul, x, weight.T),
            "forward with bias": partial(F.linear, x, weight, bias),
            "input gradient": partial(torch.matmul, dy, weight),
            "weight gradient": partial(torch.matmul, dy.T, x),
        }
        flops = 2.0 * TOKENS * out * into
        times = interleaved(calls, warmup=3, repeats=10)
        found[name] = {
            what: {"ms": round(t.median, 3), "tflops": round(flops / t.median / 1e9, 1)}
            for what, t in times.items()
        }
    return found


def attention(width: int, heads: int = 16, batch: int = 256) -> dict[str, Any]:
    """Forward, and forward with backward, laid out as a block has them."""
    shape = (batch, 256, 3, heads, width)
    qkv = torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(batch, 256, heads, width, device=GPU, dtype=torch.bfloat16).transpose(1, 2)
    flops = 4.0 * batch * heads * 256 * 256 * width

    def forward(backend: SDPBackend) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    def both(backend: SDPBackend) -> Tensor:
        return torch.autograd.grad(forward(backend), qkv, up)[0]

    found: dict[str, Any] = {}
    truth = None
    for name, backend in BACKENDS.items():
        try:
            gradient = both(backend).float()
            truth = gradient if truth is None else truth
            times = interleaved(
                {"forward": partial(forward, backend), "both": partial(both, backend)},
                warmup=3,
                repeats=10,
            )
        except RuntimeError as error:
            found[name] = {"failed": str(error).splitlines()[0][:200]}
            continue
        found[name] = {
            "forward_ms": round(times["forward"].median, 3),
            "both_ms": round(times["both"].median, 3),
            "tflops": round(3.5 * flops / times["both"].median / 1e9, 1),
            "gradient_differs_from_first": float((gradient - truth).norm() / truth.norm()),
            "repeats": all(torch.equal(both(backend), both(backend)) for _ in range(3)),
        }
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    chosen = torch._fused_sdp_choice(q, k, v)  # pyright: ignore[reportPrivateImportUsage]
    return {**found, "chosen": SDPBackend(chosen).name}


def noise_bits() -> dict[str, Any]:
    """Whether the kernels draw the very bits that the definition draws on a CPU."""
    root, ids = torch.tensor(7), torch.arange(64) * 1_000_003
    here = random_bits(root, ids, 4096, Stream.NOISE), normal(root, ids, 4096)
    there = (
        random_bits(root.to(GPU), ids.to(GPU), 4096, Stream.NOISE),
        normal(root.to(GPU), ids.to(GPU), 4096),
    )
    normals = there[1].cpu()
    return {
        "words_equal": torch.equal(here[0], there[0].cpu()),
        "normals_equal": torch.equal(here[1], normals),
        "normals_that_differ": int((here[1] != normals).sum()),
        "of": normals.numel(),
    }


def engine_of(config: TrainConfig, how: str = "blocks", **options: Any) -> Engine:
    return make_engine(config, GPU, forward=partial(compiled, how=how), **options)


def no_waiting() -> dict[str, Any]:
    """DiT-S/2's step raises where the host would wait for the device."""
    config = replace(gpu_cases()["DiT-S/2"], batch_size=64)
    engine, batch = engine_of(config), synthetic_batch(config, GPU)
    for _ in range(3):
        engine.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = engine.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"loss": float(report.loss), "skipped": float(report.skipped)}


def repeats() -> dict[str, Any]:
    """Twenty steps twice, as they come and with deterministic algorithms."""
    config = replace(gpu_cases()["DiT-S/2"], batch_size=64)
    batch = synthetic_batch(config, GPU)
    found: dict[str, Any] = {}
    for name, wanted in (("default", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        torch.backends.cuda.enable_cudnn_sdp(not wanted)
        sums = []
        for _ in range(2):
            torch.cuda.manual_seed(0)  # of its first parameters
            engine = engine_of(config)
            for _ in range(20):
                engine.step(batch)
            sums.append([p.detach().clone() for p in engine.model.parameters()])
            if len(sums) == 1:
                found[f"{name}: step"] = timed_steps(partial(engine.step, batch), 10)
        equal = [torch.equal(a, b) for a, b in zip(*sums, strict=True)]
        found[name] = {"parameters": len(equal), "equal": sum(equal)}
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    return found


def tests(seconds: float) -> dict[str, Any]:
    """The tests of the kernels and of the engine, on the device."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", "--tb=line",
        "tests/speed_kernels", "tests/training/test_engine.py", "tests/test_ops.py",
    ]  # fmt: skip
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        text = run.stdout
    except subprocess.TimeoutExpired as expired:
        text = (expired.stdout or b"").decode()
    print(text[-6000:])
    lines = text.splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"last_line": lines[-1] if lines else "", "failed_tests": failed[:60]}
