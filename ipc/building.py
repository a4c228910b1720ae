"""What a builder of plans is asked and what it answers, and the record that lies beside each plan.

``python -m trtpool.workers.build`` reads a `BuildRequest` as JSON on standard input and writes one `Line` of JSON
after the other to standard output, the last of them with `built`, `builder` or `refusal`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from .settings import DEFAULT_BUILD_BATCH, BuildSettings, ModelSource, Profile, Refusal, ShapeRange

BUILD_FORMAT: Final = 1
"""Rises when the same file and options are to give another plan or record; cached plans are then built anew."""

RECORD_SUFFIX: Final = ".json"
"""The record of ``model.plan`` is ``model.plan.json``."""


WEIGHTS_SUFFIX: Final = ".weights"
"""The weights of a large ``model.onnx`` that was written are in ``model.onnx.weights``."""

IO_FORMATS: Final = {
    "chw2": 2, "chw4": 4, "chw16": 16, "chw32": 32, "hwc": 1, "hwc8": 8, "hwc16": 16,
}  # fmt: skip
"""How inputs and outputs can lie in memory beside the plain way, and how many channels are kept together."""

ONNX: Final = "onnx"
"""The flavour of a changed ONNX file that was written out, in its record."""


class BuildRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Standard input of `python -m trtpool.workers.build`, as JSON.

    Attributes:
        source: the ONNX file.
        flavour: a key of `FLAVOURS`; empty: the first that is installed and can build.
        build: how.
        shapes: item shapes, by input name, for inputs that leave theirs open and have no profile in `build`.
        max_batch: the largest batch, for inputs whose batch is open and has no range in `build`.
        no_batch: the model's tensors have no batch axis, or not in front.
        output: the file to write, absolute, in a folder that is the builder's alone; empty: build nothing, only say
            who would.
        timing_cache: a folder for TensorRT's timings, which make the next build faster; empty: keep none.
        onnx: write the changed ONNX file, and no plan.
    """

    source: ModelSource
    flavour: str = ""
    build: BuildSettings = BuildSettings()
    shapes: dict[str, ShapeRange] = {}
    max_batch: int = DEFAULT_BUILD_BATCH
    no_batch: bool = False
    output: str = ""
    timing_cache: str = ""
    onnx: bool = False


class Builder(msgspec.Struct, frozen=True):
    """Who would build, and from what.

    Attributes:
        flavour, version: the TensorRT, such as "rtx" and "1.7.1.116".
        source_sha256: digest of the ONNX file and of the files that hold its weights.
    """

    flavour: str
    version: str
    source_sha256: str


class PlanTensor(msgspec.Struct, frozen=True):
    """An input or output of a plan.

    Attributes:
        role: "input" or "output".
        dtype: as NumPy calls it, or in lower case as TensorRT does where NumPy has none.
        shape: batch axis first; -1 where the plan leaves it open.
        profile: the shapes that an open input takes; `more` has those of further profiles.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    profile: Profile | None = None
    more: tuple[Profile, ...] = ()


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a plan was built: ``model.plan.json`` beside it.

    Attributes:
        format: `BUILD_FORMAT`.
        trtpool: the version of this package.
        source: the ONNX file, absolute.
        source_sha256: see `Builder`.
        flavour, version: the TensorRT that built it; `ONNX` and the version of onnx for a changed ONNX file.
        gpu: the GPU that it was built on; "" if that was none.
        compute_capability: of the GPU that it was built for, such as "8.9".
        options, shapes, max_batch: as in the request, but that `options.normalize` names each input.
        tensors: the inputs, then the outputs.
        seconds: how long the build took.
        built: when it ended, in UTC, such as "2026-11-22T17:50:37Z".
        plan_bytes, plan_sha256: of the plan; one that differs is damaged.
    """

    format: int
    trtpool: str
    source: str
    source_sha256: str
    flavour: str
    version: str
    gpu: str
    compute_capability: str
    options: BuildSettings
    shapes: dict[str, ShapeRange]
    max_batch: int
    tensors: tuple[PlanTensor, ...]
    seconds: float
    built: str
    plan_bytes: int
    plan_sha256: str


class Progress(msgspec.Struct, frozen=True):
    """How far a build is: `done` of `of` steps, never falling; `phase` is what it does, in TensorRT's words."""

    phase: str
    done: int
    of: int


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the builder's answer: one of these, the last three only at the end.

    Attributes:
        said: a decision, for the user.
        progress: only TensorRT 10 and newer tell.
        builder: the answer when nothing was to be built.
        built: the plan is written.
        refusal: it is not.
    """

    said: str | None = None
    progress: Progress | None = None
    builder: Builder | None = None
    built: PlanRecord | None = None
    refusal: Refusal | None = None
