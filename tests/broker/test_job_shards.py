"""Tar shards as inputs of `trtpool run`, without processes: what is in them, what of it is read, and how much."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from trtpool.broker.jobs import images, members, reading, shards, sources, wire
from trtpool.broker.jobs.functions import BuiltInDecoder
from trtpool.ipc.errors import ConfigError, InvalidInput
from trtpool.ipc.tensors import ModelSpec, TensorSpec

Members = Sequence[tuple[str, bytes]]


def write(path: Path, content: Members, mode: str = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as tar:  # type: ignore[call-overload]  # the mode is of several kinds
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def find(*paths: object, columns: Sequence[str] = (), any_file: bool = False) -> sources.Inputs:
    return sources.find([str(path) for path in paths], lambda: b"", any_file=any_file, columns=columns)


def rows(inputs: sources.Inputs, *wanted: tuple[str, str], any_type: bool = False, most: int = 3) -> list[Any]:
    """Key and value of each row, or what is wrong with it, of the model input x."""
    names = sorted({name for name, _ in wanted if name} or {"x"})
    reader = reading.Reader(inputs.kind, sources.choose(inputs, wanted, names, any_type=any_type))
    found = []
    for chunk in inputs.chunks(most):
        sent = msgspec.json.decode(msgspec.json.encode(chunk), type=wire.Chunk)
        for item, value in reader.rows(sent):
            try:
                found.append((item.key, value()))
            except (InvalidInput, OSError, EOFError) as error:
                found.append((item.key, error))
    reader._open[1].close() if reader._open else None
    return found


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


PAIRS = [(f"{number:03}.{suffix}", f"{suffix}{number}".encode()) for number in range(7) for suffix in ("jpg", "json")]
IMAGES = [(f"{number:03}.jpg", f"jpg{number}".encode()) for number in range(7)]


# --- What is in them ---


@pytest.mark.parametrize(
    ("suffix", "mode", "form"),
    [
        ("tar", "w", tarfile.USTAR_FORMAT),
        ("tar", "w", tarfile.GNU_FORMAT),
        ("TAR", "w", tarfile.PAX_FORMAT),
        ("tar.gz", "w:gz", tarfile.GNU_FORMAT),
        ("tgz", "w:gz", tarfile.PAX_FORMAT),
    ],
)
def test_the_image_of_each_sample_is_a_row_in_every_format(tmp_path: Path, suffix: str, mode: str, form: int) -> None:
    deep = "deep/" * 15 + "x" * 60 + ".png"  # too long for one field of a header
    for name in ("a", "b"):
        write(tmp_path / f"{name}.{suffix}", [*PAIRS, (deep, b"png")], mode, format=form)
    inputs = find(tmp_path)
    assert (inputs.kind, inputs.rows) == ("tar", 16)
    wanted = [*IMAGES, (deep, b"png")]
    assert rows(inputs) == [(f"{tmp_path}/{a}.{suffix}#{name}", data) for a in ("a", "b") for name, data in wanted]


def test_names_are_split_as_webdataset_splits_them() -> None:
    for name, parts in {
        "000.jpg": ("000", "jpg"),
        "a.b/c/000.seg.png": ("a.b/c/000", "seg.png"),
        "./000.jpg": ("./000", "jpg"),
        ".hidden.jpg": None,
        "a/._000.jpg": None,
        "LICENSE": None,
        "__info__/a.jpg": None,
    }.items():
        assert shards.split_name(name) == parts, name


def test_what_is_no_file_and_what_is_no_input_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("readme.md", b"read"), *PAIRS, ("__meta__", b""), ("x/.hidden.jpg", b"")])
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.jpg")
            info.type, info.linkname = kind, "000.jpg"
            tar.addfile(info)
    assert rows(find(path)) == [(f"{path}#{name}", data) for name, data in IMAGES]


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("1.jpg", b"j1"), ("2.jpg", b"j2"), ("1.cls", b"c1"), ("2.cls", b"c2")])
    both = find(path, columns=["jpg", "cls"])
    assert [value for _, value in rows(both, ("a", "jpg"), ("b", "cls"))] == [
        {"a": b"j1", "b": b"c1"},
        {"a": b"j2", "b": b"c2"},
    ]


def test_a_name_that_is_no_text_is_written_in_ascii(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("\udcffa\n.jpg", b"1"), ("b.jpg\udcfe.png", b"2")])
    assert rows(find(path)) == [(rf"{path}#\udcffa\n.jpg", b"1"), (rf"{path}#b.jpg\udcfe.png", b"2")]


# --- Which member is the input ---


def test_suffixes_name_the_input_in_any_case_and_several_are_alternatives(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("1.JPG", b"j1"), ("1.seg.png", b"s1"), ("2.png", b"p2"), ("2.seg.png", b"s2")])
    for column, wanted in {
        "seg.png": [("1.seg.png", b"s1"), ("2.seg.png", b"s2")],
        ".jpg;png": [("1.JPG", b"j1"), ("2.png", b"p2")],
    }.items():
        assert rows(find(path, columns=[column]), ("", column)) == [(f"{path}#{name}", data) for name, data in wanted]


def test_a_sample_without_the_member_is_a_row_with_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("1.jpg", b"j1"), ("2.txt", b"t2"), ("3.jpg", b"j3")])
    first, second, third = rows(find(path, columns=["jpg"]), ("", "jpg"))
    assert (first, third) == ((f"{path}#1.jpg", b"j1"), (f"{path}#3.jpg", b"j3"))
    assert second[0] == f"{path}#2"
    assert str(second[1]) == "the sample has no member .jpg"


def test_a_member_that_is_called_like_the_input_is_taken(tmp_path: Path) -> None:
    content = [(f"{n}.{name}.npy", npy(np.full(2, n + at))) for n in (1, 2) for at, name in enumerate(("x", "y"))]
    path = write(tmp_path / "a.tar", content)
    ((key, value), _) = rows(find(path))
    assert (key, value.tolist()) == (f"{path}#1.x.npy", [1, 1])
    assert sources.choose(find(path), (), ["y", "x"], any_type=False) == {"y": "y.npy", "x": "x.npy"}


def test_a_function_gets_any_member(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("1.flac", b"f1"), ("2.flac", b"f2")])
    assert [value for _, value in rows(find(path, any_file=True), any_type=True)] == [b"f1", b"f2"]
    path = write(tmp_path / "b.tar", PAIRS)
    inputs = find(path, any_file=True)
    assert [value for _, value in rows(inputs, any_type=True)] == [data for _, data in IMAGES]
    pairs = rows(find(path, any_file=True, columns=["jpg", "json"]), ("", "jpg"), ("", "json"), any_type=True)
    assert pairs[2] == (f"{path}#002", {"jpg": b"jpg2", "json": b"json2"})


@pytest.mark.parametrize(
    ("content", "columns", "names", "says"),
    [
        (
            [("1.jpg", b""), ("1.seg.png", b"")],
            [],
            ["x"],
            r"sample 1 has several .* \.jpg, \.seg\.png; .* --column jpg",
        ),
        ([("1.jpg", b""), ("1.seg.png", b"")], [], ["a", "b"], r"--column a=SUFFIX, --column b=SUFFIX"),
        ([("1.jpg", b""), ("1.json", b"")], [("", "txt")], ["x"], r"--column txt: no sample .*, only \.jpg, \.json"),
        ([("1.jpg", b""), ("1.json", b"")], [("y", "jpg")], ["x"], r"inputs are x, but --column names y"),
        ([("1.json", b"")], [], ["x"], r"no member is an image or a \.npy file, there is only \.json; .*--decode"),
        ([], [], ["x"], r"no member is an image or a \.npy file, there is nothing with a suffix"),
    ],
)
def test_what_is_not_clear_is_said(
    tmp_path: Path, content: Members, columns: list[tuple[str, str]], names: list[str], says: str
) -> None:
    path = write(tmp_path / "a.tar", content)
    with pytest.raises(ConfigError, match=says):
        sources.choose(find(path, columns=[column for _, column in columns]), columns, names, any_type=False)


# --- Shards that are damaged ---


@pytest.mark.parametrize(("name", "data"), [("a.tar", b"x" * 5000), ("a.tgz", b"x" * 5000), ("a.tar", b"")])
def test_what_is_no_shard_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.(tar|tgz) is no tar file: .*\.tar\.gz or \.tgz"):
        find(tmp_path / name)


def test_a_compressed_shard_that_is_called_like_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", IMAGES, "w:gz")
    with pytest.raises(ConfigError, match="compressed ones must be called"):
        find(tmp_path / "a.tar")


def big(count: int = 6) -> Members:
    rng = np.random.default_rng(3)
    return [(f"{number}.jpg", rng.bytes(3000)) for number in range(count)]


def cut(data: bytes, at: int) -> bytes:
    return data[:at]


def scribbled(data: bytes, at: int) -> bytes:
    return data[:at] + b"\xff" * 300 + data[at + 300 :]


BLOCKS = 512 * 7
"""A header and 3000 bytes, in blocks."""


@pytest.mark.parametrize(
    ("damage", "at", "good", "says"),
    [
        (cut, 3 * BLOCKS, 3, "at byte 10,752 it ends without the mark"),
        (cut, 3 * BLOCKS + 100, 3, "without the mark|there is no header"),
        (cut, 3 * BLOCKS + 600, 3, "unexpected end of data"),
        (scribbled, 3 * BLOCKS, 3, "at byte 10,752 there is no header"),
    ],
)
def test_a_damaged_shard_is_read_up_to_there_and_a_row_says_so(
    tmp_path: Path, damage: Callable[[bytes, int], bytes], at: int, good: int, says: str
) -> None:
    path = write(tmp_path / "a.tar", big())
    path.write_bytes(damage(path.read_bytes(), at))
    write(tmp_path / "b.tar", IMAGES[:1])
    found = rows(find(tmp_path))
    assert found[:good] == [(f"{path}#{name}", data) for name, data in big()[:good]]
    *torn, (key, error), after = found[good:]
    assert key == str(path)
    assert isinstance(error, InvalidInput)
    assert re.search(says, str(error))
    assert after == (f"{tmp_path}/b.tar#000.jpg", b"jpg0")
    for key, error in torn:  # its header was whole, and its data is not
        assert key == f"{path}#{good}.jpg"
        assert str(error) == "the shard is cut off within this member; write it anew"


@pytest.mark.parametrize("part", [0.5, 0.98])
def test_a_compressed_shard_that_is_cut_off_is_read_up_to_there(tmp_path: Path, part: float) -> None:
    path = write(tmp_path / "a.tgz", big(60), "w:gz")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    *found, (key, last) = rows(find(path))
    good = [row for row in found if isinstance(row[1], bytes)]
    assert good == [(f"{path}#{name}", data) for name, data in big(60)[: len(good)]]
    assert 20 < len(good) < 60
    assert len(found) - len(good) <= 1
    assert (key, "the shard is damaged" in str(last)) == (str(path), True)


def test_a_checksum_that_is_wrong_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tgz", IMAGES, "w:gz")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    *found, (key, error) = rows(find(path))
    assert [value for _, value in found] == [data for _, data in IMAGES]
    assert (key, "CRC check failed" in str(error)) == (str(path), True)


def test_a_header_that_claims_terabytes_allocates_nothing(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 1 << 44
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    (_, torn), (_, damage) = rows(find(tmp_path / "a.tar"))
    assert "cut off within this member" in str(torn)
    assert "the shard is damaged" in str(damage)


def test_a_name_that_comes_twice_is_an_error_of_its_row_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("1.jpg", b"old"), ("2.jpg", b"j2"), ("1.jpg", b"new")])
    (_, first), second = rows(find(path))
    assert "has 1.jpg twice" in str(first)
    assert second == (f"{path}#2.jpg", b"j2")


def test_a_sparse_member_is_an_error_of_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    sparse = tarfile.TarInfo("0.jpg")
    sparse.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + write(tmp_path / "b.tar", IMAGES[1:]).read_bytes())
    (_, first), second, *_ = rows(find(path))
    assert "stored as a sparse file" in str(first)
    assert second == (f"{path}#001.jpg", b"jpg1")


# --- Reading ---


def bytes_read() -> int:
    """What this process has asked the kernel to read."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_only_headers_are_read_to_list_a_shard_and_only_members_to_read_them(tmp_path: Path) -> None:
    path, size = tmp_path / "a.tar", 1 << 30
    with path.open("wb") as file:  # 20 GiB of which the disk holds only the headers
        for number in range(20):
            for suffix, length in (("jpg", 3000), ("bin", size)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = length
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                file.seek(-(-length // 512) * 512, os.SEEK_CUR)
        file.write(bytes(1024))
    before = bytes_read()
    inputs = find(path)
    listing = bytes_read() - before
    assert listing < 20 * 2 * 1024 + 20_000, "more than the headers"  # and what else the interpreter reads
    before = bytes_read()
    values = [value for _, value in rows(inputs)]
    assert values == [bytes(3000)] * 20
    assert bytes_read() - before < 20 * 3000 + 20_000, "more than the members"


def test_a_compressed_shard_is_read_once_by_whoever_has_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tar.gz", big(60), "w:gz")
    inputs = find(path)
    rewinds: list[None] = []
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda _: rewinds.append(None))
    assert [value for _, value in rows(inputs)] == [data for _, data in big(60)]
    assert not rewinds


def test_no_shard_stays_open_when_the_next_is_read(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.tar", IMAGES)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # of names alone
    assert len(rows(find(tmp_path))) == 21
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.ones((3, 2))), np.float64(3), np.zeros((0, 4))],
)
def test_arrays_are_read_in_place(array: Any) -> None:
    data = npy(array)
    value = members.member_value("x.NPY", data)
    assert np.array_equal(value, array)
    assert (value.shape, value.dtype) == (array.shape, array.dtype)
    assert not value.size or np.shares_memory(value, np.frombuffer(data, np.uint8)), "it is copied"


