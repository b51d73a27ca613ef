"""Webhooks of jobs that are over: who may be called, signed as Standard Webhooks says, tried again until taken."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import SplitResult, urlsplit

import httpx
import sqlalchemy as sa

from app.errors import Impossible
from app.jobs.store import Row, Store
from app.jobs.tables import DELIVERIES
from app.logs import SERVER
from app.metrics import Metrics

Outcome = Literal["delivered", "retried", "abandoned", "refused"]
BACK_OFF = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Seconds between one try and the next, those that Standard Webhooks recommends; then it is given up."""
TRY_SECONDS = 10.0
HOLD_SECONDS = 60.0
"""How long a server has a delivery to itself."""
AT_ONCE = 16
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class PrivateAddress(Exception):
    """A host has an address that is not of the public Internet, and that nobody has listed."""


@dataclass(frozen=True)
class Allowed:
    """Whom this server may call: origins, and networks beyond the public Internet."""

    origins: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()

    def check(self, url: str) -> SplitResult:
        """The parts of a URL. Raises `Impossible` for one whose origin is not listed."""
        origin = _origin(url)
        if origin is None or origin not in {_origin(listed) for listed in self.origins}:
            raise Impossible("webhook_url: its origin is not one that this server may call", param="webhook_url")
        return urlsplit(url)

    def address(self, host: str, found: Iterable[str]) -> str:
        """The first of a host's addresses that may be called. Raises `PrivateAddress` where any may not."""
        addresses = [ipaddress.ip_address(address.partition("%")[0]) for address in found]
        networks = [ipaddress.ip_network(network) for network in self.networks]
        named = host == "localhost" or _literal(host)  # an origin that names its address is listed with it
        for address in addresses:
            if not (is_public(address) or named or any(address in network for network in networks)):
                raise PrivateAddress(f"{host} is {address}")
        return str(addresses[0])


def is_public(address: Address) -> bool:
    """Whether an address is one host's on the public Internet, and so is each IPv4 address that it carries."""
    carried = _carried(address)
    if carried:
        return all(map(is_public, carried))
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _carried(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that an IPv6 one leads to: mapped, by NAT64 (RFC 6052), 6to4 or Teredo (of both ends)."""
    if not isinstance(address, ipaddress.IPv6Address):
        return ()
    if address in NAT64:
        return (ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF),)
    single = address.ipv4_mapped or address.sixtofour
    return (single,) if single is not None else address.teredo or ()


def _literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port; None for what is no plain http(s) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
        httpx.URL(url)  # by which it will be called
    except (ValueError, httpx.InvalidURL):
        return None
    if parts.scheme not in PORTS or not parts.hostname or parts.username is not None or parts.password is not None:
        return None
    return parts.scheme, parts.hostname.lower(), port or PORTS[parts.scheme]


def signed(secret: str, message_id: str, moment: int, payload: str) -> dict[str, str]:
    """The headers of Standard Webhooks: id, time, and HMAC-SHA256 over both and the body."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{message_id}.{moment}.{payload}".encode(), hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {"webhook-id": message_id, "webhook-timestamp": str(moment), "webhook-signature": signature}


class Webhooks:
    """Sends what the store has to send."""

    def __init__(self, store: Store, allowed: Allowed, secret: str, metrics: Metrics) -> None:
        self._store = store
        self.allowed = allowed
        self._secret = secret
        self._metrics = metrics
        for outcome in get_args(Outcome):
            metrics.webhooks.labels(outcome)

    async def deliver(self) -> None:
        """Try everything that is due once."""
        while due := await self._store.call(self._claim):
            await asyncio.gather(*map(self._try, due))

    def _claim(self) -> list[Row]:
        now = self._store.clock()
        with self._store.begin() as connection:
            query = sa.select(DELIVERIES.c.id).where(DELIVERIES.c.next_at <= now).order_by(DELIVERIES.c.next_at)
            ids = list(connection.execute(query.limit(AT_ONCE).with_for_update(skip_locked=True)).scalars())
            update = (
                sa.update(DELIVERIES)
                .where(DELIVERIES.c.id.in_(ids))
                .values(attempts=DELIVERIES.c.attempts + 1, next_at=now + HOLD_SECONDS)
            )
            return list(connection.execute(update.returning(DELIVERIES)).mappings()) if ids else []

    async def _try(self, row: Row) -> None:
        try:
            status = await self._post(row)
            outcome = self._outcome(status, row["attempts"])
        except (PrivateAddress, Impossible) as error:
            SERVER.error("a webhook is refused: %s", error)
            outcome = "refused"
        except (httpx.HTTPError, OSError, TimeoutError):
            outcome = self._outcome(0, row["attempts"])
        self._metrics.webhooks.labels(outcome).inc()
        await self._store.call(self._note, row, outcome)

    def _outcome(self, status: int, attempts: int) -> Outcome:
        if 200 <= status < 300:
            return "delivered"
        return "abandoned" if status == 410 or attempts > len(BACK_OFF) else "retried"

    async def _post(self, row: Row) -> int:
        """POST once, to an address that was looked at, following nothing. The status."""
        url = self.allowed.check(row["url"])
        host, port = str(url.hostname), url.port or PORTS[url.scheme]
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(TRY_SECONDS):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = self.allowed.address(host, [str(entry[4][0]) for entry in found])
        there = httpx.URL(row["url"]).copy_with(host=address)
        headers: Mapping[str, str] = {
            **signed(self._secret, row["id"], int(self._store.clock()), row["payload"]),
            "Content-Type": "application/json",
            "Host": url.netloc,
            "User-Agent": "slipstream",
        }
        async with (
            asyncio.timeout(TRY_SECONDS),
            httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=TRY_SECONDS) as client,
            client.stream(
                "POST", there, content=row["payload"], headers=headers, extensions={"sni_hostname": host}
            ) as answer,
        ):
            return answer.status_code

    def _note(self, row: Row, outcome: Outcome) -> None:
        with self._store.begin() as connection:
            mine = DELIVERIES.c.id == row["id"]
            if outcome == "retried":
                later = self._store.clock() + BACK_OFF[row["attempts"] - 1]
                connection.execute(sa.update(DELIVERIES).where(mine).values(next_at=later))
            else:
                connection.execute(sa.delete(DELIVERIES).where(mine))
