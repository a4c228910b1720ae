"""The engines that GPU tests run: plans, inputs for them, and what onnxruntime or NumPy make of these.

``$TRTPOOL_ENGINES`` names a folder with plans, ``NAME.plan`` or ``NAME.plan.xz``, and the ONNX files they come from,
``STEM.onnx``.  What it lacks is made: the ONNX file by scripts/make_models.py, the plan by `trtpool build`.

Inputs are new in each run.  They are made so that the answers of any two items differ by more than the error that is
allowed: then a mix-up shows.  ``$TRTPOOL_TEST_SEED`` repeats a run; each test prints it.
"""

from __future__ import annotations

import hashlib
import importlib
import lzma
import os
import secrets
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import ROOT
from tests.system.rig import CLI
from trtpool.ipc.errors import MissingExtra

Array = npt.NDArray[Any]

MAKE_MODELS: Final = ROOT / "scripts" / "make_models.py"

POISON: Final = 0xFF
"""The byte that fills outputs beforehand: in float16 and float32 it makes NaN, which is never right."""


# --- Inputs, shape (items, *item_shape) ----------------------------------------------------------


def _vectors(rng: np.random.Generator, items: int) -> Array:
    return rng.standard_normal((items, 256), dtype=np.float32)


def _tiles(rng: np.random.Generator, items: int) -> Array:
    """Noise on tiles of noise, (items, 3, 224, 224), standard deviation 1: noise alone looks all the same to a CNN."""
    tiles = rng.standard_normal((items, 3, 8, 8), dtype=np.float32).repeat(28, 2).repeat(28, 3)
    tiles += rng.standard_normal(tiles.shape, dtype=np.float32) / 2
    return tiles


def _contrasts(items: int, least: float, most: float) -> Array:
    """One for each item, all different by as much as there is room for: (items, 1, 1, 1)."""
    return np.geomspace(least, most, items, dtype=np.float32).reshape(-1, 1, 1, 1)


def _images(rng: np.random.Generator, items: int) -> Array:
    """float32 that is exact in float16, so that engines of both dtypes have the same answers."""
    return (_tiles(rng, items) * _contrasts(items, 0.25, 4)).astype(np.float16).astype(np.float32)


def _photos(rng: np.random.Generator, items: int) -> Array:
    pixels = 124 + 50 * _tiles(rng, items) * _contrasts(items, 0.2, 1)
    return np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _levels(rng: np.random.Generator, items: int) -> Array:
    """A level of its own for each channel, and ends that weigh so much that a mean without them is wrong."""
    images = rng.random((items, 3, 1600, 2560), dtype=np.float32)
    images += rng.uniform(1, 8, (items, 3, 1, 1)).astype(np.float32)
    channels = images.reshape(items, 3, -1)
    channels[..., :64] = channels[..., -64:] = 3e4
    return images


_LETTERS: Final = np.array(
    [[31, 17, 17, 31, 17, 17, 17], [30, 17, 17, 30, 17, 17, 30], [31, 16, 16, 30, 16, 16, 31],
     [17, 17, 17, 31, 17, 17, 17], [16, 16, 16, 16, 16, 16, 31], [17, 25, 21, 19, 17, 17, 17],
     [31, 4, 4, 4, 4, 4, 4], [14, 17, 17, 17, 17, 17, 14]]
)  # fmt: skip
"""A, B, E, H, L, N, T and O: seven rows of five bits each."""


def _pages(rng: np.random.Generator, items: int) -> Array:
    """Pages with words.  Of noise a text detector makes next to nothing, and what it makes is all rounding error."""
    letters = np.pad((_LETTERS[:, :, None] >> np.arange(4, -1, -1)) & 1, ((0, 0), (0, 0), (0, 1))).astype(np.float32)
    pages = rng.standard_normal((items, 3, 1600, 2560), dtype=np.float32) / 20 + 1
    for page in pages:
        for line in rng.choice(30, 24, replace=False):
            word = np.concatenate(letters[rng.integers(0, len(letters), rng.integers(4, 24))], axis=1)
            word = word.repeat(6, 0).repeat(6, 1)
            top, left = line * 53, rng.integers(0, 2560 - word.shape[1])
            page[:, top : top + word.shape[0], left : left + word.shape[1]] -= 2 * word
    return pages


