import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speed_engine.data.preparing.sources.coco import CocoCaptions
from speed_engine.data.preparing.sources.image_folder import ImageFolder
from speed_engine.data.preparing.sources.zip_archive import ZipArchive
from speed_engine.runtime.checks import UserError


def picture(value: int, side: int = 6) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def values(source) -> list[tuple[int, int | None]]:
    """(pixel, label) of every sample."""
    records = [source.read(i, 3) for i in range(len(source))]
    return [(int(np.asarray(record.picture)[0, 0, 0]), record.label) for record in records]


def write_zip(path: Path, labels: object, count: int = 4) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(f"00000/img{i:08d}.png", picture(10 * i))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


EDM_LABELS = [[f"00000/img{i:08d}.png", i % 3] for i in range(4)]


def test_classes_are_the_sub_folders_in_order(tmp_path):
    write(tmp_path / "dog" / "a.png", picture(30))
    write(tmp_path / "cat" / "deep" / "b.JPEG", picture(20))
    write(tmp_path / "cat" / "a.png", picture(10))
    write(tmp_path / "cat" / "notes.txt", b"not a picture")
    write(tmp_path / ".git" / "x.png", picture(90))
    source = ImageFolder(tmp_path)
    assert source.classes == ("cat", "dog")
    assert values(source) == [(10, 0), (20, 0), (30, 1)]
    assert values(pickle.loads(pickle.dumps(source))) == values(source)


def test_a_folder_of_pictures_alone_is_one_class(tmp_path):
    write(tmp_path / "a.png", picture(1))
    source = ImageFolder(tmp_path)
    assert source.classes == ("all",) and values(source) == [(1, 0)]


def test_another_list_of_files_is_another_source(tmp_path):
    write(tmp_path / "a" / "1.png", picture(1))
    before = ImageFolder(tmp_path).identity
    assert ImageFolder(tmp_path).identity == before
    write(tmp_path / "a" / "2.png", picture(2))
    assert ImageFolder(tmp_path).identity != before


