import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speed_engine.data.config import DataConfig
from speed_engine.evaluation import features
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.features import INCEPTION_URL, inception_features
from speed_engine.evaluation.references import real_images
from speed_engine.runtime.checks import UserError

ROOT = Path(__file__).parents[2]


def test_missing_inception_weights_come_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="--inception-weights PATH") as error:
        inception_features()
    kept_at = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    assert INCEPTION_URL in str(error.value) and str(kept_at) in str(error.value)
    with pytest.raises(ValueError, match="elsewhere.pth"):
        inception_features(tmp_path / "elsewhere.pth")


class Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_is_not_the_published_one_is_refused_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    sprung = tmp_path / "sprung"
    path = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    torch.save(Trap(sprung), path)
    with pytest.raises(ValueError, match="was not opened") as error:
        inception_features()
    assert str(path) in str(error.value) and not sprung.exists()


def test_the_published_hash_is_the_one_in_the_file_name():
    assert f"-{features.INCEPTION_SHA256[:8]}.pth" in INCEPTION_URL


def test_importing_evaluation_does_not_import_torchvision():
    code = (
        "import sys, speed_engine.evaluation.fidelity\n"
        "sys.exit(' '.join({'torchvision', 'torch_fidelity', 'sklearn'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_torchvision_of_another_build_is_named_with_the_remedy(tmp_path, monkeypatch):
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torch_fidelity.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    data = DataConfig()
    with pytest.raises(UserError, match="nms does not exist") as error:  # before a run trains
        real_images(data, EvaluationConfig(), data.image_shape)
    for part in (f"torch {torch.__version__}", "torchvision ", "--index-url"):
        assert part in str(error.value)
