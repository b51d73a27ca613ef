"""Pictures over the wire: what an upload looks like when it is read, and how well a file keeps a picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.errors import Impossible
from app.http.pictures import MEDIA_TYPES, decode_base64, encode, read, to_base64


def gradient(width: int = 48, height: int = 20) -> Image.Image:
    """A picture that no compression keeps whole."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 5 % 256, y * 11 % 256, x * y * 7 % 256], -1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_files_are_written_at_quality_95(kind: str) -> None:
    expected = io.BytesIO()
    gradient().save(expected, kind, quality=95)
    assert encode(gradient(), kind, {}, 3) == expected.getvalue()  # type: ignore[arg-type]


def test_a_png_keeps_every_pixel() -> None:
    found = Image.open(io.BytesIO(encode(gradient(), "png", {"seed": 3}, 3)))
    assert (found.size, found.tobytes()) == ((48, 20), gradient().tobytes())


def test_media_types() -> None:
    assert MEDIA_TYPES == {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_upload_is_read_as_it_is(kind: str) -> None:
    picture, alpha = read(saved(gradient(), kind, lossless=True), 48 * 20)
    assert alpha is None
    assert (picture.mode, picture.size, picture.tobytes()) == ("RGB", (48, 20), gradient().tobytes())


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_270),
        (8, Image.Transpose.ROTATE_90),
    ],
)
def test_a_turned_upload_is_turned_back(orientation: int, turned: Image.Transpose | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read(saved(gradient(), "PNG", exif=exif), 48 * 20).picture
    expected = gradient() if turned is None else gradient().transpose(turned)
    assert (picture.size, picture.tobytes()) == (expected.size, expected.tobytes())


@pytest.mark.parametrize(
    ("mode", "given", "value"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32768, (128, 128, 128)),
        ("I;16", 300, (1, 1, 1)),
        ("I;16", 0, (0, 0, 0)),
    ],
)
def test_other_modes_become_rgb(mode: str, given: Any, value: tuple[int, int, int]) -> None:
    picture, alpha = read(saved(Image.new(mode, (3, 5), given), "PNG"), 15)
    assert alpha is None
    assert (picture.mode, picture.size, picture.getpixel((2, 4))) == ("RGB", (3, 5), value)


CORNER = (1, 3)
"""The pixel that is not like the others, as x and y."""


def with_corner(mode: str, fill: Any, corner: Any) -> Image.Image:
    """A picture of 3x5 of which one pixel differs."""
    picture = Image.new(mode, (3, 5), fill)
    picture.putpixel(CORNER, corner)
    return picture


@pytest.mark.parametrize(
    ("picture", "options", "kind", "rest", "seen", "opacity"),
    [
        (with_corner("RGBA", (10, 20, 30, 255), (10, 20, 30, 0)), {}, "PNG", (10, 20, 30), (255, 255, 255), 0),
        (with_corner("RGBA", (10, 20, 30, 255), (0, 0, 0, 51)), {}, "PNG", (10, 20, 30), (204, 204, 204), 51),
        (
            with_corner("RGBA", (10, 20, 30, 255), (0, 0, 0, 51)),
            {"lossless": True},
            "WEBP",
            (10, 20, 30),
            (204, 204, 204),
            51,
        ),
        (with_corner("LA", (10, 255), (0, 0)), {}, "PNG", (10, 10, 10), (255, 255, 255), 0),
        (with_corner("L", 10, 99), {"transparency": 99}, "PNG", (10, 10, 10), (255, 255, 255), 0),
        (with_corner("RGB", (1, 2, 3), (9, 8, 7)), {"transparency": (9, 8, 7)}, "PNG", (1, 2, 3), (255, 255, 255), 0),
        (with_corner("I;16", 5000, 99), {"transparency": 99}, "PNG", (19, 19, 19), (255, 255, 255), 0),
    ],
    ids=["clear", "glass", "webp", "grey", "grey level", "colour", "16-bit grey level"],
)
def test_transparent_pixels_lie_on_white_and_their_opacity_is_kept(
    picture: Image.Image, options: dict[str, Any], kind: str, rest: object, seen: object, opacity: int
) -> None:
    found, alpha = read(saved(picture, kind, **options), 15)
    assert found.mode == "RGB"
    assert found.getpixel(CORNER) == seen
    assert found.getpixel((2, 4)) == rest
    assert alpha is not None
    assert (alpha.mode, alpha.size, alpha.getpixel(CORNER), alpha.getpixel((2, 4))) == ("L", (3, 5), opacity, 255)


def test_an_upload_may_have_as_many_pixels_as_are_allowed() -> None:
    assert read(saved(gradient(), "PNG"), 960).picture.size == (48, 20)
    with pytest.raises(Impossible, match="image: 48x20 is more than 959 pixels") as caught:
        read(saved(gradient(), "PNG"), 959)
    assert (caught.value.param, caught.value.code, caught.value.status) == ("image", "invalid_value", 422)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_files_are_refused(kind: str) -> None:
    with pytest.raises(Impossible, match="no PNG, JPEG or WebP"):
        read(saved(gradient(), kind), 960)


def test_base64_both_ways() -> None:
    data = bytes(range(256))
    assert decode_base64(to_base64(data)) == data
    assert decode_base64("data:image/webp;base64," + to_base64(data)) == data
    assert decode_base64("data:," + to_base64(data)) == data


@pytest.mark.parametrize("text", ["QUJD\n", "QU JD", "QUJ", "image/png;base64,QUJD"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(Impossible, match="not valid base64") as caught:
        decode_base64(text)
    assert caught.value.param == "image"
