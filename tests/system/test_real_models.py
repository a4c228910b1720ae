"""Trained models of other people, in real pools: each answer is onnxruntime's own, called directly.

Bit for bit, where the call is the same.  onnxruntime rounds the same item otherwise in batches of other sizes, and a
stream's batches are the broker's choice; so a stream is compared bit for bit with `max_batch=1`, and with larger
batches to the last digits.  A new pool's first work, in adjacent slots, is one batch, and compared with a direct call
on that.
"""
# ruff: noqa: E402 - imported once it is known that all optional packages are there

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import trtpool
from tests.real import require_models
from tests.system.rig import StartedPool, figures, wait_all_free
from trtpool.ipc.errors import InvalidInput, ModelError

require_models()

from PIL import Image
from scripts import demo_pages, minilm
from scripts.examples import read_text
from scripts.packaged import packaged_file

from tests.direct import Array, Direct, Item, stream


def assert_same(got: Mapping[str, Any], wanted: Item) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got[name], array)


def assert_close(got: Mapping[str, Any], wanted: Item) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-5)


def together(items: Sequence[Item]) -> dict[str, Array]:
    """Items of one shape as one array of each input."""
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


def check(
    pool: trtpool.Client,
    items: Sequence[Item],
    batch: Sequence[Item],
    direct: Direct,
) -> list[dict[str, Array]]:
    """Compare a batch, then a stream, through models "alone", with batches of one, and "batched"; see the top.

    Returns:
        The outputs of `items`, batched.
    """
    assert_same(pool.infer(together(batch), model="batched"), direct.whole(**together(batch)))
    assert {model.name: model.batches for model in pool.status().models} == {"alone": 0, "batched": 1}
    wanted = [direct.item(**item) for item in items]
    for got, one in zip(stream(pool, items, "alone"), wanted, strict=True):
        assert_same(got, one)
    answers = stream(pool, items, "batched")
    for got, one in zip(answers, wanted, strict=True):
        assert_close(got, one)
    return answers


def both(path: Path, **options: Any) -> list[trtpool.Model]:
    """A model twice, as "alone" and as "batched"."""
    return [trtpool.Model(path, name=name, max_batch=most, **options) for name, most in (("alone", 1), ("batched", 4))]


# --- PP-OCRv4 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    paths = demo_pages.write_pages(tmp_path_factory.mktemp("pages"), 3)
    return [Image.open(path).convert("RGB") for path in paths]


@pytest.fixture(scope="module")
def lines(pages: list[Image.Image]) -> list[Image.Image]:
    """Lines of text that were cut out of pages, upright."""
    detect, found = Direct(read_text.model_file("det")), []
    for page in pages:
        x = np.empty(read_text.DETECT, np.float32)
        demo_pages.write_input(page, x)
        (output,) = detect.item(x=x).values()
        found += [read_text.crop(page, region) for region in demo_pages.find_regions(output[0], page.size)]
    assert len(found) > 8
    return found


def line_input(line: Image.Image, width: int) -> dict[str, Array]:
    """A line as models of lines take it, 48 pixels high, and 0 beyond its end."""
    x = np.empty((3, 48, width), np.float32)
    read_text.write_line(read_text.Line(0, demo_pages.Region((), 1.0), line), {"x": x})
    return {"x": x}


def own_width(line: Image.Image) -> int:
    """How wide a line is when it is 48 pixels high."""
    return int(np.clip(line.width * 48 / line.height, 32, 640))


def test_detection_on_pages_of_several_sizes(pages):
    items = []
    for height, width in ((96, 160), (192, 320), (96, 160), (128, 320)):
        for page in pages:
            items.append({"x": np.empty((3, height, width), np.float32)})
            demo_pages.write_input(page, items[-1]["x"])
    models = both(read_text.model_file("det"), shapes={"x": (3, (96, 192), (160, 320))})
    with trtpool.Pool(models, slots=16, workers=2, threads=1) as pool:
        check(pool, items, items[:3], Direct(read_text.model_file("det")))


def test_recognition_of_lines_as_wide_as_they_are(lines):
    items = [line_input(line, own_width(line)) for line in lines[:8]]
    items += items[::-1]
    letters = read_text.letters_of(read_text.model_file("rec"))
    models = both(read_text.model_file("rec"), shapes={"x": (3, 48, (32, 640))})
    with trtpool.Pool(models, slots=24, threads=1) as pool:
        cut = [line_input(line, 320) for line in lines[:4]]
        answers = check(pool, items, cut, Direct(read_text.model_file("rec")))
    texts = [read_text.text_of(next(iter(got.values())), letters) for got in answers]
    assert texts[0] == "Region-based segmentation"
    assert texts == texts[::-1]


