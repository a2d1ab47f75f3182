"""What is built of this repository works without it: the wheel, installed in an empty environment.

The environment has no network: the libraries are those of the tests' own.
"""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = """
import diffusers, speed_engine as se
method = se.build_method("speed_paper", diffusers.DDPMScheduler())
print(se.__file__, *(part.shape for part in method.draw(8, 0)))
"""


def done(*command: object, cwd: Path, **environment: str) -> str:
    ours = {name: of for name, of in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, env=ours | environment
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The distributions, by the ends of their names."""
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The commands of an environment that holds the wheel."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    done(*pip, "--no-index", built[".whl"], cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))
    return folder / "bin"


@pytest.mark.long
def test_the_wheel_trains_examines_the_machine_and_gives_methods_to_other_loops(
    installed, tmp_path
):
    run = tmp_path / "run"
    options = "--steps 3 --batch-size 4 --model.dim 16 --model.depth 1 --model.num-heads 2"
    options += " --evaluation.features none --evaluation.num-images 10"
    engine = installed / "speed-engine"
    said = done(engine, "train", "digits", "--run", run, *options.split(), cwd=tmp_path)
    assert "1,797 images" in said and (run / "ema.safetensors").is_file()
    assert "kernels are not tested" in done(engine, "doctor", cwd=tmp_path)
    where, *shapes = done(installed / "python", "-c", PLUGIN, cwd=tmp_path).split(maxsplit=1)
    assert Path(where).is_relative_to(installed.parent)
    assert shapes == ["torch.Size([8]) torch.Size([8])\n"]


@pytest.mark.long
def test_the_wheel_s_kernels_compile_for_a_gpu_that_is_not_there(installed, tmp_path):
    script = tmp_path / "cubins.py"  # away from the repository
    script.write_text((ROOT / "benchmarks" / "cubins.py").read_text())
    kernel = ["--architectures", "90", "--kernels", "noised_input"]
    said = done(
        installed / "python", script, *kernel, "--json", cwd=tmp_path,
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert '"90"' in said or "sm_90" in said, said


def test_the_distributions_hold_every_file_that_they_are_made_of(built):
    """The source distribution all that git knows, the wheel what is imported."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    tracked = set(done("git", "ls-files", cwd=ROOT).split("\n")) - {""}
    there = {name for name in tracked if (ROOT / name).exists()}
    with tarfile.open(built[".gz"]) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    assert there - source == set()
    with zipfile.ZipFile(built[".whl"]) as archive:
        wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    folders = ("speed_engine/", "kernels/speed_kernels/")
    packages = {name.removeprefix("kernels/") for name in there if name.startswith(folders)}
    assert packages - wheel == set()
    assert not any(name.startswith(("tests/", "benchmarks/", "scripts/")) for name in wheel)


def test_the_version_is_that_of_the_package_everywhere(built):
    import speed_engine

    version = speed_engine.__version__
    assert all(f"-{version}" in path.name for path in built.values())
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None and cited[1] == version


def test_every_extra_is_in_the_readme():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "README.md").read_text()
    missing = [name for name in project["optional-dependencies"] if f"| `{name}` |" not in text]
    assert missing == []
