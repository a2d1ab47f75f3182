import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.decoding import read_all
from speed_engine.data.preparing.sources import digits
from speed_engine.data.preparing.sources.digits import digits_folder, write_digits

ROOT = Path(__file__).parents[4]


def test_the_digits_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    with np.load(Path(digits.__file__).with_name("digits.npz"), allow_pickle=False) as ours:
        assert np.array_equal(ours["images"], np.reshape(images, (-1, 8, 8)))
        assert np.array_equal(ours["labels"], labels)


def test_grey_levels_span_a_byte(tmp_path):
    write_digits(tmp_path)
    images, conditions = read_all(ShardReader(tmp_path), (1, 8, 8))
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.uint8
    levels = np.unique(images)
    assert levels.tolist() == [round(v * 255 / 16) for v in range(17)]
    assert np.bincount(conditions["labels"]).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]


def test_the_shards_are_frozen(tmp_path):
    write_digits(tmp_path)
    assert ShardReader(tmp_path).fingerprint == (
        "009afacbadc31f1e0dc312b91bb6846cf1266f133534280fd81cb1566f8a5ed1"
    )


def test_a_second_call_reuses_the_shards(tmp_path, monkeypatch):
    folder = digits_folder(tmp_path)
    monkeypatch.setattr(digits, "write_digits", lambda _: pytest.fail("written again"))
    assert digits_folder(tmp_path) == folder


def test_the_cache_is_chosen_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_ENGINE_CACHE", str(tmp_path / "cache"))
    assert digits_folder().parent == tmp_path / "cache"


def test_processes_may_race_for_the_cache(tmp_path):
    script = f"""
import os
from speed_engine.data.preparing.sources.digits import digits_folder
children = []
for _ in range(6):
    pid = os.fork()
    if pid == 0:
        digits_folder({str(tmp_path)!r})
        os._exit(0)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    assert [path.name for path in tmp_path.iterdir()] == [digits_folder(tmp_path).name]
    assert len(ShardReader(digits_folder(tmp_path))) == 1797


def test_an_interrupted_call_leaves_no_folder(tmp_path, monkeypatch):
    def interrupted(folder):
        (Path(folder) / "half.tar").write_bytes(b"")
        raise OSError("disk full")

    monkeypatch.setattr(digits, "write_digits", interrupted)
    with pytest.raises(OSError, match="disk full"):
        digits_folder(tmp_path)
    assert not list(tmp_path.iterdir())
