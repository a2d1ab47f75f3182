import pytest
from PIL import Image

from speed_engine import cli
from speed_engine.data.preparing import catalogue
from speed_engine.data.preparing.catalogue import SOURCES, Kind, open_source
from speed_engine.data.preparing.source import Record, Source
from speed_engine.data.preparing.sources.digits import Digits
from speed_engine.data.preparing.sources.image_folder import ImageFolder
from speed_engine.runtime.checks import UserError


class Greys(Source):
    """A source as somebody may add one."""

    identity = "greys"

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def name(self, i: int) -> str:
        return f"grey {i}"

    def read(self, i: int, channels: int) -> Record:
        return Record(Image.new("L" if channels == 1 else "RGB", (2, 2), i))


def test_a_source_is_its_class_and_its_entry(monkeypatch, capsys):
    kind = Kind("plain greys", lambda asked: Greys(int(asked.name[6:])))
    monkeypatch.setitem(SOURCES, "greys:*", kind)
    assert len(open_source("greys:5")) == 5
    with pytest.raises(UserError, match="does not exist; needed: digits, .*, greys:NAME"):
        open_source("nowhere")
    cli.main(["shards", "--help"])
    assert "greys:NAME" in capsys.readouterr().out


def test_a_name_is_a_source_by_its_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.zip").mkdir()  # a folder, whatever its name
    Image.new("L", (2, 2)).save(tmp_path / "a.zip" / "x.png")
    (tmp_path / "digits").mkdir()
    assert isinstance(open_source("a.zip"), ImageFolder)
    assert isinstance(open_source("digits"), Digits)
    monkeypatch.setattr(catalogue, "HuggingFace", lambda *asked: asked)
    assert open_source("hf:user/set", split="test") == ("user/set", "test")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "metadata.jsonl").touch()  # of no split but train
    assert open_source("hf:set", split="test") == ("set", "test")
    for name, options in (
        ("digits", {"split": "test"}),
        ("a.zip", {"split": "test"}),
        ("digits", {"images": tmp_path}),
        ("hf:user/set", {"images": tmp_path}),
    ):
        with pytest.raises(UserError, match=rf"--{min(options)} .* have it, {name} has none"):
            open_source(name, **options)  # pyright: ignore[reportArgumentType]
    for missing in ("b.zip", "b.json", "b/", "b.tar.gz"):
        with pytest.raises(UserError, match="does not exist"):
            open_source(missing)
