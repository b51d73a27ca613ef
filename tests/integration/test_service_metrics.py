"""Known requests to a server on a clock of the test's own, then every figure compared with what was asked."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from torch import Tensor

from app.engine import decoder, loading
from app.engine.loading import load_all, warm_all
from app.engine.pace import Pace
from app.http import generation, middleware, pictures
from app.http.main import create_app
from app.metrics import Metrics
from app.settings import Settings
from models import Backbone, load, macs
from models.accelerators import CfgStudent, DeepCache, DeltaDiT
from models.generate import decode
from models.reuse.rows import Conditioning, Row
from models.reuse.store import FeatureStore
from tests.pipelines import save_adapter
from tests.serving import PROMPT, Served, aio, serving, until

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
    """A network without arithmetic: a forward costs `price(rows)` seconds of a clock; it predicts and keeps zeros."""

    def __init__(self, network: Any, clock: Clock, price: Callable[[int], float], real: bool = False) -> None:
        self._network, self._clock, self._price, self._real = network, clock, price, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row], store: FeatureStore
    ) -> Tensor:
        """Wait at the gate, then let the time pass."""
        if (gate := self._clock.gate) is not None:
            self._clock.at_gate += 1
            gate.acquire(timeout=60)
        self._clock.batches.append(len(rows))
        self._clock.now += self._price(len(rows))
        if self._real:
            out: Tensor = self._network.forward(x, t, conditioning, rows, store)
            return out
        for row in rows:
            for feature in row.plan.keep:
                kept = x.new_zeros(1, *self._network.sites.shape(feature, *x.shape[2:]))
                store.write([(row.memory, (feature, row.plan.step))], kept)
        return torch.zeros_like(x)


def priced(backbone: Backbone, clock: Clock, price: float | Callable[[int], float], real: bool = False) -> Backbone:
    """The same model; a float is the price of a row."""
    of_rows = price if callable(price) else lambda rows: price * rows
    return replace(backbone, network=Priced(backbone.network, clock, of_rows, real))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The clock of the whole server; decoding and the writing of files take their time on it."""
    clock = Clock()
    write = pictures.encode

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
    yield clock
    if clock.gate is not None:
        clock.let_all()


