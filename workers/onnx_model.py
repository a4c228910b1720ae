"""ONNX files: loading one.  What cannot be is refused here, with a text that says what to change."""

from __future__ import annotations

import importlib
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

from trtpool.ipc.errors import MissingExtra, ModelError

from .trust import check_file

ERROR_CHARACTERS: Final = 400
"""onnxruntime's texts are cut to this length: they can hold whole graphs."""


def load(path: Path, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` for `path`, whose calls run on `threads` threads.

    Raises:
        ModelError: the file cannot be read, or onnxruntime does not take it.
        MissingExtra: onnxruntime is not installed.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path} is not a file; name the .onnx file itself")
        with path.open("rb") as file:
            if not file.read(1):
                raise ModelError(f"{path} is empty; export or copy the model again")
            check_file(path, os.fstat(file.fileno()))
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}; check path and permissions") from error
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtra(
            f"the CPU engine needs onnxruntime, which cannot be imported ({one_line(error)}); "
            "install it with: pip install 'trtpool[cpu]'"
        ) from error
    ort.set_default_logger_severity(4)  # fatal: what it says of an error, we say in ours
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Workers share the CPUs: one that spins while it has no work takes them from one that has.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = one_line(error)
        raise ModelError(f"onnxruntime {ort.__version__} cannot load {path}: {text}; {_load_remedy(text)}") from error


def _load_remedy(text: str) -> str:
    """What to do when onnxruntime does not load a model and says `text`."""
    if "Protobuf parsing failed" in text:
        return "the file is damaged or no ONNX model: copy it again, or export the model to ONNX"
    if "External data" in text or "No such file" in text:  # the second is onnxruntime 1.20
        return "put the files that hold the model's weights beside it"
    return "export it with an older opset and without custom operators, or upgrade onnxruntime"


def one_line(error: Exception) -> str:
    """The text of `error` on one line, less what only onnxruntime's developers can read."""
    text = " ".join(str(error).split()).rstrip(".")
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"Load model from \S+ failed:", "", text)
    text = re.sub(r"/\S+\.(?:cc|h):\d+ [^()]*\([^()]*\) (?:.*? was false\. )?", "", text)  # where it was raised
    return text if len(text) <= ERROR_CHARACTERS else text[:ERROR_CHARACTERS] + "..."