def test_folders_that_are_no_classes_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        ImageFolder(tmp_path)
    write(tmp_path / "cat" / "a.png", picture(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        ImageFolder(tmp_path)
    write(tmp_path / "empty" / "a.png", picture(1))
    write(tmp_path / "stray.png", picture(1))
    with pytest.raises(ValueError, match=r"stray.png.*beside sub-folders"):
        ImageFolder(tmp_path)


def test_links_are_followed_and_hidden_entries_left_out_at_every_depth(tmp_path):
    source = tmp_path / "source"
    for depth, folder in enumerate((source / "cat", source / "cat" / "deep")):
        write(folder / "seen.png", picture(10 * depth))
        write(folder / ".hidden" / "x.png", picture(90))
        write(folder / ".hidden.png", picture(90))
        write(tmp_path / f"away{depth}" / "linked.png", picture(10 * depth + 5))
        (folder / "link").symlink_to(tmp_path / f"away{depth}")
    (source / "dog").symlink_to(tmp_path / "away1")
    found = sorted(values(ImageFolder(source)))
    assert found == [(0, 0), (5, 0), (10, 0), (15, 0), (15, 1)]


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_link_that_leads_round_in_a_circle_is_named(tmp_path, target):
    write(tmp_path / "cat" / "a.png", picture(1))
    (tmp_path / "cat" / "loop").symlink_to(target)
    with pytest.raises(UserError, match="cat/loop links to a folder that it is in"):
        ImageFolder(tmp_path)


def test_files_of_other_kinds_are_counted(tmp_path):
    write(tmp_path / "cat" / "a.png", picture(1))
    for name in ("cat/b.GIF", "cat/deep/c.gif", "cat/d.avif", "cat/LICENSE", "notes.txt", ".x.gif"):
        write(tmp_path / name, b"")
    expected = {".gif": 2, ".avif": 1, "LICENSE": 1, ".txt": 1}
    assert dict(ImageFolder(tmp_path).left_out) == expected
    path = write_zip(tmp_path / "edm.zip", EDM_LABELS)
    assert not ZipArchive(path).left_out
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("00000/more.tiff", b"")
    assert dict(ZipArchive(path).left_out) == {".tiff": 1}


def test_a_link_to_nothing_is_a_sample_that_cannot_be_read(tmp_path):
    write(tmp_path / "a.png", picture(1))
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    source = ImageFolder(tmp_path)
    assert len(source) == 2
    with pytest.raises(FileNotFoundError):
        source.read(1, 3)


def test_a_class_name_that_is_no_text_is_refused(tmp_path):
    write(tmp_path / "caf\udce9" / "a.png", picture(1))
    with pytest.raises(ValueError, match="not UTF-8"):
        ImageFolder(tmp_path)


def test_an_edm_zip_has_its_labels(tmp_path):
    source = ZipArchive(write_zip(tmp_path / "edm.zip", EDM_LABELS))
    assert values(source) == [(0, 0), (10, 1), (20, 2), (30, 0)]
    assert source.classes == ("0", "1", "2")
    assert values(pickle.loads(pickle.dumps(source))) == values(source)


def test_a_zip_without_labels_is_one_class(tmp_path):
    source = ZipArchive(write_zip(tmp_path / "edm.zip", None))
    assert {label for _, label in values(source)} == {0} and source.classes == ("all",)


@pytest.mark.parametrize(
    "labels, message",
    [
        (EDM_LABELS[:3], "img00000003.png.*a picture but no label"),
        ([*EDM_LABELS, ["x.png", 1]], "x.png.*a label but no picture"),
        ([[name, 0.5] for name, _ in EDM_LABELS], "label 0.5"),
        ([[name, [0, 1]] for name, _ in EDM_LABELS], r"label \[0, 1\]"),
        (3, "dataset.json is not"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        ZipArchive(write_zip(tmp_path / "edm.zip", labels))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**23))
    with pytest.raises(ValueError, match="would unpack to 8388608 bytes"):
        ZipArchive(tmp_path / "bomb.zip")


def test_a_damaged_zip_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not a zip"):
        ZipArchive(write(tmp_path / "a.zip", b"PK nonsense"))
    path = write_zip(tmp_path / "edm.zip", EDM_LABELS)
    data = bytearray(path.read_bytes())
    data[60] ^= 1  # in the first picture
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        ZipArchive(path).read(0, 3)


def coco(tmp_path: Path, captions: list[dict], images: list[dict]) -> CocoCaptions:
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return CocoCaptions(path, tmp_path / "val")


def test_coco_has_all_captions_of_a_picture(tmp_path):
    write(tmp_path / "val" / "one.png", picture(5))
    write(tmp_path / "val" / "two.png", picture(6))
    captions = [
        {"id": 9, "image_id": 2, "caption": "a later\n one "},
        {"id": 3, "image_id": 1, "caption": "first"},
        {"id": 4, "image_id": 2, "caption": "early"},
    ]
    images = [{"id": 2, "file_name": "two.png"}, {"id": 1, "file_name": "one.png"}]
    source = coco(tmp_path, captions, images)
    assert source.read(0, 3).captions == ("first",)
    assert source.read(1, 3).captions == ("early", "a later one")
    assert values(source) == [(5, None), (6, None)] and source.classes == ()


@pytest.mark.parametrize(
    "captions, images, message",
    [
        ([("a dog", 7)], [(1, "one.png")], "'a dog' of image 7 belongs to no picture"),
        ([(" ", 1)], [(1, "one.png")], "is empty"),
        ([], [(1, "one.png")], "'one.png' has no caption"),
        ([("a", 1)], [(1, "../one.png")], r"'../one.png' is not in"),
        ([], [], "lists no pictures"),
    ],
)
def test_captions_that_do_not_fit_are_named(tmp_path, captions, images, message):
    write(tmp_path / "val" / "one.png", picture(5))
    with pytest.raises(ValueError, match=message):
        coco(
            tmp_path,
            [{"id": n, "image_id": i, "caption": text} for n, (text, i) in enumerate(captions)],
            [{"id": i, "file_name": name} for i, name in images],
        )


def test_other_json_is_not_taken_for_captions(tmp_path):
    for text in ("[]", "{", '{"images": 3, "annotations": []}'):
        path = write(tmp_path / "captions.json", text.encode())
        with pytest.raises(ValueError, match="not a file of COCO captions"):
            CocoCaptions(path, tmp_path)
