"""What does loading cost, and how much less than with other loaders?

Run: ``python benchmarks/bench_loader.py --streaming-python PYTHON``, of an environment that has
mosaicml-streaming, which needs older transformers and numpy, and simplejpeg; without, it is left
out. Latents are (8, 32, 32) float16, pictures JPEGs of 256 x 256, quality 90, of noise with the
spectrum of photographs. Every provider is a process that loads for a second when its turn comes,
from the page cache, and then a part of an epoch after its files were dropped from it. The turns of
a cycle are in random order.

Reported: images per CPU-second (self, threads and workers together), which a busy machine changes
less than those per second of the wall clock, reported, too, and megabytes per worker. Median and
20 to 80 % range, also of the ratios, which are taken within a cycle.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness import result_path, summary, write_result
from loader_providers import BATCH, JPG_SHAPE, LATENT_SHAPE, PROVIDERS, npy_bytes
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.preparing.pictures import encode_picture

HERE = Path(__file__).parent
CLASSES, SHARDS = 10, 10
SECONDS = 1.0  # of a turn
COLD = {"jpg": 1280, "latents": 3840}  # images of a turn, less than an epoch
STREAMING = ("mosaicml-streaming", "torch", "numpy", "simplejpeg")
DECODED = ("pictures dropped", "into one array", "into a batch")
GOALS = [  # ours, theirs, how many times as many images per CPU-second
    ("latents speed_engine", "latents webdataset, decode()", 8.0),
    ("latents speed_engine", "latents one .npy per image", 8.0),
    ("latents speed_engine", "latents mosaicml-streaming", 1.0),
    ("latents speed_engine", "latents webdataset, frombuffer", 8.0),
    *(("jpg speed_engine", f"jpg decoder, {kept}", 0.95) for kept in DECODED),
    ("jpg speed_engine", "jpg torchvision ImageFolder", 1.25),
    ("jpg speed_engine", "jpg mosaicml-streaming", 1.0),
]


def main() -> None:
    options = _options()
    if options.table:
        print(table(json.loads(result_path("loader").read_text())))
        return
    images = {"jpg": options.jpg, "latents": options.latents}  # of an epoch
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=options.scratch))
        data = Path(scratch)
        write_pictures(data / "jpg", images["jpg"])
        write_latents(data / "latents", images["latents"])
        pythons = {name: sys.executable for name in PROVIDERS}
        for name in [name for name in PROVIDERS if "streaming" in name]:
            pythons[name] = options.streaming_python
        if options.streaming_python:
            _run(options.streaming_python, "write-streaming", str(data))
        pythons = {name: python for name, python in pythons.items() if python}
        os.sync()
        costs = measure(data, pythons, options)
    figures = {
        case: {name: _figures(values) for name, values in providers.items() if values}
        for case, providers in costs.items()
    }
    warm = next(iter(costs.values()))
    ratios = [
        {"ours": ours, "theirs": theirs, "goal": goal, "ratio": _ratio(warm[ours], warm[theirs])}
        for ours, theirs, goal in GOALS
        if theirs in pythons
    ]
    for case, providers in figures.items():
        for name, values in providers.items():
            cpu, wall = values["images_per_cpu_second"], values["images_per_second"]
            print(
                f"{case:16} {name:35} {cpu['median']:9,.0f} [{cpu['p20']:,.0f}, {cpu['p80']:,.0f}]"
                f" /CPU-s {wall['median']:9,.0f} /s {values['worker_megabytes']['median']:6.0f} MB"
            )
    for row in ratios:
        print(_goal(row))
    if not options.dry_run:
        data_facts = {"images": images, "shards": SHARDS, "latent_shape": LATENT_SHAPE}
        data_facts |= {"seconds_per_turn": SECONDS, "images_per_cold_turn": COLD}
        data_facts |= {"images_per_batch": BATCH}
        sections = {"data": data_facts, "goals": ratios, "figures": figures}
        if options.streaming_python:  # versions say more than where they were installed
            sections["streaming"] = _streaming_versions(options.streaming_python)
            sys.argv = ["PYTHON" if a == options.streaming_python else a for a in sys.argv]
        path = write_result("loader", sections)
        print(path)


Costs = list[dict[str, float]]  # of one provider, turn by turn


def measure(
    data: Path, pythons: dict[str, str], options: argparse.Namespace
) -> dict[str, dict[str, Costs]]:
    """What the turns of every provider cost in every case."""
    cases = [("warm", 0, options.repeats), ("cold", 0, options.cold_repeats)]
    cases.append(("warm", options.workers, options.cold_repeats))
    measured: dict[str, dict[str, Costs]] = {}
    shuffled = random.Random(0)
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(_child(python, name, data))
            for name, python in pythons.items()
        }
        for state, workers, repeats in cases:
            costs: dict[str, Costs] = {name: [] for name in children}
            for _ in range(repeats):
                for name in shuffled.sample([*children], len(children)):
                    kind = name.partition(" ")[0]
                    if workers and "decoder" in name.split(",")[0].split()[1]:
                        continue  # it has none
                    order = {"seconds": SECONDS, "images": None, "workers": workers}
                    if state == "cold":
                        drop_from_page_cache(data / kind)
                        order |= {"seconds": None, "images": COLD[kind]}
                    costs[name].append(_ask(children[name], order))
            measured[f"{state}, workers={workers}"] = costs
    return measured


def table(result: dict[str, Any]) -> str:
    """The rows of README.md, from a result."""
    cases = list(result["figures"])
    head = ["", *(f"{case}: images per CPU-second" for case in cases), "MB per worker"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in result["figures"][cases[0]]:
        figures = [result["figures"][case].get(name) for case in cases]
        medians = [_median(row, "images_per_cpu_second") for row in figures]
        rows.append([name, *medians, _median(figures[-1], "worker_megabytes")])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {_goal(row)}" for row in result["goals"])])


def _goal(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    spread = f"{ratio['median']:.3g} [{ratio['p20']:.3g}, {ratio['p80']:.3g}]"
    return f"{row['ours']} / {row['theirs']}: {spread}, goal {row['goal']:g}"


def _median(figures: dict[str, Any] | None, name: str) -> str:
    return f"{figures[name]['median']:,.0f}" if figures else ""


def write_pictures(folder: Path, count: int) -> None:
    """Shards and one file per image."""
    generator = np.random.default_rng(0)
    with _both(folder, count) as (writer, files):
        for i in range(count):
            label, data = i % CLASSES, encode_picture(_photograph(generator), "jpg", 90)
            writer.write(f"{i:06d}", {"jpg": data, "cls": str(label).encode()})
            path = files / str(label) / f"{i:06d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)


def write_latents(folder: Path, count: int) -> None:
    """Shards and, as fast-DiT does, one file of features and one of the label per image."""
    generator = np.random.default_rng(0)
    with _both(folder, count) as (writer, files):
        for part in ("features", "labels"):
            (files / part).mkdir()
        for i in range(count):
            latent = generator.standard_normal(LATENT_SHAPE, np.float32).astype(np.float16)
            data, label = npy_bytes(latent), np.array([i % CLASSES])
            writer.write(f"{i:06d}", {"npy": data, "cls": str(label[0]).encode()})
            (files / "features" / f"{i}.npy").write_bytes(data)
            (files / "labels" / f"{i}.npy").write_bytes(npy_bytes(label))


@contextmanager
def _both(folder: Path, count: int) -> Iterator[tuple[ShardWriter, Path]]:
    (folder / "files").mkdir(parents=True)
    with ShardWriter(folder / "shards", "x", -(-count // SHARDS)) as writer:
        yield writer, folder / "files"


def _photograph(generator: np.random.Generator) -> Image.Image:
    """Noise whose power falls with the square of the frequency; channels are correlated."""
    channels, height, width = JPG_SHAPE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(generator.standard_normal((channels, height, width))) / frequency
    planes = np.fft.irfft2(noise)
    planes = 0.8 * planes[:1] + 0.2 * planes
    pixels = 128 + 48 * planes / planes.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def drop_from_page_cache(folder: Path) -> None:
    """The next reads come from the disk, if all was written to it before."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _streaming_versions(python: str) -> dict[str, str]:
    """Of what mosaicml-streaming runs with."""
    ask = f"print(json.dumps({{p: version(p) for p in {STREAMING}}}))"
    imports = "import json; from importlib.metadata import version; "
    return json.loads(subprocess.check_output([python, "-c", imports + ask], text=True))


