"""Steps whose whole prediction is foretold, through the real app: what clients, events and metrics say of them."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.http import service
from models import Backbone, Request, generate, macs
from models.accelerators import Accelerator, DeepCache
from models.networks.sites import level
from models.request import Run
from models.resolve import resolve
from models.reuse.gates import Gate
from models.reuse.plans import Gated as GatedReuse
from models.reuse.plans import Recall, StepPlan
from models.reuse.sites import OUTPUT
from tests.serving import PROMPT, Served, aio, events, hooked, pixels, serving

Model = Callable[..., Backbone]


class Forecast(Accelerator):
    """One step in three is computed; the whole prediction is foretold in the others."""

    mode: str = "forecast"

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """Foretell along the line through the last two predictions."""
        return StepPlan({OUTPUT: Recall(1)} if step % 3 else {})


@pytest.fixture(autouse=True)
def foretelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds from 100 on are foretold, which no body can ask for yet, nor an answer say."""

    def resolved(spec: Any, config: Any, request: Request, outlook: object = None) -> Run:
        if request.seed < 100:
            return resolve(spec, config, request)
        run = resolve(spec, config, replace(request, acceleration=[*request.accelerators, Forecast()]))
        return replace(run, accelerators=request.accelerators)

    monkeypatch.setattr(service, "resolve", resolved)


def test_what_is_foretold_is_told_of_in_every_answer(student_of: Model) -> None:
    """Eight steps, guided, two images: forwards at 0, 3 and 6. Beside them DeepCache of as many and one plain."""
    batches: list[int] = []
    backbone = hooked(student_of("sd"), lambda rows: batches.append(len(rows)))
    row = macs(backbone, num_inference_steps=1, guidance_scale=1.0).image
    size: dict[str, Any] = {"width": 48, "height": 32}
    body = {"num_inference_steps": 8, "seed": 100, **size}
    wide = macs(backbone, num_inference_steps=1, guidance_scale=1.0, **size).image
    assert wide > row
    asked = Request(prompt=PROMPT, num_images=2, acceleration=Forecast(), num_inference_steps=8, seed=100, **size)
    expected = generate(backbone, [asked])[0]

    @aio
    async def test() -> None:
        async with serving({"sd": backbone}, max_rows=16) as served:
            batches.clear()
            answer = (await served.post(num_images=2, **body)).json()
            assert batches == [4] * 3
            usage = {"steps": 8, "evaluations": 3, "rows": 12, "macs": 12 * wide, "macs_unaccelerated": 32 * wide}
            assert answer["usage"] == usage
            for i, image in enumerate(expected.images):
                assert np.abs(pixels(answer, i) - np.asarray(image).astype(np.int16)).max() <= 1

            alone = await served.post(headers={"Accept": "image/png"}, **body)
            facts = {name: alone.headers[f"x-slipstream-{name}"] for name in ("steps", "evaluations", "rows", "macs")}
            assert facts == {"steps": "8", "evaluations": "3", "rows": "6", "macs": str(6 * wide)}
            apart = np.abs(np.asarray(Image.open(io.BytesIO(alone.content))).astype(np.int16) - pixels(answer))
            assert apart.max() <= 1

            streamed = events((await served.post(num_images=2, stream=True, partial_images=2, **body)).text)
            assert [data["step"] for name, data in streamed if name == "progress"] == [6, 12, 16]
            shown = [(data["step"], data["index"]) for name, data in streamed if name == "partial_image"]
            assert shown == [(3, 0), (3, 1), (6, 0), (6, 1)]
            assert streamed[-1][1]["usage"] == usage

            plain, cached, foretold = await asyncio.gather(
                served.post(num_inference_steps=8, seed=1),
                served.post(num_inference_steps=8, seed=2, acceleration={"mode": "deepcache", "interval": 2}),
                served.post(num_inference_steps=8, seed=100),
            )
            assert [a.json()["usage"]["evaluations"] for a in (plain, cached, foretold)] == [8, 8, 3]
            check(served)

    test()


def check(served: Served) -> None:
    """Six images of eight steps are foretold but for three, beside a plain one and one of DeepCache."""
    labels = {"model": "sd"}
    assert served.value("network_evaluations_total", kind="computed", **labels) == 6 * 3 + 8 + 8
    assert served.value("network_evaluations_total", kind="forecast", **labels) == 6 * 5
    assert served.value("forecast_steps_total") == 6 * 5
    steps = {kind: served.total("denoise_steps_total", kind=kind) for kind in ("full", "reduced")}
    assert steps == {"full": 6 * 3 + 8 + 4, "reduced": 6 * 5 + 4}
    assert served.value("tick_rows_sum", **labels) == 2 * (6 * 3 + 8 + 8)
    assert served.value("feature_memory_bytes", **labels) == 0
    assert served.engine.backbones["sd"].features.nbytes == 0


class Gated(Accelerator):
    """The inner levels of a U-Net, reused after the first step wherever the rule is asked: whatever has changed."""

    mode: str = "gated"

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """Asked on every step."""
        return StepPlan({level(0): GatedReuse(Gate(threshold=1e9, probe="input", max_skips=2), Recall())})


def test_what_gates_decided_is_what_an_answer_counts(student_of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven steps of which the gate has the first, the fourth and the last computed in full."""

    def resolved(spec: Any, config: Any, request: Request, outlook: object = None) -> Run:
        run = resolve(spec, config, replace(request, acceleration=[Gated()]))
        return replace(run, accelerators=())

    monkeypatch.setattr(service, "resolve", resolved)
    backbone = student_of("sd")
    options: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": 3.0}
    static = macs(backbone, acceleration=DeepCache(interval=3), **options)

    @aio
    async def test() -> None:
        async with serving({"sd": backbone}) as served:
            usage = (await served.post(num_images=2, **options)).json()["usage"]
            assert (usage["macs"], usage["evaluations"]) == (2 * static.image, 7)
            assert usage["macs_unaccelerated"] == 2 * static.image_unaccelerated
            for kind, steps in (("full", 6), ("reduced", 8)):
                assert served.total("denoise_steps_total", model="sd", kind=kind) == steps

    test()
