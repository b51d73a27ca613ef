"""/v1/images/jobs over the real engine: what is answered, what survives, who sees what."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from app.errors import StoreFull
from models import Backbone
from models.adapters.registry import Adapters
from tests.serving import PROMPT, Served, aio, events, hooked, pixels, serving

Models = Callable[..., Backbone]
JOBS = "/v1/images/jobs"


class Gate:
    """A network that stands still while it is shut; `reached` says that a forward waits at it."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.opened.set()

    def __call__(self, _: Any) -> None:
        self.reached.set()
        self.opened.wait(20)

    def shut(self) -> None:
        self.reached.clear()
        self.opened.clear()


async def submit(served: Served, headers: dict[str, str] | None = None, **body: Any) -> Any:
    answer = await served.post(JOBS, headers, **body)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"{JOBS}/{answer.json()['id']}"
    return answer.json()


async def ended(served: Served, job: str, **options: Any) -> Any:
    for _ in range(2000):
        found = (await served.client.get(f"{JOBS}/{job}", **options)).json()
        if found["status"] in ("completed", "failed", "cancelled"):
            return found
        await asyncio.sleep(0.01)
    raise TimeoutError(found)


def shown(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


def picture() -> str:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((40, 24)).convert("RGB").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def half_clear() -> str:
    """A mask that has the left half repainted."""
    mask, out = Image.new("RGBA", (40, 24), "black"), io.BytesIO()
    mask.paste((0, 0, 0, 0), (0, 0, 20, 24))
    mask.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@aio
async def test_a_job_gives_what_a_live_request_gives(student_of: Models, tmp_path: Path) -> None:
    body: dict[str, Any] = {
        "num_images": 2,
        "seed": 7,
        "acceleration": {"mode": "deepcache", "interval": 2},
        "height": 48,
    }
    async with serving({"sd": student_of("sd")}, data_dir=tmp_path) as served:
        live = (await served.post(**body)).json()
        accepted = await submit(served, **body)
        assert (accepted["object"], accepted["seed"], accepted["images"]) == ("image.job", 7, [])
        job = await ended(served, accepted["id"])
        assert (job["status"], job["progress"], job["error"], job["position"]) == ("completed", 100, None, None)
        assert job["usage"] == live["usage"]
        assert job["acceleration"] == live["acceleration"]
        assert [image["seed"] for image in job["images"]] == [7, 8]
        assert job["created_at"] <= job["started_at"] <= job["completed_at"] < job["expires_at"]
        for index, image in enumerate(job["images"]):
            answer = await served.client.get(image["url"])
            assert answer.headers["content-type"] == "image/png"
            assert np.abs(shown(answer.content) - pixels(live, index)).max() <= 1
        again = (await served.client.post("/generate", json=job["request"])).json()
        assert np.abs(pixels(again, 1) - pixels(live, 1)).max() <= 1
        absent = await served.client.get(f"{JOBS}/{job['id']}/content?index=2")
        assert (absent.status_code, absent.json()["error"]["param"]) == (404, "index")
        assert served.total("images_total") == 6


@aio
async def test_a_seed_that_is_drawn_and_an_upload_survive_the_process(student_of: Models, tmp_path: Path) -> None:
    """Stopped while it runs, with another waiting: both run in the next process, from the seeds of the first."""
    gate = Gate()
    models = {"sd": hooked(student_of("sd"), gate)}
    start: dict[str, Any] = {"image": picture(), "mask": half_clear(), "strength": 0.5, "output_format": "webp"}
    async with serving(models, data_dir=tmp_path, jobs_in_flight=1) as served:
        gate.shut()
        first = await submit(served, seed=None, **start)
        second = await submit(served, seed=None)
        await asyncio.to_thread(gate.reached.wait, 20)
        waiting = (await served.client.get(f"{JOBS}/{second['id']}")).json()
        assert (waiting["status"], waiting["position"]) == ("queued", 0)
        threading.Timer(0.2, gate.opened.set).start()
        served.engine.close(0.01)
    async with serving({"sd": student_of("sd")}, data_dir=tmp_path) as served:
        for before in (first, second):
            after = await ended(served, before["id"])
            assert (after["status"], after["seed"]) == ("completed", before["seed"])
        assert first["seed"] != second["seed"]
        assert first["has_image"]
        assert not {"image", "mask"} & first["request"].keys()
        made = await served.client.get(f"{JOBS}/{first['id']}/content")
        assert made.headers["content-type"] == "image/webp"
        live = await served.post(seed=first["seed"], **start)
        assert np.abs(shown(made.content) - pixels(live.json())).mean() < 1
        unmasked = await served.post(seed=first["seed"], **{**start, "mask": None})
        assert np.abs(shown(made.content) - pixels(unmasked.json())).mean() > 1


@aio
async def test_the_same_key_is_the_same_job(student_of: Models, tmp_path: Path) -> None:
    async with serving({"sd": student_of("sd")}, data_dir=tmp_path) as served:
        key = {"Idempotency-Key": "night-1"}
        first = await submit(served, key, seed=None)
        assert (await submit(served, key, seed=None))["id"] == first["id"]
        other = await served.post(JOBS, key, seed=3)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert other.json()["error"]["param"] == "Idempotency-Key"
        listed = (await served.client.get(JOBS)).json()
        assert [job["id"] for job in listed["data"]] == [first["id"]]


@aio
async def test_events_begin_with_the_state_and_resume(student_of: Models, tmp_path: Path) -> None:
    gate = Gate()
    async with serving({"sd": hooked(student_of("sd"), gate)}, data_dir=tmp_path) as served:
        gate.shut()
        job = (await submit(served, num_inference_steps=5))["id"]
        following = asyncio.create_task(served.client.get(f"{JOBS}/{job}/events"))
        await asyncio.sleep(0.05)
        gate.opened.set()
        text = (await following).text
        names = [name for name, _ in events(text)]
        assert names[-1] == "completed"
        steps = [data["step"] for name, data in events(text) if name == "progress"]
        assert steps == sorted(steps)
        assert events(text)[-1][1]["id"] == job
        numbers = [line.removeprefix("id: ") for line in text.splitlines() if line.startswith("id: ")]
        assert numbers[-1] == "end"
        rest = await served.client.get(f"{JOBS}/{job}/events", headers={"Last-Event-ID": numbers[0]})
        assert [name for name, _ in events(rest.text)] == ["completed"]
        over = await served.client.get(f"{JOBS}/{job}/events", headers={"Last-Event-ID": "end"})
        assert over.status_code == 204


@aio
async def test_cancelling_frees_the_rows(student_of: Models, tmp_path: Path) -> None:
    gate = Gate()
    async with serving({"sd": hooked(student_of("sd"), gate)}, data_dir=tmp_path, jobs_in_flight=1) as served:
        gate.shut()
        first, second = [await submit(served, num_inference_steps=50) for _ in range(2)]
        await asyncio.to_thread(gate.reached.wait, 20)
        assert (await served.client.get(f"{JOBS}/{first['id']}/content")).status_code == 409
        assert (await served.client.delete(f"{JOBS}/{first['id']}")).json()["error"]["code"] == "conflict"
        assert (await served.client.post(f"{JOBS}/{second['id']}/cancel")).json()["status"] == "cancelled"
        await served.client.post(f"{JOBS}/{first['id']}/cancel")
        gate.opened.set()
        assert (await ended(served, first["id"]))["status"] == "cancelled"
        await served.until(lambda: served.engine.jobs == 0)
        for job in (first, second):
            assert (await served.client.delete(f"{JOBS}/{job['id']}")).json()["deleted"] is True
            assert (await served.client.get(f"{JOBS}/{job['id']}")).status_code == 404
        after = await submit(served)
        assert (await ended(served, after["id"]))["status"] == "completed"


@aio
async def test_jobs_of_a_key_are_seen_with_that_key_alone(student_of: Models, tmp_path: Path) -> None:
    async with serving({"sd": student_of("sd")}, data_dir=tmp_path, api_keys="mine,yours") as served:
        mine, yours = ({"Authorization": f"Bearer {key}"} for key in ("mine", "yours"))
        job = (await submit(served, mine))["id"]
        assert (await served.client.get(f"{JOBS}/{job}", headers=yours)).status_code == 404
        assert (await served.client.get(JOBS, headers=yours)).json()["data"] == []
        assert (await served.client.post(f"{JOBS}/{job}/cancel", headers=yours)).status_code == 404
        assert (await served.client.get(f"{JOBS}/{job}/events", headers=yours)).status_code == 404
        assert (await ended(served, job, headers=mine))["status"] == "completed"
        assert (await served.client.get(f"{JOBS}/{job}/content", headers=yours)).status_code == 404
        assert (await served.client.get(JOBS)).status_code == 401


@aio
async def test_what_is_refused(student_of: Models, tmp_path: Path) -> None:
    async with serving({"sd": student_of("sd")}, data_dir=tmp_path, max_jobs=1, jobs_in_flight=1) as served:
        for body, param in (
            ({"stream": True}, "stream"),
            ({"partial_images": 2}, "partial_images"),
            ({"priority": "now"}, "priority"),
            ({"webhook_url": "https://example.com"}, "webhook_url"),
            ({"num_inference_steps": 999}, "num_inference_steps"),
            ({"acceleration": {"mode": "delta_dit"}}, "acceleration.mode"),
            ({"nope": 1}, "nope"),
        ):
            answer = await served.post(JOBS, **body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
        bad = await served.client.get(f"{JOBS}?limit=0")
        assert (bad.status_code, bad.json()["error"]["param"]) == (422, "limit")
        unknown = await served.client.get(f"{JOBS}?after=job-x")
        assert unknown.status_code == 404
        assert (await served.client.get(JOBS)).json()["data"] == []
        served.app.state.jobs.runner.stopping = True
        await submit(served)
        full = await served.post(JOBS)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert full.headers["retry-after"]


@aio
async def test_without_a_store(student_of: Models) -> None:
    async with serving({"sd": student_of("sd")}) as served:
        answer = await served.post(JOBS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "store_off")


@aio
async def test_another_models_weights_make_no_picture(student_of: Models, tmp_path: Path) -> None:
    backbone = student_of("sd")
    async with serving({"sd": backbone}, data_dir=tmp_path) as served:
        served.app.state.jobs.runner.stopping = True  # accepted, not run
        job = await submit(served, acceleration={"mode": "cfg_student", "adapter": "student"}, guidance_scale=None)
        plain = await submit(served)
    lora = backbone.adapters.fetch(backbone.adapters["student"])
    other = replace(lora, terms=dict(list(lora.terms.items())[1:]))
    adapters = Adapters(lambda path, name: other)
    adapters.register("other", "student")
    changed = replace(backbone, adapters=adapters, spec=replace(backbone.spec, adapters=adapters))
    async with serving({"sd": changed}, data_dir=tmp_path) as served:
        found = await ended(served, job["id"])
        assert (found["status"], found["error"]["code"], found["error"]["param"]) == (
            "failed",
            "model_changed",
            "adapter",
        )
        assert (await ended(served, plain["id"]))["status"] == "completed", "it does not use the adapter"


def test_a_digest_tells_weights_apart(student_of: Models) -> None:
    from models.fingerprint import fingerprint

    backbone = student_of("sd")
    weights = backbone.network.module.state_dict()
    name = next(iter(weights))
    other = {**weights, name: weights[name] + 1e-3}
    assert fingerprint(weights.items()) == fingerprint({k: v.clone() for k, v in weights.items()}.items())
    assert fingerprint(weights.items()) != fingerprint(other.items())
    turned = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in weights.items()}
    assert fingerprint(weights.items()) == fingerprint(turned.items()), "however it lies in memory"


@aio
async def test_a_full_store_is_a_507_and_what_runs_goes_on(
    student_of: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with serving({"sd": hooked(student_of("sd"), gate)}, data_dir=tmp_path) as served:
        gate.shut()
        monkeypatch.setattr("app.jobs.runner.RETRY_SECONDS", 0.05)
        store = served.app.state.jobs.store
        job = await submit(served)
        await served.until(lambda: bool(served.app.state.jobs.runner.running))

        def full(*_: Any) -> None:
            raise StoreFull("the store's disk is full", retry_after=60)

        with monkeypatch.context() as patch:
            patch.setattr(store, "make_sure_of_room", full)
            patch.setattr(store, "put", full)
            refused = await served.post(JOBS)
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "store_full")
            gate.opened.set()
            assert (await served.post()).status_code == 200, "live requests go on"
            await asyncio.sleep(0.2)
            assert (await served.client.get(f"{JOBS}/{job['id']}")).json()["status"] == "in_progress"
        assert (await ended(served, job["id"]))["status"] == "completed", "once there is room"


@aio
async def test_a_client_of_live_requests_goes_first(student_of: Models, tmp_path: Path) -> None:
    """With many jobs waiting, those in the engine are fewer while live requests are, and one at least."""
    most: list[int] = []
    gate = Gate()
    async with serving({"sd": hooked(student_of("sd"), gate)}, data_dir=tmp_path, jobs_in_flight=6) as served:
        gate.shut()
        live = [asyncio.create_task(served.post(seed=i)) for i in range(9)]
        await served.until(lambda: served.engine.jobs == 9)
        jobs = [await submit(served, seed=i) for i in range(4)]
        await served.until(lambda: bool(served.app.state.jobs.runner.running))
        most.append(len(served.app.state.jobs.runner.running))
        gate.opened.set()
        assert {(await answer).status_code for answer in live} == {200}
        for job in jobs:
            assert (await ended(served, job["id"]))["status"] == "completed"
    assert most == [1]


@aio
async def test_metrics(student_of: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.runner.SWEEP_SECONDS", 0.05)
    async with serving({"sd": student_of("sd")}, data_dir=tmp_path) as served:
        job = await submit(served)
        await ended(served, job["id"])
        await served.until(lambda: served.value("jobs", status="completed") == 1)
        text: httpx.Response = await served.client.get("/metrics")
        assert 'slipstream_jobs{status="queued"} 0.0' in text.text
        assert PROMPT not in text.text


@aio
async def test_a_job_that_is_cancelled_before_its_first_step_gives_its_place_back(
    student_of: Callable[..., Backbone], tmp_path: Path
) -> None:
    async with serving({"sd": student_of("sd")}, data_dir=tmp_path) as served:
        runner = served.app.state.jobs.runner
        begin = runner._begin

        def begin_and_stop(claimed: Any) -> None:
            begin(claimed)
            runner.stop_job(claimed.row["id"])

        runner._begin = begin_and_stop
        answer = await served.client.post("/v1/images/jobs", json={"prompt": "x", "num_inference_steps": 2})
        stopped, write = list[str](), runner.jobs.leases.stopped

        def stop(job_id: str) -> None:
            stopped.append(job_id)
            write(job_id)

        runner.jobs.leases.stopped = stop
        await served.until(lambda: bool(stopped) and not runner.running)
        assert stopped[0] == answer.json()["id"]
        assert runner.room > 0
