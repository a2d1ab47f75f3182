import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from speed_engine.data.preparing.sources import cifar
from speed_engine.data.preparing.sources.cifar import Cifar10

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def write_archive(path: Path, folder: str = "cifar-10-batches-bin", names=NAMES) -> np.ndarray:
    """All files of the published archive with random records, which are returned."""
    records = np.random.default_rng(0).integers(0, 256, (60_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    files = {"batches.meta.txt": "\n".join(names).encode(), "readme.html": b"<html>"}
    for batch in range(5):
        part = records[batch * 10_000 : (batch + 1) * 10_000]
        files[f"data_batch_{batch + 1}.bin"] = part.tobytes()
    files["test_batch.bin"] = records[50_000:].tobytes()
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return records


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("cifar") / "cifar-10-binary.tar.gz"
    return path, write_archive(path)


@pytest.mark.parametrize("split, first, count", [("train", 0, 50_000), ("test", 50_000, 10_000)])
def test_pictures_and_labels_are_those_of_the_records(archive, split, first, count):
    path, records = archive
    source = Cifar10(path, split)
    assert len(source) == count and source.classes == tuple(NAMES)
    for i in (0, 9_999, count - 1):
        record = source.read(i, 3)
        label, *pixels = records[first + i].tolist()
        assert record.label == label
        assert np.array_equal(np.asarray(record.picture).transpose(2, 0, 1).ravel(), pixels)


def test_the_pickled_version_is_refused_and_the_binary_one_named(tmp_path):
    write_archive(tmp_path / "cifar-10-python.tar.gz", folder="cifar-10-batches-py")
    with pytest.raises(ValueError, match="take cifar-10-binary.tar.gz"):
        Cifar10(tmp_path / "cifar-10-python.tar.gz", "train")


def test_what_is_not_the_archive_is_refused(archive, tmp_path, monkeypatch):
    path, _ = archive
    with pytest.raises(ValueError, match="CIFAR-10 has train, test"):
        Cifar10(path, "validation")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="damaged"):
        Cifar10(cut, "train")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="has no cifar-10-batches-bin/batches.meta.txt"):
        Cifar10(tmp_path / "other.tar.gz", "train")
    monkeypatch.setattr(cifar, "_MAX_UNPACKED", 1_000_000)
    with pytest.raises(ValueError, match="unpacks to more"):
        Cifar10(path, "train")
