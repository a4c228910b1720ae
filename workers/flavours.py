"""Which TensorRT: `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`, and the one logger of each.

They are one library in three editions.  All load in one process, each with its own state, and each takes the first
logger that it is given for good, so there is one for each, and it is never freed.

Nothing here calls into a driver: without a working one, `Runtime` crashes in some versions.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import re
import sys
import threading
from collections import deque
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, NamedTuple

from trtpool.ipc.errors import ConfigError, MissingExtra, ModelError
from trtpool.ipc.settings import FLAVOURS

log = logging.getLogger("trtpool.tensorrt")

HEADER_BYTES: Final = 28
"""As much of a plan's start as `load_flavour` and `plan_version` look at."""

_TITLES: Final = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX", "lean": "TensorRT lean"}
_READERS: Final = {b"ftrt": ("tensorrt", "lean"), b"vtrt": ("rtx",)}
"""A plan's first four bytes, and who can read such a plan, best first; seen in every version, and not documented."""

_LEVELS: Final = {
    "INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.DEBUG,
}  # fmt: skip
"""TensorRT's severities, and ours.  VERBOSE is thousands of lines and goes nowhere."""

_errors: deque[str] = deque(maxlen=16)
_loggers: dict[ModuleType, Any] = {}
_loggers_lock = threading.Lock()


class Flavour(NamedTuple):
    """An imported TensorRT.

    Attributes:
        name: "tensorrt", "rtx" or "lean".
        module: the module, which programs call ``trt``.
        version: such as ``(10, 13, 0, 35)``.
    """

    name: str
    module: Any
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{_TITLES[self.name]} {self.dotted}"

    @property
    def dotted(self) -> str:
        """The version, such as ``"10.13.0.35"``."""
        return ".".join(map(str, self.version))


def load_flavour(wanted: str, header: bytes | None = None, *, build: bool = False) -> Flavour:
    """Choose a TensorRT and import it.

    Args:
        wanted: a key of `FLAVOURS`; empty: what `header` asks for, else the first that is installed.
        header: the first `HEADER_BYTES` of the plan to run; None when there is none yet.
        build: it must be able to build a plan, which the lean one is not.

    Raises:
        ConfigError: `wanted` cannot build.
        MissingExtra: it is not installed; the text names the extra.
        ModelError: `header` is not that of a plan, or that of a plan which `wanted` cannot run.
    """
    if build and wanted == "lean":
        raise ConfigError("the lean TensorRT runs plans and cannot build one; choose --flavour tensorrt or rtx")
    if header is None:
        names: tuple[str, ...] = tuple(name for name in FLAVOURS if not (build and name == "lean"))
    else:
        names = _readers(header)
    if wanted:
        if wanted not in names:
            raise ModelError(
                f"the plan was built by {_describe_builder(header or b'')}, which {_TITLES[wanted]} cannot run; "
                f"leave out --flavour, or build the model again with --flavour {wanted}"
            )
        names = (wanted,)
    reasons = {}
    for name in names:
        try:
            return _import(name)
        except (ImportError, OSError) as error:
            reasons[name] = error
    raise MissingExtra(_describe_missing(reasons, header))


def plan_version(header: bytes) -> tuple[int, ...] | None:
    """The version that `header`, a plan's first `HEADER_BYTES`, names; None if it is none.

    A hint for the text of an error, such as ``(8, 6, 0, 12)``: NVIDIA does not document where it stands.
    """
    if len(header) < HEADER_BYTES or header[:4] not in _READERS:
        return None
    return tuple(header[24:HEADER_BYTES])


def logger(flavour: Flavour) -> Any:
    """The logger (a ``trt.ILogger``) to give to every object of this flavour.

    It may be called from any thread, passes messages on to the log ``trtpool.tensorrt``, and keeps the last errors
    for `take_errors`.
    """
    with _loggers_lock:
        if flavour.module not in _loggers:
            _loggers[flavour.module] = made = _make_logger(flavour.module)
            # One reference that is never given back: the library may log until the process has ended.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        return _loggers[flavour.module]


def take_errors() -> str:
    """The errors that any flavour has logged since the last call, as one line, oldest first; "" if there are none."""
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(_errors.popleft())
    # Without a driver TensorRT for RTX adds this to whatever is wrong, though it needs none to build.
    telling = [text for text in taken if "cudaError 35" not in text] or taken
    return "; ".join(dict.fromkeys(telling))  # one error is often said again on the way up


def record(severity: str, message: str) -> None:
    """Log a message of TensorRT, and keep it if it is an error.

    Args:
        severity: the name of a ``trt.ILogger.Severity``.
        message: as TensorRT words it, with the place in its source first.
    """
    level = _LEVELS.get(severity)
    if level is None:
        return
    text = " ".join(message.split())
    if level >= logging.ERROR:
        _errors.append(_without_places(text))
    log.log(level, "%s", text)


def _without_places(text: str) -> str:
    """`text` without what only TensorRT's developers can read.

    ::

        3: [network.cpp::validate::12] Error Code 4: API Usage Error (x has no profile. In validate at /a/b.cpp:40)
        x has no profile
    """
    text = re.sub(r"\[[\w./~]+\.(?:cpp|h|cu)::[^\]]*\]\s*", "", text)
    text = re.sub(r"In \S+ at \S+\.(?:cpp|h|cu):\d+\s*", "", text)
    text = re.sub(r"^(?:\d+: )?(?:I\w+::\w+: )?", "", text)
    text = re.sub(r"^Error Code \d+: (?:API Usage|Internal) Error \((.*)\)$", r"\1", text)
    return text.rstrip(" .")


def _readers(header: bytes) -> tuple[str, ...]:
    readers = _READERS.get(header[:4])
    if readers is None:
        raise ModelError(
            f"this is not a TensorRT plan, since it begins with {header[:4]!r}; "
            "name a plan that `trtpool build` or TensorRT wrote, or an .onnx file"
        )
    return readers


def _import(name: str) -> Flavour:
    module = importlib.import_module(FLAVOURS[name])
    version = getattr(module, "__version__", None)
    if version is None:  # a folder of that name somewhere on the path
        raise ImportError(f"{FLAVOURS[name]} on the path is not NVIDIA's package")
    return Flavour(name, module, tuple(map(int, re.findall(r"\d+", version)[:4])))


def _make_logger(module: Any) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]  # of a module that is chosen at run time
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # An exception that went back into TensorRT would end the process.
            with contextlib.suppress(Exception):
                if not sys.is_finalizing():
                    record(severity.name, message)

    return Logger()


def _describe_builder(header: bytes) -> str:
    version = plan_version(header)
    title = _TITLES[_readers(header)[0]]
    return f"{title} {'.'.join(map(str, version))}" if version else title


def _describe_missing(reasons: Mapping[str, Exception], header: bytes | None) -> str:
    first = next(iter(reasons))
    what = " or ".join(_TITLES[name] for name in reasons)
    need = f"the plan was built by {_describe_builder(header)} and needs {what}" if header else f"{what} is needed"
    broken = [str(error) for error in reasons.values() if not isinstance(error, ModuleNotFoundError)]
    why = f"cannot be imported ({'; '.join(broken)})" if broken else "is not installed"
    return (
        f"{need}, which {why}; install it with: pip install 'trtpool[{first}]', or 'trtpool[{first}-cu12]' for CUDA 12"
    )