def _run(python: str, *arguments: str) -> None:
    script = str(HERE / "loader_providers.py")
    subprocess.run([python, script, *arguments], check=True, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_paths())}


def _paths() -> Iterable[str]:
    return (str(HERE.parent), str(HERE.parent / "kernels"))


@contextmanager
def _child(python: str, provider: str, data: Path) -> Iterator[subprocess.Popen]:
    script = str(HERE / "loader_providers.py")
    child = subprocess.Popen(
        [python, script, provider, str(data)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    try:
        _answer(child)
        yield child
    finally:
        child.communicate()  # closes its input, which ends it


def _ask(child: subprocess.Popen, order: dict[str, float | None]) -> dict[str, float]:
    assert child.stdin is not None
    child.stdin.write(json.dumps(order) + "\n")
    child.stdin.flush()
    return _answer(child)


def _answer(child: subprocess.Popen) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"{child.args} ended with status {child.wait()}.")
    return json.loads(line)


def _figures(costs: Costs) -> dict[str, Any]:
    return {name: _spread([cost[name] for cost in costs]) for name in costs[0]}


def _spread(values: list[float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in summary(values)._asdict().items()}


def _ratio(ours: Costs, theirs: Costs) -> dict[str, float]:
    """Of images per CPU-second, within each cycle of turns."""
    counted = "images_per_cpu_second"
    return _spread([a[counted] / b[counted] for a, b in zip(ours, theirs, strict=True)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streaming-python", help="of an environment with mosaicml-streaming")
    parser.add_argument("--jpg", type=int, default=5120, help="pictures of an epoch")
    parser.add_argument("--latents", type=int, default=12_800, help="latents of an epoch")
    parser.add_argument("--repeats", type=int, default=25, help="turns of every provider, warm")
    parser.add_argument("--cold-repeats", type=int, default=5, help="and with files dropped")
    parser.add_argument("--workers", type=int, default=2, help="of the second table")
    parser.add_argument("--scratch", help="folder for the data, on the disk to be measured")
    parser.add_argument("--table", action="store_true", help="print the rows of README.md")
    parser.add_argument("--dry-run", action="store_true", help="write no result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
