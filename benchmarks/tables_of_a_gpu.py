"""Tables of what ``gpu.py`` measured."""

from collections.abc import Callable
from functools import partial
from typing import Any

from table_rows import missing, result, rows

GPU_MACHINE = "nvidia-h200"


def gpu(section: str) -> dict[str, Any]:
    """Rows of a section of ``gpu.py`` that were measured; none where it has no result."""
    found = (result(f"gpu_{section}", GPU_MACHINE) or {}).get("rows", {})
    return {name: of for name, of in found.items() if not of.keys() & {"failed", "left_out"}}


def steps_on_a_gpu(model: str) -> str:
    """Every row of a model, before the kernels were tuned and after."""
    body = []
    for section, when in (("xl", "before"), ("second", "after"), ("third", "attention, too")):
        for name, facts in gpu(section).items():
            if not name.startswith(f"{model}: ") or "ms" not in facts:
                continue
            time = facts["ms"]
            body.append([
                name.removeprefix(f"{model}: ").removeprefix("tuned, ").replace("tuned", "default"),
                when,
                f"{time['median']:.1f}",
                f"{time['p20']:.1f} to {time['p80']:.1f}",
                f"{facts['host_ms']:.1f}",
                f"{facts['images_per_second']:,.0f}",
                f"{facts['mfu']:.1%}",
                f"{facts['peak_gigabytes']:.1f}",
                f"{facts['first_step_seconds']:.1f}",
                f"{facts['product_tflops']:.0f}",
            ])  # fmt: skip
    head = ["", "tuning", "ms per step", "20 to 80 %", "host, ms", "images/s", "MFU", "peak, GB"]
    head += ["first step, s", "product, TFLOP/s"]
    return rows(head, body) if body else missing("gpu.py xl")


def gpu_rates() -> str:
    found = gpu("first")
    if not found:
        return missing("gpu.py first")
    body = []
    if copy := found.get("copy"):
        body.append(["copy", f"{copy['gigabytes_per_second']:,.0f} GB/s"])
    if product := found.get("product 8192"):
        body.append(["product of 8192, bfloat16", f"{product['tflops']:.0f} TFLOP/s"])
    for name, ways in found.get("products", {}).items():
        if name != "seconds":
            rates = [way["tflops"] for way in ways.values()]
            body.append([
                f"{name} of DiT-XL/2, forward and gradients",
                f"{min(rates):.0f} to {max(rates):.0f} TFLOP/s",
            ])  # fmt: skip
    return rows(["", "rate"], body)


def gpu_attention() -> str:
    body = []
    for name, backends in gpu("first").items():
        if not name.startswith("attention"):
            continue
        for backend in ("flash", "cudnn", "efficient"):
            facts = backends[backend]
            body.append([
                f"{name.removeprefix('attention, ')}: {backend}",
                f"{facts['forward_ms']:.2f}",
                f"{facts['both_ms']:.2f}",
                f"{facts['tflops']:.0f}",
                "yes" if facts["repeats"] else "no",
            ])  # fmt: skip
    head = ["", "forward, ms", "with backward, ms", "TFLOP/s", "gradients repeat"]
    return rows(head, body) if body else missing("gpu.py first")


TUNED = {  # parameters in the source before, and since
    "adaLN forward": ("forward", "4,1,8", "8,3,16"),
    "adaLN backward": ("backward", "32,1,8", "32,4,8"),
    "GELU backward": ("gelu", "128,4,512,1,4", "128,16,128,3,4"),
}


def gpu_tuning() -> str:
    tried = gpu("tune")
    if not tried:
        return missing("gpu.py tune")
    body = []
    for name, (kernel, before, after) in TUNED.items():
        if kernel not in tried:
            continue
        values = tried[kernel]
        tried_of = [value for value in values.values() if isinstance(value, list)]
        milliseconds = [f"{values[key][0]:.3f}" for key in (before, after)]
        body.append([name, *milliseconds, f"{len(tried_of)}"])
    return rows(["", "before, ms", "since, ms", "parameters tried"], body)


def gpu_attention_gradients() -> str:
    """PyTorch's, and the fastest parameters of either way to write it."""
    found = gpu("attention")
    if not found:
        return missing("gpu.py tune")
    body = []
    for heads, ways in found.items():
        timed = {name: values for name, values in ways.items() if isinstance(values, list)}
        for way in ("PyTorch's, cudnn", "PyTorch's, flash", "two phases", "one program per head"):
            tried = {name: values for name, values in timed.items() if name.startswith(way)}
            best = min(tried, key=lambda name: tried[name][0])
            milliseconds, error = tried[best]
            body.append([heads, best, f"{milliseconds:.2f}", f"{error:.4f}"])
    return rows(["", "gradients of qkv and its bias", "ms", "relative error"], body)


