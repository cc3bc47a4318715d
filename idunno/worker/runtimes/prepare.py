# idunno/worker/runtimes/prepare.py: a query's value as the tensor row that a model's input wants.
#
# Rule 1: without a model.toml the input's signature decides: images are resized to a fixed height and width, in NCHW or
#         NHWC with 1 or 3 channels, divided by 255 for floating-point inputs and left as they are for integer ones.
# Rule 2: numbers are cast, never scaled. A cast that would change an integer's value is refused.
# Rule 3: whatever is wrong with a row is a RowError, with what came and what was wanted.
from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from idunno.worker.data import Array, Bad, Picture

PIXELS_MAX: Final = 64 * 1024 * 1024
"""Of one image: 192 MB as RGB. Checked before anything is decoded."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is tried; Pillow knows forty more, each a decoder to attack."""

Image.MAX_IMAGE_PIXELS = PIXELS_MAX


class RowError(Exception):
    """This row cannot be used; the others can."""


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a model. `shape` is a row's: the batch axis is cut off; None stands for any length."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @property
    def row_bytes(self) -> int:
        """Of one row; an open axis counts as 224, the side of a common image."""
        return max(1, self.dtype.itemsize) * math.prod(224 if n is None else max(1, n) for n in self.shape)

    def __str__(self) -> str:
        axes = ", ".join("?" if n is None else str(n) for n in self.shape)
        return f"{self.name} {self.dtype}[N{', ' if axes else ''}{axes}]"


@dataclass(frozen=True, slots=True)
class _Layout:
    """How an image lies in a row."""

    mode: str  # Pillow's: L or RGB
    height: int | None
    width: int | None
    axes: str  # CHW, HWC, HW or flat


def layout(wanted: Input) -> _Layout | None:
    """The image layout that an input's shape means; None when it is not one of an image."""
    match wanted.shape:
        case (1 | 3 as channels, height, width):
            return _Layout("L" if channels == 1 else "RGB", height, width, "CHW")
        case (height, width, 1 | 3 as channels):
            return _Layout("L" if channels == 1 else "RGB", height, width, "HWC")
        case (height, width):
            return _Layout("L", height, width, "HW")
        case (int() as pixels,) if math.isqrt(pixels) ** 2 == pixels:
            side = math.isqrt(pixels)
            return _Layout("L", side, side, "flat")
        case _:
            return None


def row(value: object, wanted: Input) -> Array:
    """`value` as one row of `wanted`. Raises RowError."""
    if isinstance(value, Bad):
        raise RowError(value.error)
    if isinstance(value, Picture):
        return _image(value.content, wanted)
    return _numbers(value, wanted)


def _image(content: bytes, wanted: Input) -> Array:
    how = layout(wanted)
    if how is None or wanted.dtype.kind not in "uif":
        raise RowError(f"is an image, but the model's input is {wanted}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = opened.size
            if width * height > PIXELS_MAX:
                raise RowError(f"has {width} x {height} pixels, more than {PIXELS_MAX}")
            image: Image.Image = opened.convert(how.mode)
    except UnidentifiedImageError:
        raise RowError(f"is no image that can be read ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowError(f"has more than {PIXELS_MAX} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        # Pillow's decoders raise all of these for files that are cut off or forged.
        raise RowError(f"is an image that cannot be decoded: {error}") from None
    size = (how.width or image.width, how.height or image.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels: Array = np.asarray(image)
    if how.axes == "CHW":
        pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    elif how.axes == "HWC" and pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    elif how.axes == "flat":
        pixels = pixels.reshape(-1)
    if wanted.dtype.kind == "f":
        return (pixels * np.float32(1 / 255)).astype(wanted.dtype, copy=False)
    return pixels.astype(wanted.dtype)


def _numbers(value: object, wanted: Input) -> Array:
    try:
        array: Array = np.asarray(value, dtype=object if wanted.dtype.kind == "O" else None)
    except (ValueError, TypeError, OverflowError) as error:
        raise RowError(f"is no array of numbers: {error}") from None
    return fit(cast(array, wanted), wanted)


def cast(array: Array, wanted: Input) -> Array:
    """`array` in the input's type. Raises RowError when it holds something else than numbers, or values would change."""
    target = wanted.dtype
    if array.dtype == target and target.kind != "O":
        return array
    if target.kind == "O":
        items = array.reshape(-1)
        if array.dtype.kind != "U" and not all(isinstance(item, str) for item in items):
            raise RowError(f"holds something else than text, the model's input is {wanted}")
        return array.astype(object)
    if array.dtype.kind not in "biuf":
        raise RowError(f"holds something else than numbers, the model's input is {wanted}")
    if target.kind == "f":
        return array.astype(target)
    with np.errstate(invalid="ignore"):
        whole = array.astype(target)
    if not np.array_equal(whole, array):
        raise RowError(f"holds numbers that {target} cannot hold, the model's input is {wanted}")
    return whole


def fit(array: Array, wanted: Input) -> Array:
    """`array` in the input's shape. Axes of length 1 may be missing or too many, and a flat row takes any shape of its
    size; nothing else is rearranged, for it would be a guess. Raises RowError."""
    shape = wanted.shape
    if array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=True)):
        return array
    if None not in shape:
        fixed = tuple(n for n in shape if n is not None)
        same = tuple(n for n in array.shape if n != 1) == tuple(n for n in fixed if n != 1)
        flat = min(array.ndim, len(fixed)) <= 1 and array.size == math.prod(fixed)
        if same or flat:
            return array.reshape(fixed)
    elif shape.count(None) == 1 and array.ndim == 0 and len(shape) == 1:
        return array.reshape(1)
    raise RowError(f"has shape {list(array.shape)}, the model's input is {wanted}")
