"""The kernels against eager PyTorch, as DiT writes it, and against torch.compile of that.

Run: ``python benchmarks/bench_kernels.py [--sections NAME ...] [--again] [--dry-run]``.

Each section takes a few minutes and writes its own result file; run again, sections that this
commit has measured on this machine are left alone. A case is checked for correctness before it is
timed. Reported are the call time (one call and a wait, what Python costs included) and the device
time (replay of a CUDA graph, over several sets of inputs, so that small cases do not live in the
cache), both with their 20 to 80 % range; bytes are what the operation must move, and their rate is
given as a share of the rate of a plain copy measured in the same section.

``--dry-run`` runs every section on tiny shapes in Triton's interpreter, to prove the script.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch
from torch import Tensor

import block_cases
import noise_and_loss_cases
from harness import Timing, interleaved, measured, write_result
from kernel_case import DEVICE, DRY, Case, compiled, require, sets_for
from speed_kernels.adaln import (
    adaln,
    adaln_reference,
    gated_residual_adaln,
    gated_residual_adaln_reference,
)
from speed_kernels.adamw_ema import adamw_ema, adamw_ema_reference
from speed_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from speed_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

TOKENS = {  # (B, N, D) of a block
    "DiT-S/2, latents 32 x 32": (256, 256, 384),
    "DiT-B/2, latents 32 x 32": (256, 256, 768),
    "DiT-L/2, latents 32 x 32": (256, 256, 1024),
    "DiT-XL/2, latents 32 x 32": (256, 256, 1152),
    "DiT-XL/2, latents 64 x 64": (64, 1024, 1152),
}
HEADS = {  # (B, H, N, D) of attention
    "DiT-S/2-modern, latents 32 x 32": (256, 6, 256, 64),
    "DiT-B/2-modern, latents 32 x 32": (256, 12, 256, 64),
    "DiT-L/2-modern, latents 32 x 32": (256, 16, 256, 64),
    "DiT-XL/2-modern, latents 32 x 32": (256, 16, 256, 72),
    "DiT-XL/2-modern, latents 64 x 64": (64, 16, 1024, 72),
}
CHANNELS = {  # (B, C, H, W) of a block of a U-Net, and its groups
    "DDPM++, 32 x 32": ((256, 128, 32, 32), 32),
    "ADM, 64 x 64": ((64, 192, 64, 64), 32),
    "ADM, 256 x 256": ((8, 256, 256, 256), 32),
    "latent diffusion, 16 x 16": ((64, 640, 16, 16), 32),
}
MODELS = {"DiT-B/2": (768, 12), "DiT-XL/2": (1152, 28)}  # D, blocks
if DRY:
    TOKENS = {"tiny": (1, 3, 72)}
    HEADS = {"tiny": (1, 2, 3, 8)}
    CHANNELS = {"tiny": ((2, 6, 3, 5), 3)}
    MODELS = {"tiny": (8, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter")
    options = parser.parse_args()
    if DEVICE.type != "cuda" and not DRY:
        raise SystemExit("No GPU: there is nothing to measure here. --dry-run proves the script.")
    for section in options.sections:
        if not DRY and not options.again and measured(name(section)):
            print(f"{section}: measured at this commit, left alone (--again repeats it)")
            continue
        begin = time.perf_counter()
        torch.manual_seed(0)
        rate = copy_rate()
        cases = [measure(case, rate) for case in SECTIONS[section]()]
        figures = {
            "copy_gigabytes_per_second": rate,
            "cases": cases,
            "seconds": round(time.perf_counter() - begin),
        }
        print(f"{section}: {figures['seconds']} s", end="")
        print("; dry run, nothing kept" if DRY else f"; {write_result(name(section), figures)}")


def name(section: str) -> str:
    return f"kernels_{section}"


def copy_rate() -> float:
    """Gigabytes per second of a copy that no cache holds, reads and writes counted."""
    source = torch.zeros(2**20 if DRY else 2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, **repeats())["copy"]
    return round(2 * source.nbytes / timing.median / 1e6, 1)


def repeats() -> dict[str, int]:
    return dict(warmup=0, repeats=1) if DRY else dict(warmup=5, repeats=50)


def measure(case: Case, rate: float) -> dict[str, Any]:
    """Check, then call and device times of every provider."""
    case.check()
    calls = {provider: (lambda run=run: run(0)) for provider, run in case.providers.items()}
    call_times = interleaved(calls, **repeats())
    device_times, refusals = replay_times(case)
    figures: dict[str, Any] = {"case": case.name, "bytes": case.num_bytes, **case.facts}
    figures["providers"] = {}
    for provider, call_time in call_times.items():
        device_time = device_times.get(provider)
        row: dict[str, Any] = {"call_milliseconds": call_time._asdict()}
        line = f"{case.name:52} {provider:20} call {call_time.median:9.4f} ms"
        if device_time is not None:
            speed = case.num_bytes / device_time.median / 1e6
            row["device_milliseconds"] = device_time._asdict()
            row["gigabytes_per_second"] = round(speed, 1)
            row["share_of_copy"] = round(speed / rate, 3)
            line += f", device {device_time.median:9.4f} ms {speed:6.0f} GB/s {speed / rate:6.1%}"
        elif provider in refusals:
            row["no_graph"] = refusals[provider]
        figures["providers"][provider] = row
        print(line, flush=True)
    return figures


def replay_times(case: Case) -> tuple[dict[str, Timing], dict[str, str]]:
    """Device time of one call by provider, and why a provider has none."""
    graphs, refusals = {}, {}
    if DEVICE.type != "cuda":
        return {}, {}
    for provider, run in case.providers.items():
        try:
            graphs[provider] = capture(run, case.num_sets)
        except RuntimeError as error:  # a provider that copies from the host cannot be captured
            refusals[provider] = str(error).splitlines()[0][:120]
            torch.cuda.synchronize()
    if not graphs:
        return {}, refusals
    timings = interleaved({provider: graph.replay for provider, graph in graphs.items()})
    per_call = {
        provider: Timing(*(value / case.num_sets for value in timing))
        for provider, timing in timings.items()
    }
    return per_call, refusals


def capture(run: Callable[[int], object], num_sets: int) -> "torch.cuda.CUDAGraph":
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for i in range(num_sets):
                run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_sets):
            run(i)
    return graph


# adaLN with the gated residual sum.


def adaln_cases() -> Iterator[Case]:
    for label, shape in TOKENS.items():
        size = 2 * int(np.prod(shape))  # bytes of one (B, N, D) tensor in bfloat16
        modulated = [shape[0], shape[2]]
        sets = []
        for _ in range(min(sets_for(size), 4)):
            big = [torch.randn(shape, device=DEVICE).bfloat16() for _ in range(4)]
            small = [torch.randn(modulated, device=DEVICE).bfloat16() for _ in range(3)]
            sets.append(([t.requires_grad_() for t in (*big[:2], *small)], big[2:]))
        by_compiler = compiled(gated_residual_adaln_reference)

        def forward(i, f, sets=sets):
            with torch.no_grad():
                return f(*sets[i][0])

        def both(i, f, sets=sets):
            leaves, upstream = sets[i]
            return torch.autograd.grad(f(*leaves), leaves, upstream)

        def check(run=both, sets=sets):
            few = [([t[:2].detach().requires_grad_() for t in sets[0][0]], [])]
            few[0][1].extend(t[:2] for t in sets[0][1])
            exact = [([t.detach().double().requires_grad_() for t in few[0][0]], [])]
            exact[0][1].extend(t.double() for t in few[0][1])
            ours = run(0, gated_residual_adaln, few)
            truth = run(0, gated_residual_adaln_reference, exact)
            for i, pair in enumerate(zip(ours, truth, strict=True)):
                require(f"adaLN gradient {i}", *pair, 1e-2)
            alone = adaln(few[0][0][0], *few[0][0][3:])
            require("adaLN", alone, adaln_reference(exact[0][0][0], *exact[0][0][3:]), 1e-2)

        implementations = {
            "eager": gated_residual_adaln_reference,
            "torch.compile": by_compiler,
            "fused": gated_residual_adaln,
        }
        for title, run, tensors in (
            ("adaLN forward", forward, 4),
            ("adaLN forward and backward", both, 10),
        ):
            yield Case(
                f"{title}, {label}",
                tensors * size,
                {
                    provider: (lambda i, run=run, f=f: run(i, f))
                    for provider, f in implementations.items()
                },
                len(sets),
                check,
            )


# Queries and keys; group norm with SiLU.


def differentiable_cases(
    name: str, sizes: tuple[int, int], sets: list, fused: Callable, reference: Callable
) -> Iterator[Case]:
    """Forward alone and with the gradients of all leaves; sizes in bytes, sets of
    (leaves, the other arguments, gradients from above).
    """

    def forward(i, f):
        leaves, others, _ = sets[i]
        with torch.no_grad():
            return f(*leaves, *others)

    def both(i, f):
        leaves, others, upstream = sets[i]
        return torch.autograd.grad(f(*leaves, *others), leaves, upstream)

    def check():
        leaves, others, upstream = sets[0]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        ours, truth = fused(*leaves, *others), reference(*exact, *others)
        if isinstance(ours, Tensor):
            ours, truth = (ours,), (truth,)
        results = torch.autograd.grad(ours, leaves, upstream)
        truths = torch.autograd.grad(truth, exact, [gradient.double() for gradient in upstream])
        for i, pair in enumerate(zip((*ours, *results), (*truth, *truths), strict=True)):
            require(f"{name}, figure {i}", *pair, 1e-2)

    implementations = {"eager": reference, "torch.compile": compiled(reference), "fused": fused}
    for title, run, num_bytes in (
        ("forward", forward, sizes[0]),
        ("forward and backward", both, sizes[1]),
    ):
        providers = {
            provider: (lambda i, run=run, f=f: run(i, f)) for provider, f in implementations.items()
        }
        yield Case(f"{name}, {title}", num_bytes, providers, len(sets), check)


def qk_norm_rope_cases() -> Iterator[Case]:
    for label, (batch, heads, tokens, dim) in HEADS.items():
        size = 2 * batch * heads * tokens * dim
        angles = torch.rand(tokens, dim, device=DEVICE)
        sets = []
        for _ in range(min(sets_for(size), 4)):
            qkv = torch.randn(batch, tokens, 3, heads, dim, device=DEVICE).bfloat16()
            q, k, _ = qkv.permute(2, 0, 3, 1, 4)
            weights = (torch.ones(dim, device=DEVICE).requires_grad_() for _ in range(2))
            leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), *weights)
            upstream = [torch.randn_like(q), torch.randn_like(k)]
            sets.append((leaves, (angles.cos(), angles.sin()), upstream))
        yield from differentiable_cases(
            f"QK norm and RoPE, {label}", (4 * size, 10 * size), sets, qk_norm_rope,
            qk_norm_rope_reference,
        )  # fmt: skip


def group_norm_cases() -> Iterator[Case]:
    for label, (shape, groups) in CHANNELS.items():
        size = 2 * int(np.prod(shape))
        for layout in (torch.channels_last, torch.contiguous_format):
            sets = []
            for _ in range(min(sets_for(size), 4)):
                x, dy = (
                    torch.randn(shape, device=DEVICE).bfloat16().to(memory_format=layout)
                    for _ in range(2)
                )
                affine = [torch.randn(shape[1], device=DEVICE) for _ in range(2)]
                rows = [torch.randn(shape[:2], device=DEVICE).bfloat16() for _ in range(2)]
                leaves = tuple(t.requires_grad_() for t in (x, *affine, *rows))
                sets.append((leaves, (), [dy]))
            fused, reference = (
                lambda x, *rest, f=f, groups=groups: f(x, groups, *rest)
                for f in (group_norm_silu, group_norm_silu_reference)
            )
            name = f"group norm and SiLU, {label}, {str(layout).removeprefix('torch.')}"
            yield from differentiable_cases(name, (3 * size, 8 * size), sets, fused, reference)


# Optimizer and averages.


def parameter_shapes(dim: int, depth: int) -> list[tuple[int, ...]]:
    """Of the blocks of a DiT, which hold nearly all of its parameters."""
    widths = [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim), (6 * dim, dim)]
    return [shape for _ in range(depth) for w in widths for shape in (w, (w[0],))]


def optimizer_cases() -> Iterator[Case]:
    hyper: dict[str, Any] = dict(
        learning_rate=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0
    )
    for label, (dim, depth) in MODELS.items():
        shapes = parameter_shapes(dim, depth)
        parameters, gradients, first, second, average = (
            [torch.randn(shape, device=DEVICE).mul_(0.02) for shape in shapes] for _ in range(5)
        )
        for moment in second:
            moment.abs_()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_().grad = gradient
        detached = [parameter.detach() for parameter in parameters]
        steps = torch.full((len(shapes),), 5.0, device=DEVICE)
        norm = torch.tensor(0.5, device=DEVICE)
        capturable = DEVICE.type == "cuda"
        loops = torch.optim.AdamW(
            parameters, lr=1e-4, weight_decay=0.0, foreach=True, capturable=capturable
        )
        fused = torch.optim.AdamW(
            parameters, lr=1e-4, weight_decay=0.0, fused=True, capturable=capturable
        )

        def eager(_, optimizer=loops, average=average, detached=detached):
            optimizer.step()
            for mean, parameter in zip(average, detached, strict=True):
                mean.mul_(0.9999).add_(parameter, alpha=1e-4)

        def two_passes(_, optimizer=fused, average=average, detached=detached):
            optimizer.step()
            torch._foreach_lerp_(average, detached, 1e-4)  # pyright: ignore[reportPrivateImportUsage]

        state = (detached, gradients, first, second, [average], steps, norm)

        def one_sweep(_, state=state):
            adamw_ema(*state, max_norm=1.0, decays=[0.9999], **hyper)

        def check(state=state):
            few = [[tensor.clone() for tensor in group[:3]] for group in state[:4]]
            few.append([tensor.clone() for tensor in state[4][0][:3]])
            exact = [[tensor.double() for tensor in group] for group in few]
            for update, (p, g, m, v, mean) in ((adamw_ema, few), (adamw_ema_reference, exact)):
                update(
                    p, g, m, v, [mean], state[5][:3].clone(), state[6],
                    max_norm=1.0, decays=[0.9], **hyper,
                )  # fmt: skip
            for group in (0, 2, 3, 4):
                for pair in zip(few[group], exact[group], strict=True):
                    require("AdamW and average", *pair, 1e-6)

        count = sum(parameter.numel() for parameter in parameters)
        yield Case(
            f"AdamW and average, {label}, {count / 1e6:.0f} M parameters",
            36 * count,
            {
                "foreach, loop": eager,
                "fused, foreach": two_passes,
                "one sweep": one_sweep,
            },
            1,
            check,
        )


SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "noise": noise_and_loss_cases.noise_cases,
    "loss": noise_and_loss_cases.loss_cases,
    "hybrid_loss": noise_and_loss_cases.hybrid_cases,
    "stored_noise": noise_and_loss_cases.stored_noise_cases,
    "clean_images": noise_and_loss_cases.clean_cases,
    "adaln": adaln_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "group_norm": group_norm_cases,
    "block": lambda: block_cases.block_cases(TOKENS),
    "optimizer": optimizer_cases,
}

if __name__ == "__main__":
    main()
