"""Adapters added, used and removed over HTTP, found again after a restart; bad files change nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from models import Backbone, load
from models.reuse.rows import Row
from tests.serving import Served, aio, hooked, pixels, serving
from tests.styles import save_style

ADMIN = {"Authorization": "Bearer admin-key"}
URL = "/v1/models/sd/adapters"
BODY: dict[str, Any] = {"prompt": "a red ring", "num_inference_steps": 2, "seed": 1}
STYLED = {**BODY, "loras": [{"name": "style", "scale": 0.8}]}


@pytest.fixture(scope="module")
def style(pipeline_of: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = save_style(pipeline_of("sd"), tmp_path_factory.mktemp("styles") / "style.safetensors", 1)
    return file.read_bytes()


@pytest.fixture
def fresh(pipeline_dir: Callable[[str], Path]) -> Callable[[], Backbone]:
    return lambda: load(str(pipeline_dir("sd")), device="cpu", dtype="float32")


async def add(served: Served, data: bytes, name: str = "style", **headers: str) -> httpx.Response:
    files = {"file": ("style.safetensors", data)}
    return await served.client.post(URL, files=files, data={"name": name}, headers={**ADMIN, **headers})


async def names(served: Served) -> list[str]:
    return [one["name"] for one in (await served.client.get(URL)).json()["data"]]


@aio
async def test_added_used_and_found_again(fresh: Callable[[], Backbone], style: bytes, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data_dir": tmp_path, "admin_key": "admin-key", "alias": ("dall-e-3=sd",)}
    async with serving({"sd": fresh()}, **settings) as served:
        assert (await served.client.post("/generate", json=STYLED)).json()["error"]["code"] == "unknown_adapter"
        answer = await add(served, style)
        assert answer.status_code == 201
        assert answer.json() == {
            "name": "style",
            "kind": "style",
            "guidance_scale": None,
            "rank": 2,
            "parameters": answer.json()["parameters"],
            "negative_prompt": "",
        }
        other = URL.replace("/sd/", "/dall-e-3/")  # by another name of the model
        assert (await served.client.get(other)).json()["data"] == [answer.json()]
        listed = (await served.client.get("/v1/models/sd")).json()["adapters"]
        assert listed == [answer.json()]
        drawn = (await served.client.post("/generate", json=STYLED)).json()
        plain = (await served.client.post("/generate", json=BODY)).json()
        assert not np.array_equal(pixels(drawn), pixels(plain))
        assert drawn["usage"]["macs"] > plain["usage"]["macs"]
        text = (await served.client.get("/metrics")).text
        assert f'slipstream_adapter_memory_bytes{{model="sd"}} {4.0 * answer.json()["parameters"]}' in text
        again = await add(served, style)
        assert (again.status_code, again.json()["error"]["param"]) == (409, "name")
    (tmp_path / "adapters" / "sd" / "half.part").write_bytes(style[:100])
    async with serving({"sd": fresh()}, **settings) as served:
        assert await names(served) == ["style"]
        same = (await served.client.post("/generate", json=STYLED)).json()
        assert np.array_equal(pixels(same), pixels(drawn))
        assert (await served.client.delete(f"{URL}/style", headers=ADMIN)).json()["deleted"]
        assert (await served.client.delete(f"{URL}/style", headers=ADMIN)).status_code == 404
        assert await names(served) == []
        assert (await served.client.post("/generate", json=STYLED)).status_code == 422
    gc.collect()  # tasks and their frames are cyclic
    assert [file.name for file in (tmp_path / "adapters" / "sd").iterdir()] == []


@aio
async def test_removed_while_in_use_those_rows_finish_with_it(
    fresh: Callable[[], Backbone], style: bytes, tmp_path: Path
) -> None:
    """Also one that waits still, whose adapter has left the device."""
    loop, begun, go = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def wait(rows: Sequence[Row]) -> None:
        if any(row.adapters for row in rows):
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result(20)

    backbone = hooked(fresh(), wait)
    async with serving({"sd": backbone}, data_dir=tmp_path, admin_key="admin-key", max_rows=2) as served:
        await add(served, style)
        running = asyncio.create_task(served.client.post("/generate", json=STYLED))
        await begun.wait()
        waiting = asyncio.create_task(served.client.post("/generate", json=STYLED))
        await served.until(lambda: served.engine.jobs == 2)
        await served.client.delete(f"{URL}/style", headers=ADMIN)
        backbone.adapters.release()
        assert (await served.client.post("/generate", json=STYLED)).status_code == 422
        go.set()
        answers = [(await one).json() for one in (running, waiting)]
        assert np.array_equal(pixels(answers[0]), pixels(answers[1]))


def header(size: int) -> bytes:
    """A file that announces so many bytes, and has none of them."""
    text = json.dumps({"unet.x.lora_A.weight": {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]}})
    return struct.pack("<Q", len(text)) + text.encode()


def changed(data: bytes, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], folder: Path) -> bytes:
    (folder / "x.safetensors").write_bytes(data)
    return save(change(load_file(folder / "x.safetensors")))


def with_nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(weights))
    return {**weights, first: weights[first] * float("nan")}


def of_another_rank(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([t, t]) if "lora_A" in k else t for k, t in weights.items()}


def of_another_base(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([t, t], dim=1) if "lora_A" in k else t for k, t in weights.items()}


@aio
async def test_bad_files_are_refused_and_nothing_is_kept(
    fresh: Callable[[], Backbone], style: bytes, tmp_path: Path
) -> None:
    most = 2**20
    bad = {
        "NaN": changed(style, with_nan, tmp_path),
        "rank 4 in its one half and 2": changed(style, of_another_rank, tmp_path),
        "this model": changed(style, of_another_base, tmp_path),
        "not a safetensors file": style[:-100],
        "not a safetensors": header(2**31),
        "not a safetensors file:": b"\x80\x04pickle",
        "no LoRA weights": save({}),
    }
    settings: dict[str, Any] = {"admin_key": "admin-key", "max_adapter_file_bytes": most}
    async with serving({"sd": fresh()}, data_dir=tmp_path / "data", **settings) as served:
        for complaint, data in bad.items():
            answer = await add(served, data)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, "file"), complaint
            assert complaint in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.text
        for name in ("../up", "a/b", "", ".hidden", "x" * 65, "a\\b", "a b", "ä"):
            answer = await add(served, style, name)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, "name"), name
        assert (await add(served, style + bytes(most))).status_code == 413
        announced = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(2**31)}
        assert (await served.client.post(URL, content=b"--x", headers={**ADMIN, **announced})).status_code == 413
        assert (await served.client.post(URL, content=b"{}", headers=ADMIN)).status_code == 400
        assert await names(served) == []
        assert (await served.client.post("/generate", json=BODY)).status_code == 200
    assert not [file for file in (tmp_path / "data" / "adapters").rglob("*") if file.is_file()]


@aio
async def test_only_the_admin_adds_and_removes(fresh: Callable[[], Backbone], style: bytes, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data_dir": tmp_path, "api_keys": ("client-key",)}
    client = {"Authorization": "Bearer client-key"}
    async with serving({"sd": fresh()}, **settings, admin_key="admin-key") as served:
        for key, status in (("client-key", 403), ("wrong", 401), ("admin-key", 201)):
            answer = await add(served, style, Authorization=f"Bearer {key}")
            assert answer.status_code == status
        assert (await served.client.get(URL, headers=client)).json()["data"][0]["name"] == "style"
        assert (await served.client.delete(f"{URL}/style", headers=client)).status_code == 403
    async with serving({"sd": fresh()}, data_dir=tmp_path) as served:
        refused = (await add(served, style)).json()["error"]
        assert (refused["code"], refused["type"]) == ("admin_only", "permission_error")
    async with serving({"sd": fresh()}, admin_key="admin-key") as served:
        assert (await add(served, style)).json()["error"]["code"] == "store_off"
