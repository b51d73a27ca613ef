"""Pictures over the wire: uploaded ones checked before they are decoded, generated ones with how to make them again."""

from __future__ import annotations

import base64
import binascii
import io
import json
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from app.errors import Impossible
from app.http.schemas.requests import OutputFormat

FORMATS = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = 95


def decode_base64(text: str) -> bytes:
    """Base64, with or without a `data:` prefix. Raises `Impossible` for anything else."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Impossible("image: is not valid base64", param="image") from error


def read(data: bytes, max_pixels: int) -> Image.Image:
    """An uploaded PNG, JPEG or WebP as an RGB picture, upright; its size is checked before a pixel is decoded."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height > max_pixels:
            raise Impossible(f"image: {width}x{height} is more than {max_pixels} pixels", param="image")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Impossible(f"image: is more than {max_pixels} pixels", param="image") from error
    except UnidentifiedImageError as error:
        raise Impossible("image: is no PNG, JPEG or WebP", param="image") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise Impossible("image: is damaged", param="image") from error


def encode(picture: Image.Image, output_format: OutputFormat, facts: dict[str, Any], seed: int) -> bytes:
    """A picture as a file. A PNG says in its text chunks what was asked for (`slipstream`) and the seed."""
    out = io.BytesIO()
    if output_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("slipstream", json.dumps(facts))
        chunks.add_text("seed", str(seed))
        picture.save(out, "PNG", pnginfo=chunks)
    else:
        picture.save(out, output_format.upper(), quality=QUALITY)
    return out.getvalue()


def to_base64(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")
