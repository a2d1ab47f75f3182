"""What the data rooms need no extra for, and what names its extra where that is missing."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from speed_engine.data.preparing.sources import emoji
from speed_engine.data.preparing.sources.huggingface import HuggingFace
from speed_engine.encoders.hub import load_pretrained
from speed_engine.runtime.checks import UserError

ROOT = Path(__file__).parents[2]
OPTIONAL = ("fontTools", "aiohttp", "s3fs", "gcsfs", "datasets", "diffusers", "transformers")

WITHOUT_EXTRAS = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it is an ImportError
import torch
from pathlib import Path
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.remote import fetch
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.preparing.catalogue import open_source
from speed_engine.data.preparing.prepare import PictureOptions, make
from speed_engine.data.preparing.sources.digits import digits_folder

folder = Path(sys.argv[1])
with Loader(ShardReader(digits_folder(folder)), (1, 8, 8), Feed(4, 0)) as loader:
    print(tuple(Cleaning(torch.tensor(0)).batch(next(loader)).images.shape))
with ShardWriter(folder / "mine", "x", 5) as writer:
    writer.write("0", {{"txt": b"text"}})
print(ShardReader(folder / "mine", ["txt"]).read(0))
for url in ("https://example.org/x.tar", "s3://bucket/x.tar", "gs://bucket/x.tar"):
    try:
        fetch(url, folder / "x", 1)
    except ValueError as error:
        print("speed-engine[remote]" in str(error))
"""


def test_digits_and_local_shards_need_no_extra_and_urls_name_theirs(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_EXTRAS), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = ["(4, 1, 8, 8)", "{'txt': b'text'}", "True", "True", "True"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_libraries_of_preparation_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'speed-engine\[prepare\]'"):
        HuggingFace("user/set", "train")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'speed-engine\[prepare\]'"):
        load_pretrained("diffusers", "AutoencoderKL", "somewhere")


def test_the_emoji_name_their_extra_before_anything_is_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fontTools.ttLib", None)
    monkeypatch.setattr(emoji, "_open", lambda _: None)
    for name in ("font.ttf", "emoji-test.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"pip install 'speed-engine\[emoji\]'"):
        emoji.Emoji(tmp_path / "font.ttf", tmp_path / "emoji-test.txt")
