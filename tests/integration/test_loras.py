"""Style LoRAs by request: diffusers' `set_adapters` as oracle, and what one forward mixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Backbone, Request, generate, load
from models.accelerators import Accelerator, CfgStudent, DeepCache, DeltaDiT, Forecast
from models.errors import OutOfRange, RequestError, UnknownAdapter
from models.request import LoraScale
from tests.integration.test_joint import CASES
from tests.integration.test_joint import drawn as drawn_joint
from tests.integration.test_mixed import distance
from tests.pipelines import save_adapter
from tests.reference import by_loop, by_pipeline, generators, text_conditioning
from tests.styles import network_of, save_style, under

Pipelines = Callable[..., Any]
Directories = Callable[[str], Path]
PROMPT = "a large red circle"
RUN: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 3}
LAYOUTS = ("sd", "sdxl", "pixart-alpha", "flux-dev", "sd3")
STYLES = {"one": 1, "two": 2}


def request(*loras: LoraScale, **options: Any) -> Request:
    return Request(**{**RUN, "loras": loras, **options})


def drawn(layout: str, pipeline: Any) -> Tensor:
    """Latents of `request()` by diffusers, guided."""
    if layout in CASES:
        case = CASES[layout]
        options = {**case.guided, "num_inference_steps": 3}
        latents, _ = drawn_joint(pipeline, case, generator=generators(3, 1), height=32, width=32, **options)
        return latents
    if layout.startswith("pixart"):
        rows = text_conditioning(pipeline, PROMPT, "dull", guided=True)
        return by_loop(pipeline, "ddim", rows, steps=3, scale=3.0, seeds=generators(3, 1)).latents
    inputs: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": "dull",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
    }
    return by_pipeline(pipeline, "ddim", generator=generators(3, 1), **inputs).latents


def asked(layout: str) -> dict[str, Any]:
    """The same for us."""
    if layout in CASES:
        return {**CASES[layout].guided, "width": 32, "height": 32}
    return {"negative_prompt": "dull", "guidance_scale": 3.0, "scheduler": "ddim"}


def packed(layout: str, latents: Tensor) -> Tensor:
    return CASES[layout].pack(latents) if layout in CASES else latents


@pytest.fixture(scope="module")
def styled(
    pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Backbone, dict[str, Path]]]:
    """A layout's backbone with two styles, of unlike rank and alpha, and a student; the styles' files."""
    root, made = tmp_path_factory.mktemp("styles"), {}

    def of(layout: str) -> tuple[Backbone, dict[str, Path]]:
        if layout not in made:
            pipeline, folder = pipeline_of(layout), root / layout
            files = {
                "one": save_style(pipeline, folder / "one.safetensors", 1),
                "two": save_style(pipeline, folder / "two.safetensors", 2, rank=3, alpha=None),
            }
            student = save_adapter(network_of(pipeline), folder / "student", guidance_scale=3.0)
            directory = str(pipeline_dir(layout))
            backbone = load(directory, device="cpu", dtype="float32", adapters={**files, "student": student})
            made[layout] = backbone, files
        return made[layout]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_and_two_styles_equal_diffusers(layout: str, styled: Any, pipeline_of: Pipelines) -> None:
    """Alone, and all in one batch."""
    backbone, files = styled(layout)
    asks = [{"one": 1.0}, {"two": 0.6}, {"one": 0.7, "two": -0.4}, {}]
    requests = [request(*(LoraScale(n, s) for n, s in ask.items()), **asked(layout)) for ask in asks]
    together = generate(backbone, requests)
    alone = [generate(backbone, [one])[0] for one in requests]
    plain = drawn(layout, pipeline_of(layout))
    for ask, mixed, single in zip(asks, together, alone, strict=True):
        pipeline = under(pipeline_of(layout), {files[n]: s for n, s in ask.items()}) if ask else pipeline_of(layout)
        expected = drawn(layout, pipeline)
        assert distance(packed(layout, single.latents), expected) <= 1e-4
        assert distance(mixed.latents, single.latents) <= 1e-4
        assert not ask or distance(expected, plain) > 5e-3


MIXES: dict[str, list[list[Accelerator]]] = {
    "sd": [[CfgStudent()], [DeepCache(interval=2)], [Forecast(interval=2, order=1)]],
    "pixart-alpha": [[CfgStudent()], [DeltaDiT(interval=2)], [Forecast(interval=2, order=1)]],
}


@pytest.mark.parametrize("layout", MIXES)
def test_alone_is_mixed_with_students_and_caches(layout: str, styled: Any) -> None:
    """Plain rows, students, two different styles at different scales, each accelerated differently, sixteen rows."""
    backbone, _ = styled(layout)
    scale = {"scheduler": "ddim", "num_inference_steps": 4}
    one, two = LoraScale("one", 0.9), LoraScale("two", 0.5)
    requests = [request(**scale), request(one, **scale), request(two, one, seed=5, **scale)]
    for acceleration in MIXES[layout]:
        requests += [request(acceleration=acceleration, **scale)]
        requests += [request(style, acceleration=acceleration, seed=7, **scale) for style in (one, two)]
    together = generate(backbone, requests)
    for i, (one_request, mixed) in enumerate(zip(requests, together, strict=True)):
        assert distance(mixed.latents, generate(backbone, [one_request])[0].latents) <= 1e-5, i


def test_plain_rows_beside_styles_are_bitwise_those_of_the_plain_model(
    styled: Any, backbone_of: Callable[..., Backbone]
) -> None:
    backbone, _ = styled("sd")
    mixed = generate(backbone, [request(), request(LoraScale("one"), seed=9)])
    alike = generate(backbone_of("sd"), [request(), request(seed=9)])
    assert torch.equal(mixed[0].latents, alike[0].latents)
    assert not torch.equal(mixed[1].latents, alike[1].latents)


def test_what_styles_cost_is_counted(styled: Any) -> None:
    backbone, _ = styled("sd")
    both = [LoraScale("one"), LoraScale("two")]
    plain, one, two = (generate(backbone, [request(*both[:n])])[0].usage for n in range(3))
    assert plain.macs == plain.macs_unaccelerated == one.macs_unaccelerated
    assert plain.macs < one.macs < two.macs < 1.3 * plain.macs
    again = generate(backbone, [request(both[1])])[0].usage
    assert two.macs - one.macs == again.macs - plain.macs


@pytest.mark.parametrize(
    ("loras", "error", "complaint"),
    [
        ([{"name": "nobody"}], UnknownAdapter, r"loras\.0\.name: 'nobody' is no LoRA of .* \(registered: one, two\)"),
        ([{"name": "student"}], UnknownAdapter, "a guidance student, for cfg_student"),
        ([{"name": "one"}, {"name": "one"}], OutOfRange, "named twice"),
        ([{"name": "one", "scale": 11.0}], OutOfRange, r"loras\.0\.scale: 11.0 is not in -10..10"),
        ([{"name": "one", "scale": float("nan")}], OutOfRange, "nan is not in"),
        ([{"name": "one"}] * 9, OutOfRange, "9 are more than 8"),
        ([{"weight": 1}], RequestError, "each is a name and a scale"),
    ],
)
def test_refused_requests(loras: Any, error: type[Exception], complaint: str, styled: Any) -> None:
    with pytest.raises(error, match=complaint):
        generate(styled("sd")[0], [Request(prompt=PROMPT, loras=loras)])
