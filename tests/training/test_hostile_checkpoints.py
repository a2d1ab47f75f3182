"""Files of a run, whole by their checksums, that say what cannot be: one error names it."""

import hashlib
import json
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hostile
from speed_engine.run.averages import load_average
from speed_engine.run.folder import newest_checkpoint, read_config
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.records import RunLog, read_records
from speed_engine.training import checkpoint

WRITTEN = Path(__file__).parents[1] / "written_by_0_1" / "run"
STEP = "checkpoints/step-00000010"
SHARD = "shard-00001-model-00001-of-00001.safetensors"
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(WRITTEN, folder)
    return folder


def seal(path: Path) -> None:
    """Make the manifest vouch for the files as they are."""
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    manifest = {"schema": 2, "step": 10, "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest))


def put(run: Path, name: str, content: bytes) -> None:
    """One file of the checkpoint of a run, with the others as they were."""
    shutil.copytree(WRITTEN / STEP, run / STEP, dirs_exist_ok=True)
    (run / STEP / name).write_bytes(content)
    if name != "manifest.json":
        seal(run / STEP)


def load(run: Path) -> None:
    """All that is read of a run's checkpoint when it is resumed or its images are generated."""
    config = read_config(run)
    path = newest_checkpoint(run)
    checkpoint.read_state(path)
    checkpoint.shapes(path)
    load_average(run, config, torch.device("cpu"))


def header(content: bytes) -> dict:
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def with_header(content: bytes, text: str) -> bytes:
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + content[begin:]


def test_an_untouched_checkpoint_is_loaded(run):
    put(run, "state.json", (WRITTEN / STEP / "state.json").read_bytes())
    load(run)
    assert checkpoint.read_state(run / STEP).step == 10


@pytest.mark.parametrize(
    "field, value, named",
    [
        ("step", "10", r'step="10": should be a valid integer'),
        ("step", -1, "step=-1: must be at least 0"),
        ("step", 10**400, "step=10000"),
        ("step", None, "step=null"),
        ("step", True, "step=true"),
        ("means", [], r"means=\[\]: should be an object"),
        ("means", {"sum": [0, 0, 0]}, "means has no field 'count'"),
        ("means", {"sum": "abc", "count": 0}, 'means.sum="abc"'),
        ("means", {"sum": [0, 0, None], "count": 0}, r"means\.sum\.2=null"),
        ("means", {"sum": [0, 0, 0], "count": float("nan")}, "means.count=nan"),
        ("means", {"sum": [0, 0, 0], "count": 1e300}, r"means.count=1e\+300"),
        ("bad_samples", -3, "bad_samples=-3"),
        ("skipped", [0, 0], "skipped"),
        ("skipped", [0, 0, 1e300], r"skipped=1e\+300"),
        ("seconds", float("inf"), "seconds=inf"),
        ("data", 7, "data=7: should be a valid string"),
        ("data", "\udcff", "no Unicode"),
        ("more", 1, "more is unknown"),
    ],
)
def test_a_state_of_another_shape_names_file_field_and_value(run, field, value, named):
    state = json.loads((WRITTEN / STEP / "state.json").read_text())
    put(run, "state.json", json.dumps(state | {field: value}).encode())
    with pytest.raises(UserError, match=rf"state\.json: .*{named}.*Delete this checkpoint"):
        checkpoint.read_state(checkpoint.newest(run / "checkpoints"))


@pytest.mark.parametrize("text", ["", "3", "null", "[" * 10_000, '{"step": 10}', "\x00", "NaN"])
def test_a_state_that_is_none_is_named(run, text):
    put(run, "state.json", text.encode())
    with pytest.raises(UserError, match=r"state\.json: "):
        load(run)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"files": []}, r"files=\[\]: should be an object"),
        ({"files": {"a": 3}}, r"files\.a=3"),
        ({"files": {"a": {"bytes": 1}}}, "files.a has no field 'sha256'"),
        ({"files": {"../a": {"bytes": 1, "sha256": ""}}}, r"outside of the checkpoint: '\.\./a'"),
        ({"schema": 3}, "schema=3: must be at most 2"),
        ({"schema": None}, "schema=null"),
        ({"step": "x"}, 'step="x"'),
    ],
)
def test_a_manifest_of_another_shape_names_file_and_field_where_nothing_is_left(run, change, named):
    manifest = json.loads((WRITTEN / STEP / "manifest.json").read_text())
    put(run, "manifest.json", json.dumps(manifest | change).encode())
    with pytest.raises(UserError, match=rf"no complete checkpoint \(.*manifest\.json: .*{named}"):
        load(run)


@settings(max_examples=150)
@given(seed=seeds, name=st.sampled_from(["state.json", "manifest.json"]))
def test_whatever_a_document_of_a_checkpoint_says_is_refused_or_is_a_checkpoint(run, seed, name):
    document = json.loads((WRITTEN / STEP / name).read_text())
    put(run, name, hostile.mutated(document, random.Random(seed)).encode())
    try:
        load(run)
    except UserError as refusal:
        assert str(run / STEP) in str(refusal)


