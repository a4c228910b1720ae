"""The demo: what happens to a page before and after the model, and that a wrong answer is noticed."""
# ruff: noqa: E402 - imported once it is known that all optional packages are there

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from trtpool.ipc.errors import MissingExtra, PoolError, StartFailed

for needed in ("PIL", "scipy", "onnx", "onnxruntime"):
    pytest.importorskip(needed)

import onnx
import onnxruntime
from PIL import Image, ImageDraw
from rich.console import Console
from scripts import demo, demo_pages

HEIGHT, WIDTH = demo_pages.HEIGHT, demo_pages.WIDTH


@pytest.fixture
def installed() -> None:
    """Skip where the model or the scans are not installed."""
    try:
        demo_pages.model_file()
        demo_pages.packaged_file("skimage", "data/page.png")
    except MissingExtra as error:
        pytest.skip(str(error))


def noise(width: int, height: int) -> Image.Image:
    """Return a colour picture in which no two channels are alike."""
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


# Before the model


@pytest.mark.parametrize("size", [(640, 320), (300, 320), (640, 90)], ids=["exact", "narrow", "flat"])
def test_input_is_the_papers_formula_in_blue_green_red(size: tuple[int, int]) -> None:
    page = noise(*size)  # no larger than the input in any direction and as large in one, so not scaled
    out = np.full((3, HEIGHT, WIDTH), np.nan, np.float32)
    demo_pages.write_input(page, out)
    expected = np.zeros((3, HEIGHT, WIDTH))
    pixels = np.asarray(page)[:, :, ::-1] / 255.0
    normal = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected[:, : size[1], : size[0]] = normal.transpose(2, 0, 1)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_page_of_any_size_fits(width: int, height: int) -> None:
    scale, rows, columns = demo_pages.fit((width, height), HEIGHT, WIDTH)
    assert 1 <= rows <= HEIGHT
    assert 1 <= columns <= WIDTH
    assert rows == HEIGHT or columns == WIDTH
    assert abs(rows - height * scale) <= 1
    assert abs(columns - width * scale) <= 1


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
def test_every_element_of_a_used_slot_is_written(size: tuple[int, int]) -> None:
    out = np.full((3, HEIGHT, WIDTH), np.nan, np.float32)
    demo_pages.write_input(noise(*size), out)
    assert np.isfinite(out).all()


@pytest.mark.usefixtures("installed")
def test_pages_differ_from_each_other_and_not_from_run_to_run(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    pages = [path.read_bytes() for path in demo_pages.write_pages(first, 24)]
    assert len(set(pages)) == 24
    assert pages == [path.read_bytes() for path in demo_pages.write_pages(second, 24)]


# After the model


def tilted_map(core: list[tuple[float, float]], value: float = 0.9) -> npt.NDArray[Any]:
    """Return a map with one polygon of probability `value`."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(mask).polygon(core, fill=1)
    return np.asarray(mask, np.float32) * np.float32(value)


def test_a_tilted_line_is_found_where_it_is_and_widened() -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    core = np.array([(-100, -10), (100, -10), (100, 10), (-100, 10)])
    probability = tilted_map([(x, y) for x, y in core @ turn + (300, 150)])
    (region,) = demo_pages.find_regions(probability, (WIDTH * 2, HEIGHT * 2))  # the page is twice the map
    widened = 1.6 * 202 * 22 / (2 * 224)  # the pixels drawn reach 1 beyond the core on each side
    expected = (core + np.sign(core) * (1 + widened)) @ turn + (300.5, 150.5)
    distance = np.linalg.norm(np.array(region.corners)[:, None] / 2 - expected, axis=2)
    assert distance.min(axis=0).max() < 1.5
    assert distance.min(axis=1).max() < 1.5
    assert region.score == pytest.approx(0.9)


def test_lines_come_top_first_and_touching_ones_are_one() -> None:
    probability = np.zeros((HEIGHT, WIDTH), np.float32)
    probability[200:220, 50:300] = 0.8
    probability[100:110, 400:500] = 0.7
    probability[110:120, 500:600] = 0.7  # touches the one above at a corner
    regions = demo_pages.find_regions(probability, (WIDTH, HEIGHT))
    assert [round(region.score, 2) for region in regions] == [0.7, 0.8]


@pytest.mark.parametrize(("value", "rows"), [(0.45, 20), (0.9, 2), (0.0, 20)], ids=["faint", "thin", "nothing there"])
def test_what_is_no_line_is_not_found(value: float, rows: int) -> None:
    probability = np.zeros((HEIGHT, WIDTH), np.float32)
    probability[100 : 100 + rows, 50:300] = value
    assert demo_pages.find_regions(probability, (WIDTH, HEIGHT)) == []


def test_the_margin_is_not_searched_and_no_corner_leaves_the_page() -> None:
    probability = np.full((HEIGHT, WIDTH), 0.9, np.float32)
    (region,) = demo_pages.find_regions(probability, (100, 320))  # takes columns 0 to 100
    assert {tuple(map(round, corner)) for corner in region.corners} == {
        (0, 0),
        (100, 0),
        (100, 320),
        (0, 320),
    }


@settings(deadline=None)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=24)))
def test_a_box_is_a_rectangle_round_all_its_pixels(mask: npt.NDArray[Any]) -> None:
    mask[np.arange(len(mask)), np.arange(len(mask)) % mask.shape[1]] = True  # one in each row, as promised
    box = demo_pages.widened_box(mask)
    if box is None:
        assert min(mask.sum(axis=0).max(), mask.sum(axis=1).max()) < 4
        return
    sides = np.roll(box, -1, axis=0) - box
    np.testing.assert_allclose(sides[:2] + sides[2:], 0, atol=1e-9)
    assert sides[0] @ sides[1] == pytest.approx(0, abs=1e-6)
    ys, xs = np.nonzero(mask)
    centres = np.stack([xs, ys], axis=1) + 0.5
    for start, side in zip(box, sides, strict=True):
        away = centres - start
        assert (side[0] * away[:, 1] - side[1] * away[:, 0] > 0).all()


# A wrong answer is noticed


@pytest.fixture
def grey_model(tmp_path: Path) -> Path:
    """Return a model with the detector's tensors, whose map is the mean of the channels."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, HEIGHT, WIDTH])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 1, HEIGHT, WIDTH])
    mean = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=1)
    graph = onnx.helper.make_graph([mean], "grey", [x], [y])
    path = tmp_path / "grey.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_the_last_bit_of_one_pixel_is_compared(tmp_path: Path, grey_model: Path) -> None:
    paths, maps = [], []
    session = onnxruntime.InferenceSession(grey_model, providers=["CPUExecutionProvider"])
    for width in (200, 300, 400):
        paths.append(tmp_path / f"{width}.png")
        noise(width, 200).save(paths[-1])
        x = np.empty((1, 3, HEIGHT, WIDTH), np.float32)
        demo_pages.write_input(noise(width, 200), x[0])
        maps.append(session.run(None, {"x": x})[0][0, 0])
    answers = np.stack(maps)
    assert demo.compare(grey_model, paths, answers).differing == []
    answers[1, 7, 9] = np.nextafter(answers[1, 7, 9], np.float32(np.inf))
    compared = demo.compare(grey_model, paths, answers)
    assert compared.differing == ["300.png"]
    assert compared.worst > 0


