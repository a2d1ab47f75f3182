import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speed_engine.data.preparing.catalogue import open_source
from speed_engine.data.preparing.prepare import PictureOptions, make
from speed_engine.data.preparing.sources.coco import CocoCaptions
from speed_engine.data.preparing.sources.image_folder import ImageFolder
from speed_engine.data.preparing.sources.zip_archive import ZipArchive
from speed_engine.data.preparing.summary import summarise
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
    expected = {".gif": 2, ".avif": 1, "LICENSE": 1, ".txt": 1, "hidden": 1}
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


@pytest.mark.parametrize("place, value", [(6, b"\1\0"), (8, b"\x63\0")])
def test_a_zip_that_is_encrypted_or_packed_otherwise_is_named(tmp_path, place, value):
    """Flag and method, in the local header (4 bytes further on in the directory)."""
    path = write_zip(tmp_path / "edm.zip", EDM_LABELS)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        infos, start = archive.infolist(), archive.start_dir
    for info in infos:
        data[info.header_offset + place : info.header_offset + place + 2] = value
        data[start + place + 2 : start + place + 4] = value
        start += 46 + len(info.filename) + len(info.extra)
    path.write_bytes(data)
    with pytest.raises(UserError, match="dataset.json cannot be read"):
        ZipArchive(path)


def test_a_short_member_of_a_zip_is_named(tmp_path, monkeypatch):
    source = ZipArchive(write_zip(tmp_path / "edm.zip", EDM_LABELS))

    def end(*_: object) -> None:
        raise EOFError("too short")

    monkeypatch.setattr(zipfile.ZipFile, "read", end)
    with pytest.raises(UserError, match="too short"):
        source.read(0, 3)


def test_two_pictures_of_one_name_in_a_zip_are_named(tmp_path):
    path = write_zip(tmp_path / "edm.zip", EDM_LABELS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("./00000/img00000001.png", picture(90))
    with pytest.raises(UserError, match="two pictures named '00000/img00000001.png'"):
        ZipArchive(path)


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


@pytest.mark.parametrize("folder, prefix", [("top/", ""), ("./", ""), ("a/b/", ""), ("", "./")])
def test_a_zip_that_was_packed_again_keeps_its_labels(tmp_path, folder, prefix):
    path = tmp_path / "edm.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, _) in enumerate(EDM_LABELS):
            archive.writestr(f"{folder}{name}", picture(10 * i))
        listed = [[prefix + name, label] for name, label in EDM_LABELS]
        archive.writestr(f"{folder}dataset.json", json.dumps({"labels": listed}))
    source = ZipArchive(path)
    assert values(source) == [(0, 0), (10, 1), (20, 2), (30, 0)]
    assert source.classes == ("0", "1", "2") and not source.left_out


def test_hidden_folders_of_a_zip_hold_no_samples_and_two_lists_are_refused(tmp_path):
    path = write_zip(tmp_path / "edm.zip", EDM_LABELS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("00000/.ipynb_checkpoints/x.png", picture(90))
        archive.writestr("__MACOSX/._dataset.json", b"junk")
    assert len(ZipArchive(path)) == 4 and dict(ZipArchive(path).left_out) == {"hidden": 2}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more/dataset.json", b"{}")
    with pytest.raises(UserError, match="several dataset.json"):
        ZipArchive(path)


def test_links_that_lead_round_by_way_of_each_other_are_named(tmp_path):
    write(tmp_path / "source" / "cat" / "a.png", picture(1))
    write(tmp_path / "away" / "b.png", picture(2))
    (tmp_path / "source" / "cat" / "x").symlink_to(tmp_path / "away")
    (tmp_path / "away" / "y").symlink_to(tmp_path / "source" / "cat")
    with pytest.raises(UserError, match="x/y links to a folder that it is in"):
        ImageFolder(tmp_path / "source")


def test_every_name_of_jpegs_is_taken(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.JPG"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "JPEG")
    assert len(ImageFolder(tmp_path)) == 3


def test_a_label_that_is_no_number_of_a_class_is_refused_at_once(tmp_path):
    write(tmp_path / "a.png", picture(0))
    write(tmp_path / "metadata.jsonl", b'{"file_name": "a.png", "label": 1000000000}')
    with pytest.raises(UserError, match="a label is 1,000,000,000; needed are classes numbered fr"):
        open_source(str(tmp_path))


def test_metadata_jsonl_gives_labels_and_captions(tmp_path):
    for i in range(3):
        write(tmp_path / "sub" / f"{i}.png", picture(10 * i))
    write(tmp_path / "unlisted.png", picture(90))
    rows = [
        {"file_name": f"./sub/{i}.png", "label": label, "text": f"the  {label}", "extra": 1}
        for i, label in enumerate(("dog", "cat", "dog"))
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n"
    write(tmp_path / "metadata.jsonl", text.encode())
    for name in (str(tmp_path), f"hf:{tmp_path}"):
        source = open_source(name)
        assert source.classes == ("cat", "dog")
        assert values(source) == [(0, 1), (10, 0), (20, 1)]
        assert source.read(1, 3).captions == ("the cat",)
        assert dict(source.left_out) == {"pictures that metadata.jsonl does not list": 1}
    (tmp_path / "metadata.jsonl").unlink()
    table = "file_name,label\nsub/0.png,b\nsub/2.png,a\n"
    write(tmp_path / "metadata.csv", table.encode())
    assert values(open_source(str(tmp_path))) == [(0, 1), (20, 0)]


@pytest.mark.parametrize(
    "labels, classes, expected",
    [
        (("10", "2", "0"), tuple(map(str, range(11))), [10, 2, 0]),
        (("10", "2", "x"), ("10", "2", "x"), [0, 1, 2]),
        (("007", "7", "0"), ("0", "007", "7"), [1, 2, 0]),
    ],
)
def test_numbers_in_a_table_are_numbers_of_classes(tmp_path, labels, classes, expected):
    rows = []
    for i, label in enumerate(labels):
        write(tmp_path / f"{i}.png", picture(i))
        rows.append(f"{i}.png,{label}\r\n")
    table = "\ufefffile_name,label\r\n" + "".join(rows)  # as Excel writes it
    write(tmp_path / "metadata.csv", table.encode())
    source = open_source(str(tmp_path))
    assert source.classes == classes and [label for _, label in values(source)] == expected


def test_line_breaks_inside_of_json_end_no_line(tmp_path):
    write(tmp_path / "a.png", picture(1))
    line = json.dumps({"file_name": "a.png", "text": "a\u2028b\x85c"}, ensure_ascii=False)
    write(tmp_path / "metadata.jsonl", f"{line}\r\n".encode())
    assert open_source(str(tmp_path)).read(0, 3).captions == ("a b c",)
    path = write_tar(tmp_path / "a.tar", **{"a.png": picture(1), "a.txt": "a\u2028b\n c".encode()})
    assert open_source(str(path)).read(0, 3).captions == ("a b", "c")


def test_an_unpacked_edm_folder_has_its_labels(tmp_path):
    for i, (name, _) in enumerate(EDM_LABELS):
        write(tmp_path / name, picture(10 * i))
    write(tmp_path / "dataset.json", json.dumps({"labels": EDM_LABELS}).encode())
    source = open_source(str(tmp_path))
    assert values(source) == [(0, 0), (10, 1), (20, 2), (30, 0)]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["[]"], "metadata.jsonl, line 1: needed"),
        (['{"file_name": 3}'], "line 1: needed"),
        (['{"file_name": "a.png", "label": 1.5}'], "line 1: label 1.5"),
        (['{"file_name": "gone.png"}'], "'gone.png'.*is not there"),
        (['{"file_name": "../a.png"}'], "is not there"),
        (['{"file_name": "a.png"}'] * 2, "'a.png' is there twice"),
        (['{"file_name": "a.png", "label": 1}', '{"file_name": "b.png"}'], "every picture needs"),
        (['{"file_name": "a.png", "text": "x"}', '{"file_name": "b.png"}'], "have no caption"),
        (["{"], "not a list of pictures"),
        (["[" * 100_000], "not a list of pictures"),
    ],
)
def test_a_list_that_does_not_fit_is_named(tmp_path, lines, message):
    for name in ("a.png", "b.png"):
        write(tmp_path / name, picture(1))
    write(tmp_path / "metadata.jsonl", "\n".join(lines).encode())
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path))


