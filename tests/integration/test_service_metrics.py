"""Known requests to a server on a clock of the test's own, then every figure that it gives compared with what was asked."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from torch import Tensor

from app import decoder, generation, loading, middleware
from app.engine import RETRY_LOADING
from app.loading import load_all, warm_all
from app.main import create_app
from app.metrics import Metrics
from app.middleware import REQUESTS
from app.pace import Pace
from app.settings import Settings
from models import Backbone, load, macs
from models.accelerators import CfgStudent, DeepCache, DeltaDiT, SelectiveGuidance
from models.adapters import WEIGHT_NAME
from models.generate import decode
from models.rows import Conditioning, Row
from tests.pipelines import save_adapter
from tests.serving import PROMPT, Served, aio, serving

Model = Callable[..., Backbone]
LABELS = ("endpoint", "model", "acceleration", "outcome", "stage", "kind", "part", "reason", "cause", "le")
ENCODE, DECODE, FILE = 0.125, 0.5, 0.0625
"""Seconds that texts, a chunk of latents and a picture's file take on the test's clock."""


class Clock:
    """Moves only where something is said to take time. All steps are powers of two, so that sums are exact."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.gate: threading.Semaphore | None = None
        self.at_gate = 0
        self.batches: list[int] = []

    def __call__(self) -> float:
        return self.now

    def module(self, **more: Any) -> Any:
        """In place of `time` in a module."""
        return SimpleNamespace(monotonic=self, perf_counter=self, **more)

    def hold(self) -> None:
        """From now on every forward waits to be let through."""
        self.gate, self.at_gate = threading.Semaphore(0), 0

    def let_all(self) -> None:
        gate, self.gate = self.gate, None
        assert gate is not None
        gate.release(1000)


class Priced:
    """A network without arithmetic: a forward costs `price(rows)` seconds of a clock and predicts zeros."""

    def __init__(self, network: Any, clock: Clock, price: Callable[[int], float], real: bool = False) -> None:
        self._network, self._clock, self._price, self._real = network, clock, price, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]) -> Tensor:
        """Wait at the gate, then let the time pass."""
        if (gate := self._clock.gate) is not None:
            self._clock.at_gate += 1
            gate.acquire(timeout=5)
        self._clock.batches.append(len(rows))
        self._clock.now += self._price(len(rows))
        if self._real:
            out: Tensor = self._network.forward(x, t, conditioning, rows)
            return out
        return torch.zeros_like(x)


