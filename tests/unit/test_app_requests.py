"""The fields of a request: what each is where it is not given, and the last value that each takes."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from app.http.problems import translate
from app.http.schemas.requests import GenerationRequest, ImagesRequest
from models.accelerators import REGISTRY, DeepCache, SelectiveGuidance

MOST_SEED = 2**63 - 2


def test_defaults() -> None:
    assert GenerationRequest.model_validate({"prompt": "x"}).model_dump() == {
        "prompt": "x",
        "negative_prompt": None,
        "model": None,
        "class_label": None,
        "width": None,
        "height": None,
        "num_inference_steps": None,
        "guidance_scale": None,
        "true_cfg_scale": None,
        "quality": None,
        "loras": [],
        "image_guidance_scale": None,
        "mask": None,
        "seed": None,
        "num_images": 1,
        "scheduler": None,
        "image": None,
        "control": None,
        "strength": None,
        "timestep_warp": 1.0,
        "acceleration": None,
        "output_format": "png",
        "output_compression": None,
        "stream": False,
        "partial_images": 0,
        "timeout_seconds": None,
    }


RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("class_label", [0, 10**6], [-1]),
    ("width", [1, 10**6], [0, -8]),
    ("height", [1, 10**6], [0, -8]),
    ("num_inference_steps", [1, 1000], [0, 1001]),
    ("guidance_scale", [0.0, 100.0], [-0.01, 100.01]),
    ("seed", [0, MOST_SEED], [-1, MOST_SEED + 1]),
    ("num_images", [1, 1000], [0, 1001]),
    ("strength", [0.0, 1.0], [-0.01, 1.01]),
    ("timestep_warp", [0.05, 20.0], [0.049, 20.01]),
    ("partial_images", [0, 10], [-1, 11]),
    ("timeout_seconds", [0.001, 10.0**9], [0, 0.0, -1.0]),
    ("output_format", ["png", "jpeg", "webp"], ["PNG", "gif", ""]),
    ("stream", [True, False], ["true", 1]),
]
OPENAI: list[tuple[str, list[Any], list[Any]]] = [
    ("n", [1, 1000], [0, 1001]),
    ("size", ["auto", "1x1", "99999x99999", "64x8"], ["100000x1", "1x100000", "0x8", "8x0", "8X8", "8x", "8x8x8", ""]),
    ("response_format", ["b64_json", "url"], ["URL"]),
    ("user", ["", "x" * 512], ["x" * 513]),
]


def refusal(kind: type[GenerationRequest] | type[ImagesRequest], given: dict[str, Any]) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"prompt": "x"} | given)
    error = translate(RequestValidationError(caught.value.errors()))
    assert (error.status, error.kind) == (422, "invalid_request_error")
    return error.param, error.code


@pytest.mark.parametrize(("name", "good", "bad"), RANGES, ids=[name for name, _, _ in RANGES])
def test_ranges(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(GenerationRequest.model_validate({"prompt": "x", name: value}), name) == value
        assert getattr(ImagesRequest.model_validate({"prompt": "x", name: value}).plain(), name) == value
    for value in bad:
        assert refusal(GenerationRequest, {name: value}) == refusal(ImagesRequest, {name: value})
        assert refusal(GenerationRequest, {name: value}) == (name, "invalid_value")


@pytest.mark.parametrize(("name", "good", "bad"), OPENAI, ids=[name for name, _, _ in OPENAI])
def test_ranges_of_openais_fields(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(ImagesRequest.model_validate({"prompt": "x", name: value}), name) == value
    for value in bad:
        assert refusal(ImagesRequest, {name: value}) == (name, "invalid_value")
        assert refusal(GenerationRequest, {name: value}) == (name, "unknown_field")


def test_openais_fields_stand_for_ours() -> None:
    def plain(**given: Any) -> GenerationRequest:
        return ImagesRequest.model_validate({"prompt": "x"} | given).plain()

    assert (plain(size="24x40").width, plain(size="24x40").height) == (24, 40)
    assert (plain(size="auto").width, plain(size="auto", width=8).width, plain(height=8).height) == (None, 8, 8)
    assert (plain().num_images, plain(n=4).num_images, plain(num_images=5).num_images) == (1, 4, 5)
    assert plain(n=4, num_images=4).num_images == 4
    ours = {"negative_prompt": "y", "model": "m", "seed": 5, "strength": 0.3, "stream": True, "timeout_seconds": 2.0}
    assert plain(**ours).model_dump() == GenerationRequest.model_validate({"prompt": "x"} | ours).model_dump()
    assert type(plain()) is GenerationRequest


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 1, "num_images": 2}, "n and num_images differ"),
        ({"n": 2, "num_images": 1}, "n and num_images differ"),
        ({"size": "8x8", "width": 8}, "size and width or height are both given"),
        ({"size": "8x8", "height": 8}, "size and width or height are both given"),
    ],
)
def test_openais_fields_and_ours_may_not_differ(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ImagesRequest.model_validate({"prompt": "x"} | given)


def test_accelerators_however_they_were_given() -> None:
    def accelerators(acceleration: Any) -> Any:
        return GenerationRequest.model_validate({"prompt": "x", "acceleration": acceleration}).accelerators

    one, two = {"mode": "selective_guidance", "stop": 0.5}, {"mode": "deepcache", "interval": 2}
    assert accelerators(None) == accelerators([]) == ()
    assert accelerators(one) == accelerators([one]) == (SelectiveGuidance(stop=0.5),)
    assert accelerators([one, two]) == (SelectiveGuidance(stop=0.5), DeepCache(interval=2))


def test_as_many_accelerators_as_there_are_modes() -> None:
    given = {"acceleration": [{"mode": "none"}] * len(REGISTRY)}
    assert len(GenerationRequest.model_validate({"prompt": "x"} | given).accelerators) == len(REGISTRY)
    assert refusal(GenerationRequest, {"acceleration": [{"mode": "none"}] * (len(REGISTRY) + 1)}) == (
        "acceleration",
        "invalid_value",
    )
