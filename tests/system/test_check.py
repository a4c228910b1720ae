"""`trtpool check` on real models, each in a pool of real processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.models import MODELS, NO_BATCH, SHARED, parse, save
from tests.system.rig import CLI
from trtpool.ipc import errors

DIFFERENT = 23
IMAGES = "g (float[N,3,8,8] x) => (float[N,6] y, int64[N,1] k) { s = GlobalAveragePool(x) f = Flatten(s) n = Neg(f) "


def run(*words: object, code: int = 0) -> str:
    """Run ``trtpool WORDS``; returns standard output, or standard error if it is to fail."""
    ended = subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, env=os.environ, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout if code in (0, DIFFERENT) else ended.stderr


def checked(*words: object, code: int = 0) -> Any:
    report = json.loads(run("check", *words, "--json", code=code))
    assert report["ok"] == (code == 0)
    return report


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """Six scores and their best, from the means of three colours."""
    return save(f"{IMAGES} y = Concat<axis=1>(f, n) k = ArgMax<axis=1>(y) }}", tmp_path, "classifier")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(2)
    for number in range(5):
        pixels = random.integers(0, 256, (20 + number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_pixels_normalised_inside_answer_as_floats_normalised_before(classifier, photos, tmp_path):
    changed = tmp_path / "pixels.onnx"
    run("build", classifier, "-o", changed, "--normalize=imagenet")
    report = checked(changed, "--against", classifier, "--data", photos)
    assert (report["items"], list(report["normalized"])) == (5, ["x"])
    y, k = report["outputs"]
    assert (y["name"], y["max_error"], y["top1"], y["equal"]) == ("y", 0, 1, None)
    assert (k["name"], k["max_error"], k["top1"], k["equal"]) == ("k", None, None, 1)


def test_float16_costs_a_little_and_a_limit_says_how_much_it_may(classifier, photos, tmp_path):
    changed = tmp_path / "half.onnx"
    run("build", classifier, "-o", changed, "--fp16", "--io=fp16")
    said = run("check", changed, "--against", classifier, "--data", photos)
    assert said.splitlines()[-1] == "verdict: good, within the limits"
    words = (changed, "--against", classifier, "--data", photos, "--max-error=1e-6", "--mean-error=1e-7")
    report = checked(*words, code=DIFFERENT)
    y = report["outputs"][0]
    assert (y["dtype"], y["reference_dtype"]) == ("float16", "float32")
    assert 0 < y["mean_error"] < y["max_error"] < 0.005
    assert [problem.split(" error ")[0] for problem in report["problems"]] == ["y: the largest", "y: the mean"]
    assert report["outputs"][0]["worst"].endswith(".png")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_wrong_normalisation_is_found(recorded, classifier, photos, tmp_path):
    """What is told goes before what the record beside the model says was built in."""
    changed = tmp_path / "pixels.onnx"
    run("build", classifier, "-o", changed, "--normalize=imagenet")
    if not recorded:
        (tmp_path / "pixels.onnx.json").unlink()
    words = (changed, "--against", classifier, "--data", photos)
    assert checked(*words, "--normalize=x=symmetric", code=DIFFERENT)["outputs"][0]["max_error"] > 0.05
    assert checked(*words, "--normalize=imagenet")["outputs"][0]["max_error"] == 0


def test_other_weights_are_found_with_random_items(tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(parse(MODELS["mlp"].model))
    reference = save(model, tmp_path, "reference")
    (weights,) = [tensor for tensor in model.graph.initializer if tensor.name == "w"]
    numbers = onnx.numpy_helper.to_array(weights) * np.float32(1.5)
    weights.CopyFrom(onnx.numpy_helper.from_array(numbers, "w"))
    other = save(model, tmp_path, "other")
    said = run("check", other, "--against", reference, "--items=40", "--seed=3", code=DIFFERENT)
    assert said.startswith("40 items: random numbers (seed 3), which say little about a trained model: give --data")
    assert "too far: y: the mean error 0." in said
    assert said.splitlines()[-1] == "verdict: not good"


@pytest.mark.parametrize(("model", "words"), [(SHARED, []), (NO_BATCH, ["--no-batch"])], ids=["shared", "no batch"])
def test_models_of_other_kinds(model, words, tmp_path):
    path = save(model, tmp_path)
    assert checked(path, "--against", path, *words)["items"] == 32


def test_what_cannot_be_checked_is_one_line(tmp_path):
    mlp = save(MODELS["mlp"].model, tmp_path, "mlp")
    for words, error, text in (
        ((mlp, "--against", tmp_path / "no.onnx"), errors.ModelError, "there is no file"),
        ((mlp, "--against", mlp, "--data", tmp_path / "no"), errors.ConfigError, "--data "),
        ((mlp, "--against", mlp, "--scores=z"), errors.ConfigError, "--scores z: the models' outputs are y"),
    ):
        (line,) = run("check", *words, code=error.exit_code).splitlines()
        assert line.startswith("trtpool: ")
        assert text in line
