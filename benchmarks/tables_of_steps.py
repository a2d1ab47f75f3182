"""Tables of loading, steps and start-up on the CPU."""

from collections.abc import Callable

import bench_loader
from table_rows import missing, result, rows


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


def compile_pays() -> str:
    """The sentence on ``torch.compile`` on a CPU."""
    found = result("compile")
    if found is None:
        return missing("bench_compile.py")
    first, step = found["first_step_seconds"], found["step_milliseconds"]
    eager, fast = (step[name]["median"] for name in ("eager", "compiled"))
    won_back = found["steps_until_compiling_pays"]["cold"]
    return (
        f"On two CPU cores it makes the step of the digits model {eager / fast:.2f} times as fast "
        f"but\nfirst costs {first['compiled cold']:.0f} s ({first['compiled cached']:.1f} s with "
        f"kept code), which {won_back:,.0f} steps win back."
    )


TABLES: dict[str, Callable[[], str]] = {
    "loader": loader,
    "train_step": train_step,
    "operators": operators,
    "loader_step": loader_step,
    "startup": startup,
    "compile_pays": compile_pays,
}
