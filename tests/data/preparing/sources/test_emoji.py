"""Emoji of the installed font; where it is not installed, only what needs no font is tested."""

import json
import pickle

import numpy as np
import pytest

from speed_engine import cli
from speed_engine.data.preparing.catalogue import open_source
from speed_engine.data.preparing.prepare import PictureOptions, make
from speed_engine.data.preparing.sources.emoji import FONT, SEQUENCES, Emoji, read_sequences

LINES = """\
# Version: 15.0
# group: People & Body
# subgroup: person
1F44B             ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB       ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
1F441 FE0F        ; fully-qualified     # 👁️ E0.7 eye
1F7E5             ; fully-qualified     # 🟥 E12.0 red square
1F441             ; unqualified         # 👁 E0.7 eye
# group: Component
1F3FB             ; component           # 🏻 E1.0 light skin tone
# group: Flags
1F1F3 1F1F4       ; fully-qualified     # 🇳🇴 E2.0 flag: Norway
1F1E7 1F1FB       ; fully-qualified     # 🇧🇻 E2.0 flag: Bouvet Island
"""
needs_font = pytest.mark.skipif(
    not (FONT.is_file() and SEQUENCES.is_file()),
    reason="apt-get install fonts-noto-color-emoji unicode-data",
)


@pytest.fixture
def sequences(tmp_path):
    path = tmp_path / "emoji-test.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def test_skin_tones_components_and_unqualified_forms_are_left_out():
    assert [(e.group, e.name, e.text) for e in read_sequences(LINES)] == [
        ("People & Body", "waving hand", "\U0001f44b"),
        ("People & Body", "eye", "\U0001f441\ufe0f"),
        ("People & Body", "red square", "\U0001f7e5"),
        ("Flags", "flag: Norway", "\U0001f1f3\U0001f1f4"),
        ("Flags", "flag: Bouvet Island", "\U0001f1e7\U0001f1fb"),
    ]


def test_without_the_font_the_packages_are_named(tmp_path, sequences, monkeypatch, capsys):
    missing = tmp_path / "font.ttf"
    monkeypatch.setattr(Emoji.__init__, "__defaults__", (missing, sequences))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["shards", "make", "emoji", str(tmp_path / "out")])
    shown = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and str(missing) in shown
    assert "apt-get install fonts-noto-color-emoji unicode-data" in shown
    assert not (tmp_path / "out").exists()


def test_another_font_is_refused(tmp_path, sequences):
    from matplotlib import font_manager

    for font in (font_manager.findfont("DejaVu Sans"), sequences):
        with pytest.raises(ValueError, match="fonts-noto-color-emoji"):
            Emoji(type(sequences)(font), sequences)


@needs_font
def test_each_drawing_is_there_once_centred_on_white(sequences):
    source = pickle.loads(pickle.dumps(Emoji(sequences=sequences)))
    assert source.classes == ("People & Body", "Flags")
    assert [source.name(i) for i in range(len(source))] == [
        "emoji 'waving hand'", "emoji 'eye'", "emoji 'red square'", "emoji 'flag: Norway'",
    ]  # fmt: skip
    for i, label in enumerate((0, 0, 0, 1)):
        picture, read_label, _ = source.read(i, 3)
        pixels = np.asarray(picture)
        assert pixels.shape == (136, 136, 3) and read_label == label
        assert (pixels[:4] == 255).all() and (pixels[-4:] == 255).all()
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5
    drawn = np.flatnonzero((np.asarray(source.read(2, 3).picture) < 250).any((1, 2)))
    assert abs(drawn[0] - (135 - drawn[-1])) <= 2
    assert "2." in source.metadata["font_version"] and source.metadata["unicode"] == "15.0"
    assert "SIL Open Font License" in source.metadata["licence"]


@needs_font
def test_the_same_font_makes_the_same_shards(sequences, tmp_path):
    records = []
    for out in (tmp_path / "a", tmp_path / "b"):
        make(Emoji(sequences=sequences), out, PictureOptions(size=32), workers=1)
        records.append((out / "dataset.json").read_text())
    assert records[0] == records[1]
    facts = json.loads(records[0])
    assert facts["contents"]["png"] == {"dtype": "uint8", "shape": [32, 32]}
    assert facts["metadata"]["classes"] == ["People & Body", "Flags"]
    assert facts["metadata"]["font"] == "Noto Color Emoji"


@needs_font
def test_all_of_unicode_is_nine_classes_of_which_none_is_most():
    source = open_source("emoji")
    assert isinstance(source, Emoji)
    labels = [source.classes.index(sequence.group) for sequence in source._sequences]
    assert len(source) > 1500 and len(source.classes) == 9
    assert np.bincount(labels).max() < 0.25 * len(source) and np.bincount(labels).min() > 50
