import io
import pickle
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pytest
from PIL import Image

from speed_engine.data.format.reader import ShardReader
from speed_engine.data.preparing.catalogue import open_source
from speed_engine.data.preparing.prepare import PictureOptions, make
from speed_engine.runtime.checks import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(value: int) -> dict[str, bytes | None]:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def dataset(**columns: tuple[list, object]) -> datasets.Dataset:
    features = {name: feature for name, (_, feature) in columns.items()}
    features["picture"] = datasets.Image()
    count = len(next(iter(columns.values()))[0]) if columns else 3
    content = {name: values for name, (values, _) in columns.items()}
    content["picture"] = [picture(10 * i) for i in range(count)]
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


LABELS = ([1, 0, 1], datasets.ClassLabel(names=["cat", "dog"]))


def test_a_parquet_folder_and_a_saved_data_set_give_the_same_samples(tmp_path):
    dataset(label=LABELS).save_to_disk(tmp_path / "saved")
    dataset(label=LABELS).to_parquet(tmp_path / "parquet" / "train-0.parquet")
    for folder in ("saved", "parquet"):
        source = open_source(f"hf:{tmp_path / folder}")
        records = [source.read(i, 3) for i in range(len(source))]
        assert [record.label for record in records] == [1, 0, 1]
        assert [int(np.asarray(r.picture)[0, 0, 0]) for r in records] == [0, 10, 20]
        assert source.classes == ("cat", "dog")
        again = open_source(f"hf:{tmp_path / folder}")
        assert again.identity == source.identity
        assert pickle.loads(pickle.dumps(source)).read(1, 3).label == 0


def test_it_becomes_shards_in_worker_processes(tmp_path):
    dataset(label=LABELS).to_parquet(tmp_path / "parquet" / "train-0.parquet")
    source = open_source(f"hf:{tmp_path / 'parquet'}")
    make(source, tmp_path / "out", PictureOptions(samples_per_shard=2), workers=2)
    reader = ShardReader(tmp_path / "out", ("png", "cls"))
    assert sorted(reader.read(n)["cls"] for n in range(3)) == [b"0", b"1", b"1"]


def test_numbers_are_labels_and_strings_captions(tmp_path):
    numbers = ([2, 0, 1], datasets.Value("int64"))
    texts = ([["a  b", "c"], ["d"], ["e"]], datasets.List(datasets.Value("string")))
    dataset(label=numbers, captions=texts).save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}")
    assert source.classes == ("0", "1", "2")
    assert source.read(0, 3).captions == ("a b", "c") and source.read(0, 3).label == 2
    dataset(text=(["x", "y", ""], datasets.Value("string"))).save_to_disk(tmp_path / "text")
    source = open_source(f"hf:{tmp_path / 'text'}")
    assert source.classes == () and source.read(0, 3).captions == ("x",)
    with pytest.raises(ValueError, match="there is no caption"):
        source.read(2, 3)


def test_a_missing_label_is_an_error_and_an_empty_caption_is_left_out(tmp_path):
    kinds = ([None, 0, 1], datasets.ClassLabel(names=["cat", "dog"]))
    texts = ([["", "a dog"], ["x"], ["y"]], datasets.List(datasets.Value("string")))
    dataset(label=kinds, text=texts).save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}")
    with pytest.raises(UserError, match="there is no label"):
        source.read(0, 3)
    dataset(text=texts).save_to_disk(tmp_path / "told")
    assert open_source(f"hf:{tmp_path / 'told'}").read(0, 3).captions == ("a dog",)


def test_pictures_alone_are_one_class(tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}")
    assert source.classes == ("all",) and source.read(0, 3).label == 0


def test_what_cannot_be_used_is_an_error(tmp_path):
    dataset(label=LABELS).to_parquet(tmp_path / "parquet" / "train-0.parquet")
    with pytest.raises(ValueError, match="split 'validation', cannot be loaded"):
        open_source(f"hf:{tmp_path / 'parquet'}", split="validation")
    without = dataset(label=LABELS).remove_columns("picture")
    without.save_to_disk(tmp_path / "without")
    with pytest.raises(ValueError, match="needed: one column of kind Image"):
        open_source(f"hf:{tmp_path / 'without'}")
    dataset(label=([-1, 0, 1], datasets.Value("int64"))).save_to_disk(tmp_path / "negative")
    with pytest.raises(ValueError, match="column 'label' holds"):
        open_source(f"hf:{tmp_path / 'negative'}")


def test_a_missing_picture_is_an_error(tmp_path):
    broken = datasets.Dataset.from_dict(
        {"picture": [picture(1), None]}, features=datasets.Features({"picture": datasets.Image()})
    )
    broken.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="there is no picture"):
        open_source(f"hf:{Path(tmp_path / 'saved')}").read(1, 3)
