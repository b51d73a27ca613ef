"""Pictures over the wire: uploaded ones checked before they are decoded, generated ones with how to make them again."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from app.errors import Impossible
from app.http.schemas.requests import OutputFormat

FORMATS = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = 95
LONGEST_SIDE: dict[OutputFormat, int] = {"jpeg": 65_500, "webp": 16_383}
"""Pixels, beyond which the format has no such file; a PNG's side is larger than any picture."""


def decode_base64(text: str, field: str = "image") -> bytes:
    """Base64, with or without a `data:` prefix. Raises `Impossible`, which names the field, for anything else."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Impossible(f"{field}: is not valid base64", param=field) from error


class Upload(NamedTuple):
    """An uploaded picture: RGB, and where it was transparent its opacity (mode L, 255 opaque), for use as a mask."""

    picture: Image.Image
    alpha: Image.Image | None


def read(data: bytes, max_pixels: int, field: str = "image") -> Upload:
    """An uploaded PNG, JPEG or WebP as RGB, upright; its size is checked before a pixel is decoded."""
    return flatten(read_as_is(data, max_pixels, field))


def read_as_is(data: bytes, max_pixels: int, field: str) -> Image.Image:
    """The same in the mode that it has, transparency included."""
    with _refusing(max_pixels, field):
        picture = ImageOps.exif_transpose(_opened(data, max_pixels, field))
        picture.load()
        return picture


def pixels_of(data: bytes, max_pixels: int, field: str = "image") -> int:
    """How many pixels an uploaded PNG, JPEG or WebP has; none is decoded. Raises what `read` would."""
    with _refusing(max_pixels, field):
        width, height = _opened(data, max_pixels, field).size
        return width * height


def _opened(data: bytes, max_pixels: int, field: str) -> Image.Image:
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > max_pixels:
        raise Impossible(f"{field}: {width}x{height} is more than {max_pixels} pixels", param=field)
    return picture


@contextmanager
def _refusing(max_pixels: int, field: str) -> Iterator[None]:
    """What may be wrong with an upload, as `Impossible`."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Impossible(f"{field}: is more than {max_pixels} pixels", param=field) from error
    except UnidentifiedImageError as error:
        raise Impossible(f"{field}: is no PNG, JPEG or WebP", param=field) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise Impossible(f"{field}: is damaged", param=field) from error


def flatten(picture: Image.Image) -> Upload:
    """Any mode as RGB: 16 bits become the nearest 8, transparent pixels lie on white."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow would cut it off at 255
        return _flatten_grey(picture)
    if not picture.has_transparency_data:
        return Upload(picture.convert("RGB"), None)
    layered = picture.convert("RGBA")
    alpha = layered.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return Upload(layered.convert("RGB"), None)
    white = Image.new("RGBA", picture.size, "white")
    return Upload(Image.alpha_composite(white, layered).convert("RGB"), alpha)


def _flatten_grey(picture: Image.Image) -> Upload:
    """16-bit grey [height, width], of which one level may stand for transparent."""
    levels = np.asarray(picture).astype(np.uint32)
    grey = ((levels * 255 + 32767) // 65535).astype(np.uint8)
    clear = picture.info.get("transparency")
    if clear is None:
        return Upload(Image.fromarray(grey).convert("RGB"), None)
    opaque = levels != clear
    alpha = None if opaque.all() else Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))
    return Upload(Image.fromarray(np.where(opaque, grey, np.uint8(255))).convert("RGB"), alpha)


def encode(
    picture: Image.Image, output_format: OutputFormat, facts: dict[str, Any], seed: int, quality: int | None = None
) -> bytes:
    """A picture as a file, of `quality` up to 100 where its format loses anything.

    A PNG says in its text chunks what was asked for (`slipstream`) and the seed.
    """
    out = io.BytesIO()
    if output_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("slipstream", json.dumps(facts))
        chunks.add_text("seed", str(seed))
        picture.save(out, "PNG", pnginfo=chunks)
    else:
        picture.save(out, output_format.upper(), quality=QUALITY if quality is None else quality)
    return out.getvalue()


def to_base64(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")
