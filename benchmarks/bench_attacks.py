"""Commands are killed, given hostile files and random options; what came of it is counted.

    python benchmarks/bench_attacks.py                               # all, about an hour on 2 cores
    python benchmarks/bench_attacks.py --sections kills --kills 20   # a piece; counts add up

kills     SIGKILL, SIGTERM and SIGINT at random moments: in training, evaluation, saving, pruning,
          ``shards make`` and ``compare``; each then goes on by the same command, to the same end
files     pictures, zips, tars, npy, indexes, checkpoints and JSON that are damaged or mutated
options   random options of every command

Counted in each: tracebacks, hangs, silent losses, and files outside the folder of the command. The
first few of each are written down with what is needed to repeat them. A section goes on where the
committed figures stop: its seed is the number of attacks so far.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fault_harness as faults
import hostile
from harness import result_path, write_result
from speed_engine.data.format.record import dataset_from_json
from speed_engine.runtime.records import read_records
from speed_engine.training import checkpoint

TINY = (
    "digits --batch-size 16 --log-every 1 --model.dim 16 --model.depth 1 --model.num-heads 2 "
    "--evaluation.num-images 9 --evaluation.features none --evaluation.solver-steps 2 "
    "--device cpu --compile off"
).split()
ANSWER = 30  # seconds in which a command that is asked to stop does, on a busy machine
LONGEST = 180  # seconds of one command
SHOWN = 5  # failures that are written down
CHAIN = 10  # kills of one command before it comes to its end
KINDS = ("tracebacks", "hangs", "silent_losses", "files_outside")


class Findings:
    """Attacks and their failures.

    Args:
        before: figures to add to.
    """

    def __init__(self, before: dict[str, Any]) -> None:
        self.figures = {"attacks": 0, **dict.fromkeys(KINDS, 0), "by_kind": {}, "failures": []}
        self.figures |= before

    @property
    def seed(self) -> int:
        return self.figures["attacks"]

    def attacked(self, kind: str, count: int = 1) -> None:
        self.figures["attacks"] += count
        by_kind = Counter(self.figures["by_kind"]) + Counter({kind: count})
        self.figures["by_kind"] = dict(by_kind)

    def failed(self, what: str, **facts: Any) -> None:
        self.figures[what] += 1
        if len(self.figures["failures"]) < SHOWN:
            self.figures["failures"].append({"what": what, **facts})
        print(what, facts, flush=True)


class Place:
    """A folder with a run, shards and pictures, from which every command is started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0
        for name in ("work", "home", "own"):
            (folder / name).mkdir()
        self.run, self.pictures, self.shards = (folder / n for n in ("run", "pictures", "shards"))
        self.pictures.mkdir()
        for i in range(3):
            (self.pictures / f"{i}.png").write_bytes(picture("png", i))
        short = ["--steps", "2", "--evaluation.every", "2", "--run", str(self.run)]
        made = ["shards", "make", str(self.pictures), str(self.shards), "--workers", "1"]
        for line in (["train", *TINY, *short], made):
            code, said = self.call(line)
            assert code == 0, said
        self.known = self.listed()

    def new(self) -> Path:
        """The folder of the next command."""
        self.made += 1
        path = self.folder / "own" / str(self.made)
        path.mkdir()
        return path

    def call(self, line: list[str], findings: Findings | None = None) -> tuple[int | None, str]:
        """(exit status, None if it had to be killed; what it printed)."""
        started = faults.Training(self.folder / "call", line[1:], 0)
        started.begin(line[0], cwd=self.folder / "work", HOME=str(self.folder / "home"))
        try:
            (code,) = started.join(LONGEST)
        except TimeoutError:
            code = None
        said = started.said()
        started.out.unlink(missing_ok=True)
        if findings is not None:
            facts = {"line": line, "said": said[-600:]}
            if code is None:
                findings.failed("hangs", **facts)
            if "Traceback" in said or code not in (None, 0, 1, 2):
                findings.failed("tracebacks", **facts)
            if added := self.listed() - self.known:
                findings.failed("files_outside", **facts, files=sorted(added)[:3])
                self.known |= added
        return code, said

    def listed(self) -> set[str]:
        """All files but those of the command's own folder and of caches; planted ones anywhere."""
        tops = [self.folder / name for name in ("run", "pictures", "shards")]
        paths = [path for top in tops for path in top.rglob("*")]
        # By default what is made is named after the preset, in the folder of work.
        paths += [p for p in self.folder.iterdir() if p.name not in ("call.out", "own", "cache")]
        paths += [*self.folder.rglob(self.planted), *self.folder.parent.glob(self.planted)]
        return {os.path.relpath(path, self.folder) for path in paths}

    @property
    def planted(self) -> str:
        """What a file that escapes is called: as no other is, also beside the folder."""
        return f"{self.folder.name}-evil.png"

    def escapes(self) -> list[str]:
        """Names by which an archive would plant that file outside."""
        up = [f"{'../' * depth}{self.planted}" for depth in (1, 2, 4)]
        return [*up, f"{self.folder.parent}/{self.planted}", f"..\\{self.planted}"]


