"""Many different requests at once: each as it would be alone, and every count right afterwards."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from models import Backbone
from tests.serving import Served, aio, pixels, serving, with_plan

Model = Callable[..., Backbone]
TOLERANCE = 2
"""Levels of 255: batches of another shape round differently."""

UNET = [
    None,
    {"mode": "none"},
    {"mode": "deepcache", "interval": 2},
    {"mode": "deepcache", "interval": 3, "branch": 1, "schedule": "nonuniform"},
    {"mode": "depth_skip", "depth": 4},
    {"mode": "cfg_student"},
    {"mode": "selective_guidance", "stop": 0.5},
    [{"mode": "deepcache", "interval": 2}, {"mode": "selective_guidance", "start": 0.2}],
    [{"mode": "deepcache", "interval": 2}, {"mode": "cfg_student"}],
]
DIT = [
    None,
    {"mode": "delta_dit", "interval": 2},
    {"mode": "delta_dit", "interval": 3, "blocks": 2, "boundary": 2},
    {"mode": "selective_guidance", "start": 0.3},
    {"mode": "ditfastattn", "plan": "all"},
    {"mode": "cfg_student"},
]
PLAN_STEPS = 5


def mixed(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests over both models, every accelerator in turn, the rest drawn."""
    draw = random.Random(seed)
    bodies = []
    for i in range(count):
        model, choices = (("sd", UNET), ("pixart", DIT))[i % 2]
        acceleration = choices[(i // 2) % len(choices)]
        fixed = isinstance(acceleration, dict) and acceleration["mode"] == "ditfastattn"
        body: dict[str, Any] = {"model": model, "seed": i, "prompt": f"a {draw.choice(['red', 'blue'])} ring {i % 5}"}
        body["num_inference_steps"] = PLAN_STEPS if fixed else draw.randint(2, 7)
        body["scheduler"] = "ddim" if fixed else draw.choice(["ddim", "euler", "dpmpp_2m", "euler_ancestral"])
        if not fixed:
            body["width"], body["height"] = draw.choice([(32, 32), (32, 32), (32, 32), (48, 32), (16, 16)])
            body["num_images"] = draw.choice([1, 1, 1, 2])
        bodies.append(body | ({} if acceleration is None else {"acceleration": acceleration}))
    return bodies


def models_of(student_of: Model) -> dict[str, Backbone]:
    return {"sd": student_of("sd"), "pixart": with_plan(student_of("pixart-alpha"), "all", PLAN_STEPS)}


async def together(served: Served, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async def one(body: dict[str, Any], delay: float) -> dict[str, Any]:
        await asyncio.sleep(delay)
        answer = await served.post(**body)
        assert answer.status_code == 200, (body, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    draw = random.Random(0)
    return await asyncio.gather(*(one(body, draw.random() * 0.3) for body in bodies))


@aio
async def test_64_at_once_are_each_as_alone(student_of: Model) -> None:
    bodies = mixed(64, seed=5)
    async with serving(models_of(student_of), max_rows=16) as served:
        answers = await together(served, bodies)
        ticks = served.total("tick_plans_count")
        plain = served.total("tick_plans_bucket", le="1.0")
        assert ticks - plain > 10, "ticks with more than one plan"
        for body, answer in zip(bodies, answers, strict=True):
            alone = (await served.post(**body)).json()
            for i in range(len(answer["images"])):
                apart = np.abs(pixels(answer, i) - pixels(alone, i)).max()
                assert apart <= TOLERANCE, (body, apart)
            assert answer["usage"] == alone["usage"]


@aio
async def test_every_count_after_a_known_load(student_of: Model) -> None:
    bodies = [body | {"num_images": 1} for body in mixed(24, seed=6)]
    async with serving(models_of(student_of), max_rows=16) as served:
        answers = await together(served, bodies)
        refused = await served.post(acceleration={"mode": "warp9"})
        assert refused.status_code == 422
        await served.until(lambda: served.value("requests_running") == 0)

        def label(body: dict[str, Any]) -> str:
            given = body.get("acceleration") or {"mode": "none"}
            return "+".join(a["mode"] for a in (given if isinstance(given, list) else [given]))

        order = ["none", "deepcache", "delta_dit", "ditfastattn", "cfg_student", "depth_skip", "selective_guidance"]
        counts = Counter((body["model"], "+".join(sorted(label(body).split("+"), key=order.index))) for body in bodies)
        for (model, acceleration), count in counts.items():
            facts = {"model": model, "acceleration": acceleration, "outcome": "ok"}
            assert served.value("requests_total", endpoint="/generate", **facts) == count
            assert served.value("request_duration_seconds_count", **facts) == count
        invalid = {"model": "unknown", "acceleration": "unknown", "outcome": "invalid"}
        assert served.value("requests_total", endpoint="/generate", **invalid) == 1
        assert served.total("requests_total") == len(bodies) + 1
        for model in ("sd", "pixart"):
            ours = [a for a in answers if a["model"] == model]
            rows = sum(a["usage"]["rows"] for a in ours)
            steps = sum(a["usage"]["steps"] for a in ours)
            computed = sum(a["usage"]["macs"] for a in ours)
            plain = sum(a["usage"]["macs_unaccelerated"] for a in ours)
            assert served.value("tick_rows_sum", model=model) == rows
            assert served.total("denoise_steps_total", model=model) == steps
            assert served.value("macs_total", model=model, kind="computed") == computed
            saved = sum(max(0, a["usage"]["macs_unaccelerated"] - a["usage"]["macs"]) for a in ours)
            assert served.value("macs_total", model=model, kind="saved") == saved
            assert computed < plain
            assert served.value("images_total", model=model) == len(ours)
            assert served.value("queue_duration_seconds_count", model=model) == len(ours)
            ticks = served.value("tick_rows_count", model=model)
            assert served.value("tick_plans_count", model=model) == ticks
            assert served.value("tick_duration_seconds_count", model=model) == ticks
            assert served.value("feature_memory_bytes", model=model) == 0
        for stage in ("encode", "denoise", "decode", "serialize"):
            assert served.value("stage_duration_seconds_count", stage=stage) == len(bodies)
        assert served.total("denoise_steps_total", kind="reduced", acceleration="none") == 0
        assert served.total("denoise_steps_total", kind="reduced", acceleration="deepcache") > 0
        assert served.value("requests_waiting") == served.value("requests_running") == 0
        assert served.value("ready") == 1
        text = (await served.client.get("/metrics")).text
        assert "slipstream_build_info" in text
        assert "process_resident_memory_bytes" in text


@aio
async def test_no_label_grows_with_what_clients_say(student_of: Model) -> None:
    async with serving({"sd": student_of("sd")}) as served:

        def series() -> int:
            return sum(len(family.samples) for family in served.app.state.metrics.registry.collect())

        async def trouble(i: int) -> None:
            await served.post(model=f"model-{i}", headers={"X-Request-Id": f"id-{i}"})
            unknown: dict[str, Any] = {f"field_{i}": i}
            await served.post(**unknown)
            await served.post(scheduler=f"s{i}")
            await served.post(acceleration={"mode": f"m{i}"})
            await served.post(acceleration=[{"mode": "none"}] * (i % 7 + 1), num_inference_steps=1 + i % 2)
            await served.client.post(f"/generate/{i}", json={})
            await served.client.request("BREW", "/generate")

        for i in range(3):
            await trouble(i)
        before = series()
        for i in range(3, 12):
            await trouble(i)
        assert series() == before
