"""What each of two models gets of an item, and where items come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trtpool.broker.check.data import Data
from trtpool.broker.check.feeds import Feeder, Raw, Side, check_alike
from trtpool.broker.jobs.images import ImageOptions
from trtpool.ipc.errors import ConfigError
from trtpool.ipc.normalization import Normalization
from trtpool.ipc.tensors import ModelSpec, TensorSpec

HALF = Normalization(mean=(0.5,), std=(0.5,))


def side(dtype: str, *, inside: bool = False, shape: tuple[int, ...] = (3, 2, 2), shared: bool = False) -> Side:
    inputs = [TensorSpec("x", dtype, shape)]
    if shared:
        inputs.append(TensorSpec("k", "float32", (), shared=True))
    spec = ModelSpec("model", "model.onnx", tuple(inputs), (TensorSpec("y", "float32", (2,)),))
    return Side(spec, {"x": HALF} if inside else {})


def feeder(ours: Side, theirs: Side, **normalize: Normalization) -> Feeder:
    return Feeder(ours, theirs, normalize, ImageOptions())


def fed(ours: Side, theirs: Side, raw: Raw, **normalize: Normalization) -> list[Any]:
    return [arrays["x"] for arrays in feeder(ours, theirs, **normalize).feed([{"x": raw}])]


PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 2, 2) * 20


@pytest.mark.parametrize("image", [False, True])
def test_a_model_that_normalises_inside_gets_pixels_and_the_other_what_is_inside(image):
    ours, theirs = fed(side("uint8", inside=True), side("float32"), Raw(PIXELS, image))
    np.testing.assert_array_equal(ours[0], PIXELS)
    assert (ours.dtype, theirs.dtype) == (np.uint8, np.float32)
    np.testing.assert_allclose(theirs[0], PIXELS / 127.5 - 1, atol=1e-6)


def test_one_that_normalises_inside_and_takes_floats_gets_pixels_as_floats():
    ours, theirs = fed(side("float16", inside=True), side("float32"), Raw(PIXELS, image=False))
    np.testing.assert_array_equal(ours[0], PIXELS.astype(np.float16))
    np.testing.assert_allclose(theirs[0], PIXELS / 127.5 - 1, atol=1e-6)


def test_images_for_floats_are_divided_and_arrays_are_not():
    for array, image in zip(fed(side("float16"), side("float32"), Raw(PIXELS, image=True)), (2e-4, 1e-7), strict=True):
        np.testing.assert_allclose(array[0], PIXELS / 255, atol=image)
    for array in fed(side("float32"), side("float32"), Raw(PIXELS, image=False)):
        np.testing.assert_array_equal(array[0], PIXELS)


def test_an_input_of_bytes_without_normalisation_has_the_same_numbers_as_floats():
    ours, theirs = fed(side("uint8"), side("float32"), Raw(PIXELS, image=True))
    np.testing.assert_array_equal(ours, theirs)


def test_normalisation_that_is_given_is_for_floats_that_do_not_do_it():
    for array in fed(side("float32"), side("float32"), Raw(PIXELS, image=False), x=HALF):
        np.testing.assert_allclose(array[0], PIXELS / 127.5 - 1, atol=1e-6)
    ours, theirs = fed(side("uint8"), side("float32"), Raw(PIXELS, image=False), x=HALF)
    np.testing.assert_array_equal(ours[0], PIXELS)
    np.testing.assert_allclose(theirs[0], PIXELS / 127.5 - 1, atol=1e-6)


def test_numbers_that_an_input_cannot_hold():
    with pytest.raises(ConfigError, match=r"input 'x' takes uint8, and --data has other numbers, from 0 to 0\.5"):
        fed(side("uint8"), side("float32"), Raw(np.linspace(0, 0.5, 12).reshape(3, 2, 2), image=False))
    with pytest.raises(ConfigError, match="--normalize names 'z', and the inputs are x"):
        feeder(side("uint8"), side("float32"), z=HALF)


@pytest.mark.parametrize(
    ("ours", "theirs", "least", "most", "whole"),
    [
        (side("uint8"), side("float32"), 0, 255, True),
        (side("float32"), side("float32", inside=True), 0, 255, True),
        (side("int8"), side("float32"), -128, 127, True),
        (side("int64"), side("int64"), 0, 1, True),
        (side("float16"), side("float32"), -6, 6, False),
    ],
)
def test_random_items_are_what_models_take(ours, theirs, least, most, whole):
    rows = [row["x"].array for _, row in Data((), 300, 7, feeder(ours, theirs)).rows()]
    array = np.stack(rows).astype(np.float64)
    assert array.shape == (300, 3, 2, 2)
    assert least <= array.min() < array.max() <= most
    assert array.max() - array.min() > (most - least) * 0.5
    assert np.array_equal(array, np.round(array)) == whole
    again = [row["x"].array for _, row in Data((), 300, 7, feeder(ours, theirs)).rows()]
    np.testing.assert_array_equal(again, rows)


def test_images_and_arrays_are_read_as_jobs_read_them(tmp_path: Path):
    Image.new("RGB", (2, 2), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("L", (40, 40), 7).save(tmp_path / "b.png")
    feeds = feeder(side("uint8"), side("float32"))
    rows = list(Data((str(tmp_path),), None, 0, feeds).rows())
    assert [key for key, _ in rows] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    np.testing.assert_array_equal(rows[0][1]["x"].array, np.repeat((10, 20, 30), 4).reshape(3, 2, 2))
    assert (rows[1][1]["x"].array == 7).all()
    np.save(tmp_path / "rows.npy", np.stack([PIXELS, PIXELS + 1]))
    rows = list(Data((str(tmp_path / "rows.npy"),), 1, 0, feeds).rows())
    (row,) = rows
    np.testing.assert_array_equal(row[1]["x"].array, PIXELS)


def test_a_folder_with_an_array_for_each_input(tmp_path: Path):
    feeds = feeder(side("float32", shared=True), side("float32", shared=True))
    np.save(tmp_path / "x.npy", np.stack([PIXELS, PIXELS + 1]))
    np.save(tmp_path / "k.npy", np.float32(4))
    rows = [row for _, row in Data((str(tmp_path),), None, 0, feeds).rows()]
    assert len(rows) == 2
    (ours, _) = feeds.feed(rows)
    np.testing.assert_array_equal(ours["k"], np.float32(4), strict=True)
    np.testing.assert_array_equal(ours["x"], np.stack([PIXELS, PIXELS + 1]))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: (folder / "x.png").write_text("no image"), "x.png cannot be used: UnidentifiedImageError"),
        (lambda folder: np.save(folder / "x.npy", np.zeros((2, 5))), r"takes shape \(3, 2, 2\), and this has \(5,\)"),
        (
            lambda folder: (folder / "x.txt").touch(),
            "--data .*: no images, Parquet, .npy or Arrow files or tar shards are there",
        ),
    ],
)
def test_data_that_cannot_be_used_is_named(make, text, tmp_path):
    make(tmp_path)
    with pytest.raises(ConfigError, match=text):
        list(Data((str(tmp_path),), None, 0, feeder(side("uint8"), side("float32"))).rows())


def test_models_that_cannot_be_compared():
    check_alike(side("uint8").spec, side("float32").spec)
    with pytest.raises(
        ConfigError, match=r"one has the inputs x uint8 \(N, 3, 2, 2\), the other x float32 \(N, 3, 4, 4\)"
    ):
        check_alike(side("uint8").spec, side("float32", shape=(3, 4, 4)).spec)
