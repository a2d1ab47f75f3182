"""Tables of the documentation, made from the results: a figure without a result cannot appear.

Run: ``python benchmarks/tables.py`` to fill, in the pages of ``DOCUMENTS``, every block

    <!-- table: NAME -->
    ...
    <!-- end -->

Where a benchmark has no result yet, its block says so.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import bench_loader
from candidates import CANDIDATES, CASES
from speed_engine.arena.results import BUDGET, SEED_OFFSET, Results, read_results
from speed_engine.arena.speedup import LOSS, complete_runs
from speed_engine.arena.summary import against, written, written_interval

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
COMPARISONS = ROOT / "docs" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "recipes.md",
    ROOT / "docs" / "training.md",
    Path(__file__).parent / "README.md",
)
MACHINE = "x86-64-2-cores"  # of blocks that name no other
GPU_MACHINE = "nvidia-h200"
BLOCK = re.compile(r"(<!-- table: ([a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        document.write_text(filled(text))
        print(document, "changed" if filled(text) != text else "as it was")


def filled(text: str) -> str:
    """The document with every block as its results have it.

    Raises:
        KeyError: a block that nothing here makes.
    """
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


def result(name: str, machine: str = MACHINE) -> dict[str, Any] | None:
    path = RESULTS / machine / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows(head: list[str], body: list[list[str]]) -> str:
    """A table of Markdown, the first column text, the others figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loader() -> str:
    found = result("loader")
    return bench_loader.table(found) if found else missing("bench_loader.py")


def train_step() -> str:
    """Providers of a CPU, one case after the other."""
    body = []
    for name in ("digits", "cifar16", "dit-s-2", "unet"):
        found = result(f"train_step_{name}")
        if found is None:
            continue
        faster = found["times_as_fast_at_equal_flops"] | {"compiled": 1.0}
        for provider, facts in found["providers"].items():
            time = facts["step_milliseconds"]
            body.append([
                f"{found['case']}: {provider}",
                f"{time['median']:,.1f}",
                f"{time['p20']:,.1f} to {time['p80']:,.1f}",
                f"{facts['images_per_second']:,.1f}",
                f"{facts['share_of_matrix_product']:.0%}",
                f"{faster[provider]:.2f}",
            ])  # fmt: skip
    head = ["", "ms per step", "20 to 80 %", "images/s", "of a product's rate"]
    head.append("times the compiled step's time, at equal FLOPs")
    return rows(head, body) if body else missing("bench_train_step.py --sections step")


def operators() -> str:
    """What the compiled steps' time goes to."""
    body, parts = [], []
    for name in ("digits", "cifar16", "dit-s-2", "unet"):
        found = result(f"train_step_{name}")
        if found is None:
            continue
        for provider, facts in found["providers"].items():
            shares = facts.get("operators")
            if shares is None:
                continue
            parts = list(shares)
            body.append([f"{found['case']}: {provider}", *(f"{s:.0%}" for s in shares.values())])
    return rows(["", *parts], body) if body else missing("bench_train_step.py --sections step")


def loader_step() -> str:
    found = result("train_loader")
    if found is None:
        return missing("bench_train_step.py --sections loader")
    body = [
        [
            row["case"],
            f"{row['step_milliseconds']['loader']['median']:,.1f}",
            f"{row['step_milliseconds']['one batch']['median']:,.1f}",
            f"{row['share']:.1%}",
        ]
        for row in found["rows"]
    ]
    return rows(["", "ms with the loader", "ms with one batch", "rate kept"], body)


def startup() -> str:
    found = result("train_startup")
    if found is None:
        return missing("bench_train_step.py --sections startup")
    cases = found["seconds"]
    parts = list(next(iter(cases.values())))
    body = [
        [name, *(f"{seconds[part]['median']:.1f}" for part in parts)]
        for name, seconds in cases.items()
    ]
    return rows([found["case"], *(f"{part}, s" for part in parts)], body)


def gpu(section: str) -> dict[str, Any]:
    """Rows of a section of ``gpu.py``; none where it has no result."""
    found = result(f"gpu_{section}", GPU_MACHINE) or {}
    return found.get("rows", {})


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
    body = [["copy", f"{found['copy']['gigabytes_per_second']:,.0f} GB/s"]]
    body += [["product of 8192, bfloat16", f"{found['product 8192']['tflops']:.0f} TFLOP/s"]]
    for name, ways in found["products"].items():
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
    found = gpu("third")
    if not found:
        return missing("gpu.py xl")
    best, default = found["XL/2: bf16 stream"], found["XL/2: default"]
    original = found["XL/2: original loop, SDPA, batch 64"]
    return (
        f"On one H200, DiT-XL/2 trains at {default['images_per_second']:.0f} images/s with the "
        f"defaults (256 images a step,\nbfloat16 autocast, {default['mfu']:.0%} of the peak rate) "
        f"and at {best['images_per_second']:.0f} with a bfloat16 residual stream;\n"
        f"the original loop, rewritten, with its 64 images a step, at "
        f"{original['images_per_second']:.0f}."
    )


