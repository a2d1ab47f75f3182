"""What images are generated of: prompts, or samples, of which some are damaged."""

import numpy as np
import pytest

from speed_engine.data.config import DataConfig
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import load_index
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.decoding import BatchReader
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.evaluation.conditions import generation_conditions, generation_texts, prompted

COUNT = 5


@pytest.fixture
def told(tmp_path) -> DataConfig:
    """Five samples, whose tokens and texts say which they are; the second is damaged."""
    with ShardWriter(tmp_path / "told", "x", COUNT) as writer:
        for i in range(COUNT):
            tokens = npy_bytes(np.full((2, 3), i, np.float16))
            image = npy_bytes(np.full((1, 8, 8), i, np.uint8))
            writer.write(str(i), {"npy": image, "tokens.npy": tokens, "txt": b"text %d" % i})
    index, _ = load_index(tmp_path / "told/x-000000.index.safetensors")
    path = tmp_path / "told/x-000000.tar"
    tar = bytearray(path.read_bytes())
    tar[int(index.offset[1, index.extensions.index("npy")]) + 130] ^= 1
    path.write_bytes(tar)
    return DataConfig(source=str(tmp_path / "told"), members=("npy", "tokens.npy"))


def test_another_sample_takes_the_place_of_a_damaged_one_with_its_text(told):
    tokens = generation_conditions(told, 7, seed=0)["tokens"]
    which = tokens[:, 0, 0].int().tolist()
    assert which[0] == 0 and which[1] != 1 and which[2:5] == [2, 3, 4] and which[5:] == which[:2]
    assert generation_texts(told, 7) == tuple(f"text {i}" for i in which)


def test_a_damaged_one_ends_the_run_where_that_is_the_policy(told):
    stopping = DataConfig(source=told.source, members=told.members, on_bad_sample="stop")
    with pytest.raises(ShardError, match="sample '1'"):
        generation_conditions(stopping, 7, seed=0)
    with pytest.raises(ShardError, match="sample '1'"):
        generation_texts(stopping, 7)
    assert generation_texts(stopping, 1) == ("text 0",)


def test_no_sample_is_read_twice_for_more_images_than_there_are(told, monkeypatch):
    asked, read = [], BatchReader.read
    monkeypatch.setattr(
        BatchReader,
        "read",
        lambda self, samples, *given: asked.extend(samples) or read(self, samples, *given),
    )
    assert len(generation_conditions(told, 40, seed=0)["tokens"]) == 40
    assert asked == list(range(COUNT))


def test_prompts_come_in_turn_and_no_text_at_all_is_what_hides_them(monkeypatch):
    """By an encoder whose tokens are the length of the text."""
    encoded = lambda texts: np.array([np.full((2, 3), len(text)) for text in texts], np.float16)
    monkeypatch.setattr("speed_engine.evaluation.conditions.TextEncoder", lambda *_: encoded)
    data = DataConfig(members=("npy", "tokens.npy"), token_shape=(2, 3))
    conditions, null = prompted(data, 5, ["one", "a frog"], "clip")
    assert conditions["tokens"].shape == (5, 2, 3) and null["tokens"].shape == (2, 3)
    assert conditions["tokens"][:, 0, 0].tolist() == [3, 6, 3, 6, 3]
    assert null["tokens"].unique().tolist() == [0]