def test_direction_of_lines(lines):
    path = packaged_file("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
    upright = [line_input(line, 192) for line in lines]
    turned = [line_input(line.rotate(180), 192) for line in lines]
    with trtpool.Pool(both(path, shapes={"x": (3, 48, 192)}), slots=16, threads=1) as pool:
        answers = check(pool, [*upright, *turned], turned[:4], Direct(path))
    classes = np.reshape([next(iter(got.values())).argmax() for got in answers], (2, -1)).mean(axis=1)
    assert classes[0] < 0.2, "upright"
    assert classes[1] > 0.8, "upside down"


# --- Magika --------------------------------------------------------------------------------------


def test_magika_from_several_producers(run_dir):
    path = packaged_file("magika", "models/standard_v3_3/model.onnx")
    random, direct = np.random.default_rng(5), Direct(path)
    items = [{"bytes": random.integers(0, 257, 2048, np.int32)} for _ in range(60)]
    wanted = [direct.item(**item) for item in items]
    with (
        StartedPool(path, run_dir=run_dir, max_batch=8, slots=32, workers=2, items_per_slot=2, threads=1) as pool,
        pool.connect() as client,
        ThreadPoolExecutor(3) as threads,
    ):
        assert "bytes int32 (N, 2048) -> target_label float32 (N, 214)" in pool.announced
        assert_same(client.infer(together(items[:8])), direct.whole(**together(items[:8])))
        for item, one in zip(items[:5], wanted[:5], strict=True):
            assert_same(client.infer(item), one)

        def work(part: int) -> None:
            chosen = slice(part, None, 3)
            whole = client.infer(together(items[chosen]))
            for got, one in zip(whole["target_label"], wanted[chosen], strict=True):
                assert_close({"target_label": got}, one)

        list(threads.map(work, range(3)))
        with pytest.raises(InvalidInput, match="int32"):
            client.infer(bytes=np.zeros(2048, np.uint8))
        wait_all_free(client)


# --- Silero VAD ----------------------------------------------------------------------------------


def sound(rate: int, seconds: float) -> npt.NDArray[np.float32]:
    """Silence, then something like a voice: pulses of 110 to 150 Hz through the resonances of some vowels."""
    time_s = np.arange(int(rate * seconds)) / rate
    pitch = np.cumsum(130 + 20 * np.sin(2 * np.pi * 2 * time_s)) / rate
    voice = np.zeros_like(time_s)
    for number in range(1, 25):
        vowel = 500 + 250 * np.sin(2 * np.pi * 3 * time_s)
        gain = 1 / (1 + ((number * 130 - vowel) / 120) ** 2) + 0.4 / (1 + ((number * 130 - 1500) / 200) ** 2)
        voice += gain * np.sin(2 * np.pi * number * pitch)
    voice *= 0.2 * (time_s > seconds / 2)
    noise = np.random.default_rng(rate).standard_normal(len(time_s))
    return np.asarray(voice + 0.001 * noise, np.float32)


def chunks(rate: int, seconds: float = 1.6) -> Iterator[npt.NDArray[np.float32]]:
    """What the model takes of a sound, ``(1, samples)``: 32 ms, and before them the last 4 ms of what was there."""
    step, context = (512, 64) if rate == 16000 else (256, 32)
    samples = np.concatenate([np.zeros(context, np.float32), sound(rate, seconds)])
    for start in range(0, len(samples) - context - step + 1, step):
        yield samples[None, start : start + context + step]


def test_silero_with_state_carried_between_calls_of_two_streams(run_dir):
    """The model says nothing of its outputs, fails on zeros, and has the batch on the second axis of its state."""
    path = packaged_file("silero_vad", "data/silero_vad.onnx")
    options: dict[str, Any] = {"no_batch": "silero_vad", "workers": 2, "slots": 8, "threads": 1}
    shapes = ["--shape=input=1x288..576", "--shape=state=2x1x128", "--shape=output=1x1", "--shape=stateN=2x1x128"]
    direct = Direct(path)
    with StartedPool(path, *shapes, run_dir=run_dir, **options) as pool, pool.connect() as client:

        def listen(rate: int) -> list[float]:
            heard, wanted = [], {"stateN": np.zeros((2, 1, 128), np.float32)}
            state = wanted["stateN"]
            for chunk in chunks(rate):
                with client.lease() as slot:
                    slot.inputs["input"] = chunk
                    slot.inputs["state"][...] = state
                    slot.inputs["sr"][...] = rate
                    outputs = slot.submit().result().outputs
                    wanted = direct.whole(input=chunk, state=wanted["stateN"], sr=np.array(rate))
                    assert_same(outputs, wanted)
                    state = outputs["stateN"].copy()
                    heard.append(float(outputs["output"][0, 0]))
                    del outputs
            return heard

        with ThreadPoolExecutor(2) as threads:
            for heard in threads.map(listen, (8000, 16000)):
                assert max(heard[: len(heard) // 2]) < 0.2, heard
                assert max(heard) > 0.5, heard
        wait_all_free(client)


def test_silero_without_what_it_does_not_tell_is_refused_with_what_to_say():
    path = packaged_file("silero_vad", "data/silero_vad.onnx")
    with pytest.raises(ModelError, match=r"--shape output=\.\.\. --shape stateN=\.\.\.$") as caught:
        trtpool.Pool(path, shapes={"input": (1, 576), "state": (2, 1, 128)}, no_batch=["silero_vad"])
    assert "batch axis" not in str(caught.value)
    path = packaged_file("silero_vad", "data/silero_vad_16k_op15.onnx")
    with pytest.raises(ModelError, match="--no-batch silero_vad_16k_op15"):
        trtpool.Pool(path, shapes={"input": (576,), "state": (2, 1, 128)})


# --- all-MiniLM-L6-v2 ----------------------------------------------------------------------------

TEXTS = (
    "This is an example sentence",
    "Each sentence is converted",
    "A cat sits on the mat.",
    "A kitten is lying on the carpet.",
    "Shares fell after the bank raised interest rates again, and analysts do not expect that to change this year.",
    "ok",
)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minilm.write_model(tmp_path_factory.mktemp("minilm") / "minilm.onnx")


def test_the_text_model_is_the_published_one(text_model):
    """The first numbers of what sentence-transformers gives for its own example."""
    direct, tokenizer = Direct(text_model), minilm.load_tokenizer()
    for text, published in (
        (TEXTS[0], [0.0676569, 0.0634960, 0.0487131, 0.0793050]),
        (TEXTS[1], [0.0864386, 0.1027627, 0.0053946, 0.0020444]),
    ):
        answer = direct.item(**minilm.inputs_of(tokenizer.encode(text)))
        np.testing.assert_allclose(answer["sentence_embedding"][:4], published, atol=2e-6)


def test_sentences_of_all_lengths_mixed(text_model):
    direct, tokenizer = Direct(text_model), minilm.load_tokenizer()
    items = [minilm.inputs_of(tokenizer.encode(text)) for text in TEXTS * 4]
    same_length = [minilm.inputs_of(tokenizer.encode(f"{word} is a word")) for word in ("red", "stone", "walk", "up")]
    shapes = dict.fromkeys(items[0], ((2, 64),))
    with trtpool.Pool(both(text_model, shapes=shapes), slots=32, threads=1) as pool:
        answers = check(pool, items, same_length, direct)
        with pytest.raises(InvalidInput, match="2 to 64"):
            pool.infer({name: np.ones(65, np.int64) for name in items[0]}, model="batched")
        wait_all_free(pool)
    vectors = [answer["sentence_embedding"] for answer in answers]
    assert vectors[2] @ vectors[3] > 0.5
    assert vectors[2] @ vectors[4] < 0.2


def test_sentences_of_one_length_share_batches_without_padding(run_dir, text_model):
    tokenizer = minilm.load_tokenizer()
    encoded = [minilm.inputs_of(tokenizer.encode(text)) for text in (TEXTS[2], TEXTS[4])]
    shapes = [f"--shape={name}=1..32" for name in minilm.INPUTS]
    with (
        StartedPool(text_model, *shapes, run_dir=run_dir, max_batch=4, slots=32, threads=1) as pool,
        pool.connect() as client,
    ):
        with ExitStack() as slots:
            works = []
            with pool.stopped_worker():  # what waits meanwhile is batched when it goes on
                for number in range(16):  # short and long in turn, one by one
                    slot = slots.enter_context(client.lease())
                    for name, array in encoded[number % 2].items():
                        slot.inputs[name] = array
                    works.append(slot.submit())
                assert figures(client).queued > 8
            results = [work.result().outputs["sentence_embedding"].copy() for work in works]
        direct = Direct(text_model)
        for number, got in enumerate(results):
            assert_close({"y": got}, {"y": direct.item(**encoded[number % 2])["sentence_embedding"]})
        assert figures(client).items == 16
        assert figures(client).batches <= 8
        wait_all_free(client)