STEPS_OF_A_RUN = ("eager, memory kept", "compiled")


def compile_pays() -> str:
    """The sentence on ``torch.compile`` on a CPU; steps as they were measured last."""
    found, step = result("compile"), result("train_step_digits")
    if found is None or step is None:
        return missing("bench_compile.py")
    providers, first = step["providers"], found["first_step_seconds"]
    times = (providers[name]["step_milliseconds"]["median"] for name in STEPS_OF_A_RUN)
    eager, fast = times
    won_back = 1000 * first["compiled cold"] / (eager - fast)
    return (
        f"On two CPU cores it makes the step of the digits model {eager / fast:.2f} times as fast "
        f"but\nfirst costs {first['compiled cold']:.0f} s ({first['compiled cached']:.1f} s with "
        f"kept code), which {won_back:,.0f} steps win back."
    )


def missing(command: str) -> str:
    return f"Not measured (`benchmarks/{command}`)."


def ladder(name: str) -> str:
    """The recipes of a comparison, one change a rung."""
    path = COMPARISONS / name / "results.json"
    if not path.exists():
        return "Not measured yet."
    results = read_results(path)
    rungs = _rungs(results)
    lowest = next(iter(rungs.values()))
    body, below = [], None
    for rung, contestant in rungs.items():
        ends = [run.points[-1].values for run in complete_runs(results, contestant).values()]
        schedule = {c.name: c.schedule for c in results.contestants}
        same = below is not None and schedule[below] == schedule[contestant]
        body.append([
            rung,
            f"`{contestant}`",
            spread([end[results.metric] for end in ends]),
            spread([end[LOSS] for end in ends]) if schedule[contestant] == "flow" else "–",
            times(results, contestant, lowest, "final"),
            times(results, contestant, below, "median"),
            times(replace(results, metric=LOSS), contestant, below if same else None, "median"),
        ])  # fmt: skip
        below = contestant
    head = ["", "written", results.title, "validation loss", "against the first row"]
    head += ["against the row above", "the same by validation loss"]
    return rows(head, body)


# Data of the headline: in words, and comparisons, of which the first that has a rung shows it.
PROOFS = {
    "CIFAR-10 at 16 px": ("cifar16", "cifar16-decay"),
    "digits at 8 px": ("recipe-digits", "digits-decay"),
}
FLOW = "logit-normal times"  # the rung that the headline's ratios are given against


def proofs() -> str:
    """Recipes on all data: quality, and how many times fewer images than a flow with AdamW."""
    columns = [
        _proof([path for name in names if (path := COMPARISONS / name / "results.json").exists()])
        for names in PROOFS.values()
    ]
    head = [""]
    for data in PROOFS:
        head += [f"{data}: FID", "times as fast as the flow"]
    body = [
        [rung, *(cell for of in columns for cell in of.get(rung, ["", ""]))]
        for rung in RUNGS
        if any(rung in of for of in columns)
    ]
    return rows(head, body)


def _proof(paths: list[Path]) -> dict[str, list[str]]:
    """Cells of each rung."""
    cells: dict[str, list[str]] = {}
    for results in map(read_results, paths):
        rungs = _rungs(results)
        for rung, contestant in rungs.items():
            runs = complete_runs(results, contestant).values()
            flow = rungs[FLOW] if contestant != rungs[FLOW] else None
            shown = [
                spread([run.points[-1].values[results.metric] for run in runs]),
                times(results, contestant, flow, "median") if flow else "1",
            ]
            cells.setdefault(rung, shown)
    return cells


def cifar_tuning() -> str:
    """Single runs by which learning rates and a target were chosen."""
    found = result("cifar16_tuning")
    if found is None:
        return "Not measured yet."
    body = [
        [name]
        + [f"{of['held_out_fid']:.3g}" for of in run["evaluations"]]
        + [f"{run['evaluations'][-1]['validation_loss']:.3f}"]
        for name, run in found["runs"].items()
    ]
    gaussian = found["gaussian_per_class"]["held_out_fid"]
    body.append(["a Gaussian per class, no training", "", f"{gaussian:.3g}", ""])
    halves = [f"FID at {of['images']:,} images" for of in found["runs"][body[0][0]]["evaluations"]]
    return rows(["optimizer, learning rate", *halves, "validation loss at the end"], body)