# The pool it starts


def pool_like(ending: str) -> list[str]:
    """Return a command that does what `trtpool start` does as far as the demo sees."""
    script = f"import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: {ending})\n"
    script += "print('loading', flush=True)\nprint('ready x', flush=True)\nwhile True:\n    signal.pause()"
    return [sys.executable, "-c", script]


def test_a_pool_runs_while_the_block_does(capfd: pytest.CaptureFixture[str]) -> None:
    with demo.running(pool_like("sys.exit(0)"), Console()):
        assert "ready x" in capfd.readouterr().out


def test_a_pool_that_does_not_start_is_reported_with_its_code() -> None:
    with (
        pytest.raises(StartFailed, match="code 4"),
        demo.running([sys.executable, "-c", "raise SystemExit(4)"], Console()),
    ):
        pytest.fail("the block ran without a pool")


def test_a_pool_that_ends_badly_is_reported() -> None:
    with pytest.raises(PoolError, match="code 20"), demo.running(pool_like("sys.exit(20)"), Console()):
        pass


def test_a_pool_that_ends_badly_does_not_hide_the_first_error() -> None:
    with pytest.raises(KeyError), demo.running(pool_like("sys.exit(20)"), Console()):
        raise KeyError


# As a whole


@pytest.mark.parametrize("arguments", [["--pages", "0"], ["--out", "no/such/folder.png"], ["--out", "picture.nothing"]])
def test_a_wrong_option_is_refused_before_anything_starts(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "demo", lambda *_: pytest.fail("the demo was started"))
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)


def run_demo(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the demo as its own process, after the Python statements `before`."""
    script = f"import runpy, sys\n{before}\nrunpy.run_path({demo.__file__!r}, run_name='__main__')"
    command = [sys.executable, *(["-c", script] if before else [demo.__file__]), *arguments]
    environment = {**os.environ, "COLUMNS": "120", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.parametrize("package", ["scipy", "PIL", "rich"])
def test_a_missing_package_is_answered_with_the_command(package: str) -> None:
    done = run_demo(before=f"sys.modules[{package!r}] = None")
    assert done.returncode == MissingExtra.exit_code
    assert done.stderr == f"the demo needs the package {package}; run: scripts/demo\n"


def test_a_missing_model_is_answered_with_the_command() -> None:
    with pytest.raises(MissingExtra, match="no_such_package is not installed; run: scripts/demo"):
        demo_pages.packaged_file("no_such_package", "model.onnx")
    with pytest.raises(MissingExtra, match=r"numpy here has no model\.onnx"):
        demo_pages.packaged_file("numpy", "model.onnx")


@pytest.mark.usefixtures("installed")
def test_pages_go_through_a_real_pool_and_come_back_equal(tmp_path: Path) -> None:
    picture = tmp_path / "found.png"
    done = run_demo("--pages", "5", "--producers", "2", "--out", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EQUAL: all 5 maps" in done.stdout
    assert "5 pages in" in done.stdout
    with Image.open(picture) as found:
        red = np.asarray(found)[:HEIGHT, :WIDTH] == (220, 20, 20)  # the first tile: the page of print
        assert red.all(axis=2).any()
