"""Documents of the right syntax and the wrong shape: one error that names file and field."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from speed_engine import cli
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.record import _checksum, dataset_from_json
from speed_engine.data.format.repair import load_repair_list
from speed_engine.data.format.writer import index_folder
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError

HUGE = 10**400
WRONG = [
    ("version", "2", "version"),
    ("shards", {}, "shards"),
    ("shards", None, "shards"),
    ("shards", [3], "shards.0"),
    ("shards", [{"name": "a.tar"}], "shards.0"),
    ("shards", [{"name": 3, "bytes": 1, "samples": 1, "sha256": ""}], "shards.0.name"),
    ("shards", [{"name": "a.tar", "bytes": 1.5, "samples": 1, "sha256": ""}], "shards.0.bytes"),
    ("shards", [{"name": "a.tar", "bytes": True, "samples": 1, "sha256": ""}], "shards.0.bytes"),
    ("shards", [{"name": "a.tar", "bytes": 1, "samples": -1, "sha256": ""}], "samples"),
    ("shards", [{"name": "a.tar", "bytes": HUGE, "samples": 1, "sha256": ""}], "bytes"),
    ("contents", [], "contents"),
    ("contents", {"npy": None}, "contents.npy"),
    ("contents", {"npy": {"shape": 3}}, "contents.npy.shape"),
    ("contents", {"npy": {"shape": ["a"]}}, "contents.npy.shape.0"),
    ("contents", {"cls": {"classes": "10"}}, "contents.cls.classes"),
    ("contents", {"cls": {"classes": -1}}, "classes"),
    ("contents", {"cls": {"present": [1]}}, "classes"),
    ("metadata", None, "metadata"),
    ("metadata", {"classes": 3}, "metadata.classes"),
    ("metadata", {"classes": [3]}, "metadata.classes"),
    ("metadata", {"latent_scale": "big"}, "metadata.latent_scale"),
    ("metadata", {"latent_scale": HUGE}, "metadata.latent_scale"),
    ("metadata", {"latent_scale": True}, "metadata.latent_scale"),
    ("metadata", {"latent_shift": [0]}, "metadata.latent_shift"),
    ("files", [], "files"),
    ("files", {"a": {"bytes": "1", "sha256": ""}}, "files.a.bytes"),
]


@pytest.mark.parametrize("field, value, named", WRONG, ids=str)
def test_a_record_of_another_shape_names_file_and_field(field, value, named):
    record = {"version": 2, "shards": [], "contents": {}, "metadata": {}, "files": {}}
    record[field] = value
    text = json.dumps(record | {"checksum": _checksum(record)})
    with pytest.raises(ShardError, match=rf"d/dataset\.json.*{re.escape(named)}"):
        dataset_from_json(text.encode(), "d/dataset.json")


@pytest.mark.parametrize(
    "text",
    [
        "3", "[]", "null", "{}", "[" * 100_000, '{"a":' * 100_000, "\udcff", "{", "\\",
        '{"version": NaN}', '{"version": 1e999}', '{"version": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_other_json_is_no_record_and_no_repair_list(tmp_path, text):
    content = text.encode("utf-8", "surrogateescape")
    with pytest.raises(ShardError, match="d/dataset.json"):
        dataset_from_json(content, "d/dataset.json")
    (tmp_path / "repair.json").write_bytes(content)
    with pytest.raises(ShardError, match="repair.json is not a repair list"):
        load_repair_list(tmp_path / "repair.json")


@pytest.mark.parametrize(
    "field, value",
    [("shards", []), ("shards", {"a": 3}), ("samples", {"a": []}), ("samples", {"a": {"k": 1}})],
    ids=str,
)
def test_a_repair_list_of_another_shape_names_file_and_field(tmp_path, field, value):
    text = json.dumps({"version": 2, "shards": {}, "samples": {}, field: value})
    (tmp_path / "repair.json").write_text(text)
    with pytest.raises(ShardError, match=rf"repair\.json.*{field}"):
        load_repair_list(tmp_path / "repair.json")


def test_a_document_longer_than_any_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(strict, "MAX_BYTES", 10)
    (tmp_path / "repair.json").write_text("x" * 11)
    with pytest.raises(ShardError, match=r"repair\.json has 11 bytes; at most 10"):
        load_repair_list(tmp_path / "repair.json")


def rewritten(path, change):
    """An index with another header, whose checksum fits."""
    index, _ = load_index(path)
    header = {"version": 2, "tar_bytes": index.tar_bytes, "sha256": index.content_hash()}
    header |= {"extensions": list(index.extensions), "contents": index.contents}
    header |= change
    header["checksum"] = index._checksum(header)
    save_file(load_file(path), path, {"index": json.dumps(header, sort_keys=True)})


@pytest.mark.parametrize(
    "change",
    [
        {"tar_bytes": "3"}, {"tar_bytes": 1.5}, {"tar_bytes": -1}, {"tar_bytes": HUGE},
        {"extensions": "cs"}, {"extensions": [1, 2]}, {"contents": []}, {"contents": {"npy": 3}},
        {"contents": {"npy": {"shape": [1.5]}}}, {"contents": {"cls": {"classes": None, "x": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_of_another_shape_is_one_error(make_shards, change):
    path = index_path(make_shards(4, per_shard=4) / "x-000000.tar")
    rewritten(path, {})
    load_index(path)
    rewritten(path, change)
    with pytest.raises(ShardError, match=rf"x-000000.index.safetensors.*{next(iter(change))}"):
        load_index(path)


def test_keys_that_end_outside_of_their_bytes_are_refused(make_shards):
    path = index_path(make_shards(4, per_shard=4) / "x-000000.tar")
    index, _ = load_index(path)
    columns = load_file(path) | {"key_ends": np.array([4, 8, 12, 99])}
    save_file(columns, path, {"index": json.dumps({"version": 2})})
    with pytest.raises(ShardError, match=r"x-000000\.index\.safetensors is not a shard index"):
        load_index(path)
    assert len(index) == 4


@pytest.mark.parametrize("facts", [{"present": [0, 2]}, {"classes": None, "present": [0]}])
def test_an_index_of_present_classes_needs_their_number(make_shards, facts):
    path = index_path(make_shards(4, per_shard=4) / "x-000000.tar")
    rewritten(path, {"contents": {"cls": facts}})
    with pytest.raises(ShardError, match=r"x-000000\.index.*need the number of classes"):
        load_index(path)


def test_an_index_that_knows_no_number_of_classes_is_read(make_shards):
    folder = make_shards(6, per_shard=3)
    rewritten(index_path(folder / "x-000000.tar"), {"contents": {"cls": {"classes": None}}})
    (folder / "dataset.json").unlink()
    assert len(ShardReader(folder)) == 6


@pytest.mark.parametrize("keys", [[b"\xff1", b"2"], [b"a\xc3", b"\xa9b"]])
def test_keys_of_no_encoding_are_refused(make_shards, keys):
    path = index_path(make_shards(2, per_shard=2) / "x-000000.tar")
    index, _ = load_index(path)
    noise = np.frombuffer(b"".join(keys), np.uint8)
    ends = np.cumsum([len(key) for key in keys])
    path.write_bytes(replace(index, key_bytes=noise, key_ends=ends).to_bytes())
    with pytest.raises(ShardError, match="is not a shard index"):
        load_index(path)


def test_facts_of_a_record_that_do_not_fit_are_mended_as_is_said(make_shards):
    folder = make_shards(4, per_shard=4)
    record = json.loads((folder / "dataset.json").read_text())
    del record["checksum"]
    record["metadata"] = {"latent_scale": "x"}
    text = json.dumps(record | {"checksum": _checksum(record)})
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ShardError, match="delete it and run `speed-engine shards index`"):
        ShardReader(folder)
    (folder / "dataset.json").unlink()
    index_folder(folder, metadata={"latent_scale": 0.5})
    assert ShardReader(folder).dataset.metadata == {"latent_scale": 0.5}


def test_facts_are_added_to_those_of_the_record(make_shards, tmp_path):
    folder = make_shards(4, per_shard=4)
    index_folder(folder, metadata={"vae": "x", "latent_scale": 1})
    index_folder(folder, metadata={"latent_scale": 0.5})
    assert ShardReader(folder).dataset.metadata == {"vae": "x", "latent_scale": 0.5}


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"latent_scale": "x"}', '{"classes": 3}'])
def test_metadata_of_another_shape_is_one_error(make_shards, tmp_path, capsys, text):
    (tmp_path / "facts.json").write_text(text)
    folder = make_shards(4, per_shard=4)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["shards", "index", str(folder), "--metadata", str(tmp_path / "facts.json")])
    assert stopped.value.code == 2
    assert "facts.json" in capsys.readouterr().err.replace("\n", "")
    assert issubclass(ShardError, UserError)