def cifar_ddpm_tuning() -> str:
    """Single runs on DDPM by which its learning rate was chosen."""
    found = result("cifar16_tuning")
    if found is None:
        return "Not measured yet."
    body = [
        [name, f"{run['evaluations'][-1]['held_out_fid']:.3g}"]
        for name, run in found["ddpm"]["runs"].items()
    ]
    return rows(["method, target, learning rate of AdamW", "FID at 102,400 images"], body)


def candidates() -> str:
    """What was tried in place of the recipe: figures, and how far off the recipe's own they are."""
    found = result("candidates")
    if found is None:
        return missing("candidates.py")
    names = {"digits": "digits", "cifar16": "CIFAR-10"}
    cases = [case for case in CASES if case in found["runs"]]
    head = ["in place of the recipe"]
    for case in cases:
        head += [f"{names[case]}: FID", "validation loss", "a step"]
    body = [
        [candidate.what, *(cell for case in cases for cell in _candidate(found, case, name))]
        for name, candidate in CANDIDATES.items()
    ]
    return rows(head, [line for line in body if any(cell != "–" for cell in line[1:])])


def _candidate(found: dict[str, Any], case: str, name: str) -> list[str]:
    """FID, validation loss and time of a step, against the recipe with the same seeds."""
    runs = found["runs"].get(case, {})
    cells = []
    for key in ("held_out_fid", "validation_loss"):
        own = {seed: of[key] for seed, of in runs.get(name, {}).items()}
        recipe = [runs["recipe"][seed][key] for seed in own]
        cells.append(_against(list(own.values()), recipe))
    times = {of: timing["median"] for of, timing in found["step_ms"].get(case, {}).items()}
    cells.append(f"{times[name] / times['recipe']:.2f}×" if name in times else "–")
    return cells


def _against(own: list[float], recipe: list[float]) -> str:
    """The mean, and by how many per cent it is above that of the recipe."""
    if not own:
        return "–"
    above = 100 * (fmean(own) / fmean(recipe) - 1)
    return f"{fmean(own):.4g}" if own == recipe else f"{fmean(own):.4g} ({above:+.1f} %)"


# What is changed: the method, the process, the optimizer and its weight decay of the contestant.
RUNGS = {
    "DDPM, uniform timesteps": ("uniform", "linear", "adamw", 0),
    "DDPM, SpeeD": ("speed_paper", "linear", "adamw", 0),
    "a rectified flow": ("uniform", "flow", "adamw", 0),
    "logit-normal times": ("logit_normal", "flow", "adamw", 0),
    "Muon": ("logit_normal", "flow", "muon", 0),
    "Muon, weight decay 0.1": ("logit_normal", "flow", "muon", 0.1),
}


def _rungs(results: Results) -> dict[str, str]:
    """Rung -> contestant, of those that a comparison has."""
    found = {rung: _on_rung(results, *of) for rung, of in RUNGS.items()}
    return {rung: name for rung, name in found.items() if name is not None}


def _on_rung(results: Results, *rung: str | float) -> str | None:
    """The contestant, with the whole budget and the seeds of all."""
    for contestant in results.contestants:
        options = contestant.options
        if options.keys() & {BUDGET, SEED_OFFSET}:
            continue
        by = options.get("optimizer.name", "adamw"), options.get("optimizer.weight_decay", 0)
        if (contestant.method, contestant.schedule, *by) == rung:
            return contestant.name
    return None


def spread(values: list[float]) -> str:
    return f"{fmean(values):.3g} ± {stdev(values):.2g}"


def times(results: Results, contestant: str, baseline: str | None, where: str) -> str:
    """The speed-up in images to the other's final quality, or its median, with its interval."""
    if baseline is None or baseline == contestant:
        return "–"
    found = against(results, baseline)
    if contestant in found.missing:
        return "undecided"
    ratio = getattr(found.by_images[contestant], where)
    said = f"{written(ratio)} ({written_interval(ratio)})"
    return f"undecided: {said}" if contestant in found.undecided else said


TABLES: dict[str, Callable[[], str]] = {
    "loader": loader,
    "train_step": train_step,
    "operators": operators,
    "loader_step": loader_step,
    "startup": startup,
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
    "compile_pays": compile_pays,
    "cifar_tuning": cifar_tuning,
    "cifar_ddpm_tuning": cifar_ddpm_tuning,
    "candidates": candidates,
    "ladder_cifar": partial(ladder, "cifar16"),
    "ladder_digits": partial(ladder, "recipe-digits"),
    "proofs": proofs,
}

if __name__ == "__main__":
    main()
