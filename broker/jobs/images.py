"""Images into a slot: decoded, fitted, normalised.

What a model takes is read off its input: ``(3, H, W)`` or ``(1, H, W)`` is NCHW, ``(H, W, 3)``, ``(H, W, 1)`` or
``(H, W)`` NHWC; integers take pixels as they are, floats take them divided by 255 unless told otherwise.  The
normalising arithmetic writes into the slot (``out=``), so a float never exists elsewhere.  Pillow keeps an image with
colours in four bytes a pixel; where it can lend them through Arrow they are read there, else NumPy copies them once.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from trtpool.ipc.errors import ConfigError, InvalidInput, MissingExtra
from trtpool.ipc.normalization import NORMS
from trtpool.ipc.tensors import TensorSpec

FITS: Final = ("letterbox", "crop", "stretch")


class ImageOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the command line says about images; empty: what `complete` finds in the model.

    Attributes:
        library: "pillow", or "opencv", which decodes and scales faster and rounds differently.
        fit: "letterbox" scales the whole image into the input and pads it, "crop" fills the input from the image's
            middle, "stretch" ignores proportions.
        norm: a key of `NORMS`.
        mean, std: in place of `norm`: one number, or one for each channel, on a scale of 0 to 1.
        channels: "rgb" or "bgr".
        pad: the pixel value of what a letterbox leaves free, 0 to 255.
    """

    library: str = "pillow"
    fit: str = ""
    norm: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: str = "rgb"
    pad: int = 0


class Layout(msgspec.Struct, frozen=True):
    """How an input holds an image: pixels, channels (1 or 3), and whether these come first."""

    height: int
    width: int
    channels: int
    planar: bool


def image_layout(spec: TensorSpec) -> Layout | None:
    """How an input holds an image; None if it does not look like one."""
    shape = spec.shape
    if spec.dtype == "bool" or spec.numpy_dtype.kind not in "fiu":
        return None
    if len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1:
        return Layout(shape[1], shape[2], shape[0], planar=True)
    if len(shape) == 3 and shape[2] in (1, 3) and min(shape[:2]) > 1:
        return Layout(shape[0], shape[1], shape[2], planar=False)
    if len(shape) == 2 and min(shape) > 1:
        return Layout(shape[0], shape[1], 1, planar=False)
    return None


def complete(options: ImageOptions, spec: TensorSpec, outputs: tuple[TensorSpec, ...]) -> ImageOptions:
    """Fill in what was left open: classifiers (whose outputs are vectors) crop, others letterbox; floats get 0 to 1."""
    vectors = all(len(output.shape) == 1 for output in outputs)
    return msgspec.structs.replace(
        options,
        fit=options.fit or ("crop" if vectors else "letterbox"),
        norm=options.norm or ("unit" if spec.numpy_dtype.kind == "f" else "none"),
    )


def describe(options: ImageOptions, spec: TensorSpec) -> str:
    """What is done to each image, in a line."""
    layout = image_layout(spec)
    assert layout is not None
    colours = "grey" if layout.channels == 1 else options.channels.upper()
    norm = f"mean {options.mean or 0}, std {options.std or 1}" if options.mean or options.std else options.norm
    order = "NCHW" if layout.planar else "NHWC"
    return (
        f"{options.fit} to {layout.width}x{layout.height}, {colours}, {norm}, {order} {spec.dtype} ({options.library})"
    )


