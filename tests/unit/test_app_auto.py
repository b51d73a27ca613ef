"""Auto and quality over HTTP: what is answered, counted and listed, and what the engine expects of a request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.engine.engine import Engine
from app.engine.pace import DEVIATIONS, FIRST_DEVIATION, FIRST_GUESS, FIRST_RATIO, Pace
from app.metrics import Metrics
from app.settings import Settings
from models.accelerators import Auto
from tests.faked import faked, opened, request_of
from tests.serving import aio
from tests.unit.fakes import FakeBackbone, Hand, make_job, tiny_spec
from tests.unit.specs import profile, unet_spec

SPEC = unet_spec(native_width=64, native_height=32, default_steps=10, profiles={"ddim-10": profile()})
AUTO = {"mode": "auto", "prefer": "balanced"}


@aio
async def test_the_answer_is_what_ran_and_what_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, {"unet": SPEC}) as served:
        body = (await served.post(acceleration=AUTO, seed=3)).json()
        [mode] = body["acceleration"]
        assert (mode["mode"], mode["evaluations"]) == ("forecast", 5)
        promised = {"psnr": 38.0, "ssim": 0.9, "psnr_converged": 38.5, "speedup": 2.0}
        facts = {"name": "ddim-10", "candidate": "forecast-5", "promised": promised, "differences": [], "moved": False}
        assert body["profile"] == facts
        again = request_of(opened(body["images"][0]["b64_json"]))
        assert [mode["mode"] for mode in again["acceleration"]] == ["forecast"]
        answer = await served.post(headers={"Accept": "image/png"}, quality="low")
        assert json.loads(answer.headers["X-Slipstream-Profile"])["candidate"] == "unipc-3"
        assert "X-Slipstream-Profile" not in (await served.post(headers={"Accept": "image/png"})).headers
        assert (await served.post("/v1/images/generations", quality="high")).json()["profile"]["candidate"] == "unipc-8"
        assert (await served.post(quality="auto")).json()["profile"] is None
        assert [job.run.num_inference_steps for job in served.engine.jobs] == [10, 3, 10, 8, 10]


@aio
async def test_choices_and_moves_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, {"unet": SPEC}) as served:
        await served.post(acceleration=AUTO)
        await served.post(quality="medium")
        served.engine.wait = 3.0  # a plain step of two rows takes 0.2 s, ten of them 2 s
        late = (await served.post(acceleration={**AUTO, "flexible": True}, timeout_seconds=5)).json()
        assert (late["profile"]["candidate"], late["profile"]["moved"]) == ("forecast-5", False)
        late = (await served.post(acceleration={**AUTO, "flexible": True}, timeout_seconds=4.8)).json()
        assert (late["profile"]["candidate"], late["profile"]["moved"]) == ("student", True)
        assert served.value("auto_choices_total", model="unet", candidate="forecast-5") == 3
        assert served.value("auto_choices_total", model="unet", candidate="student") == 1
        assert served.value("auto_moved_total") == 1
        facts = {"endpoint": "/generate", "model": "unet", "outcome": "ok"}
        assert served.value("requests_total", acceleration="forecast", **facts) == 3
        assert served.value("requests_total", acceleration="auto", **facts) == 0


@aio
async def test_the_time_that_is_left_includes_the_wait_and_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, {"unet": SPEC}) as served:
        wish = {"mode": "auto", "max_seconds": 4.0}
        assert (await served.post(acceleration=wish)).json()["profile"]["candidate"] == "unipc-8"
        two = await served.post(acceleration=wish, num_images=2)
        assert two.json()["profile"]["candidate"] == "unipc-8"  # 0.8 of four seconds
        served.engine.wait = 1.0
        two = await served.post(acceleration=wish, num_images=2)
        assert two.json()["profile"]["candidate"] == "forecast-5"
        served.engine.wait = 4.0
        assert await served.refused(acceleration=wish) == (422, "acceleration.max_seconds", "out_of_range")


@aio
async def test_refusals_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, {"unet": SPEC}) as served:
        both = await served.refused(acceleration=AUTO, quality="low")
        assert both == (422, "quality", "accelerator_conflict")
        assert await served.refused(quality="hd") == (422, "quality", "invalid_value")
        pair = [AUTO, {"mode": "deepcache"}]
        assert await served.refused(acceleration=pair) == (422, "acceleration", "accelerator_conflict")
        assert await served.refused(acceleration=AUTO, scheduler="euler") == (422, "acceleration", "no_profile")
        answer = await served.post(acceleration=AUTO, scheduler="euler")
        assert "slipstream calibrate --model unet --scheduler euler" in answer.json()["error"]["message"]


@aio
async def test_models_list_their_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = unet_spec(native_width=64, native_height=32)
    async with faked(monkeypatch, {"unet": SPEC, "bare": bare}) as served:
        known, none = (await served.client.get("/v1/models")).json()["data"]
        [measured] = known["profiles"]
        size = {"scheduler": "ddim", "num_inference_steps": 10, "width": 64, "height": 32, "guidance_scale": 4.0}
        assert {name: measured[name] for name in size} == size
        assert measured["prefer"] == {"fidelity": "unipc-8", "balanced": "forecast-5", "speed": "unipc-3"}
        assert [one["candidate"] for one in measured["front"]] == ["unipc-3", "student", "forecast-5", "unipc-8"]
        assert measured["front"][0]["num_inference_steps"] == 3
        assert measured["front"][2]["acceleration"] == [{"mode": "forecast", "evaluations": 5}]
        assert "auto" in [one["mode"] for one in known["accelerators"]]
        assert "auto" not in [one["mode"] for one in none["accelerators"]]
        assert none["profiles"] == []


def test_a_tick_takes_what_ticks_of_so_many_rows_took() -> None:
    pace = Pace()
    assert pace.tick("m", 4) == FIRST_GUESS * 4
    pace.observe_tick("m", 2, 1.0)
    pace.observe_tick("m", 8, 2.5)
    assert [pace.tick("m", rows) for rows in (1, 2, 4, 8, 16)] == pytest.approx([1.0, 1.0, 1.5, 2.5, 5.0])
    assert pace.predict([("m", 1)]) == FIRST_GUESS  # a trial says nothing of rows in general
    pace.observe("m", 2, 2.0)
    assert pace.tick("m", 2) == pytest.approx(1.1)
    assert pace.predict([("m", 3)]) == pytest.approx(3.0)


def test_the_outlook_is_all_that_was_accepted_before() -> None:
    engine = Engine(lambda pace: ({}, {}), Settings(model=("unet",)), Metrics())
    engine.pace.observe("unet", 2, 0.5)
    engine._state = "ready"
    assert engine.outlook("unet", 2, 9.0).wait == 0.0
    engine._thread = _Alive()  # type: ignore[assignment]
    for _ in range(2):
        engine.submit(make_job(steps=6))
    expected = engine.outlook("unet", 4, 9.0)
    assert (expected.wait, expected.step, expected.deadline) == pytest.approx((12 * 0.25, 1.0, 9.0))
    assert expected.slack == engine.pace.slack("unet")


def test_the_slack_is_what_runs_by_themselves_took_beyond_their_steps() -> None:
    spec = tiny_spec(native_width=64, native_height=32, default_steps=10, profiles={"ddim-10": profile()})
    hand = Hand({"unet": FakeBackbone(spec)})
    first = hand.pace.slack("unet")
    assert first == FIRST_RATIO + DEVIATIONS * FIRST_DEVIATION
    hand.pace.observe_tick("unet", 2, 0.1)

    def pass_time(seconds: float) -> None:
        hand.clock.now += seconds

    hand.backbone.before = lambda seeds: pass_time(0.1)
    hand.backbone.before_decode = lambda seeds: pass_time(0.3)
    wish: dict[str, Any] = {"acceleration": Auto(prefer="speed"), "guidance_scale": 4.0}
    hand.add(1, steps=10, **wish)
    hand.work()  # three steps of 0.1 s, and a picture of 0.3
    mean = FIRST_RATIO + (2.0 - FIRST_RATIO) / 8
    deviation = FIRST_DEVIATION + (2.0 - FIRST_RATIO - FIRST_DEVIATION) / 4
    alone = hand.pace.slack("unet")
    assert alone == pytest.approx(mean + DEVIATIONS * deviation)
    for seed in (2, 3):
        hand.add(seed, steps=10, **wish)
    hand.work()  # side by side, which says nothing of either
    hand.add(4, steps=10, guidance_scale=4.0)
    hand.work()  # not by a profile
    assert hand.pace.slack("unet") == alone
    assert len(hand.ended) == 4


class _Alive:
    def is_alive(self) -> bool:
        return True
