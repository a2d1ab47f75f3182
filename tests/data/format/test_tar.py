import io
import random
import tarfile

import pytest

from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.tar import scan_tar


def write_tar(path, members, tar_format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(path):
    data = path.read_bytes()
    return {
        key: {extension: data[m.offset : m.offset + m.size] for extension, m in members.items()}
        for key, members in scan_tar(path).items()
    }


LONG = "/".join(["folder" * 12, "sub" * 25, "n" * 60])


@pytest.mark.parametrize(
    "tar_format, key",
    [
        (tarfile.USTAR_FORMAT, "a"),
        (tarfile.USTAR_FORMAT, "dir.with.dots/a"),
        (tarfile.USTAR_FORMAT, "f" * 90 + "/" + "n" * 90),
        (tarfile.GNU_FORMAT, LONG),
        (tarfile.PAX_FORMAT, LONG),
        (tarfile.PAX_FORMAT, "naïve/ключ"),
    ],
)
def test_names_of_every_tar_dialect_are_read(tmp_path, tar_format, key):
    members = [(f"{key}.npy", b"x" * 700), (f"{key}.CLS", b"7"), ("z.seg.png", b"")]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    assert contents(path) == {key: {"npy": b"x" * 700, "cls": b"7"}, "z": {"seg.png": b""}}


def test_folders_links_and_hidden_files_are_not_samples(tmp_path):
    path = tmp_path / "a.tar"
    (tmp_path / "folder.d").mkdir()
    (tmp_path / "link.npy").symlink_to("/etc/passwd")
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "folder.d", "folder.d")
        tar.add(tmp_path / "link.npy", "link.npy")
    write_tar(tmp_path / "b.tar", [(".hidden", b"1"), ("README", b"2"), ("__meta__/a.json", b"3")])
    assert scan_tar(path) == scan_tar(tmp_path / "b.tar") == {}


def test_samples_keep_the_order_of_the_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.cls", b"%d" % i) for i in (3, 1, 2)])
    assert list(scan_tar(path)) == ["3", "1", "2"]


@pytest.mark.parametrize(
    "names, reason",
    [
        (["a.npy", "b.npy", "a.cls", "b.cls"], "'a' are not adjacent, at byte 2048"),
        (["a.npy", "a.npy"], "'a.npy' is there twice, at byte 1024"),
    ],
)
def test_ambiguous_samples_are_refused(tmp_path, names, reason):
    path = write_tar(tmp_path / "a.tar", [(name, b"data") for name in names])
    with pytest.raises(ShardError, match=reason):
        scan_tar(path)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_every_truncation_is_refused(tmp_path, tar_format):
    path = write_tar(tmp_path / "a.tar", [("é.npy", b"x" * 700), ("é.cls", b"1")], tar_format)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 1024  # last data block and one empty block
    for size in [*range(0, end, 97), *range(0, end, 512), end - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ShardError):
            scan_tar(path)


def test_a_damaged_header_is_named_by_its_offset(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.npy", b"x"), ("b.npy", b"x"), ("c.npy", b"x")])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a.npy"]  # why the scan looks at what tarfile leaves
    with pytest.raises(ShardError, match=r"a\.tar: neither a sound header .*, at byte 1024"):
        scan_tar(path)


@pytest.mark.parametrize("blocks", [1, 2])  # two, as at the end
def test_zeros_in_mid_archive_are_not_its_end(tmp_path, blocks):
    path = write_tar(tmp_path / "a.tar", [("a.npy", b"x"), ("b.npy", b"x"), ("c.npy", b"x")])
    data = bytearray(path.read_bytes())
    data[1024 : 1024 + 512 * blocks] = bytes(512 * blocks)
    path.write_bytes(data)
    with pytest.raises(ShardError, match="at byte 1024"):
        scan_tar(path)


def seal(data, at):
    """Give the header at a byte its checksum."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def test_malformed_pax_records_are_damage(tmp_path):
    """tarfile of Python 3.11.7 reads such members under the first 100 bytes of their names."""
    path = write_tar(tmp_path / "a.tar", [(f"{LONG}.npy", b"x")], tarfile.PAX_FORMAT)
    data = bytearray(path.read_bytes())
    data[data.index(b"path=") - 1] = ord("x")
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"pax|invalid"):
        scan_tar(path)


@pytest.mark.parametrize("name", ["a.npy", ".hidden"])
@pytest.mark.parametrize("size", ["-1024", "-512", "9999999999"])
def test_a_pax_size_that_leads_backwards_or_outside_is_refused(tmp_path, name, size):
    """tarfile of Python 3.11.7 would follow it for ever (CVE-2025-8194)."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.pax_headers = {"size": size}
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("b.npy"))
    with pytest.raises(ShardError, match=r"a\.tar: a member of -?\d+ bytes passes the end"):
        scan_tar(tmp_path / "a.tar")


def test_old_gnu_headers_have_no_prefix(tmp_path):
    """GNU tar --incremental keeps the time of access where ustar has the prefix of a name."""
    path = write_tar(tmp_path / "a.tar", [("a.npy", b"x")], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[345:357] = b"14720362211\0"
    seal(data, 0)
    path.write_bytes(data)
    assert list(scan_tar(path)) == ["a"]


@pytest.mark.parametrize("kind", [b"S", b"X", b"V"])
def test_sparse_files_and_unknown_kinds_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", [("a.npy", b"x")], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[156:157] = kind
    seal(data, 0)
    path.write_bytes(data)
    with pytest.raises(ShardError, match="unsupported member type"):
        scan_tar(path)


@pytest.mark.parametrize(
    "junk",
    [b"", b"<html>404</html>" * 100, bytes(700), random.Random(0).randbytes(5000)],
    ids=["empty", "html", "zeros", "noise"],
)
def test_what_is_no_tar_is_refused(tmp_path, junk):
    path = tmp_path / "a.tar"
    path.write_bytes(junk)
    with pytest.raises(ShardError, match=r"a\.tar"):
        scan_tar(path)
