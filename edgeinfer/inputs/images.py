"""Pictures: read, brought to a model's size and layout, normalized, and the way back from its coordinates."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgeinfer.errors import InputError
from edgeinfer.forms.form import FITS, PictureInput
from edgeinfer.onnx.ports import Port

#: --normalize: (scale, mean, std) of (pixel * scale - mean) / std.
PRESETS: dict[str, tuple[float, tuple[float, ...], tuple[float, ...]]] = {
    "none": (1.0, (0.0,), (1.0,)),
    "unit": (1 / 255, (0.0,), (1.0,)),
    "half": (1 / 255, (0.5,), (0.5,)),
    "imagenet": (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


@dataclass(frozen=True)
class Placement:
    """Where a picture (pixels of `width` x `height`) lies in a model's input of `size` (height, width)."""

    width: int
    height: int
    size: tuple[int, int]
    scale_x: float
    scale_y: float
    left: float
    top: float

    def to_picture(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [N, 4] (x1, y1, x2, y2) from pixels of the model's input to pixels of the picture, cut to
        it."""
        offset = np.array([self.left, self.top] * 2)
        scale = np.array([self.scale_x, self.scale_y] * 2)
        limit = np.array([self.width, self.height] * 2)
        return np.clip((boxes - offset) / scale, 0, limit)


def read_picture(file: BinaryIO, name: str) -> Image.Image:
    """A PNG or JPEG picture, turned as its EXIF data says, as RGB (transparent parts on white). Raises
    InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=("PNG", "JPEG"))
            picture.load()
            picture = ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be read. Expected a PNG or JPEG file.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is too large a picture: {error} Make it smaller first.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"The picture {name} is broken: {str(error).rstrip('.')}.") from error
    return _opaque(picture)


def _opaque(picture: Image.Image) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # 16 bits of grey
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def with_options(
    form: PictureInput, resize: str | None, normalize: str | None
) -> tuple[PictureInput, tuple[int, int] | None]:
    """The form with what --resize and --normalize say, and the size (height, width) where --resize names
    one."""
    size = None
    for word in filter(None, (resize or "").split(":")):
        if word in FITS:
            form = replace(form, fit=word)
        elif match := re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", word):
            size = int(match[2]), int(match[1])
        else:
            raise InputError(
                f"--resize {resize} cannot be read. Expected {', '.join(FITS)}, WIDTHxHEIGHT, or both: "
                "pad:640x480."
            )
    if normalize is not None:
        scale, mean, std = PRESETS.get(normalize) or _mean_and_std(normalize)
        form = replace(form, scale=scale, mean=mean, std=std)
    return form, size


def _mean_and_std(text: str) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
        if len(mean) not in (1, 3) or len(std) not in (1, 3) or not all(std):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--normalize {text} cannot be read. Expected {', '.join(PRESETS)}, or MEAN/STD of pixels from "
            "0 to 1, one "
            "or three values each: 0.5,0.5,0.5/0.25,0.25,0.25."
        ) from None
    return 1 / 255, mean, std


def is_picture_port(port: Port) -> bool:
    """Whether the input has the rank, type and channels of a picture."""
    if port.dtype.kind not in "fui" or len(port.shape) not in (3, 4):
        return False
    channels, height, width, _ = picture_axes(port)
    return channels in (1, 3) and height != 1 and width != 1


def picture_axes(port: Port) -> tuple[int, int | None, int | None, bool]:
    """(channels, height, width, channels last) of an input; None: any size. Unstated channels are three."""
    sizes = [size if isinstance(size, int) else None for size in port.shape[-3:]]
    if sizes[0] not in (1, 3) and sizes[2] in (1, 3):
        return sizes[2], sizes[0], sizes[1], True
    return sizes[0] or 3, sizes[1], sizes[2], False


def to_input(
    picture: Image.Image, port: Port, form: PictureInput, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, Placement]:
    """`picture` as the array of the input `port`, and where it lies in it. Raises InputError."""
    channels, height, width, last = picture_axes(port)
    if size is not None and any(fixed not in (None, asked) for fixed, asked in zip((height, width), size)):
        raise InputError(
            f"Input {port.name!r} takes pictures of {width or 'any'}x{height or 'any'} (width x height); "
            "--resize asks "
            f"for {size[1]}x{size[0]}."
        )
    own = size or _own_size(picture, form)
    fitted, placement = _fit(picture, form, (height or own[0], width or own[1]))
    array = _pixels(fitted, form, channels)
    if port.dtype.kind == "f":
        mean, std = np.float32(form.mean), np.float32(form.std)
        if channels == 1:
            mean, std = mean.mean(), std.mean()
        array = (array.astype(np.float32) * np.float32(form.scale) - mean) / std
    elif port.dtype == np.int8:
        array = array.astype(np.int16) - 128
    if not last:
        array = array.transpose(2, 0, 1)
    return np.ascontiguousarray(array[None] if len(port.shape) == 4 else array, port.dtype), placement


def _own_size(picture: Image.Image, form: PictureInput) -> tuple[int, int]:
    """(height, width) for a model of any size: the picture's, at most `longest`, in whole `multiple`s."""
    shrink = min(1.0, (form.longest or max(picture.size)) / max(picture.size))
    width, height = (max(1, round(side * shrink / form.multiple)) * form.multiple for side in picture.size)
    return height, width


def _fit(picture: Image.Image, form: PictureInput, size: tuple[int, int]) -> tuple[Image.Image, Placement]:
    height, width = size
    method = Image.Resampling[form.resample.upper()]
    scale_x, scale_y = width / picture.width, height / picture.height
    if form.fit != "stretch":
        scale_x = scale_y = (max if form.fit == "crop" else min)(scale_x, scale_y)
    inner = max(1, round(picture.width * scale_x)), max(1, round(picture.height * scale_y))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    resized = picture.resize(inner, method)
    if form.fit == "crop":
        resized = resized.crop((-left, -top, width - left, height - top))
    elif form.fit == "pad":
        canvas = Image.new("RGB", (width, height), (form.padding,) * 3)
        canvas.paste(resized, (left, top))
        resized = canvas
    scale = inner[0] / picture.width, inner[1] / picture.height
    return resized, Placement(picture.width, picture.height, size, *scale, left, top)


def _pixels(picture: Image.Image, form: PictureInput, channels: int) -> np.ndarray:
    """uint8 [height, width, channels]"""
    if channels == 1 or form.channels == "gray":
        grey = np.asarray(picture.convert("L"))[..., None]
        return np.repeat(grey, channels, axis=2)
    pixels = np.asarray(picture)
    return pixels[..., ::-1] if form.channels == "bgr" else pixels


def normalization_of(form: PictureInput) -> str:
    """The preset's name, or mean and standard deviation, for people."""
    found = (form.scale, form.mean, form.std)
    name = next((name for name, preset in PRESETS.items() if preset == found), None)
    return name or f"(pixel * {form.scale:.4g} - {_show(form.mean)}) / {_show(form.std)}"


def _show(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
