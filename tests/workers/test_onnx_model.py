"""Every model that cannot be served is refused with one line that says what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import ADD, BAD_MODELS, MODELS, OPEN_ITEM, parse, save, save_without_its_weights
from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import EngineSettings, ModelSource, ShapeRange
from trtpool.workers.onnx_engine import OnnxEngine


def refusal(path: Path, **shapes: ShapeRange) -> str:
    """The text with which the model is refused."""
    with pytest.raises(ModelError) as caught:
        OnnxEngine(ModelSource(str(path), "m"), EngineSettings(shapes=shapes))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("what", BAD_MODELS)
def test_bad_model(tmp_path, what):
    model, text = BAD_MODELS[what]
    assert text in refusal(save(model, tmp_path, "bad"))


def missing(folder: Path) -> Path:
    return folder / "none.onnx"


def directory(folder: Path) -> Path:
    return folder


def below_a_file(folder: Path) -> Path:
    return save(ADD, folder) / "model.onnx"


def empty(folder: Path) -> Path:
    (folder / "model.onnx").touch()
    return folder / "model.onnx"


def not_a_model(folder: Path) -> Path:
    (folder / "model.onnx").write_text("#!/bin/sh\necho this is no model\n")
    return folder / "model.onnx"


def cut_short(folder: Path) -> Path:
    path = save(MODELS["mlp"].model, folder)
    os.truncate(path, path.stat().st_size // 2)
    return path


def of_the_future(folder: Path) -> Path:
    model = parse(ADD)
    model.ir_version = 99
    return save(model, folder)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (missing, "No such file or directory; check path and permissions"),
        (directory, "is not a file; name the .onnx file itself"),
        (below_a_file, "Not a directory; check path"),
        (empty, "is empty; export or copy the model again"),
        (not_a_model, "the file is damaged or no ONNX model: copy it again, or export the model to ONNX"),
        (cut_short, "the file is damaged or no ONNX model"),
        (of_the_future, "Unsupported model IR version: 99"),
        (save_without_its_weights, "put the files that hold the model's weights beside it"),
    ],
)
def test_bad_file(tmp_path, make: Callable[[Path], Path], text):
    path = make(tmp_path)
    shown = refusal(path)
    assert text in shown
    assert str(path) in shown


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read(tmp_path):
    path = save(ADD, tmp_path)
    path.chmod(0)
    assert "Permission denied; check path and permissions" in refusal(path)


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (3, 4, 5, 6), ()])
def test_a_shape_that_does_not_fit_is_refused(tmp_path, shape):
    assert "has shape (N, 3, H, W): --shape x=" in refusal(save(OPEN_ITEM, tmp_path), x=shape)


def test_a_shape_for_an_input_that_is_not_there_names_those_that_are(tmp_path):
    text = refusal(save(ADD, tmp_path), c=(3,))
    assert text == "--shape names c, but the inputs of model.onnx are: a, b"


def test_a_shape_that_says_what_the_model_says_is_fine(tmp_path):
    engine = OnnxEngine(ModelSource(str(save(ADD, tmp_path)), "m"), EngineSettings(shapes={"a": (3,)}))
    assert engine.spec.inputs[0].shape == (3,)


@pytest.mark.parametrize("name", MODELS)
def test_batch_limit(tmp_path, name):
    good = MODELS[name]
    path = save(good.model, tmp_path)
    spec = OnnxEngine(ModelSource(str(path), name), EngineSettings(shapes=dict(good.shapes), **good.settings)).spec
    assert spec.batch_limit == good.batch_limit


def test_more_tensors_than_a_pool_can_describe(tmp_path):
    inputs = ", ".join(f"float[N] x{index}" for index in range(65))
    names = ", ".join(f"x{index}" for index in range(65))
    text = refusal(save(f"wide ({inputs}) => (float[N] y) {{ y = Sum({names}) }}", tmp_path))
    assert "model.onnx is beyond what a pool can describe" in text
