"""`speed-engine shards make` and `encode` as a person meets them."""

import numpy as np
import pytest
from PIL import Image

from speed_engine import cli
from speed_engine.data.format.reader import ShardReader


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["shards", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.err + captured.out).split())


def test_the_digits_become_shards_that_can_be_trained_on(capsys, tmp_path):
    out = tmp_path / "out"
    cli.main(["shards", "make", "digits", str(out), "--format", "npy", "--workers", "1"])
    shown = capsys.readouterr().out
    assert "1,797 samples in 2 shards" in shown
    assert "members: cls, npy uint8 1x8x8" in shown
    assert "10 classes, smallest first: 8 174" in shown
    assert len(ShardReader(out)) == 1797
    sheet = np.asarray(Image.open(out / "contact-sheet.png"))
    assert sheet.shape[0] > 900 and sheet.std() > 50


def test_many_classes_are_summed_up(capsys, tmp_path):
    for c in range(20):
        (tmp_path / "in" / f"class{c:02d}").mkdir(parents=True)
        for i in range(c + 1):
            Image.new("RGB", (9, 9), (10 * c, i, 0)).save(
                tmp_path / "in" / f"class{c:02d}" / f"{i}.png"
            )
    options = ["--size", "4", "--workers", "1"]
    cli.main(["shards", "make", str(tmp_path / "in"), str(tmp_path / "out"), *options])
    shown = capsys.readouterr().out
    assert "20 classes, smallest first: class00 1, class01 2, class02 3, ..., class17 18" in shown


def test_what_cannot_be_made_is_one_message(capsys, tmp_path):
    out = str(tmp_path / "out")
    assert "does not exist; needed: digits" in fails(capsys, "make", "nowhere", out)
    assert "holds no pictures" in fails(capsys, "make", str(tmp_path), out)
    captions = tmp_path / "captions.json"
    captions.write_text("{}")
    assert "need the folder of their pictures" in fails(capsys, "make", str(captions), out)
    (tmp_path / "a.rar").write_bytes(b"")
    assert "'.rar' are not known" in fails(capsys, "make", str(tmp_path / "a.rar"), out)
    assert "size=0" in fails(capsys, "make", "digits", out, "--size", "0")
    assert "workers=0" in fails(capsys, "make", "digits", out, "--workers", "0")
    assert "does not exist" in fails(capsys, "encode", str(tmp_path / "none"), out)


def test_encode_without_an_encoder_says_what_is_missing(capsys, tmp_path):
    cli.main(["shards", "make", "digits", str(tmp_path / "a"), "--workers", "1"])
    message = fails(capsys, "encode", str(tmp_path / "a"), str(tmp_path / "b"))
    assert "give a VAE, a text encoder or both" in message
