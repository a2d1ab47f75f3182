"""Tables of the documentation, made from the results: a figure without a result cannot appear.

Run: ``python benchmarks/tables.py`` to fill, in README.md and benchmarks/README.md, every block

    <!-- table: NAME -->
    ...
    <!-- end -->

Where a benchmark has no result yet, its block says so.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_loader
from speed_engine.arena.results import read_results
from speed_engine.arena.summary import against, headline

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
COMPARISONS = ROOT / "docs" / "results"
DOCUMENTS = (ROOT / "README.md", Path(__file__).parent / "README.md")
MACHINE = "x86-64-2-cores"  # of blocks that name no other
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
    for name in ("digits", "dit-s-2", "unet"):
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
    for name in ("digits", "dit-s-2", "unet"):
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


def ladder() -> str:
    """Of every GPU and model that was measured."""
    body = []
    for path in sorted(RESULTS.glob("*/train_step_*.json")):
        found = json.loads(path.read_text())
        if "interleaved" not in found:
            continue
        for rung, facts in found["providers"].items():
            if "left_out" in facts:
                body.append([f"{path.parent.name}, {found['case']}: {rung}", *["-"] * 5])
                continue
            body.append([
                f"{path.parent.name}, {found['case']}: {rung}",
                f"{facts['batch']}",
                f"{facts['images_per_second']:,.0f}",
                f"{facts['mfu']:.1%}" if "mfu" in facts else "",
                f"{facts['share_of_matrix_product']:.1%}",
                f"{facts['peak_memory_gigabytes']:.1f}",
            ])  # fmt: skip
    head = ["", "batch", "images/s", "MFU", "of a product's rate", "GB"]
    return rows(head, body) if body else missing("gpu.sh")


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


def comparisons() -> str:
    """What the committed comparisons say in a sentence for each baseline."""
    text = []
    for folder in sorted(COMPARISONS.glob("*/")):
        results = read_results(folder / "results.json")
        sentences = [headline(results, against(results, name)) for name in results.baselines]
        sentences = [f"- {sentence}" for sentence in sentences]
        size = f"{len(results.contestants)} contestants, {len(results.seeds)} seeds"
        link = f"[{folder.name}](docs/results/{folder.name}/report.md)"
        text.append(f"{link} ({size}, {results.budget_images:,} images each):\n")
        text += [*sentences, ""]
    return "\n".join(text).rstrip()


TABLES: dict[str, Callable[[], str]] = {
    "loader": loader,
    "train_step": train_step,
    "operators": operators,
    "loader_step": loader_step,
    "startup": startup,
    "ladder": ladder,
    "compile_pays": compile_pays,
    "comparisons": comparisons,
}

if __name__ == "__main__":
    main()