class ImageWriter:
    """Writes images into an input of a slot.

    Args:
        spec: the input.
        options: complete.

    Raises:
        ConfigError: the input does not look like an image, or an option does not fit it.
        MissingExtra: the library is not installed.
    """

    def __init__(self, spec: TensorSpec, options: ImageOptions) -> None:
        layout = image_layout(spec)
        if layout is None:
            raise ConfigError(f"input {spec} does not look like an image; name a function that writes it with --decode")
        self._layout = layout
        self._options = options
        self._integer = spec.numpy_dtype.kind != "f"
        if self._integer and (options.norm != "none" or options.mean or options.std):
            raise ConfigError(f"input {spec} takes pixels as they are; leave out --norm, --mean and --std")
        if spec.dtype == "int8":
            raise ConfigError(f"input {spec} cannot hold pixels of 0 to 255; name a function with --decode")
        self._gain, self._bias = self._arithmetic()
        self._library: _Pillow | _OpenCV = (
            _OpenCV(layout, options) if options.library == "opencv" else _Pillow(layout, options)
        )

    def _arithmetic(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Gain and bias of each channel, in the model's order: ``value = pixel * gain + bias``."""
        mean, std = NORMS[self._options.norm]
        count = self._layout.channels
        values = [np.array(self._options.mean or mean), np.array(self._options.std or std)]
        for index, value in enumerate(values):
            if value.size not in (1, count) and not (value.size == 3 and count == 1):
                raise ConfigError(f"the input has {count} channels, so give --mean and --std 1 or {count} numbers each")
            values[index] = np.broadcast_to(value, (max(count, value.size),))
        if not values[1].all():
            raise ConfigError("--std 0 would divide by zero; give positive numbers")
        if count == 1 and values[0].size == 3:
            values = [value.mean(keepdims=True) for value in values]
        if count == 3 and self._options.channels == "bgr":
            values = [value[::-1] for value in values]
        mean_of, std_of = values
        gain, bias = 1 / (255 * std_of), -mean_of / std_of
        return gain.astype(np.float32), bias.astype(np.float32)

    def write(self, value: Any, out: npt.NDArray[Any]) -> None:
        """Write an image, every element of `out`.

        Args:
            value: a path, a buffer with an encoded image, or uint8 of shape ``(H, W)`` or ``(H, W, 1 or 3)``.
            out: the slot's array.

        Raises:
            InvalidInput: it is no image.
            OSError: it cannot be read; Pillow's own errors are of this kind too.
        """
        layout = self._layout
        image = out if layout.planar else np.moveaxis(out.reshape(layout.height, layout.width, layout.channels), 2, 0)
        interleaved = not layout.planar and out.dtype == np.uint8 and out.flags.c_contiguous
        slot = out.reshape(layout.height, layout.width, layout.channels) if interleaved else None
        pixels, top, left = self._library.fitted(value, slot)
        rows, columns = pixels.shape[:2]
        body = image[:, top : top + rows, left : left + columns]
        planes = np.moveaxis(pixels, 2, 0)
        if layout.channels == 3 and self._options.channels == "bgr":
            planes = planes[::-1]
        if slot is not None and np.may_share_memory(pixels, slot):
            pass  # scaled right into it
        elif self._integer:
            np.copyto(body, planes)
        else:
            np.multiply(planes, self._gain[:, None, None], out=body, dtype=np.float32, casting="same_kind")
            if self._bias.any():
                np.add(body, self._bias[:, None, None], out=body, casting="same_kind")
        if (rows, columns) != (layout.height, layout.width):
            self._fill_margins(image, top, left, rows, columns)

    def _fill_margins(self, image: npt.NDArray[Any], top: int, left: int, rows: int, columns: int) -> None:
        pad = self._options.pad
        value = np.full(self._layout.channels, pad) if self._integer else pad * self._gain + self._bias
        for margin in (
            image[:, :top],
            image[:, top + rows :],
            image[:, top : top + rows, :left],
            image[:, top : top + rows, left + columns :],
        ):
            margin[...] = value[:, None, None]


def fitted_box(
    fit: str, size: tuple[int, int], layout: Layout
) -> tuple[tuple[float, float, float, float], int, int, int, int]:
    """Which part of an image of `size` (width, height) is used, and where it goes.

    Returns:
        left, top, right and bottom in the image; then width, height, top and left in the input.
    """
    width, height = size
    if fit == "crop":
        scale = max(layout.width / width, layout.height / height)
        used_width, used_height = layout.width / scale, layout.height / scale
        left, top = (width - used_width) / 2, (height - used_height) / 2
        box = (max(0.0, left), max(0.0, top), min(width, left + used_width), min(height, top + used_height))
        return box, layout.width, layout.height, 0, 0
    new_width, new_height = layout.width, layout.height
    if fit == "letterbox":
        scale = min(layout.width / width, layout.height / height)
        new_width = min(layout.width, max(1, round(width * scale)))
        new_height = min(layout.height, max(1, round(height * scale)))
    top, left = (layout.height - new_height) // 2, (layout.width - new_width) // 2
    return (0.0, 0.0, float(width), float(height)), new_width, new_height, top, left


class _Pillow:
    """Bilinear, with every source pixel counted when an image is made smaller; turned as its EXIF data says."""

    def __init__(self, layout: Layout, options: ImageOptions) -> None:
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise MissingExtra("images are decoded with Pillow; install it: pip install 'trtpool[etl]'") from error
        self._image, self._ops = Image, ImageOps
        self._layout, self._fit = layout, options.fit
        self._mode = "L" if layout.channels == 1 else "RGB"

    def fitted(self, value: Any, _slot: npt.NDArray[Any] | None) -> tuple[npt.NDArray[np.uint8], int, int]:
        """Pixels ``(rows, columns, channels)``, RGB or grey, and the row and column of the input where they go.

        Args:
            value: see `ImageWriter.write`.
            _slot: for libraries that can scale into it: ``(H, W, channels)`` of uint8.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; what cannot be decoded raises
            image = self._ops.exif_transpose(self._opened(value))
            if image.mode.startswith("I;16"):
                image = self._image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert(self._mode)
        box, width, height, top, left = fitted_box(self._fit, image.size, self._layout)
        if (width, height) != image.size or box != (0, 0, *image.size):
            image = image.resize((width, height), self._image.Resampling.BILINEAR, box=box)
        return self._pixels(image), top, left

    def _opened(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self._image.fromarray(np.ascontiguousarray(value[..., 0] if value.shape[2:] == (1,) else value))
        if isinstance(value, Path):
            return self._image.open(value)
        try:
            # Bytes are read where they are; pyarrow's buffers are copied: its own reader lacks what some formats need.
            return self._image.open(io.BytesIO(value if isinstance(value, bytes) else memoryview(value)))
        except TypeError as error:
            raise InvalidInput(f"a {type(value).__name__} is not an image; name a function with --decode") from error
        except self._image.UnidentifiedImageError as error:  # whose text has an address in memory
            raise InvalidInput("its bytes are no image that Pillow knows") from error

    def _pixels(self, image: Any) -> npt.NDArray[np.uint8]:
        if self._mode == "L":
            return np.asarray(image)[..., None]
        if hasattr(image, "__arrow_c_array__"):
            try:
                import pyarrow as pa

                pixels = pa.array(image).values.to_numpy(zero_copy_only=True)
                return np.asarray(pixels.reshape(image.height, image.width, 4)[..., :3])
            except (ImportError, ValueError, AttributeError):  # no pyarrow, or an image in several blocks
                pass
        return np.asarray(image)


class _OpenCV:
    """As Pillow does it, by OpenCV's area and bilinear interpolation."""

    def __init__(self, layout: Layout, options: ImageOptions) -> None:
        try:
            import cv2
        except ImportError as error:
            raise MissingExtra(
                "--image-library opencv needs OpenCV; install it with: pip install opencv-python-headless"
            ) from error
        self._cv2: Any = cv2
        self._layout, self._fit, self._channels = layout, options.fit, options.channels
        cv2.setNumThreads(1)  # there is a producer for each CPU already

    def fitted(self, value: Any, slot: npt.NDArray[Any] | None) -> tuple[npt.NDArray[np.uint8], int, int]:
        """See `_Pillow.fitted`; what was scaled into the slot has its channels in the model's order already."""
        cv2, channels = self._cv2, self._layout.channels
        image, is_bgr = self._decoded(value)
        box, width, height, top, left = fitted_box(self._fit, (image.shape[1], image.shape[0]), self._layout)
        x0, y0, x1, y1 = (round(edge) for edge in box)
        image = image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        if image.shape[:2] == (height, width):
            return image.reshape(height, width, channels)[..., :: -1 if is_bgr else 1], top, left
        how = cv2.INTER_AREA if image.shape[0] > height or image.shape[1] > width else cv2.INTER_LINEAR
        target = None if slot is None else slot[top : top + height, left : left + width]
        if target is not None:
            target = target[..., 0] if channels == 1 else target
        scaled = cv2.resize(np.ascontiguousarray(image), (width, height), dst=target, interpolation=how)
        if target is not None and np.may_share_memory(scaled, target):
            if channels == 3 and is_bgr != (self._channels == "bgr"):
                cv2.cvtColor(scaled, cv2.COLOR_BGR2RGB, dst=scaled)
            return scaled.reshape(height, width, channels), top, left
        return scaled.reshape(height, width, channels)[..., :: -1 if is_bgr else 1], top, left

    def _decoded(self, value: Any) -> tuple[Any, bool]:
        """The image, with as many channels as the input, and whether they are blue, green, red."""
        cv2, grey = self._cv2, self._layout.channels == 1
        if isinstance(value, np.ndarray):
            if grey and value.ndim == 3 and value.shape[2] == 3:
                return cv2.cvtColor(value, cv2.COLOR_RGB2GRAY), False
            if not grey and (value.ndim == 2 or value.shape[2] == 1):
                return cv2.cvtColor(value, cv2.COLOR_GRAY2RGB), False
            return value, False
        data = np.fromfile(value, np.uint8) if isinstance(value, Path) else np.frombuffer(value, np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR) if data.size else None
        if image is None:
            raise InvalidInput("OpenCV cannot decode it: it is no image, or a broken one")
        return image, not grey
