"""Statistics of real images are computed once, kept on disk, and rebuilt when damaged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pixels import Pixels, extractor_of
from torch_fidelity import utils

from speed_engine.evaluation.features import Extractor
from speed_engine.evaluation.fidelity import frechet_distance
from speed_engine.evaluation.image_set import ImageSet, extract, statistics_path

EXTRACTOR = extractor_of(2, 2)
GENERATOR = torch.Generator().manual_seed(0)
REAL, GENERATED = torch.randint(0, 256, (2, 40, 1, 2, 2), dtype=torch.uint8, generator=GENERATOR)


def path_of(folder, data="0" * 64, shape=(1, 2, 2), extractor=EXTRACTOR):
    return statistics_path(folder, data, "npy", shape, extractor)


def fid(images, file):
    generated, real = ImageSet(GENERATED, 40, EXTRACTOR), ImageSet(images, 40, EXTRACTOR, file)
    return frechet_distance(generated.statistics, real.statistics)


def unread():
    raise AssertionError("the real images were read again")


def test_a_second_evaluation_reads_no_real_images_and_finds_the_same_bits(tmp_path):
    path = path_of(tmp_path / "made" / "when needed")
    first = fid(lambda: REAL, path)
    assert fid(unread, path) == first == fid(REAL, None)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].shape for name in file} == {"mu": (4,), "sigma": (4, 4)}


def test_other_data_shapes_and_weights_are_other_files(tmp_path):
    other = Extractor(name="pixels-of-2x2", weights_sha256="2" * 64, feature_dim=4, channels=1)
    paths = [
        path_of(tmp_path),
        path_of(tmp_path, data="1" * 64),
        path_of(tmp_path, shape=(1, 4, 1)),
        path_of(tmp_path, extractor=other),
    ]
    assert len(set(paths)) == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign"])
def test_a_damaged_file_is_made_again_with_one_line_in_the_log(tmp_path, damage, caplog):
    path = path_of(tmp_path)
    first = fid(REAL, path)
    whole = path.read_bytes()
    place = whole.index(np.mean(REAL.flatten(1).double().numpy(), axis=0).tobytes()) + 6
    damages = {
        "flipped": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        "cut": whole[:-20],
        "empty": b"",
    }
    if damage == "foreign":
        np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 3)))
    else:
        path.write_bytes(damages[damage])
    assert fid(REAL, path) == first
    assert [record.getMessage().count(str(path)) for record in caplog.records] == [1]
    assert path.read_bytes() == whole and fid(unread, path) == first


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    assert fid(REAL, path_of(tmp_path / "file")) == fid(REAL, None)
    assert "could not be kept" in caplog.text


def test_features_are_extracted_in_exact_float32_in_batches(monkeypatch):
    """PyTorch's default for convolutions on a GPU is TF32."""
    seen, forward = [], Pixels.forward

    def watched(self, images):
        exact = not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        seen.append((len(images), exact))
        return forward(self, images)

    monkeypatch.setattr(Pixels, "forward", watched)
    extract(REAL.repeat(10, 1, 1, 1), EXTRACTOR, ["fid"])
    assert seen == [(256, True), (144, True)]
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.enabled


def test_the_nearest_training_images_are_found_once():
    generated, training = ImageSet(GENERATED, 40, EXTRACTOR), ImageSet(REAL, 40, EXTRACTOR)
    found = generated.nearest_in(training)
    assert generated.nearest_in(training) is found
    distances = torch.cdist(generated.features.double(), training.features.double())
    assert torch.equal(found.ids, distances.argmin(1))
    assert (generated.nearest_in(generated).distances == 0).all()


def test_features_are_computed_on_a_gpu_only_where_the_extractor_says_so(monkeypatch):
    seen, create, read = [], utils.create_feature_extractor, utils.get_featuresdict_from_dataset

    def created(name, layers, cuda, **options):
        seen.append(cuda)
        return create(name, layers, cuda=False, **options)

    def features(images, network, size, cuda, **options):
        seen.append(cuda)
        return read(images, network, size, False, **options)

    monkeypatch.setattr(utils, "create_feature_extractor", created)
    monkeypatch.setattr(utils, "get_featuresdict_from_dataset", features)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for on_gpu in (False, True):
        extract(REAL, replace(EXTRACTOR, on_gpu=on_gpu), ["fid"])
        assert seen == [on_gpu] * 2
        seen.clear()
