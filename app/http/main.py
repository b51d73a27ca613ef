"""The application: everything put together, and the lifespan that owns the engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from app.engine.engine import Engine, Loaded
from app.engine.loading import load_all, warm_all
from app.engine.pace import Pace
from app.http import problems
from app.http.intake import FREE_BYTES, Bodies, Intake
from app.http.links import PREFIX as LINKS
from app.http.links import Links
from app.http.middleware import Authorize, Head, Observe
from app.http.routes import adapters, batches, docs, files, generate, info, links, openai, webui
from app.http.routes import jobs as jobs_routes
from app.http.service import Service
from app.http.webui import Clients
from app.metrics import Metrics
from app.settings import Settings
from models.backbone import Backbone
from models.spec import short_name

if TYPE_CHECKING:
    from app.http.traces import Traces
    from app.jobs.service import JobService

DESCRIPTION = "Diffusion inference where each request chooses its own acceleration and all share one batch."
ALWAYS_OPEN = ("/health/", "/", "/web/", "/docs", "/docs-assets/", "/openapi.json", LINKS)
"""Paths that never ask for a key: health, pages that hold no data and have a place to give the key, and pictures at
addresses that nobody guesses."""


def create_app(settings: Settings | None = None, backbones: Mapping[str, Backbone] | None = None) -> FastAPI:
    """The server as an ASGI app. `backbones` are served as they are; without them the settings' models are loaded."""
    settings = settings or Settings()
    metrics = Metrics()
    metrics.build.info({"version": distribution_version(), "torch": torch.__version__, "device": settings.device})
    engine = Engine(_loader(settings, metrics, backbones), settings, metrics)
    service = Service(settings, engine, metrics)
    bodies = Bodies(settings.max_inflight_bytes, metrics.body_bytes)

    jobs = _store(settings, service)
    traces = _traces(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            if jobs is not None:
                await jobs.start()
            yield
        finally:
            engine.drain()
            if jobs is not None:
                await jobs.stop()
            engine.close()
            service.close()
            if traces is not None:
                await traces.close()

    app = FastAPI(
        title="Slipstream",
        description=DESCRIPTION,
        version=distribution_version(),
        lifespan=lifespan,
        middleware=_middleware(settings, metrics, bodies, lambda: engine.state not in ("loading", "ready"), traces),
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings, app.state.metrics, app.state.engine, app.state.service = settings, metrics, engine, service
    app.state.jobs = jobs
    app.state.webui = Clients()
    app.state.links = Links(settings.link_seconds, settings.max_link_bytes, None if jobs is None else jobs.files)
    app.state.bodies = bodies
    app.state.created = time.time()
    problems.install(app)
    for module in (generate, jobs_routes, files, batches, openai, links, webui, adapters, info, docs):
        app.include_router(module.router)
    app.mount("/docs-assets", docs.ASSETS, name="docs-assets")
    app.mount("/web", StaticFiles(directory=info.WEB), name="web")
    if settings.api_keys:
        _ask_for_key(app)
    return app


def _ask_for_key(app: FastAPI) -> None:
    """Let the interface description say that a key is needed, so that /docs has a place to give it."""
    description = app.openapi()
    description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{"key": []}]


def distribution_version() -> str:
    """The installed version; 0 in a bare checkout."""
    try:
        return version("slipstream-diffusion")
    except PackageNotFoundError:
        return "0"


def _store(settings: Settings, service: Service) -> JobService | None:
    """The store of jobs where one is asked for; nothing of it is imported otherwise."""
    if settings.data_dir is None and settings.jobs_url is None:
        return None
    from app.jobs.service import JobService

    return JobService(settings, service)


def _traces(settings: Settings, metrics: Metrics) -> Traces | None:
    """What sends traces where they are asked for; neither SDK nor exporter is imported otherwise."""
    if settings.otlp_endpoint is None:
        return None
    from app.http.traces import Traces, exporter

    return Traces(exporter(settings.otlp_endpoint), distribution_version(), metrics.spans)


def _loader(settings: Settings, metrics: Metrics, backbones: Mapping[str, Backbone] | None) -> Callable[[Pace], Loaded]:
    if backbones is None:
        return partial(load_all, settings, metrics)
    return lambda pace: (backbones, warm_all(backbones, settings, metrics, pace))


def _middleware(
    settings: Settings, metrics: Metrics, bodies: Bodies, ending: Callable[[], bool], traces: Traces | None
) -> list[Middleware]:
    """Outermost first."""
    cors = bool(settings.cors_origins)
    stack = [Middleware(Observe, metrics=metrics, cors=cors, ending=ending, traces=traces), Middleware(Head)]
    if settings.cors_origins:
        exposed = ["X-Request-Id", "Retry-After", *(f"X-Slipstream-{name}" for name in ("Id", "Seed", "Model"))]
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id", "Traceparent", "Tracestate"],
                expose_headers=exposed,
            )
        )
    if settings.api_keys:
        given = (*settings.api_keys, *([] if settings.admin_key is None else [settings.admin_key]))
        keys = [key.get_secret_value() for key in given]
        open_paths = ALWAYS_OPEN if settings.metrics_require_key else (*ALWAYS_OPEN, "/metrics")
        stack.append(Middleware(Authorize, keys=keys, open_paths=open_paths))
    larger = {files.router.prefix: settings.max_file_bytes}
    for model in (*map(short_name, settings.model), *settings.aliases):
        # What a form has around its file is little.
        path = adapters.router.prefix.format(model_id=model)
        larger[path] = settings.max_adapter_file_bytes + FREE_BYTES
    stack.append(Middleware(Intake, settings=settings, metrics=metrics, bodies=bodies, streamed=larger))
    return stack
