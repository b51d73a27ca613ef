"""Bodies, errors, pictures, logs: what goes over the wire without an engine."""

from __future__ import annotations

import base64
import io
import json
import logging
import struct
import zlib
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import ValidationError

from app import errors
from app.engine.job import preview_steps
from app.http.pictures import decode_base64, encode, read
from app.http.problems import body, translate
from app.http.routes.generate import image_format
from app.http.schemas.requests import GenerationRequest, ImagesRequest
from app.logs import Handler, HumanLines, JsonLines
from app.metrics import acceleration_label
from models.accelerators import REGISTRY, DeepCache, NoAcceleration, SelectiveGuidance


def param_of(given: dict[str, Any]) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        GenerationRequest.model_validate(given)
    error = translate(RequestValidationError(caught.value.errors()))
    assert error.status == 422
    return error.param, error.code


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": 3}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"prompt": "", "width": "64"}, "width", "invalid_value"),
        ({"prompt": "", "width": True}, "width", "invalid_value"),
        ({"prompt": "", "guidance_scale": float("nan")}, "guidance_scale", "invalid_value"),
        ({"prompt": "", "sede": 1}, "sede", "unknown_field"),
        ({"prompt": "", "seed": -1}, "seed", "invalid_value"),
        ({"prompt": "", "acceleration": {"mode": "warp9"}}, "acceleration", "invalid_value"),
        ({"prompt": "", "acceleration": {}}, "acceleration", "invalid_value"),
        ({"prompt": "", "acceleration": 3}, "acceleration", "invalid_value"),
        ({"prompt": "", "acceleration": [[]]}, "acceleration", "invalid_value"),
        ({"prompt": "", "acceleration": [{"mode": "none"}] * 50}, "acceleration", "invalid_value"),
        (
            {"prompt": "", "acceleration": {"mode": "deepcache", "interval": 0}},
            "acceleration.interval",
            "invalid_value",
        ),
        (
            {"prompt": "", "acceleration": {"mode": "deepcache", "interval": "3"}},
            "acceleration.interval",
            "invalid_value",
        ),
        ({"prompt": "", "acceleration": [{"mode": "deepcache", "x": 1}]}, "acceleration.x", "unknown_field"),
        ({"prompt": "", "acceleration": {"mode": "ditfastattn", "plan": {}}}, "acceleration.plan", "invalid_value"),
        ({"prompt": "", "output_format": "gif"}, "output_format", "invalid_value"),
    ],
)
def test_refusals_name_the_field(given: dict[str, Any], param: str, code: str) -> None:
    assert param_of(given) == (param, code)


@pytest.mark.parametrize("mode", REGISTRY)
def test_every_mode_is_part_of_the_schema(mode: str) -> None:
    assert f'"{mode}"' in json.dumps(GenerationRequest.model_json_schema())


def test_an_inline_plan_is_no_part_of_the_schema() -> None:
    assert "config_hash" not in json.dumps(GenerationRequest.model_json_schema())


def test_openai_fields_become_ours() -> None:
    asked = ImagesRequest.model_validate({"prompt": "x", "n": 2, "size": "64x32", "seed": 5, "user": "me"}).plain()
    assert (asked.num_images, asked.width, asked.height, asked.seed) == (2, 64, 32, 5)


@pytest.mark.parametrize(
    "given", [{"n": 2, "num_images": 3}, {"size": "8x8", "width": 8}, {"size": "0x8"}, {"size": "big"}]
)
def test_openai_fields_may_not_contradict(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImagesRequest.model_validate({"prompt": "x", **given})


def test_every_error_has_openais_shape_and_a_status() -> None:
    kinds = [errors.ServiceError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        error = kind("why", param="field")
        assert body(error)["error"] == {"message": "why", "type": kind.kind, "param": "field", "code": error.code}
        assert 400 <= kind.status <= 507


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", None),
        ("application/json", None),
        ("image/png", "png"),
        ("image/webp;q=0.9, */*", None),
        ("image/webp, */*;q=0.8", "webp"),
        ("application/json;q=0.1, image/png ; q=0.2", "png"),
        ("image/png;q=0, image/webp;q=0.001", "webp"),
        ("image/png;q=0", None),
        ("IMAGE/PNG;q=much", "png"),
        ("image/webp, image/png", "webp"),
        ("image/*", "jpeg"),
        ("text/html,application/json", None),
        ("", None),
    ],
)
def test_accept(accept: str, expected: str | None) -> None:
    assert image_format(accept, "jpeg") == expected


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(0, 10, set()), (1, 10, {5}), (3, 20, {5, 10, 15}), (3, 2, {1}), (2, 1, set()), (9, 10, set(range(1, 10)))],
)
def test_preview_steps(count: int, steps: int, expected: set[int]) -> None:
    assert preview_steps(count, steps) == expected


def test_acceleration_labels_are_bounded() -> None:
    assert acceleration_label([]) == acceleration_label([NoAcceleration()] * 3) == "none"
    both = [SelectiveGuidance(), DeepCache()]
    assert acceleration_label(both) == acceleration_label(both[::-1] * 2) == "deepcache+selective_guidance"


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(50_000, 50_000), "pixels"),
        (png(12_000, 12_000), "pixels"),
        (png(200, 200), "200x200"),
        (b"GIF89a" + b"\0" * 40, "no PNG"),
        (b"", "no PNG"),
        (png(32, 32), "damaged"),
    ],
)
def test_uploads_are_checked_before_they_are_decoded(data: bytes, words: str) -> None:
    with pytest.raises(errors.Impossible, match=words) as caught:
        read(data, max_pixels=100 * 100)
    assert caught.value.param == "image"


def test_uploads_come_out_upright_and_rgb() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (8, 4)).save(out, "JPEG", exif=exif)
    assert read(out.getvalue(), 1000).picture.size == (4, 8)
    out = io.BytesIO()
    Image.new("RGBA", (3, 5)).save(out, "WEBP")
    assert read(out.getvalue(), 1000).picture.mode == "RGB"


@pytest.mark.parametrize("text", ["data:image/png;base64,QUJD", "QUJD"])
def test_base64(text: str) -> None:
    assert decode_base64(text) == b"ABC"


@pytest.mark.parametrize("text", ["!!!", "Q", "\u00e9"])
def test_bad_base64(text: str) -> None:
    with pytest.raises(errors.Impossible):
        decode_base64(text)


def test_a_png_says_how_to_make_it_again() -> None:
    data = encode(Image.new("RGB", (4, 4)), "png", {"prompt": "ünïcode \N{SNOWMAN}", "seed": 3}, 3)
    chunks = Image.open(io.BytesIO(data)).text  # type: ignore[attr-defined]
    assert json.loads(chunks["slipstream"])["prompt"] == "ünïcode \N{SNOWMAN}"
    assert chunks["seed"] == "3"
    assert base64.b64encode(encode(Image.new("RGB", (4, 4)), "webp", {}, 3))


def test_log_lines() -> None:
    record = logging.LogRecord("slipstream.request", logging.INFO, "", 0, "request", (), None)
    record.facts = {"status": 200, "model": "m\nx"}
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["status"] == 200
    assert "status=200" in HumanLines().format(record)


def test_a_full_disk_loses_lines_only() -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    handler = Handler(full)
    for _ in range(3):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "line", (), None))
    handler.close()
    assert handler.lost == 3
    full.close()