def gpu_memory() -> str:
    """What is estimated to be held beside the allocator's peak."""
    found = gpu("defaults").get("memory")
    if found is None:
        return missing("gpu.py defaults")
    body = [
        [
            name,
            f"{facts['microbatch']}",
            f"{facts['estimated_gb']:.1f}",
            f"{facts['measured_gb']:.1f}",
            f"{facts['estimated_gb'] / facts['measured_gb'] - 1:+.0%}",
        ]
        for name, facts in found.items()
        if isinstance(facts, dict)
    ]
    return rows(["", "images at a time", "estimate, GB", "peak, GB", "estimate off by"], body)


def gpu_layouts() -> str:
    """U-Nets by the layout of their images."""
    found = gpu("defaults").get("U-Nets by layout")
    if found is None:
        return missing("gpu.py defaults")
    body = [
        [
            f"{name}: {layout}",
            f"{facts['total_ms']:.1f}",
            f"{facts['host']['ms']['median']:.1f}",
            f"{facts['host']['ms']['p20']:.1f} to {facts['host']['ms']['p80']:.1f}",
            f"{facts['peak_gigabytes']:.1f}",
        ]
        for name, layouts in found.items()
        if isinstance(layouts, dict)
        for layout, facts in layouts.items()
    ]
    head = ["", "kernels, ms per step", "step, ms", "20 to 80 %", "peak, GB"]
    return rows(head, body)


def gpu_graphs() -> str:
    """The digits' step by every way to compile it."""
    found = gpu("defaults").get("graphs of digits")
    if found is None:
        return missing("gpu.py defaults")
    names = {"blocks": "block by block", "on": "whole", "graphs": "whole, CUDA graphs"}
    body = [
        [
            name,
            f"{found[way]['ms']['median']:.1f}",
            f"{found[way]['ms']['p20']:.1f} to {found[way]['ms']['p80']:.1f}",
            f"{found[way]['host_ms']:.1f}",
            f"{found[way]['first_step_seconds']:.1f}",
        ]
        for way, name in names.items()
    ]
    return rows(["", "ms per step", "20 to 80 %", "host, ms", "first step, s"], body)


SHARES = {  # by a part of the kernel's name; the first that names it takes it
    "attention's gradient, ours": ("_attention_backward",),
    "attention": ("sdpa", "cudnn::fusion"),
    "matrix products": ("nvjet", "sm90_xmma", "splitKreduce"),
    "adaLN, ours": ("_adaln",),
    "GELU backward, ours": ("_gelu",),
    "update and average, ours": ("_adamw_ema",),
    "GELU forward, PyTorch's": ("GeluCUDA",),
}


def gpu_kernels() -> str:
    """What DiT-XL/2's step goes to, tuned, bfloat16 stream and one sweep."""
    found = gpu("third").get("XL/2: kernel table")
    if found is None:
        return missing("gpu.py xl")
    times = dict.fromkeys(SHARES, 0.0)
    for name, (milliseconds, _) in found["kernels"].items():
        part = next((p for p, words in SHARES.items() if any(w in name for w in words)), None)
        if part is not None:
            times[part] += milliseconds
    times["all others"] = found["total_ms"] - sum(times.values())
    total = {**times, "sum": found["total_ms"]}
    body = [[name, f"{ms:.1f}", f"{ms / found['total_ms']:.0%}"] for name, ms in total.items()]
    return rows(["", "ms per step", "share"], body)


def gpu_headline() -> str:
    """The sentence of the main README."""
    names = ("XL/2: bf16 stream", "XL/2: default", "XL/2: original loop, SDPA, batch 64")
    found = gpu("third")
    if not found.keys() >= set(names):
        return missing("gpu.py xl")
    best, default, original = (found[name] for name in names)
    return (
        f"On one H200, DiT-XL/2 trains at {default['images_per_second']:.0f} images/s with the "
        f"defaults (256 images a step,\nbfloat16 autocast, {default['mfu']:.0%} of the peak rate) "
        f"and at {best['images_per_second']:.0f} with a bfloat16 residual stream;\n"
        f"DiT's original loop, rewritten, with its 64 images a step, at "
        f"{original['images_per_second']:.0f}."
    )


TABLES: dict[str, Callable[[], str]] = {
    "gpu_xl": partial(steps_on_a_gpu, "XL/2"),
    "gpu_small": partial(steps_on_a_gpu, "S/2"),
    "gpu_rates": gpu_rates,
    "gpu_attention": gpu_attention,
    "gpu_tuning": gpu_tuning,
    "gpu_attention_gradients": gpu_attention_gradients,
    "gpu_memory": gpu_memory,
    "gpu_layouts": gpu_layouts,
    "gpu_graphs": gpu_graphs,
    "gpu_kernels": gpu_kernels,
    "gpu_headline": gpu_headline,
}
