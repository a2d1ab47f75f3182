import io
import json

import numpy as np
import pytest

from speed_engine import cli
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.record import RECORD
from speed_engine.data.format.repair import load_repair_list
from speed_engine.data.format.writer import ShardWriter, index_folder, write_shard
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.preparing.check import check_folder

SHAPE = (1, 2, 3)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def member_offset(path, n, extension):
    index, _ = load_index(index_path(path))
    return int(index.offset[n, index.extensions.index(extension)])


def test_a_sound_data_set_has_no_findings(make_shards):
    found = check_folder(make_shards(10, per_shard=4))
    assert (found.num_samples, found.notes) == (10, {}) and not found.repair


def test_every_kind_of_damage_is_found_and_left_out(make_shards, tmp_path):
    folder = make_shards(30, per_shard=5)
    shards = sorted(folder.glob("*.tar"))
    flip(shards[0], member_offset(shards[0], 2, "npy") + 130)  # bytes of a sample
    flip(shards[1], 3)  # a header: the name of a member
    shards[2].write_bytes(shards[2].read_bytes()[:-700])  # cut short
    found = check_folder(folder)
    assert found.repair.shards.keys() == {shards[2].name}
    assert found.repair.samples == {shards[0].name: {"0002": "CRC-32 mismatch with the index"}}
    assert found.notes.keys() == {shards[1].name} and "checksum" in found.notes[shards[1].name]

    found.repair.save(tmp_path / "repair.json")
    reader = ShardReader(folder, exclude=tmp_path / "repair.json")
    left = [i for i in range(30) if i != 2 and not 10 <= i < 15]
    assert [reader.read(i)["npy"][-1] for i in range(len(reader))] == left
    assert reader.counts == (4, 5, 5, 5, 5)
    with Loader(reader, SHAPE, Feed(24, 0)) as loader:
        pixels = next(loader).images[:, 0, 0, 0]
    assert sorted(pixels.tolist()) == left
    with pytest.raises(ShardError, match="truncated"):
        ShardReader(folder)


def test_what_is_left_out_is_part_of_the_fingerprint(make_shards, tmp_path):
    folder = make_shards(6, per_shard=3)
    whole = ShardReader(folder).fingerprint
    prints = [whole]
    for samples in ({}, {"x-000000.tar": {"0001": "?"}}, {"x-000001.tar": {"0004": "?"}}):
        record = {"version": 2, "shards": {}, "samples": samples}
        (tmp_path / "list.json").write_text(json.dumps(record))
        prints.append(ShardReader(folder, exclude=tmp_path / "list.json").fingerprint)
    assert prints[1] == whole and len(set(prints)) == 3


def test_what_is_unlike_the_rest_or_twice_is_found(tmp_path):
    def image(i, shape=SHAPE, dtype: type = np.uint8):
        file = io.BytesIO()
        np.save(file, np.full(shape, i, dtype))
        return file.getvalue()

    with ShardWriter(tmp_path, "x", 4) as writer:
        for i in range(10):
            writer.write(f"{i}", {"npy": image(i), "cls": b"1"})
        writer.write("shape", {"npy": image(1, (1, 3, 2)), "cls": b"1"})
        writer.write("dtype", {"npy": image(1, dtype=np.float16), "cls": b"1"})
        writer.write("label", {"npy": image(20), "cls": b"cat"})
        writer.write("missing", {"npy": image(21)})
        writer.write("again", {"npy": image(3), "cls": b"2"})
        writer.write("junk", {"npy": b"junk", "cls": b"2"})
    found = check_folder(tmp_path)
    reasons = {key: why for keys in found.repair.samples.values() for key, why in keys.items()}
    expected = {
        "shape": "npy: uint8 of shape (1, 3, 2); most are uint8 of shape (1, 2, 3)",
        "dtype": "npy: float16 of shape (1, 2, 3); most are uint8 of shape (1, 2, 3)",
        "label": "cls: label b'cat' is not a non-negative integer.",
        "missing": "no member 'cls', only ['npy']",
        "again": "the content of x-000000.tar: '3' again",
        "junk": "npy: not an npy file of version 1 or 2: it begins with b'junk'.",
    }
    assert reasons == expected
    found.repair.save(tmp_path / "repair.json")
    assert load_repair_list(tmp_path / "repair.json") == found.repair
    assert len(ShardReader(tmp_path, exclude=tmp_path / "repair.json")) == 10