def priced(backbone: Backbone, clock: Clock, price: float | Callable[[int], float], real: bool = False) -> Backbone:
    """The same model; a float is the price of a row."""
    of_rows = price if callable(price) else lambda rows: price * rows
    return replace(backbone, network=Priced(backbone.network, clock, of_rows, real))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the whole server; decoding and the writing of files take their time on it."""
    clock = Clock()
    write = generation.encode

    def decoded(*arguments: Any) -> Any:
        clock.now += DECODE
        return decode(*arguments)

    def written(*arguments: Any) -> bytes:
        clock.now += FILE
        return write(*arguments)

    monkeypatch.setattr(decoder, "decode", decoded)
    monkeypatch.setattr(generation, "encode", written)
    monkeypatch.setattr(generation, "time", clock.module(time=lambda: 1_700_000_000.9))
    for module in (loading, middleware):
        monkeypatch.setattr(module, "time", clock.module())
    return clock


async def scraped(served: Served) -> dict[str, float]:
    """All of ours in /metrics that is not nought, by name and label values; when series were made is left out."""
    text = (await served.client.get("/metrics")).text
    return {
        " ".join([sample.name.removeprefix("slipstream_"), *(sample.labels[n] for n in LABELS if n in sample.labels)]): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("slipstream_") and not sample.name.endswith("_created") and sample.value
    }


def part(found: dict[str, float], *names: str) -> dict[str, float]:
    """The samples of some metrics."""
    return {key: value for key, value in found.items() if key.split(" ")[0] in names}


def buckets(found: dict[str, float], name: str) -> dict[str, float]:
    """How many observations each bucket of a histogram has for itself."""
    alone, below = {}, 0.0
    for key, value in found.items():
        if key.startswith(f"{name}_bucket ") and value > below:
            alone[key.split(" ")[-1]], below = value - below, value
    return alone


def test_every_duration_is_in_seconds_and_of_its_own_stage(student_of: Model, clock: Clock) -> None:
    """One request of two images: queue, encode, denoise, decode and files, each on its own and in all."""
    backbone = priced(student_of("sd"), clock, 0.125)
    encode, slow = backbone.conditioner.encode, [ENCODE]

    def encoded(prompts: Sequence[str | None]) -> Any:
        clock.now += slow.pop() if slow else 0.0  # what comes later is remembered
        return encode(prompts)

    @aio
    async def test() -> None:
        async with serving({"sd": backbone}, clock) as served:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(backbone.conditioner, "encode", encoded)
                answer = (await served.post(num_images=2, num_inference_steps=3)).json()
            found = await scraped(served)
        encoding, denoising, files = ENCODE, 3 * 4 * 0.125, 2 * FILE
        assert answer["timing"] == {
            "queue_seconds": 0.0,
            "denoise_seconds": encoding + denoising,
            "decode_seconds": DECODE,
            "total_seconds": encoding + denoising + DECODE + files,
        }
        assert answer["created"] == 1_700_000_000
        sums = {key: value for key, value in found.items() if "seconds_sum" in key}
        assert sums == {
            "stage_duration_seconds_sum encode": encoding,
            "stage_duration_seconds_sum denoise": encoding + denoising,
            "stage_duration_seconds_sum decode": DECODE,
            "stage_duration_seconds_sum serialize": files,
            "tick_duration_seconds_sum sd": denoising,
            "request_duration_seconds_sum sd none ok": encoding + denoising + DECODE + files,
        }
        assert buckets(found, "tick_duration_seconds") == {"0.5": 3}
        assert buckets(found, "request_duration_seconds") == {"3.0": 1}

    test()


def test_the_queue_is_timed_from_acceptance_to_the_first_tick(student_of: Model, clock: Clock) -> None:
    @aio
    async def test() -> None:
        async with serving({"sd": priced(student_of("sd"), clock, 0.125)}, clock, max_rows=2, max_queue=13) as served:
            clock.hold()
            first = asyncio.ensure_future(served.post(num_inference_steps=3))
            await served.until(lambda: clock.at_gate == 1)
            assert part(await scraped(served), "requests_running", "requests_waiting", "queue_capacity", "ready") == {
                "requests_running": 1,
                "queue_capacity": 13,
                "ready": 1,
            }
            clock.now += 4.0  # a long first tick, in whose middle two more come
            others = []
            for steps in (2, 4):
                others.append(asyncio.ensure_future(served.post(num_inference_steps=steps, num_images=1)))
                await served.until(lambda: served.value("requests_waiting") == len(others))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(generation, "encode", lambda *_: b"")  # whenever that is
                clock.let_all()
                timings = [(await one).json()["timing"] for one in (first, *others)]
            found = await scraped(served)
        waited = [0.0, 3 * 0.25 + DECODE, 3 * 0.25 + DECODE + 2 * 0.25 + DECODE]
        assert [timing["queue_seconds"] for timing in timings] == waited
        assert [timing["denoise_seconds"] for timing in timings] == [4.75, 0.5, 1.0]
        assert found["queue_duration_seconds_sum sd"] == sum(waited)
        assert found["queue_duration_seconds_count sd"] == 3
        assert buckets(found, "queue_duration_seconds") == {"0.05": 1, "2.0": 1, "3.0": 1}
        assert found["tick_duration_seconds_sum sd"] == 4.0 + 9 * 0.25

    test()


def test_a_tick_is_counted_by_its_rows_and_by_its_different_plans(student_of: Model, clock: Clock) -> None:
    """Plain (4 steps), DeepCache of two images (4) and a student (3) in the ticks A, ABC, AbC, ABC, b."""

    @aio
    async def test() -> None:
        async with serving({"sd": priced(student_of("sd"), clock, 0.125)}, clock) as served:
            clock.hold()
            posts = [asyncio.ensure_future(served.post(num_inference_steps=4))]
            await served.until(lambda: clock.at_gate == 1)
            cached = {"mode": "deepcache", "interval": 2}
            posts.append(asyncio.ensure_future(served.post(num_inference_steps=4, num_images=2, acceleration=cached)))
            await served.until(lambda: served.value("requests_waiting") == 1)
            posts.append(asyncio.ensure_future(served.post(acceleration={"mode": "cfg_student"})))
            await served.until(lambda: served.value("requests_waiting") == 2)
            clock.let_all()
            assert [(await post).status_code for post in posts] == [200] * 3
            found = await scraped(served)
        assert found["tick_rows_sum sd"] == 2 + 3 * 7 + 4
        assert found["tick_rows_count sd"] == found["tick_plans_count sd"] == 5
        assert buckets(found, "tick_rows") == {"2.0": 1, "4.0": 1, "8.0": 3}
        assert found["tick_plans_sum sd"] == 1 + 2 + 3 + 2 + 1
        assert buckets(found, "tick_plans") == {"1.0": 2, "2.0": 2, "3.0": 1}
        assert part(found, "denoise_steps_total") == {
            "denoise_steps_total sd none full": 4,
            "denoise_steps_total sd deepcache full": 2 * 2,
            "denoise_steps_total sd deepcache reduced": 2 * 2,
            "denoise_steps_total sd cfg_student full": 3,
        }

    test()


def picture() -> str:
    out = io.BytesIO()
    Image.new("RGB", (40, 24), "red").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_every_count_of_known_requests_one_after_another(student_of: Model, backbone_of: Model, clock: Clock) -> None:
    sd, dit = student_of("sd"), backbone_of("dit")
    models = {"sd": priced(sd, clock, 0.125), "dit": priced(dit, clock, 0.5)}
    deepcache = {"mode": "deepcache", "interval": 2}
    wide = {"width": 48, "height": 32}
    # the request; its label; steps, rows of an image; images; what one image costs
    asked: list[tuple[dict[str, Any], str, int, int, int, Any]] = [
        ({}, "sd none", 3, 6, 1, macs(sd, num_inference_steps=3)),
        (
            {"num_inference_steps": 5, "num_images": 3, "acceleration": deepcache},
            "sd deepcache",
            5,
            10,
            3,
            macs(sd, num_inference_steps=5, acceleration=DeepCache(interval=2)),
        ),
        (
            {"guidance_scale": 1.0, "num_inference_steps": 4, "num_images": 2, **wide},
            "sd none",
            4,
            4,
            2,
            macs(sd, num_inference_steps=4, guidance_scale=1.0, **wide),
        ),
        (
            {"acceleration": {"mode": "cfg_student"}},
            "sd cfg_student",
            3,
            3,
            1,
            macs(sd, num_inference_steps=3, acceleration=CfgStudent()),
        ),
        (
            {"num_inference_steps": 4, "acceleration": [{"mode": "selective_guidance", "stop": 0.5}, deepcache]},
            "sd deepcache+selective_guidance",
            4,
            6,
            1,
            macs(sd, num_inference_steps=4, acceleration=[SelectiveGuidance(stop=0.5), DeepCache(interval=2)]),
        ),
        # Image-to-image runs the last steps only: half of four.
        (
            {"image": picture(), "strength": 0.5, "num_inference_steps": 4},
            "sd none",
            2,
            4,
            1,
            macs(sd, num_inference_steps=2),
        ),
        # Heun evaluates twice a step, but for the last.
        (
            {"scheduler": "heun", "num_inference_steps": 3},
            "sd none",
            5,
            10,
            1,
            macs(sd, num_inference_steps=3, scheduler="heun"),
        ),
        (
            {"model": "dit", "prompt": "", "class_label": 3, "num_inference_steps": 4, "num_images": 2,
             "acceleration": {"mode": "delta_dit", "interval": 2, "blocks": 4}},
            "dit delta_dit",
            4,
            8,
            2,
            macs(dit, num_inference_steps=4, acceleration=DeltaDiT(interval=2, blocks=4)),
        ),
    ]  # fmt: skip
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"model": "nope"}, "unknown unknown", "invalid"),
        ({"unheard": 1}, "unknown unknown", "invalid"),
        ({"acceleration": {"mode": "delta_dit"}}, "sd delta_dit", "invalid"),
        ({"model": "dit", "prompt": "", "num_inference_steps": 900}, "dit none", "invalid"),
    ]

    @aio
    async def test() -> None:
        usages, spent = [], []
        async with serving(models, clock, max_queue=7) as served:
            clock.batches.clear()
            for body, *_ in asked:
                began = clock.now
                answer = await served.post(**body)
                assert answer.status_code == 200, answer.text
                usages.append(answer.json()["usage"])
                spent.append(clock.now - began)
            for body, *_ in wrong:
                assert (await served.post(**body)).status_code in (404, 422)
            for path in ("/v1/models", "/generate", "/nowhere"):
                await served.client.get(path)
            openai = {"prompt": "", "model": "sd", "num_inference_steps": 1, "n": 2}
            assert (await served.client.post("/v1/images/generations", json=openai)).status_code == 200
            found = await scraped(served)
        for usage, (_, label, steps, rows, images, report) in zip(usages, asked, strict=True):
            wanted = {"steps": steps, "rows": rows * images, "macs": report.image * images}
            assert usage == wanted | {"macs_unaccelerated": report.image_unaccelerated * images}, label
        assert part(found, "requests_total") == {
            "requests_total /generate sd none ok": 4,
            "requests_total /generate sd deepcache ok": 1,
            "requests_total /generate sd cfg_student ok": 1,
            "requests_total /generate sd deepcache+selective_guidance ok": 1,
            "requests_total /generate dit delta_dit ok": 1,
            "requests_total /v1/images/generations sd none ok": 1,
            "requests_total /generate unknown unknown invalid": 2,
            "requests_total /generate sd delta_dit invalid": 1,
            "requests_total /generate dit none invalid": 1,
        }
        assert found["request_duration_seconds_sum sd deepcache ok"] == spent[1]
        assert found["request_duration_seconds_sum dit delta_dit ok"] == spent[7]
        counts = part(found, "request_duration_seconds_count")
        assert counts == {
            "request_duration_seconds_count sd none ok": 5,
            "request_duration_seconds_count sd deepcache ok": 1,
            "request_duration_seconds_count sd cfg_student ok": 1,
            "request_duration_seconds_count sd deepcache+selective_guidance ok": 1,
            "request_duration_seconds_count dit delta_dit ok": 1,
            "request_duration_seconds_count unknown unknown invalid": 2,
            "request_duration_seconds_count sd delta_dit invalid": 1,
            "request_duration_seconds_count dit none invalid": 1,
        }
        last = macs(sd, num_inference_steps=1).image * 2
        of_sd, of_dit = asked[:7], asked[7:]
        assert part(found, "macs_total") == {
            "macs_total sd computed": sum(report.image * n for *_, n, report in of_sd) + last,
            "macs_total sd saved": sum((report.image_unaccelerated - report.image) * n for *_, n, report in of_sd),
            "macs_total dit computed": sum(report.image * n for *_, n, report in of_dit),
            "macs_total dit saved": sum((r.image_unaccelerated - r.image) * n for *_, n, r in of_dit),
        }
        assert part(found, "images_total") == {"images_total sd": 1 + 3 + 2 + 1 + 1 + 1 + 1 + 2, "images_total dit": 2}
        assert part(found, "denoise_steps_total") == {
            "denoise_steps_total sd none full": 3 + 4 * 2 + 2 + 5 + 2,
            "denoise_steps_total sd deepcache full": 3 * 3,
            "denoise_steps_total sd deepcache reduced": 2 * 3,
            "denoise_steps_total sd cfg_student full": 3,
            "denoise_steps_total sd deepcache+selective_guidance full": 2,
            "denoise_steps_total sd deepcache+selective_guidance reduced": 2,
            "denoise_steps_total dit delta_dit full": 2 * 2,
            "denoise_steps_total dit delta_dit reduced": 2 * 2,
        }
        rows = {"sd": sum(r * n for _, _, _, r, n, _ in of_sd) + 4, "dit": 16}
        ticks = {"sd": sum(steps for _, _, steps, *_ in of_sd) + 1, "dit": 4}
        assert part(found, "tick_rows_sum", "tick_rows_count") == {
            **{f"tick_rows_sum {name}": value for name, value in rows.items()},
            **{f"tick_rows_count {name}": value for name, value in ticks.items()},
        }
        assert found["tick_duration_seconds_sum sd"] == rows["sd"] * 0.125
        assert found["tick_duration_seconds_sum dit"] == rows["dit"] * 0.5
        assert found["tick_plans_sum sd"] == ticks["sd"]
        assert part(found, "queue_duration_seconds_count") == {
            "queue_duration_seconds_count sd": 8,
            "queue_duration_seconds_count dit": 1,
        }
        stages = part(found, "stage_duration_seconds_count")
        assert stages == {
            f"stage_duration_seconds_count {stage}": 9 for stage in ("encode", "denoise", "decode", "serialize")
        }
        assert sum(clock.batches) == rows["sd"] + rows["dit"]
        for name in ("requests_running", "requests_waiting", "requests_rejected_total", "requests_cancelled_total"):
            assert not part(found, name), name
        assert found["queue_capacity"] == 7

    test()


def test_retry_after_is_what_is_left_by_the_rows_and_is_looked_at_anew(
    student_of: Model, backbone_of: Model, clock: Clock
) -> None:
    models = {"sd": priced(student_of("sd"), clock, 0.125), "dit": priced(backbone_of("dit"), clock, 1.0)}

    @aio
    async def test() -> None:
        async with serving(models, clock, max_rows=2, max_queue=2) as served:
            # What loading measured and what ticks of one, two and six rows teach is the same: a price a row.
            assert served.engine.pace.predict([("sd", 1)]) == 0.125
            await served.post(num_images=3, acceleration={"mode": "cfg_student"})
            assert served.engine.pace.predict([("sd", 1), ("dit", 1)]) == 1.125

            clock.hold()
            posts = [asyncio.ensure_future(served.post(num_inference_steps=20))]
            await served.until(lambda: clock.at_gate == 1)
            half = {"mode": "selective_guidance", "stop": 0.5}
            waiting: list[dict[str, Any]] = [
                {"num_inference_steps": 30, "num_images": 2, "acceleration": half},
                {"model": "dit", "prompt": "", "class_label": 1, "num_inference_steps": 7},
            ]
            for body in waiting:
                posts.append(asyncio.ensure_future(served.post(**body)))
                await served.until(lambda: served.value("requests_waiting") == len(posts) - 1)

            async def told() -> int:
                refused = await served.post(acceleration={"mode": "deepcache"})
                assert refused.status_code == 429
                return int(refused.headers["retry-after"])

            # 20 steps of 2 rows; 2 images of 15 steps of 2 rows and 15 of one; 7 steps of 2 rows of the other model
            left = 40 * 0.125 + 2 * 45 * 0.125 + 14 * 1.0
            assert await told() == 31 == -(-left // 1)
            gate = clock.gate
            assert gate is not None
            gate.release(2)
            await served.until(lambda: clock.at_gate >= 3)
            # Two ticks later, a quarter and a half of a second: what was predicted is still good, and then no more.
            assert await told() == 31
            clock.now += 0.125
            assert await told() == -(-(left - 4 * 0.125) // 1) == 30
            clock.let_all()
            for post in posts:
                assert (await post).status_code == 200
            found = await scraped(served)
            assert part(found, "requests_rejected_total") == {"requests_rejected_total queue_full": 2}
            assert found["requests_total /generate sd deepcache rejected"] == 2

    test()