def kills(place: Place, count: int, findings: Findings) -> None:
    """Chains of kills of one command, which then comes to its end."""
    phases: dict[str, Callable[[Place], tuple[list[str], list[str], Callable[[Path], Any]]]] = {
        "training": lambda _: _training(
            "--steps 1000 --evaluation.every 9999 --checkpoint-every 10"
        ),
        "evaluation": lambda _: _training("--steps 120 --evaluation.every 2 --checkpoint-every 10"),
        "saving": lambda _: _training("--steps 120 --evaluation.every 9999 --checkpoint-every 1"),
        "pruning": lambda _: _training(
            "--steps 120 --evaluation.every 9999 --checkpoint-every 1 --keep-checkpoints 1"
        ),
        "shards make": _making,
        "compare": lambda _: _comparing(),
    }
    expected: dict[str, Any] = {}
    done, turn = 0, findings.seed
    while done < count:
        phase = list(phases)[(turn // CHAIN) % len(phases)]
        first, again, result = phases[phase](place)
        if phase not in expected:
            straight = place.new() / "out"
            code, said = place.call([word.format(out=straight) for word in first], findings)
            assert code == 0, said
            expected[phase] = result(straight)
        rng, out = random.Random(turn), place.new() / "out"
        for _ in range(min(CHAIN, count - done)):
            if (out / "ema.safetensors").exists() or (out / "report.html").exists():
                break
            line = again if (out / "config.json").exists() else first
            done, turn = done + 1, turn + 1
            _kill(place, phase, [word.format(out=out) for word in line], out, rng, findings)
        for _ in range(3):
            line = again if (out / "config.json").exists() else first
            code, said = place.call([word.format(out=out) for word in line], findings)
            if code == 0 or "is complete" in said:
                break
        if code != 0 and "is complete" not in said or result(out) != expected[phase]:
            findings.failed("silent_losses", phase=phase, seed=turn, said=said[-600:])
        shutil.rmtree(out.parent)
        print(phase, findings.figures["attacks"], flush=True)


def _kill(
    place: Place, phase: str, line: list[str], out: Path, rng: random.Random, findings: Findings
) -> None:
    number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    before = max((p.name for p in (out / "checkpoints").glob("step-*")), default="")
    started = faults.Training(place.folder / "call", line[1:], 0)
    started.begin(line[0], cwd=place.folder / "work", HOME=str(place.folder / "home"))
    moment = time.monotonic() + rng.uniform(0.1, 5)
    if not started.wait_for(lambda: time.monotonic() > moment):
        findings.attacked(f"{phase}, ended before")
    else:
        started.kill(number)
        findings.attacked(f"{phase}, {number.name}")
    facts = {"phase": phase, "signal": number.name, "line": line}
    try:
        started.join(ANSWER)
    except TimeoutError:
        findings.failed("hangs", **facts, said=started.said()[-600:])
    if "Traceback" in started.said():
        findings.failed("tracebacks", **facts, said=started.said()[-1500:])
    started.out.unlink(missing_ok=True)
    if (out / "checkpoints").exists():
        try:
            kept = faults.checkpoints(out)
        except checkpoint.InvalidCheckpoint as damage:
            findings.failed("silent_losses", **facts, damage=str(damage))
        else:
            if max(kept, default="") < before:
                findings.failed("silent_losses", **facts, before=before, kept=kept)


def _training(options: str) -> tuple[list[str], list[str], Callable[[Path], Any]]:
    first = ["train", *TINY, *options.split(), "--run", "{out}"]

    def result(run: Path) -> Any:
        tensors = {k: v.double().sum().item() for k, v in faults.parameters(run).items()}
        return tensors, [r["loss"] for r in read_records(run) if "loss" in r]

    return first, ["train", "--resume", "{out}"], result


def _making(place: Place) -> tuple[list[str], list[str], Callable[[Path], Any]]:
    many = place.folder / "many"
    if not many.exists():
        many.mkdir()
        for i in range(600):
            (many / f"{i}.png").write_bytes(picture("png", i, 96))
        place.known = place.listed()
    line = ["shards", "make", str(many), "{out}", "--workers", "2", "--samples-per-shard", "20"]

    def result(out: Path) -> Any:
        dataset = dataset_from_json((out / "dataset.json").read_bytes(), "dataset")
        return dataset.fingerprint, sorted(p.name for p in out.iterdir())

    return line, line, result


def _comparing() -> tuple[list[str], list[str], Callable[[Path], Any]]:
    line = [
        "compare", *TINY, "--methods", "uniform", "--seeds", "1", "--evaluations", "1",
        "--budget-images", "64", "--final-solver-steps", "2", "--evaluation.num-images", "70",
        "--evaluation.features", "classifier", "--slots", "2", "--out", "{out}",
    ]  # fmt: skip

    def result(out: Path) -> Any:
        results = json.loads((out / "results.json").read_text())
        points = [[point["values"] for point in curve["points"]] for curve in results["curves"]]
        return points, [curve["failure"] for curve in results["curves"]]

    return line, line, result


def files(place: Place, count: int, findings: Findings) -> None:
    """Hostile files, some of one folder at a time."""
    makers = (
        _pictures, _archive, _tars, _arrays, _indexes, _states, _headers, _configs, _records,
        _datasets, _lists,
    )  # fmt: skip
    last = findings.seed + count
    while findings.seed < last:
        for maker in makers:
            rng = random.Random(findings.seed)
            folder = place.new()
            for kind, number, line, check in maker(place, folder, rng):
                code, said = place.call(line, findings)
                findings.attacked(kind, number)
                if code == 0 and not check(said):
                    facts = {"line": line, "seed": findings.seed, "said": said[-600:]}
                    findings.failed("silent_losses", kind=kind, **facts)
            shutil.rmtree(folder)
        print(findings.figures["by_kind"], flush=True)


Attack = tuple[str, int, list[str], Callable[[str], bool]]


def _accepted(said: str) -> bool:
    return True


def _pictures(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    (folder / "in").mkdir()
    for i in range(20):
        kind = rng.choice(["png", "jpeg", "webp", "gif", "bmp", "tiff"])
        content = hostile.damaged(picture(kind, i), rng)
        (folder / "in" / f"{i}.{kind}").write_bytes(content)
    line = ["shards", "make", str(folder / "in"), str(folder / "out"), "--workers", "1"]

    def all_accounted_for(said: str) -> bool:
        record = (folder / "out" / "dataset.json").read_bytes()
        kept = sum(s.samples for s in dataset_from_json(record, "").shards)
        named = sum(f"{i}." in said for i in range(20))
        return kept == 20 or "left out" in said or kept + named >= 20

    yield "pictures", 20, [*line, "--skip-bad", "--size", "8"], all_accounted_for


def _archive(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    file, path = io.BytesIO(), folder / "a.zip"
    names = ["1.png", "a/2.png", "x" * 300 + ".png", *rng.sample(place.escapes(), 3)]
    with zipfile.ZipFile(file, "w") as archive:
        for name in rng.sample(names, 3):
            archive.writestr(name, picture("png", 1))
        if rng.random() < 0.5:
            labels = {"labels": [["1.png", 0], ["a/2.png", 1]]}
            archive.writestr("dataset.json", hostile.mutated(labels, rng))
    path.write_bytes(
        file.getvalue() if rng.random() < 0.3 else hostile.damaged(file.getvalue(), rng)
    )
    line = ["shards", "make", str(path), str(folder / "out"), "--workers", "1"]
    yield "zips", 1, line, _accepted


def _tars(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    for i in range(8):
        tar = hostile.damaged(tar_of({"1.png": picture("png", i), "1.cls": b"1"}), rng)
        (folder / f"{i}.tar").write_bytes(tar)
    yield "tars", 8, ["shards", "check", str(folder), "--workers", "1"], _accepted


def _arrays(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    file = io.BytesIO()
    np.save(file, np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    members = {f"{i}.npy": hostile.damaged(file.getvalue(), rng) for i in range(20)}
    (folder / "x.tar").write_bytes(tar_of(members))
    yield "npy", 20, ["shards", "check", str(folder), "--workers", "1"], _accepted


def _indexes(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    shutil.copytree(place.shards, folder / "x")
    (path,) = (folder / "x").glob("*.index.safetensors")
    path.write_bytes(_with_mutated_header(path.read_bytes(), rng))
    yield "indexes", 1, ["shards", "check", str(folder / "x"), "--workers", "1"], _accepted


def _states(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    for name in ("state.json", "manifest.json"):
        run = folder / name
        shutil.copytree(place.run, run)
        path = checkpoint.newest(run / "checkpoints") / name
        path.write_text(hostile.mutated(json.loads(path.read_text()), rng))
        if name == "state.json":
            _seal(path.parent)
        yield "checkpoints", 1, ["export", str(run), "--out", f"{run}.safetensors"], _accepted
        yield "checkpoints", 1, ["train", "--resume", str(run), "--steps", "3"], _accepted


def _headers(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    run = folder / "run"
    shutil.copytree(place.run, run)
    (path,) = checkpoint.newest(run / "checkpoints").glob("*.safetensors")
    damage = rng.choice([_with_mutated_header, hostile.damaged])
    path.write_bytes(damage(path.read_bytes(), rng))
    _seal(path.parent)
    yield "checkpoints", 1, ["export", str(run), "--out", f"{run}.safetensors"], _accepted


def _configs(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    run = folder / "run"
    shutil.copytree(place.run, run)
    path = run / "config.json"
    path.write_text(hostile.mutated(json.loads(path.read_text()), rng))
    yield "JSON", 1, ["export", str(run), "--out", f"{run}.safetensors"], _accepted


def _records(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    run = folder / "run"
    shutil.copytree(place.run, run)
    path = run / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([hostile.mutated(json.loads(first), rng), *rest]) + "\n")
    yield "JSON", 1, ["train", "--resume", str(run), "--steps", "3"], _accepted


def _datasets(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    shutil.copytree(place.shards, folder / "x")
    path = folder / "x" / "dataset.json"
    path.write_text(hostile.mutated(json.loads(path.read_text()), rng))
    yield "JSON", 1, ["shards", "check", str(folder / "x"), "--workers", "1"], _accepted


def _lists(place: Place, folder: Path, rng: random.Random) -> Iterator[Attack]:
    repair = {"version": 2, "shards": {"a.tar": "cut"}, "samples": {"b.tar": {"1": "CRC"}}}
    (folder / "repair.json").write_text(hostile.mutated(repair, rng))
    line = ["train", *TINY, "--dry-run", "--data.source", str(place.shards), "--run", "x"]
    yield "JSON", 1, [*line, "--data.exclude", str(folder / "repair.json")], _accepted
    shutil.copytree(place.pictures, folder / "in")
    rows = [{"file_name": f"{i}.png", "label": i, "text": "a cat"} for i in range(3)]
    text = "\n".join(hostile.mutated(row, rng) for row in rows)
    (folder / "in" / "metadata.jsonl").write_text(text)
    line = ["shards", "make", str(folder / "in"), str(folder / "out"), "--workers", "1"]
    yield "JSON", 1, line, _accepted


def picture(kind: str, seed: int, side: int = 8) -> bytes:
    """Of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _with_mutated_header(content: bytes, rng: random.Random) -> bytes:
    """Of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header = hostile.mutated(json.loads(content[8 : 8 + length]), rng).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _seal(path: Path) -> None:
    """Make the manifest of a checkpoint vouch for its files as they are."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: vars(checkpoint.describe(path / name)) for name in manifest["files"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


# Options that are given beside the random ones, so that what is valid is soon over.
COMMANDS = {
    "train": f"{' '.join(TINY)} --dry-run --run {{new}}",
    "train --resume": "{run}",
    "sample": "{run} --count 2 --out {new}",
    "evaluate": "{run}",
    "export": "{run} --out {new}.safetensors",
    "compare": f"{' '.join(TINY)} --seeds 0 --out {{new}}",
    "plan": "digits --gpus 2",
    "methods": "--num-timesteps 8",
    "consistency": "{run} {run} --count 2 --out {new}",
    "doctor": "",
    "shards make": "{pictures} {new} --workers 1",
    "shards check": "{shards} --workers 1 --out {new}",
    "shards index": "{shards} --workers 1",
    "shards encode": "{shards} {new}",
}


def options(place: Place, count: int, findings: Findings) -> None:
    """Random command lines, each in a process of its own."""
    known: dict[str, tuple[str, ...]] = {}
    for _ in range(count):
        rng, command = random.Random(findings.seed), list(COMMANDS)[findings.seed % len(COMMANDS)]
        words, own = command.split(), place.new()
        if command not in known:
            of = words[:2] if words[0] == "shards" else words[:1]
            known[command] = hostile.options_of(place.call([*of, "--help"])[1])
        names = {name: getattr(place, name) for name in ("run", "pictures", "shards")}
        for name, path in names.items():
            shutil.copytree(path, own / name)
        places = {name: str(own / name) for name in names} | {"new": str(own / "out")}
        usual = COMMANDS[command].format(**places).split()
        line = [*words, *hostile.arguments(rng, usual, known[command])]
        code, said = place.call(line, findings)
        findings.attacked(f"{command}, status {code}")
        if code == 2 and not said.strip():
            findings.failed("silent_losses", line=line)
        shutil.rmtree(own)
    print(findings.figures["by_kind"], flush=True)


SECTIONS = {"kills": kills, "files": files, "options": options}


def main() -> None:
    parser = argparse.ArgumentParser(description="Commands under attack.")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--files", type=int, default=550)
    parser.add_argument("--options", type=int, default=308)
    parser.add_argument("--afresh", action="store_true", help="do not add to the figures so far")
    given = parser.parse_args()
    path = result_path("attacks")
    figures = json.loads(path.read_text()) if path.exists() and not given.afresh else {}
    figures.pop("environment", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # figures are kept
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SPEED_ENGINE_CACHE"] = f"{temporary}/cache"
        os.environ["HF_HUB_OFFLINE"] = "1"
        place = Place(Path(temporary))
        for name in given.sections:
            findings = Findings(figures.get(name, {}))
            try:
                SECTIONS[name](place, getattr(given, name), findings)
            finally:
                figures[name] = findings.figures
                write_result("attacks", figures)
    print(json.dumps({name: {k: f[k] for k in KINDS} for name, f in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