def write_tar(path: Path, **members: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_others_tars_are_a_source_whatever_their_order_and_sizes(tmp_path):
    pictures = {f"{i}.jpg": picture(10 * i, side=6 + i) for i in range(4)}
    labels = {f"{i}.cls": str(i % 2).encode() for i in range(4)}
    others = {"0.json": b"{}", "lost.txt": b"x", "lost.cls": b"1"}
    path = write_tar(tmp_path / "in" / "a.tar", **pictures, **labels, **others)
    for name in (str(path), str(tmp_path / "in")):
        source = open_source(name)
        assert values(source) == [(0, 0), (10, 1), (20, 0), (30, 1)]
        assert dict(source.left_out) == {"json": 1, "samples without a picture": 1}
    make(source, tmp_path / "out", PictureOptions(size=4), workers=1)
    assert summarise(tmp_path / "out").labels.tolist().count(1) == 2
    before = source.identity
    write_tar(path, **pictures | {"0.jpg": picture(9)}, **labels, **others)
    assert open_source(name).identity != before
    write_tar(path, **pictures, **dict([*labels.items()][1:]))
    with pytest.raises(UserError, match=r"1 of 4 pictures have no label \(cls\), the first is"):
        open_source(name)


def test_captions_name_pictures_below_their_folder(tmp_path):
    write(tmp_path / "val" / "sub" / "2.png", picture(6))
    captions = [{"id": 9, "image_id": 2, "caption": "deep"}]
    source = coco(tmp_path, captions, [{"id": 2, "file_name": "sub/2.png"}])
    assert values(source) == [(6, None)]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": [{"id": 1e999, "file_name": "a"}]}'])
def test_hostile_captions_are_one_error(tmp_path, text):
    with pytest.raises(UserError, match="not a file of COCO captions"):
        CocoCaptions(write(tmp_path / "captions.json", text.encode()), tmp_path)