async def scraped(served: Served) -> dict[str, float]:
    """All of ours in /metrics that is not nought, by name and label values; when series were made is left out."""
    text = (await served.client.get("/metrics")).text
    return {
        " ".join(
            [sample.name.removeprefix("slipstream_"), *(sample.labels[n] for n in LABELS if n in sample.labels)]
        ): (sample.value)
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
    prompts = backbone.parts.prompts
    encode, slow = prompts.encode, [ENCODE]

    def encoded(*arguments: Any) -> Any:
        clock.now += slow.pop() if slow else 0.0  # what comes later is remembered
        return encode(*arguments)

    @aio
    async def test() -> None:
        async with serving({"sd": backbone}, clock=clock) as served:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(prompts, "encode", encoded)
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
        async with serving(
            {"sd": priced(student_of("sd"), clock, 0.125)}, clock=clock, max_rows=2, max_queue=13
        ) as served:
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
        async with serving({"sd": priced(student_of("sd"), clock, 0.125)}, clock=clock) as served:
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
    cached = macs(sd, num_inference_steps=2, acceleration=DeepCache(interval=2), guidance_scale=1.0)
    full, shallow = cached.steps  # of one row
    student = macs(sd, num_inference_steps=1, acceleration=CfgStudent()).image
    wide = macs(sd, num_inference_steps=1, guidance_scale=1.0, width=48, height=32).image
    delta = macs(dit, num_inference_steps=4, acceleration=DeltaDiT(interval=2, blocks=4))
    assert shallow < full < min(student, wide)
    # the request; its label; steps, rows of an image; images; MACs of an image, and without acceleration
    asked: list[tuple[dict[str, Any], str, int, int, int, tuple[int, int]]] = [
        ({}, "sd none", 3, 6, 1, (6 * full, 6 * full)),
        (
            {"num_inference_steps": 5, "num_images": 3, "acceleration": deepcache},
            "sd deepcache",
            5,
            10,
            3,
            (6 * full + 4 * shallow, 10 * full),
        ),
        (
            {"guidance_scale": 1.0, "num_inference_steps": 4, "num_images": 2, "width": 48, "height": 32},
            "sd none",
            4,
            4,
            2,
            (4 * wide, 4 * wide),
        ),
        (
            {"acceleration": {"mode": "cfg_student"}},
            "sd cfg_student",
            3,
            3,
            1,
            (3 * student, 6 * full),
        ),
        (
            {"num_inference_steps": 4, "acceleration": [{"mode": "selective_guidance", "stop": 0.5}, deepcache]},
            "sd deepcache+selective_guidance",
            4,
            6,
            1,
            (3 * full + 3 * shallow, 8 * full),
        ),
        # Image-to-image runs the last steps only: half of four.
        (
            {"image": picture(), "strength": 0.5, "num_inference_steps": 4},
            "sd none",
            2,
            4,
            1,
            (4 * full, 4 * full),
        ),
        # Heun evaluates twice a step, but for the last.
        (
            {"scheduler": "heun", "num_inference_steps": 3},
            "sd none",
            5,
            10,
            1,
            (10 * full, 10 * full),
        ),
        (
            {"model": "dit", "prompt": "", "class_label": 3, "num_inference_steps": 4, "num_images": 2,
             "acceleration": {"mode": "delta_dit", "interval": 2, "blocks": 4}},
            "dit delta_dit",
            4,
            8,
            2,
            (delta.image, delta.image_unaccelerated),
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
        async with serving(models, clock=clock, max_queue=7) as served:
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
        for usage, (_, label, steps, rows, images, (computed, plain)) in zip(usages, asked, strict=True):
            wanted = {"steps": steps, "rows": rows * images, "macs": computed * images}
            assert usage == wanted | {"macs_unaccelerated": plain * images, "evaluations": steps}, label
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
        last = 4 * full
        of_sd, of_dit = asked[:7], asked[7:]
        assert part(found, "macs_total") == {
            "macs_total sd computed": sum(cost[0] * n for *_, n, cost in of_sd) + last,
            "macs_total sd saved": sum((cost[1] - cost[0]) * n for *_, n, cost in of_sd),
            "macs_total dit computed": sum(cost[0] * n for *_, n, cost in of_dit),
            "macs_total dit saved": sum((cost[1] - cost[0]) * n for *_, n, cost in of_dit),
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
        evaluations = {"sd": sum(steps * n for _, _, steps, _, n, _ in of_sd) + 2, "dit": 4 * 2}
        assert part(found, "network_evaluations_total", "forecast_steps_total") == {
            f"network_evaluations_total {name} computed": value for name, value in evaluations.items()
        }
        row_counts = {"sd": sum(r * n for _, _, _, r, n, _ in of_sd) + 4, "dit": 16}
        ticks = {"sd": sum(steps for _, _, steps, *_ in of_sd) + 1, "dit": 4}
        assert part(found, "tick_rows_sum", "tick_rows_count") == {
            **{f"tick_rows_sum {name}": value for name, value in row_counts.items()},
            **{f"tick_rows_count {name}": value for name, value in ticks.items()},
        }
        assert found["tick_duration_seconds_sum sd"] == row_counts["sd"] * 0.125
        assert found["tick_duration_seconds_sum dit"] == row_counts["dit"] * 0.5
        assert found["tick_plans_sum sd"] == ticks["sd"]
        assert part(found, "queue_duration_seconds_count") == {
            "queue_duration_seconds_count sd": 8,
            "queue_duration_seconds_count dit": 1,
        }
        stages = part(found, "stage_duration_seconds_count")
        assert stages == {
            f"stage_duration_seconds_count {stage}": 9 for stage in ("encode", "denoise", "decode", "serialize")
        }
        assert sum(clock.batches) == row_counts["sd"] + row_counts["dit"]
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
        async with serving(models, clock=clock, max_rows=2, max_queue=2) as served:
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
            assert await told() == math.ceil(left) == 31
            # What was predicted is good for half a second, then what has been learned since counts.
            served.engine.pace.observe("sd", 1, 10.0)
            clock.now += 0.5
            assert await told() == 31
            clock.now += 0.125
            dearer = 0.125 + 0.1 * (10.0 - 0.125)
            assert await told() == math.ceil(130 * dearer + 14.0) == 159
            # Two ticks are done, of which one of the other model's, which has less to do, and a short request has come.
            gate = clock.gate
            assert gate is not None
            gate.release(2)
            await served.until(lambda: served.value("requests_waiting") == 1)
            posts.append(asyncio.ensure_future(served.post(num_inference_steps=1)))
            await served.until(lambda: served.value("requests_waiting") == 2)
            clock.now += 0.625
            first = dearer + 0.1 * ((0.25 + 0.625) / 2 - dearer)  # the tick in which time was made to pass
            assert await told() == math.ceil((130 - 2 + 2) * first + 12.0) == 148
            clock.let_all()
            for post in posts:
                assert (await post).status_code == 200
            found = await scraped(served)
            assert part(found, "requests_rejected_total") == {"requests_rejected_total queue_full": 4}
            assert found["requests_total /generate sd deepcache rejected"] == 4

    test()


@aio
async def test_who_is_turned_away_is_told_when_to_come_back_and_counted_by_the_reason(student_of: Model) -> None:
    settings = Settings(model=("sd",), max_rows=2, torch_threads=1, drain_seconds=41.5)
    app = create_app(settings, {"sd": student_of("sd")})
    engine, transport = app.state.engine, httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def refused() -> tuple[int, str, str]:
            answer = await client.post("/generate", json={"prompt": PROMPT})
            return answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]

        assert await refused() == (503, "loading", "5")
        async with app.router.lifespan_context(app):
            await until(lambda: engine.ready)
            engine.drain()
            assert await refused() == (503, "draining", "42")
            assert await refused() == (503, "draining", "42")
        for reason, count in (("loading", 1), ("draining", 2)):
            labels = {"reason": reason}
            assert app.state.metrics.registry.get_sample_value("slipstream_requests_rejected_total", labels) == count


def test_features_are_counted_in_bytes_by_model_while_they_are_held(student_of: Model, clock: Clock) -> None:
    """Two images, guided: a row of each remembers [channels, height, width] numbers of four bytes."""
    backbone = student_of("sd")
    channels = int(backbone.network.module.config["block_out_channels"][0])  # type: ignore[index]

    @aio
    async def test() -> None:
        async with serving({"sd": priced(backbone, clock, 0.125, real=True)}, clock=clock) as served:
            clock.hold()
            body: dict[str, Any] = {
                "width": 48,
                "height": 32,
                "num_images": 2,
                "acceleration": {"mode": "deepcache", "interval": 3},
            }
            post = asyncio.ensure_future(served.post(**body))
            await served.until(lambda: clock.at_gate == 1)
            assert clock.gate is not None
            clock.gate.release(1)
            await served.until(lambda: clock.at_gate == 2)
            found = part(await scraped(served), "feature_memory_bytes")
            clock.let_all()
            assert (await post).status_code == 200
            assert not part(await scraped(served), "feature_memory_bytes")
        size = 2 * 2 * channels * (32 // 2) * (48 // 2) * 4
        assert found == {"feature_memory_bytes sd": size}

    test()


def tensor_bytes(folder: Path) -> int:
    return sum(t.nbytes for file in folder.rglob("*.safetensors") for t in load_file(file).values())


def test_weights_are_told_apart_in_bytes_and_loading_in_seconds(
    pipeline_dir: Callable[[str], Path],
    pipeline_of: Callable[..., Any],
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = save_adapter(pipeline_of("sd").unet, tmp_path / "small", guidance_scale=3.0)
    large = save_adapter(pipeline_of("sd").unet, tmp_path / "large", rank=5, guidance_scale=3.0)
    seconds = {"sd": 7.5, "dit": 2.25}

    def loads(name: str, **options: Any) -> Backbone:
        clock.now += seconds[Path(name).name]
        return priced(load(name, **options), clock, 0.125)

    monkeypatch.setattr("app.engine.loading.models.load", loads)
    monkeypatch.setattr("app.engine.loading.keep_freed_memory", lambda: None)
    names = tuple(str(pipeline_dir(layout)) for layout in ("sd", "dit"))
    adapters = (f"sd={small}", f"sd={large}")
    metrics, pace = Metrics(), Pace()
    settings = Settings(model=names, adapter=adapters, device="cpu", dtype="float32", max_rows=6)
    backbones, caps = load_all(settings, metrics, pace)
    assert caps == {"sd": 6, "dit": 6}
    assert list(backbones) == ["sd", "dit"]
    found = {
        (s.name.removeprefix("slipstream_model_"), *s.labels.values()): s.value
        for family in metrics.registry.collect()
        for s in family.samples
        if s.name.startswith("slipstream_model_")
    }
    encoder = tensor_bytes(pipeline_dir("sd") / "text_encoder")
    assert found == {
        ("weight_bytes", "sd", "base"): tensor_bytes(pipeline_dir("sd")) - encoder,
        ("weight_bytes", "sd", "text_encoder"): encoder,
        ("weight_bytes", "sd", "control"): 0.0,
        ("weight_bytes", "dit", "control"): 0.0,
        ("weight_bytes", "sd", "adapter"): tensor_bytes(small) + tensor_bytes(large),
        ("weight_bytes", "dit", "base"): tensor_bytes(pipeline_dir("dit")),
        ("weight_bytes", "dit", "text_encoder"): 0,
        ("weight_bytes", "dit", "adapter"): 0,
        ("load_duration_seconds", "sd"): 7.5,
        ("load_duration_seconds", "dit"): 2.25,
    }
    ranks = {name: (info.rank, info.parameters) for name, info in backbones["sd"].spec.adapters.items()}
    assert ranks == {"small": (2, tensor_bytes(small) // 4), "large": (5, tensor_bytes(large) // 4)}
    assert pace.predict([("sd", 3), ("dit", 1)]) == 4 * 0.125


@pytest.mark.parametrize(
    ("price", "rows", "measured"),
    [
        (lambda rows: 0.0625 * max(rows / 8, 1), 8, [2, 4, 8, 16, 32, 64]),  # eight cost what two do
        (lambda rows: 0.125 * rows, 2, [2, 4]),  # eight would leave the budget: 0.25 + 0.5 + 1 of 4/3 seconds
    ],
)
def test_loading_measures_how_many_rows_pay(
    price: Callable[[int], float], rows: int, measured: list[int], student_of: Model, clock: Clock
) -> None:
    slow_first: dict[int, float] = dict.fromkeys(measured, 64.0)  # buffers are made: the first tick does not count

    def cost(rows: int) -> float:
        return price(rows) + slow_first.pop(rows, 0.0)

    pace, settings = Pace(), Settings(model=("sd",), max_rows="auto", torch_threads=1)
    caps = warm_all({"sd": priced(student_of("sd"), clock, cost)}, settings, Metrics(), pace)
    assert caps == {"sd": rows}
    turns = clock.batches[::3]
    assert clock.batches == [n for n in turns for _ in range(3)]
    assert (turns[: len(measured)], set(turns), turns[-1]) == (measured, set(measured), rows)
    assert pace.predict([("sd", rows)]) == price(rows)


def test_loading_takes_two_rows_where_memory_ends_and_says_any_other_fault(student_of: Model, clock: Clock) -> None:
    settings = Settings(model=("sd",), max_rows="auto", torch_threads=1)

    def full(error: type[Exception]) -> Backbone:
        def cost(rows: int) -> float:
            if rows > 4:
                raise error("full")
            return 0.0625

        return priced(student_of("sd"), clock, cost)

    pace = Pace()
    assert warm_all({"sd": full(torch.OutOfMemoryError)}, settings, Metrics(), pace) == {"sd": 2}
    assert pace.predict([("sd", 1)]) == 0.03125
    with pytest.raises(LookupError, match="full"):
        warm_all({"sd": full(LookupError)}, settings, Metrics(), Pace())