# --- Engines -------------------------------------------------------------------------------------


class Source(NamedTuple):
    """An ONNX file, and items for it with one input and one output.

    Attributes:
        items: how many different ones.
        make: makes their inputs.
    """

    items: int
    make: Callable[[np.random.Generator, int], Array]


class Kind(NamedTuple):
    """An engine.

    Attributes:
        source: a key of `SOURCES`.
        limit: the relative error, ``|answer - reference| / |reference|``, that an item must stay below.
        max_batch: items in the largest batch of its profile.
        build: how to build it.
        dtype: of its input, if not that of the source.
    """

    source: str
    limit: float
    max_batch: int
    build: tuple[str, ...]
    dtype: str = ""

    @property
    def sizes(self) -> list[int]:
        """Batch sizes to try: 1, odd ones, full."""
        return [size for size in (1, 3, 7, 63) if size < self.max_batch] + [self.max_batch]


SOURCES: Final = {
    "mlp": Source(256, _vectors),
    "resnet50": Source(64, _images),
    "resnet50_u8": Source(64, _photos),
    "reduce1600x2560": Source(8, _levels),
    "ppocr_det": Source(2, _pages),
}

KINDS: Final = {
    "mlp": Kind("mlp", 2e-3, 256, ("--fp16", "--shapes=x=1:64:256")),
    "resnet50_fp16": Kind("resnet50", 1e-2, 64, ("--fp16", "--shapes=images=1:32:64")),
    "resnet50_fp16_io16": Kind("resnet50", 1e-2, 64, ("--fp16", "--io=fp16", "--shapes=images=1:32:64"), "float16"),
    "resnet50_u8": Kind("resnet50_u8", 1e-2, 64, ("--fp16", "--shapes=images=1:32:64")),
    "reduce1600x2560": Kind("reduce1600x2560", 1e-4, 8, ("--fp16", "--shapes=image=1:4:8")),
    "ppocr_det": Kind("ppocr_det", 3e-2, 4, ("--fp16", "--shapes=x=1x3x1600x2560:2x3x1600x2560:4x3x1600x2560")),
}


