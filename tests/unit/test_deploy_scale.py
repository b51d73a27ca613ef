"""A replica on Ray without Ray: how many GPUs it asks for, where its metrics are, and when it counts as healthy."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from fastapi import FastAPI

from app.jobs.queue import NewJob
from app.metrics import Metrics
from tests.deploy import DEPLOY
from tests.postgres import postgres


class Ray:
    """What of Ray the module asks for, and what it was told."""

    def __init__(self) -> None:
        self.resources: dict[str, float] = {}
        self.deployed: dict[str, Any] = {}
        self.asgi: Any = None

    def deployment(self, **options: Any) -> Any:
        """`serve.deployment`."""
        self.deployed = options
        return self._bound

    def ingress(self, asgi: Any) -> Any:
        """`serve.ingress`."""
        self.asgi = asgi
        return lambda cls: cls

    @staticmethod
    def _bound(cls: Any) -> Any:
        cls.bind = classmethod(lambda bound: bound())
        return cls


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    """Stands in for the package."""
    fake, package, part = Ray(), ModuleType("ray"), ModuleType("ray.serve")
    package.serve, package.cluster_resources = part, lambda: fake.resources  # type: ignore[attr-defined]
    part.deployment, part.ingress, part.Application = fake.deployment, fake.ingress, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", package)
    monkeypatch.setitem(sys.modules, "ray.serve", part)
    return fake


@pytest.fixture
def scale(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported with that."""
    monkeypatch.delitem(sys.modules, "app.ray.scale", raising=False)
    yield importlib.import_module("app.ray.scale")
    sys.modules.pop("app.ray.scale", None)


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [
        (None, {}, 0.0),
        (None, {"GPU": 8.0, "CPU": 64.0}, 1.0),
        (None, {"GPU": 0.5}, 0.5),
        (0.0, {"GPU": 8.0}, 0.0),
        (0.25, {}, 0.25),
        (2.0, {"GPU": 1.0}, 2.0),
    ],
)
def test_gpus_of_a_replica(ray: Ray, scale: Any, asked: float | None, there: dict[str, float], expected: float) -> None:
    ray.resources = there
    assert scale.gpus_of(scale.Options(gpus=asked)) == expected


def app_with(metrics: Metrics | None = None, **engine: Any) -> FastAPI:
    app = FastAPI()
    app.state.metrics, app.state.engine = metrics, SimpleNamespace(**{"failure": None, **engine})
    return app


def test_metrics_are_on_the_first_free_port(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, taken = 9000, {9000, 9001}
    given: list[tuple[int, object]] = []

    def start(port: int, registry: object) -> None:
        if port in taken:
            raise OSError("in use")
        given.append((port, registry))

    monkeypatch.setattr(scale, "start_http_server", start)
    metrics = Metrics()
    options = scale.Options(metrics_port=first, metrics_ports=3)
    assert scale.expose(app_with(metrics), options) == 9002
    assert given == [(9002, metrics.registry)]
    with pytest.raises(RuntimeError, match="from 9000 on"):
        scale.expose(app_with(metrics), scale.Options(metrics_port=first, metrics_ports=2))


def test_a_replica_is_healthy_once_it_is_loaded(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            app.state.engine.state = "ready"

    monkeypatch.setattr(scale, "asyncio", SimpleNamespace(sleep=sleep))
    app = app_with(state="loading")
    asyncio.run(scale.healthy(app))
    assert waits == [0.1] * 3


@pytest.mark.parametrize("state", ["ready", "draining", "stopped"])
def test_a_replica_that_only_ends_is_healthy(scale: Any, state: str) -> None:
    asyncio.run(scale.healthy(app_with(state=state)))


def test_a_replica_with_a_dead_engine_is_not(scale: Any) -> None:
    failure = LookupError("a bug")
    with pytest.raises(RuntimeError, match="died") as raised:
        asyncio.run(scale.healthy(app_with(state="dead", failure=failure)))
    assert raised.value.__cause__ is failure


def test_replicas_share_the_jobs_of_one_postgresql(ray: Ray, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "expose", lambda app, options: None)
    served = yaml.safe_load((DEPLOY / "ray/serve.yaml").read_text())["applications"][0]["args"]
    scale.build(scale.Options(**served, gpus=0))
    with postgres() as url:
        monkeypatch.setenv("SLIPSTREAM_JOBS_URL", url)
        stores = [ray.asgi().state.jobs for _ in range(2)]
        new = NewJob("me", {"prompt": "a ring"}, {}, "f")
        job = stores[0].jobs.submit(new)[0]["id"]
        assert stores[1].jobs.get(job, "me")["status"] == "queued"
        (claimed,), _, _ = stores[1].jobs.leases.claim(5)
        assert (claimed.row["id"], stores[0].jobs.leases.claim(5)[0]) == (job, [])
        for one in stores:
            one.store.close()


def test_what_is_deployed(ray: Ray, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exposed: list[Any] = []
    monkeypatch.setattr(scale, "expose", lambda app, options: exposed.append((app, options)))
    options = scale.Options(settings={"max_queue": 7}, gpus=0.5)
    replica = scale.build(options)
    assert ray.deployed == {"name": "Server", "ray_actor_options": {"num_gpus": 0.5}}
    app = ray.asgi()
    assert app.state.settings.max_queue == 7
    assert exposed == [(app, options)]
    replica.app = app_with(state="dead")
    with pytest.raises(RuntimeError, match="died"):
        asyncio.run(replica.check_health())
