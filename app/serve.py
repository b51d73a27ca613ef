"""`slipstream serve`: uvicorn around the app; SIGTERM drains, then the process ends with 0."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from types import FrameType

import diffusers
import transformers
import uvicorn
from fastapi import FastAPI

from app.engine.engine import Engine
from app.http.main import create_app
from app.logs import SERVER, configure
from app.settings import Settings

ANSWER_SECONDS = 10
"""What responses may still take to be sent once the engine has finished."""


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT, stops at once on the second. Ends where the engine is dead."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=ANSWER_SECONDS,
        )
        super().__init__(config)
        self.engine: Engine = app.state.engine
        self._settings = settings
        self._draining_since: float | None = None
        self._announced = False
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one drains."""
        if self._draining_since is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining_since = time.monotonic()
        # Not self.engine.drain() here: a signal may come while this very thread holds the engine's lock.

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        if not self._announced and self.engine.ready:
            self._announce()
        if self.engine.state == "dead":  # everybody has been told; whoever supervises the process starts another
            self.exit_code = 1
            return True
        if self._draining_since is not None:
            self.engine.drain()
            late = time.monotonic() - self._draining_since > self._settings.drain_seconds
            if late or not self.engine.jobs:
                if late and self.engine.jobs:
                    SERVER.warning("%d requests are cut off: drain_seconds have passed", self.engine.jobs)
                    await asyncio.to_thread(self.engine.close, 1.0)
                return True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, then say where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            SERVER.info("listening on %s, loading %s", self.address, ", ".join(self._settings.model))

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _announce(self) -> None:
        self._announced = True
        names = ", ".join(f"{name} on {b.device}" for name, b in self.engine.backbones.items())
        SERVER.info("ready: %s; playground at %s/, API at %s/docs", names, self.address, self.address)


def serve(settings: Settings) -> int:
    """Serve until a signal comes; the exit code: 0 after a drain, 1 where the engine could not load or died."""
    configure(settings)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    app = create_app(settings)
    server = Server(app, settings)
    previous = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    server.run()
    for sig, handler in previous.items():
        signal.signal(sig, handler)
    engine: Engine = app.state.engine
    engine.close()  # a signal that did not wait leaves it at work
    if engine.failure is not None:
        SERVER.error("%s", engine.failure)
    code = server.exit_code if server.started else 1
    if not engine.ended:  # Python would abort while torch still computes
        SERVER.warning("the last tick was not waited for")
        logging.shutdown()
        os._exit(code)
    return code