class Samples(NamedTuple):
    """Items of one engine, numbered from 0.

    Attributes:
        kind: the engine.
        inputs: shape ``(items, *item_shape)``.
        answers: float64, shape ``(items, elements)``.
    """

    kind: Kind
    inputs: Array
    answers: Array

    def choose(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` of them in random order, none twice while there are others."""
        chosen: list[int] = []
        while len(chosen) < count:
            chosen += rng.permutation(len(self.inputs)).tolist()
        return chosen[:count]

    def check(self, chosen: Sequence[int], outputs: Array) -> None:
        """Assert that `outputs`, shape ``(len(chosen), *item_shape)``, are the answers to the items `chosen`."""
        assert len(chosen) == len(outputs)
        errors = [self._error(item, output) for item, output in zip(chosen, outputs, strict=True)]
        wrong = [place for place, error in enumerate(errors) if not error < self.kind.limit]  # NaN is below nothing
        assert not wrong, f"{len(wrong)} of {len(chosen)} items are wrong; " + "; ".join(
            f"[{place}] is {self._guess(outputs[place])} and not item {chosen[place]}, error {errors[place]:.2g}"
            for place in wrong[:5]
        )

    def _error(self, item: int, output: Array) -> float:
        answer = self.answers[item]
        return float(np.linalg.norm(output.astype(np.float64).ravel() - answer) / np.linalg.norm(answer))

    def _guess(self, output: Array) -> str:
        if poisoned := np.count_nonzero(np.isnan(output)):
            return f"poisoned in {poisoned} of {output.size} elements"
        errors = [self._error(item, output) for item in range(len(self.answers))]
        best = int(np.argmin(errors))
        return f"item {best}" if errors[best] < self.kind.limit else "none of all items"


class NotBuilt(Exception):
    """`trtpool build` failed, and said this."""


class Zoo:
    """Plans and samples, each made when it is asked for and kept.

    Args:
        folder: for what is made.

    Attributes:
        seed: where all inputs come from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._given = Path(os.environ["TRTPOOL_ENGINES"]) if os.environ.get("TRTPOOL_ENGINES") else folder
        self._plans: dict[str, Path] = {}
        self._sources: dict[str, tuple[Array, Array]] = {}
        self.seed = int(os.environ.get("TRTPOOL_TEST_SEED") or secrets.randbits(32))

    def plan(self, name: str) -> Path:
        """The plan of an engine; skips where there is none and none can be built."""
        if name not in self._plans:
            self._plans[name] = self._find_plan(name)
        return self._plans[name]

    def onnx(self, stem: str) -> Path:
        """An ONNX file; skips where there is none and none can be made."""
        given = self._given / f"{stem}.onnx"
        if given.exists():
            return given
        path = self._folder / f"{stem}.onnx"
        if not path.exists() and MAKE_MODELS.exists():
            subprocess.run([sys.executable, MAKE_MODELS, self._folder], check=True)
        if not path.exists():
            pytest.skip(f"there is no {stem}.onnx in $TRTPOOL_ENGINES, and scripts/make_models.py makes none")
        return path

    def samples(self, name: str) -> Samples:
        """Inputs of an engine, and the answers to them."""
        kind = KINDS[name]
        if kind.source not in self._sources:
            self._sources[kind.source] = self._answer(kind)
        inputs, answers = self._sources[kind.source]
        return Samples(kind, inputs.astype(kind.dtype or inputs.dtype, copy=False), answers)

    def mlp_weights(self) -> tuple[Array, Array]:
        """``(w0, w1)`` of the model "mlp", which is ``max(x @ w0, 0) @ w1``; float64."""
        import onnx.numpy_helper

        first, second = onnx.load(self.onnx("mlp")).graph.initializer
        return onnx.numpy_helper.to_array(first).astype(np.float64), onnx.numpy_helper.to_array(second).astype(
            np.float64
        )

    def _find_plan(self, name: str) -> Path:
        given, path = self._given / f"{name}.plan", self._folder / f"{name}.plan"
        packed = given.with_suffix(".plan.xz")
        if given.exists():
            return given
        if packed.exists():
            with lzma.open(packed) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            return path
        return self.built(self.onnx(KINDS[name].source), *KINDS[name].build)

    def built(self, source: Path, *options: str) -> Path:
        """The plan of an ONNX file with options of `trtpool build`; skips where none can be built.

        Built when it is first asked for, it is kept with what `$TRTPOOL_ENGINES` has, for the next run too.
        """
        digest = hashlib.sha256(b"\0".join([source.read_bytes(), *map(str.encode, options)])).hexdigest()
        path = self._given / f"built-{source.stem}-{digest[:16]}.plan"
        if not path.exists():
            command: list[str | os.PathLike[str]] = [*CLI, "build", source, "-o", path, *options]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode == MissingExtra.exit_code:
                pytest.skip(f"{source.name} has no plan, and none can be built: {made.stderr}")
            if made.returncode != 0:
                raise NotBuilt(made.stdout + made.stderr)
        return path

    def _answer(self, kind: Kind) -> tuple[Array, Array]:
        source = SOURCES[kind.source]
        rng = np.random.default_rng([self.seed, list(SOURCES).index(kind.source)])
        inputs = source.make(rng, source.items)
        answers = self._reference(kind.source)(inputs).reshape(source.items, -1)
        lengths = np.linalg.norm(answers, axis=1)
        for item in range(source.items - 1):
            apart = np.linalg.norm(answers[item + 1 :] - answers[item], axis=1) / lengths[item + 1 :]
            assert apart.min() > 2 * kind.limit, f"items {item} and {item + 1 + apart.argmin()} look the same"
        return inputs, answers

    def _reference(self, stem: str) -> Callable[[Array], Array]:
        """What computes the answers, float64, to inputs of shape ``(items, *item_shape)``."""
        if stem == "mlp":
            first, second = self.mlp_weights()
            return lambda x: np.maximum(x.astype(np.float64) @ first, 0) @ second
        if stem == "reduce1600x2560":
            return lambda x: x.mean(axis=(2, 3), dtype=np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, on import
            onnxruntime = importlib.import_module("onnxruntime")
        session = onnxruntime.InferenceSession(os.fspath(self.onnx(stem)), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

        def run(x: Array) -> Array:
            answers = [session.run(None, {given.name: x[item : item + 1]})[0] for item in range(len(x))]
            joined: Array = np.concatenate(answers).astype(np.float64)
            return joined

        return run