@pytest.mark.parametrize(
    "offsets",
    [[10**12, 0], [10**30, 0], [-1, 0], [0], [0, 0, 0], "x", None, {}, [0.5, 0], ["a", "b"]],
    ids=str,
)
def test_the_place_of_a_tensor_that_cannot_be_is_refused_before_it_asks_for_memory(run, offsets):
    content = (WRITTEN / STEP / SHARD).read_bytes()
    known = header(content)
    places = json.loads(known["__metadata__"]["DCP_SHARDING_INFO"])
    places["ema/blocks.0.attn.qkv.weight"] = {"saved_offsets": offsets}
    known["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    put(run, SHARD, with_header(content, json.dumps(known)))
    with pytest.raises(UserError, match=rf"{re.escape(STEP)}: its tensors cannot be read"):
        load(run)


def test_a_tensor_of_another_dtype_is_named(run):
    content = (WRITTEN / STEP / SHARD).read_bytes()
    known = header(content)
    known["model/pos_embed"]["dtype"] = "I32"
    put(run, SHARD, with_header(content, json.dumps(known)))
    (run / "ema.safetensors").unlink(missing_ok=True)
    shape = checkpoint.shapes(run / STEP)["model/pos_embed"]
    with pytest.raises(UserError, match="model/pos_embed is int32 there and float32 here"):
        checkpoint.load(run / STEP, {"model/pos_embed": torch.zeros(shape)})


@settings(max_examples=100)
@given(seed=seeds, inner=st.booleans())
def test_whatever_the_header_of_tensors_says_is_refused_or_is_a_checkpoint(run, seed, inner):
    content, rng = (WRITTEN / STEP / SHARD).read_bytes(), random.Random(seed)
    known = header(content)
    if inner:
        places = known["__metadata__"]["DCP_SHARDING_INFO"]
        known["__metadata__"]["DCP_SHARDING_INFO"] = hostile.mutated(json.loads(places), rng)
        text = json.dumps(known)
    else:
        text = hostile.mutated(known, rng)
    put(run, SHARD, with_header(content, text))
    try:
        load(run)
    except UserError as refusal:
        assert str(run / STEP) in str(refusal)


@pytest.mark.parametrize(
    "line, named",
    [
        ("3", "it is 3: should be an object"),
        ("{}", "it has no field 'step'"),
        ('{"step": "1"}', "step=1: should be a whole number"),
        ('{"step": -1}', "step=-1: must be at least 0"),
        ('{"step": 1.5}', "step=1.5"),
        ('{"step": true}', "step=True"),
        ('{"step": 1, "loss": "low"}', "loss=low: should be a number"),
        ('{"step": 1, "loss": [1]}', r"loss=\[1\]: should be a number"),
        ('{"step": 1, "loss": 1' + "0" * 400 + "}", "loss=1000"),
        ('{"step": 1, "extractor": 3, "evaluated": true}', "extractor=3: should be a text"),
        ('{"step": 1, "extractor": "digits"}', "it has no field 'images'"),
        ("[" * 10_000 + "]" * 10_000, "not JSON"),
        ("{", "not JSON"),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_record_of_another_shape_names_the_file_the_line_and_the_field(tmp_path, line, named):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    for read in (read_records, lambda run: RunLog(run, 5)):
        with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2: .*{named}"):
            read(tmp_path)


def test_records_that_are_no_text_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is no text"):
        read_records(tmp_path)


@settings(max_examples=200)
@given(seed=seeds)
def test_whatever_a_record_says_is_refused_or_is_a_record(run, seed):
    record = json.loads((WRITTEN / "metrics.jsonl").read_text().splitlines()[-1])
    text = hostile.mutated(record, random.Random(seed))
    (run / "metrics.jsonl").write_text(f"{text}\n")
    try:
        assert all(type(record["step"]) is int for record in read_records(run))
    except UserError as refusal:
        assert "metrics.jsonl, line 1" in str(refusal)


@pytest.mark.parametrize(
    "parts, covers",
    [
        ([((0, 0), (4, 6))], True),
        ([((2, 0), (2, 6)), ((0, 0), (2, 6))], True),
        ([((0, 0), (4, 2)), ((0, 2), (4, 4)), ((4, 6), (0, 6))], True),
        ([((0, 0), (2, 6)), ((0, 0), (2, 6))], False),  # rows 0 and 1 twice, 2 and 3 never
        ([((0, 0), (3, 6)), ((2, 0), (1, 6))], False),
        ([((0, 0), (2, 6)), ((3, 0), (2, 6))], False),  # beyond the end
        ([((0, 0), (2, 6)), ((-2, 0), (2, 6))], False),
        ([((0,), (24,))], False),
    ],
)
def test_parts_of_a_tensor_cover_each_of_its_values_once(parts, covers):
    assert checkpoint._is_covered((4, 6), parts) == covers
    assert checkpoint._is_covered((), [((), ())])
