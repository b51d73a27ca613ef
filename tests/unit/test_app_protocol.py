"""One connection: clients that take nothing of their answers."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn

from app.http import protocol
from app.http.protocol import Gate, Protocol
from app.metrics import Metrics
from tests.serving import aio


@aio
@pytest.mark.parametrize("reads", [False, True])
async def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STALL_SECONDS", 0.2)
    size, ended = 32 * 2**20, asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(4):
                await send({"type": "http.response.body", "body": bytes(size // 4), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            ended.set()

    metrics = Metrics()
    gate = Gate(8, 60.0, metrics)
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Protocol(config=config, server_state=state, app_state={}, gate=gate), "127.0.0.1", 0
    )
    client = socket.create_connection(server.sockets[0].getsockname())
    client.setblocking(False)
    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    got = 0
    if reads:
        while part := await loop.sock_recv(client, 2**20):
            got += len(part)
    await asyncio.wait_for(ended.wait(), 10)
    if not reads:
        for _ in range(200):
            if not state.connections:
                break
            await asyncio.sleep(0.05)
    assert not state.connections
    assert (got > size) is reads
    cut = metrics.registry.get_sample_value("slipstream_connections_dropped_total", {"cause": "slow"}) or 0
    assert cut == (0 if reads else 1)
    client.close()
    server.close()
    await server.wait_closed()