@pytest.mark.parametrize(
    "data", [b"", b"nothing", npy(np.zeros(9))[:-1], npy(np.zeros(9))[:40], npy(np.array([{}], object))]
)
def test_what_is_no_array_is_an_error_of_its_row(data: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"no \.npy file"):
        members.member_value("npy", data)


def test_pillow_reads_a_member_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(7).integers(0, 256, (24, 32, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    path = write(tmp_path / "a.tar", [("1.png", encoded.getvalue())])
    opened: list[Mapping[str, Any]] = []
    real = io.BytesIO

    def noting(data: Any) -> io.BytesIO:
        opened.append({"type": type(data)})
        return real(data)

    monkeypatch.setattr(images.io, "BytesIO", noting)  # type: ignore[attr-defined]
    spec = TensorSpec("x", "uint8", (24, 32, 3))
    options = images.complete(images.ImageOptions(), spec, (spec,))
    slot = np.zeros(spec.shape, np.uint8)
    ((_, value),) = rows(find(path))
    BuiltInDecoder(ModelSpec("m", "/m", (spec,), (spec,)), options)(reading.Item(0, "", value), {"x": slot})
    assert np.array_equal(slot, picture)
    assert opened == [{"type": bytes}], "BytesIO shares bytes, and copies all else"


def test_images_are_told_from_arrays_by_name(tmp_path: Path) -> None:
    for name, content in (("a", PAIRS), ("b", [("1.npy", npy(np.zeros(3)))])):
        inputs = find(write(tmp_path / f"{name}.tar", content))
        columns = sources.choose(inputs, (), ["x"], any_type=False)
        assert sources.holds_images(inputs, columns) is (name == "a")


def test_a_shard_that_changed_is_noticed(tmp_path: Path) -> None:
    inputs = find(write(tmp_path / "a.tar", IMAGES))
    sources.check_unchanged(inputs)
    write(tmp_path / "a.tar", IMAGES[:2])
    with pytest.raises(ConfigError, match="changed since the job began"):
        sources.check_unchanged(inputs)
