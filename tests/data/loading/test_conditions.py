import numpy as np
import pytest

from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.conditions import condition_name, decode_condition, load_null_tokens
from speed_engine.data.preparing.pictures import npy_bytes


def test_members_are_the_models_arguments():
    members = {
        "cls": "labels",
        "tokens.npy": "tokens",
        "low.npy": "low_resolution",
        "low.png": "low_resolution",
    }
    assert {member: condition_name(member) for member in members} == members


@pytest.mark.parametrize("array", [np.zeros(4, np.float16), np.zeros((4, 3), np.int64)])
def test_what_is_not_text_tokens_is_refused(tmp_path, array):
    np.save(tmp_path / "null_tokens.npy", array)
    data = (tmp_path / "null_tokens.npy").read_bytes()
    with pytest.raises(ValueError, match=r"text tokens are \(length, width\) floats, not"):
        decode_condition(data, "tokens.npy", 3)
    with pytest.raises(ValueError, match="null_tokens.npy: text tokens are"):
        load_null_tokens(tmp_path)


def test_the_empty_prompt_is_read_from_beside_the_shards(tmp_path):
    tokens = np.arange(12, dtype=np.float16).reshape(4, 3)
    np.save(tmp_path / "null_tokens.npy", tokens)
    assert np.array_equal(load_null_tokens(tmp_path), tokens)


def test_the_empty_prompt_is_that_of_the_record_for_a_single_tar_too(tmp_path):
    tokens = np.arange(12, dtype=np.float16).reshape(4, 3)
    with ShardWriter(tmp_path, "x", 2, files=["null_tokens.npy"]) as writer:
        writer.write("a", {"tokens.npy": npy_bytes(tokens)})
        np.save(tmp_path / "null_tokens.npy", tokens)
    assert np.array_equal(load_null_tokens(tmp_path / "x-000000.tar"), tokens)
    np.save(tmp_path / "null_tokens.npy", tokens + 1)
    for source in (tmp_path, tmp_path / "x-000000.tar"):
        with pytest.raises(ShardError, match="null_tokens.npy is not the recorded file"):
            load_null_tokens(source)


def test_a_missing_empty_prompt_is_named_with_what_writes_it(tmp_path):
    with pytest.raises(ValueError, match="null_tokens.npy does not exist; .*shards encode"):
        load_null_tokens(tmp_path)
