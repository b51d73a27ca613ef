"""`slipstream serve`: uvicorn around the app; SIGTERM drains, a second one cuts off; the exit code says which."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import time
from functools import partial
from types import FrameType
from typing import Any

import diffusers
import transformers
import uvicorn
from fastapi import FastAPI

from app.engine.engine import Engine
from app.http.intake import Bodies
from app.http.main import create_app
from app.http.protocol import Gate, Protocol
from app.listening import BACKLOG, listen, room_for
from app.logs import SERVER, configure
from app.settings import Settings

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
ANSWER_SECONDS = 10.0
"""What responses may still take to be sent once the engine has finished."""
CUT_SECONDS = 2.0
"""The same where nobody wants to wait."""
COMPLAINT_SECONDS = 10.0
"""Between two lines about connections that the system cannot give us."""


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT, cuts off on the second. Ends where the engine is dead."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.gate = Gate(room_for(settings.max_connections), settings.head_seconds, app.state.metrics)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=partial(Protocol, gate=self.gate),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=ANSWER_SECONDS,  # type: ignore[arg-type]
        )
        super().__init__(config)
        app.state.metrics.connections.set_function(lambda: len(self.server_state.connections))
        self.engine: Engine = app.state.engine
        self._bodies: Bodies = app.state.bodies
        self._settings = settings
        self._draining_since: float | None = None
        self._second_signal = 0
        self._announced = False
        self._complained, self._refused = -math.inf, 0
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one drains, the second does not wait."""
        if self._second_signal:
            self.force_exit = True
        elif self._draining_since is not None:
            self._second_signal = sig
        else:
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
            self._bodies.close()
            if self._second_signal:
                self.exit_code = 128 + self._second_signal
                await self._cut_off("a second signal came")
                return True
            late = time.monotonic() - self._draining_since > self._settings.drain_seconds
            if late:
                await self._cut_off("drain_seconds have passed")
            if late or not self.engine.jobs:
                return True
        return await super().on_tick(counter)

    async def _cut_off(self, why: str) -> None:
        """Answer everybody who waits; whoever does not take the answer is not waited for."""
        self.config.timeout_graceful_shutdown = CUT_SECONDS  # type: ignore[assignment]
        if self.engine.jobs:
            SERVER.warning("%d requests are cut off: %s", self.engine.jobs, why)
            await asyncio.to_thread(self.engine.close, 1.0)

    def complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What the event loop could not do. Connections that the system does not give come by the thousand: a line."""
        if not (isinstance(error := context.get("exception"), OSError) and error.errno in EXHAUSTED):
            loop.default_exception_handler(context)
            return
        self._refused += 1
        if time.monotonic() - self._complained > COMPLAINT_SECONDS:
            SERVER.error("connections cannot be taken: %s; %d attempts", error.strerror, self._refused)
            self._complained, self._refused = time.monotonic(), 0

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, then say where."""
        asyncio.get_running_loop().set_exception_handler(self.complain)
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
    """Serve until a signal comes; the exit code.

    0 after a drain, 1 where the server could not start or its engine died, 128 and the signal's number where a second
    signal cut requests off. Raises `CannotListen` before any model is loaded.
    """
    handler = configure(settings)
    sockets = listen(settings.host, settings.port)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    app = create_app(settings)
    server = Server(app, settings)
    if server.gate.connections < settings.max_connections:
        SERVER.warning("max_connections is %d: the system allows no more descriptors", server.gate.connections)
    previous = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    server.run(sockets)
    for one in sockets:
        one.close()
    for sig, former in previous.items():
        signal.signal(sig, former)
    engine: Engine = app.state.engine
    engine.close(1.0 if server.exit_code > 1 else 10.0)  # a signal that did not wait leaves it at work
    if engine.failure is not None:
        SERVER.error("%s", engine.failure)
    code = server.exit_code if server.started else 1
    if not engine.ended or server.exit_code > 1:  # Python would abort, or wait, while threads still compute
        handler.flush()
        os._exit(code)
    return code
