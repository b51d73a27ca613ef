"""Caches that decide while they run, over HTTP: what answers, headers and metrics say of them, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from models import Backbone
from tests.serving import aio, serving

Model = Callable[..., Backbone]
ASKED: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": 3.0, "num_images": 2}
EVERY = {"threshold": 100.0, "max_skips": 2}  # every change is small: steps 0, 3 and 6 are computed


@aio
async def test_what_was_decided_is_counted(student_of: Model) -> None:
    """Two images each: of six steps in which a gate has a choice four are skipped, two are computed."""
    models = {"sd": student_of("sd"), "pixart": student_of("pixart-alpha")}
    modes = {
        "sd": {"mode": "adaptive_deepcache", "branch": 1, **EVERY},
        "pixart": {"mode": "first_block_cache", "order": 1, **EVERY},
    }
    async with serving(models) as served:
        answers = await asyncio.gather(
            *(served.post(model=model, acceleration=mode, **ASKED) for model, mode in modes.items())
        )
        for (model, mode), answer in zip(modes.items(), answers, strict=True):
            found = answer.json()
            labels = {"model": model, "mode": str(mode["mode"])}
            assert found["acceleration"][0] | mode == found["acceleration"][0]
            assert found["usage"]["macs"] < 0.9 * found["usage"]["macs_unaccelerated"]
            assert found["usage"]["evaluations"] == 7
            assert served.value("gate_decisions_total", decision="skipped", **labels) == 2 * 4
            # The third skip in a row is no choice of the change, but the rule's own: it was asked all the same.
            assert served.value("gate_decisions_total", decision="computed", **labels) == 2 * 2
            assert served.total("denoise_steps_total", model=model, kind="reduced") == 2 * 4
            assert served.total("denoise_steps_total", model=model, kind="full") == 2 * 3
            assert served.value("feature_memory_bytes", model=model) == 0


@aio
async def test_taylorseer_and_magcache_are_answered_with_what_they_ran(student_of: Model) -> None:
    async with serving({"pixart": student_of("pixart-alpha")}) as served:
        modes: list[dict[str, Any]] = [
            {"mode": "taylorseer", "interval": 2, "warmup": 1},
            {"mode": "magcache", "ratios": [1.0] * 250},
            {"mode": "forecast", "steps": [0, 1, 4]},
        ]
        for mode in modes:
            found = (await served.post(acceleration=mode, **ASKED)).json()
            assert found["acceleration"][0] | mode == found["acceleration"][0]
            assert found["usage"]["macs"] < 0.7 * found["usage"]["macs_unaccelerated"]
            picture = await served.client.post(
                "/generate", json={"prompt": "a ring", "acceleration": mode}, headers={"Accept": "image/png"}
            )
            assert picture.status_code == 200
            assert len(str(picture.headers)) < 4096
        assert served.total("gate_decisions_total") == 0


@aio
async def test_what_a_model_was_not_fitted_for_is_refused(student_of: Model) -> None:
    async with serving({"pixart": student_of("pixart-alpha")}) as served:
        for mode, field in (("teacache", "coefficients"), ("magcache", "ratios")):
            answer = await served.post(acceleration={"mode": mode})
            assert answer.status_code == 422
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("no_profile", f"acceleration.{field}")
            assert "slipstream calibrate --model" in error["message"]