def test_shards_without_an_index_are_checked_too(make_shards):
    folder = make_shards(8, per_shard=4)
    for path in (*folder.glob("*.safetensors"), folder / "dataset.json"):
        path.unlink()
    flip(folder / "x-000001.tar", 3)
    found = check_folder(folder)
    assert found.repair.shards.keys() == {"x-000001.tar"} and found.num_samples == 4


def test_a_record_of_other_files_is_found(make_shards, capsys):
    def found(folder):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["shards", "check", str(folder), "--workers", "1"])
        assert stopped.value.code == 1 and not (folder / "repair.json").exists()
        return capsys.readouterr().out

    folder = make_shards(9, per_shard=3)
    (folder / "x-000001.tar").unlink()
    assert "dataset.json: " in found(folder) and "lacks ['x-000001.tar']" in found(folder)
    folder = make_shards(9, per_shard=3, name="damaged")
    flip(folder / "dataset.json", 40)
    assert "dataset.json" in found(folder)
    folder = make_shards(9, per_shard=3, name="other")
    write_shard(folder / "x-000001.tar", [("z", {"npy": b"1", "cls": b"2"})])
    assert "x-000001.tar is of another data set than dataset.json" in str(
        check_folder(folder).notes
    )
    with ShardWriter(folder.parent / "files", "x", 4, files=["a"]) as writer:
        writer.write("z", {"cls": b"2"})
        (folder.parent / "files/a").write_bytes(b"1")
    assert not check_folder(folder.parent / "files").notes
    (folder.parent / "files/a").write_bytes(b"2")
    assert "a is not the recorded file" in check_folder(folder.parent / "files").notes[RECORD]


def test_the_command_lists_findings_and_fails(make_shards, capsys):
    folder = make_shards(6, per_shard=3)
    cli.main(["shards", "check", str(folder), "--workers", "2"])
    assert "6 samples read: 0 shards unreadable, 0 samples" in capsys.readouterr().out
    path = folder / "x-000001.tar"
    flip(path, member_offset(path, 0, "cls"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["shards", "check", str(folder), "--workers", "1"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 1 and "x-000001.tar: sample '0003'" in shown
    assert load_repair_list(folder / "repair.json").samples.keys() == {"x-000001.tar"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "shards": {}, "samples": {}}'])
def test_other_files_are_no_repair_lists(make_shards, tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ShardError, match="is not a repair list"):
        ShardReader(make_shards(2, per_shard=2), exclude=tmp_path / "list.json")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_foreign_tars_become_a_data_set(make_shards, tmp_path, capsys, workers):
    known = ShardReader(make_shards(6, per_shard=3))
    folder = make_shards(6, per_shard=3, name="foreign")
    for path in (*folder.glob("*.safetensors"), folder / "dataset.json"):
        path.unlink()
    (tmp_path / "facts.json").write_text('{"latent_scale": 0.18215}')
    facts = str(tmp_path / "facts.json")
    cli.main(["shards", "index", str(folder), "--workers", workers, "--metadata", facts])
    assert "6 samples in 2 shards" in capsys.readouterr().out
    reader = ShardReader(folder)
    assert reader.fingerprint == known.fingerprint
    assert reader.dataset.metadata == {"latent_scale": 0.18215}
    assert reader.dataset.contents == {
        "cls": {"classes": 6},
        "npy": {"dtype": "uint8", "shape": [1, 2, 3]},
    }
    write_shard(folder / "x-000002.tar", [("z", {"npy": b"1", "cls": b"2"})])
    with pytest.raises(ShardError, match=r"has \['x-000002.tar'\] against its dataset.json"):
        ShardReader(folder)
    assert index_folder(folder).metadata == {"latent_scale": 0.18215}
    assert len(ShardReader(folder)) == 7
