"""Webhooks: who may be named, what a receiver gets and verifies, what is tried again, what is never called."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from app.errors import Impossible
from app.jobs import webhooks
from app.jobs.webhooks import Allowed, PrivateAddress
from app.settings import Settings
from models import Backbone
from tests.serving import Served, aio, serving

JOBS = "/v1/images/jobs"
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


class Receiver:
    """Notes what it is sent, and answers with the next of `statuses`, in the end with 204."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
                self.send_header("Location", f"{receiver.url}/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    made.thread.start()
    yield made
    made.server.shutdown()
    made.thread.join()
    made.server.server_close()


async def submit(served: Served, receiver: Receiver, **body: Any) -> str:
    answer = await served.post(JOBS, webhook_url=f"{receiver.url}/hook?x=1", **body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def options(receiver: Receiver, tmp_path: Path) -> dict[str, Any]:
    return {"data_dir": tmp_path, "webhook_origins": receiver.url, "webhook_secret": SECRET}


@aio
async def test_a_receiver_verifies_what_it_is_told(
    student_of: Callable[..., Backbone], tmp_path: Path, receiver: Receiver
) -> None:
    async with serving({"sd": student_of("sd")}, **options(receiver, tmp_path)) as served:
        job = await submit(served, receiver, seed=5)
        await served.until(lambda: served.value("webhook_deliveries_total", outcome="delivered") == 1)
    [(headers, body)] = receiver.got
    told = Webhook(SECRET).verify(body, headers)
    assert (told["type"], told["data"]["id"], told["data"]["seed"]) == ("image.job.completed", job, 5)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"completed", b"cancelled"), headers)


@aio
async def test_a_delivery_is_tried_again_and_survives_a_restart(
    student_of: Callable[..., Backbone], tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BACK_OFF", (0.1, 0.1, 3600.0))
    receiver.statuses = [500, 302, 503]
    async with serving({"sd": student_of("sd")}, **options(receiver, tmp_path)) as served:
        await submit(served, receiver)
        await served.until(lambda: served.value("webhook_deliveries_total", outcome="retried") == 3)
    async with serving({"sd": student_of("sd")}, **options(receiver, tmp_path)) as served:
        store = served.app.state.jobs.store
        now = store.clock()
        await asyncio.sleep(0.2)
        assert len(receiver.got) == 3, "not before its time"
        store.clock = lambda: now + 3601
        await served.until(lambda: served.value("webhook_deliveries_total", outcome="delivered") == 1)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1, "the receiver can tell that it is one"
    assert len({body for _, body in receiver.got}) == 1
    assert len(receiver.got) == 4, "no redirect was followed"


@aio
async def test_what_is_given_up(
    student_of: Callable[..., Backbone], tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BACK_OFF", (0.05,))
    receiver.statuses = [500, 500, 410]
    async with serving({"sd": student_of("sd")}, **options(receiver, tmp_path)) as served:
        await submit(served, receiver)
        await served.until(lambda: served.value("webhook_deliveries_total", outcome="abandoned") == 1)
        await submit(served, receiver)
        await served.until(lambda: served.value("webhook_deliveries_total", outcome="abandoned") == 2)
    assert len(receiver.got) == 3


@aio
async def test_a_failed_and_a_cancelled_job_are_told(
    student_of: Callable[..., Backbone], tmp_path: Path, receiver: Receiver
) -> None:
    async with serving({"sd": student_of("sd")}, **options(receiver, tmp_path)) as served:
        served.app.state.jobs.runner.stopping = True
        job = await submit(served, receiver)
        await served.client.post(f"{JOBS}/{job}/cancel")
        await served.until(lambda: len(receiver.got) == 1)
    assert json.loads(receiver.got[0][1])["type"] == "image.job.cancelled"


@aio
async def test_only_listed_origins(student_of: Callable[..., Backbone], tmp_path: Path, receiver: Receiver) -> None:
    async with serving({"sd": student_of("sd")}, **options(receiver, tmp_path)) as served:
        port = receiver.server.server_port
        for url in (
            "https://example.com/hook",
            f"http://127.0.0.1:{port + 1}/",
            f"http://localhost:{port}/",
            f"https://127.0.0.1:{port}/",
            f"http://me@127.0.0.1:{port}/",
            f"http://127.0.0.1:{port}@example.com/",
            "file:///etc/passwd",
            "nonsense",
        ):
            answer = await served.post(JOBS, webhook_url=url)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, "webhook_url"), url


def test_addresses_that_are_called() -> None:
    allowed = Allowed(("https://hooks.example.com",), ("10.1.0.0/16",))
    assert allowed.address("hooks.example.com", ["93.184.216.34", "2606:2800:220:1::1"]) == "93.184.216.34"
    assert allowed.address("hooks.example.com", ["10.1.2.3"]) == "10.1.2.3"
    assert allowed.address("127.0.0.1", ["127.0.0.1"]) == "127.0.0.1", "listed as it is"
    assert allowed.address("hooks.example.com", ["64:ff9b::5db8:d822"]) == "64:ff9b::5db8:d822", "public, by NAT64"
    carried = ("::ffff:10.0.0.1", "64:ff9b::a00:1", "64:ff9b::7f00:1", "2002:a00:1::1", "2001:0:a00:1::1")
    several = ("224.0.0.1", "239.255.255.250", "ff0e::1", "ff02::1", "255.255.255.255", "240.0.0.1")
    plain = ("10.2.0.1", "127.0.0.1", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "::", "::1", "fe80::1")
    for private in (*plain, *carried, *several):
        with pytest.raises(PrivateAddress):
            allowed.address("hooks.example.com", [private])
        with pytest.raises(PrivateAddress):
            allowed.address("hooks.example.com", ["93.184.216.34", private])
    for url in ("https://hooks.example.com:444/", "https://hooks.example.com/a\nb", "https://hooks.example.com/\0"):
        with pytest.raises(Impossible):
            allowed.check(url)
    assert allowed.check("https://HOOKS.example.com:443/x").path == "/x"


@aio
async def test_a_listed_name_that_leads_inside_is_not_called(
    student_of: Callable[..., Backbone], tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = receiver.url.replace("127.0.0.1", "hooks.example.com")
    port = receiver.server.server_port
    inside = {"data_dir": tmp_path, "webhook_origins": url, "webhook_secret": SECRET}
    async with serving({"sd": student_of("sd")}, **inside) as served:

        async def resolve(host: str, *_: Any, **__: Any) -> Any:
            assert host == "hooks.example.com"
            return [(2, 1, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        await served.post(JOBS, webhook_url=f"{url}/hook")
        await served.until(lambda: served.value("webhook_deliveries_total", outcome="refused") == 1)
    assert receiver.got == []


@pytest.mark.parametrize(
    "bad",
    [
        {"webhook_origins": "https://a.example"},
        {"webhook_secret": "short"},
        {"webhook_secret": "whsec_QUJD"},
        {"webhook_networks": "10.0.0.0/99"},
    ],
    ids=["no-secret", "no-prefix", "too-short", "no-network"],
)
def test_settings_that_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings(**bad)  # type: ignore[arg-type]
