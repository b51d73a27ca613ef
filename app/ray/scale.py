"""The server on a Ray cluster: each replica is the whole FastAPI app; Ray Serve balances, scales and replaces them.

What is heavy is imported inside the replica: the process that reads the Serve config file needs no torch.
"""

import asyncio
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client import start_http_server
from pydantic import BaseModel, ConfigDict, Field
from ray import serve


class Options(BaseModel):
    """`args` of an application in the Serve config file."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of the server, by name.")
    gpus: float | None = Field(None, ge=0, description="GPUs a replica; by default one where the cluster has any.")
    metrics_port: int = Field(9808, description="Where a node's first replica serves /metrics.")
    metrics_ports: int = Field(16, ge=1, description="Ports from there on that a node's replicas may take.")


def build(options: Options) -> serve.Application:
    """What the Serve config file imports: `import_path: app.ray.scale:build`."""

    def asgi() -> FastAPI:
        from app.http.main import create_app
        from app.settings import Settings

        app = create_app(Settings(**options.settings))
        expose(app, options)
        return app

    @serve.deployment(name="Server", ray_actor_options={"num_gpus": gpus_of(options)})
    @serve.ingress(asgi)
    class Server:
        """One replica."""

        async def check_health(self) -> None:
            """Ray's first call waits until the replica is ready; later ones get a dead engine replaced."""
            await healthy(self.app)  # type: ignore[attr-defined]

    return Server.bind()  # type: ignore[attr-defined]


def gpus_of(options: Options) -> float:
    """GPUs a replica reserves."""
    if options.gpus is not None:
        return options.gpus
    return min(1.0, float(ray.cluster_resources().get("GPU", 0.0)))


def expose(app: FastAPI, options: Options) -> int:
    """Serve this replica's own metrics on the first free port: through the proxy a scrape would meet any replica."""
    for port in range(options.metrics_port, options.metrics_port + options.metrics_ports):
        try:
            start_http_server(port, registry=app.state.metrics.registry)
        except OSError:
            continue
        return port
    raise RuntimeError(f"no free metrics port from {options.metrics_port} on; raise metrics_ports")


async def healthy(app: FastAPI) -> None:
    """Wait while the models load; raise when the engine is dead."""
    engine = app.state.engine
    while engine.state == "loading":  # noqa: ASYNC110 - a thread's state
        await asyncio.sleep(0.1)
    if engine.state == "dead":
        raise RuntimeError("the engine has died") from engine.failure
