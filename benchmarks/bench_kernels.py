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
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch
from torch import Tensor

from harness import Timing, interleaved, result_path, write_result
from speed_engine import environment
from speed_kernels.adaln import (
    adaln,
    adaln_reference,
    gated_residual_adaln,
    gated_residual_adaln_reference,
)
from speed_kernels.adamw_ema import adamw_ema, adamw_ema_reference
from speed_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from speed_kernels.noising import noised_input, noised_input_reference
from speed_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from speed_kernels.weighted_mse import weighted_mse, weighted_mse_reference

DRY = "--dry-run" in sys.argv
DEVICE = torch.device("cpu" if DRY or not torch.cuda.is_available() else "cuda")
CACHE_BYTES = 128 * 2**20  # inputs of a replayed graph together exceed this, up to MOST_SETS
MOST_SETS = 1 if DRY else 16
TIMESTEPS = 1000

IMAGES = {  # (B, C, H, W) of one training step
    "DiT-S to XL, latents 32 x 32 x 4": (256, 4, 32, 32),
    "DiT-S to XL, latents 64 x 64 x 4": (256, 4, 64, 64),
    "pixels 64 x 64 x 3": (256, 3, 64, 64),
    "pixels 256 x 256 x 3": (256, 3, 256, 256),
}
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
    IMAGES = {"tiny": (2, 4, 8, 8)}
    TOKENS = {"tiny": (1, 3, 72)}
    HEADS = {"tiny": (1, 2, 3, 8)}
    CHANNELS = {"tiny": ((2, 6, 3, 5), 3)}
    MODELS = {"tiny": (8, 1)}


class Case(NamedTuple):
    """One operation in several implementations; each takes the number of a set of inputs."""

    name: str
    num_bytes: int
    providers: dict[str, Callable[[int], object]]
    num_sets: int
    check: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter")
    options = parser.parse_args()
    if DEVICE.type != "cuda" and not DRY:
        raise SystemExit("No GPU: there is nothing to measure here. --dry-run proves the script.")
    for section in options.sections:
        if not DRY and not options.again and measured(section):
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


def measured(section: str) -> bool:
    path = result_path(name(section))
    if not path.exists():
        return False
    commit = json.loads(path.read_text())["environment"]["git_commit"]
    return commit is not None and commit == environment.describe([])["git_commit"]


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
    figures: dict[str, Any] = {"case": case.name, "bytes": case.num_bytes, "providers": {}}
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


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="aot_eager" if DRY else "inductor")


def sets_for(num_bytes: int) -> int:
    return min(MOST_SETS, -(-CACHE_BYTES // num_bytes))


def require(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative error in the norm, against float64."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


# Noised input.

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, TIMESTEPS))
ROOTS = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)  # float64 on the host, as DiT keeps them


def extract(table: np.ndarray, t: Tensor) -> Tensor:
    """DiT's lookup: the table travels to the device in every step."""
    return torch.from_numpy(table).to(t.device)[t].float()[:, None, None, None]


def noise_eager(x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x0)
    return (extract(ROOTS[0], t) * x0 + extract(ROOTS[1], t) * noise).bfloat16(), noise


def noise_on_device(x0: Tensor, t: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x0)
    return (a[t][:, None, None, None] * x0 + s[t][:, None, None, None] * noise).bfloat16(), noise


def draw_batch(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """x0, timesteps, epsilon-prediction coefficients, seed and ids."""
    t = torch.randint(0, TIMESTEPS, shape[:1], device=DEVICE)
    a, s = (torch.from_numpy(root).float().to(DEVICE)[t] for root in ROOTS)
    rows = torch.stack([a, s, torch.zeros_like(a), torch.ones_like(a), torch.ones_like(a)], dim=1)
    return {
        "x0": torch.randn(shape, device=DEVICE).clamp(-1, 1),
        "t": t,
        "coefficients": rows.contiguous(),
        "seed": torch.tensor(-1, device=DEVICE),
        "ids": torch.arange(shape[0], device=DEVICE) + 2**33,
    }


def noise_cases() -> Iterator[Case]:
    for label, shape in IMAGES.items():
        num_bytes = 6 * int(np.prod(shape))  # x0 in float32, x_in in bfloat16
        batches = [draw_batch(shape) for _ in range(sets_for(num_bytes))]
        tables = [torch.from_numpy(root).float().to(DEVICE) for root in ROOTS]
        fused = [(b["x0"], b["coefficients"], b["seed"], b["ids"], torch.bfloat16) for b in batches]
        by_compiler = compiled(noise_on_device)

        def check(arguments=fused[0]):
            x0, rows, seed, ids, dtype = arguments
            few = x0[:2].cpu(), rows[:2].cpu(), seed.cpu(), ids[:2].cpu()
            expected = noised_input_reference(*few, dtype)
            same = torch.equal(noised_input(*arguments)[:2].cpu(), expected)
            assert same, "noised input: not the CPU's bits"

        yield Case(
            f"noised input, {label}",
            num_bytes,
            {
                "eager as in DiT": lambda i, b=batches: noise_eager(b[i]["x0"], b[i]["t"]),
                "torch.compile": lambda i, b=batches, f=by_compiler, tables=tables: f(
                    b[i]["x0"], b[i]["t"], *tables
                ),
                "fused": lambda i, f=fused: noised_input(*f[i]),
            },
            len(batches),
            check,
        )


# Loss and its gradient.


def loss_eager(prediction: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    return (weight * ((prediction.float() - noise) ** 2).flatten(1).mean(dim=1)).mean()


def loss_cases() -> Iterator[Case]:
    for label, shape in IMAGES.items():
        num_bytes = 8 * int(np.prod(shape))  # bfloat16: read, write and read of difference, write
        batches, noises, predictions = [], [], []
        for _ in range(sets_for(num_bytes)):
            batches.append(draw_batch(shape))
            noises.append(torch.randn(shape, device=DEVICE))
            predictions.append(torch.randn(shape, device=DEVICE).bfloat16().requires_grad_())
        by_compiler = compiled(loss_eager)

        def stored(i, loss, p=predictions, n=noises, b=batches):
            return torch.autograd.grad(loss(p[i], n[i], b[i]["coefficients"][:, 4]), p[i])

        def regenerated(i, loss=weighted_mse, p=predictions, b=batches):
            batch = [b[i][key] for key in ("x0", "coefficients", "seed", "ids")]
            return torch.autograd.grad(loss(p[i], *batch)[0].mean(), p[i])

        def check(run=regenerated, p=predictions, b=batches):
            small = [[tensor.detach()[:2] for tensor in p[:1]]]
            small.append([{k: v[:2] if v.dim() else v for k, v in b[0].items()}])
            small[0] = [tensor.requires_grad_() for tensor in small[0]]
            exact = [tensor.detach().double().requires_grad_() for tensor in small[0]]
            require(
                "loss gradient",
                run(0, p=small[0], b=small[1])[0],
                run(0, loss=weighted_mse_reference, p=exact, b=small[1])[0],
                5e-3,
            )

        yield Case(
            f"loss and gradient, {label}",
            num_bytes,
            {
                "eager as in DiT": lambda i, f=stored: f(i, loss_eager),
                "torch.compile": lambda i, f=stored, g=by_compiler: f(i, g),
                "fused": lambda i, f=regenerated: f(i),
            },
            len(batches),
            check,
        )


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
    "noise": noise_cases,
    "loss": loss_cases,
    "adaln": adaln_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "group_norm": group_norm_cases,
    "optimizer": optimizer_cases,
}

if __name__ == "__main__":
    main()
