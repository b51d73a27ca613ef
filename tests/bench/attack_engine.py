"""Attacks on the engine: pictures that grow, deadlines, floods, memory that stays."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from app.engine.engine import IDLE_SECONDS
from tests.bench.attack import LONG, MIB, PROMPT, Arena, Client, Outcome, Target, attack

BOMBS, SIDE = 60, 4096
"""Pictures of 67 MB in 2 KB."""
SMALL: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 5}


def bomb() -> str:
    """A small file of many pixels."""
    out = io.BytesIO()
    Image.new("1", (SIDE, SIDE)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def bombed(target: Target, count: int) -> tuple[list[Client], int]:
    """Requests with bombs for pictures and long work, once all wait or run; and the most memory until then."""
    body, most = LONG | {"image": bomb(), "timeout_seconds": 60}, 0
    clients = [Client(target.url, body) for _ in range(count)]

    def accepted() -> bool:
        nonlocal most
        most = max(most, target.resident)
        return target.metric("requests_running") + target.metric("requests_waiting") >= count

    target.until(accepted, 90)
    return clients, most


def left(target: Target, clients: Sequence[Client]) -> None:
    """Wait until all clients have been answered, and nothing is held for them."""
    for client in clients:
        client.ended()
    target.until(lambda: target.metric("requests_running") + target.metric("waiting_bytes") == 0)


@attack(1)
def picture_bombs(arena: Arena) -> Outcome:
    """60 pictures of 67 MB in 2 KB that wait."""
    with arena.server() as target:
        before = target.resident
        _, most = bombed(target, BOMBS)
        kept, waiting = target.resident - before, target.metric("waiting_bytes")
    figure = f"{(most - before) / MIB:.0f} MiB more at most, {kept / MIB:.0f} then, {waiting / MIB:.1f} counted"
    return Outcome(figure, "512 MiB more at most", most - before < 512 * MIB and 0 < waiting < 64 * MIB)


@attack(6)
def memory_comes_back(arena: Arena) -> Outcome:
    """Memory after 60 pictures of 67 MB, when everybody has left."""
    with arena.server(deadline_seconds=10) as target:
        body, grown = LONG | {"image": bomb()}, list[tuple[float, ...]]()

        def looked() -> tuple[float, ...]:
            """MiB: resident, of that the heap's in use, and the heap's that is kept free."""
            used, kept = (target.metric(f'heap_bytes{{state="{state}"}}') for state in ("used", "kept"))
            return target.resident / MIB, used / MIB, kept / MIB

        left(target, [Client(target.url, SMALL)])
        time.sleep(IDLE_SECONDS + 2)
        before = looked()
        for _ in range(2):  # what grows again the second time is a leak
            left(target, [Client(target.url, body) for _ in range(BOMBS)])
            at_once = looked()
            time.sleep(IDLE_SECONDS + 2)
            grown.append(tuple(now - was for now, was in zip(looked(), before, strict=True)))
    resident, used, kept = (now - was for now, was in zip(at_once, before, strict=True))
    idle = "; ".join(f"{r:+.0f} ({u:+.0f} used, {k:+.0f} kept)" for r, u, k in grown)
    figure = f"{resident:+.0f} MiB at the end ({used:+.0f} used, {kept:+.0f} kept), without work {idle}"
    held = all(one[0] < 96 for one in grown) and grown[1][1] - grown[0][1] < 8
    return Outcome(figure, "+96 MiB without work, no more used the second time", held)


@attack(1)
def uploads_beyond_the_limit(arena: Arena) -> Outcome:
    """Uploads of more bytes than may wait."""
    with arena.server(max_waiting_bytes=2 * MIB) as target:
        clients = [Client(target.url, LONG | {"image": "A" * MIB, "timeout_seconds": 5}) for _ in range(8)]
        large = Client(target.url, LONG | {"image": "A" * (3 * MIB), "timeout_seconds": 5})
        statuses = sorted({client.ended().status for client in clients})
        status = large.ended().status
        waiting = target.metric("waiting_bytes")
    held = status == 429 and set(statuses) <= {422, 429} and waiting == 0
    return Outcome(f"{status} for 3 MiB, {statuses} for 1 MiB, {waiting:.0f} left", "429 for 3 MiB, none left", held)


@attack(2)
def deadline_behind_checks(arena: Arena) -> Outcome:
    """A deadline of 1 s behind 200 open requests of different sizes."""
    with arena.server(deadline_seconds=30) as target:
        sizes = [(8 * (4 + i % 12), 8 * (4 + i // 12)) for i in range(144)]
        clients = [Client(target.url, SMALL | {"width": w, "height": h}) for w, h in sizes + sizes[:56]]
        target.until(lambda: target.metric("requests_running") + target.metric("requests_waiting") > 0, 60)
        began = time.monotonic()
        late = Client(target.url, LONG | {"timeout_seconds": 1}).ended()
        seconds = time.monotonic() - began
        for client in clients:
            client.ended()
    return Outcome(f"{late.status} after {seconds:.1f} s", "504 within 5 s", late.status == 504 and seconds < 5)


@attack(4)
def small_behind_large(arena: Arena) -> Outcome:
    """A picture of 5 steps behind four jobs of 2,500."""
    with arena.server() as target:
        target.busy(4)
        began = time.monotonic()
        small = Client(target.url, SMALL | {"timeout_seconds": 60}).ended()
        seconds = time.monotonic() - began
    return Outcome(f"{small.status} after {seconds:.1f} s", "200 within 15 s", small.status == 200 and seconds < 15)
