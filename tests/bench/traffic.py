"""Closed-loop clients, and the disciplines that serve them: a client waits for its picture, thinks, and asks again."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from app.engine.batcher import Batcher
from models import Request, advance
from models.generate import decode, start
from models.resolve import resolve
from models.trajectory import Trajectory
from tests.bench.harness import clock
from tests.bench.runs import accelerations, forecasts
from tests.bench.runs import request as one_request
from tests.bench.zoo import Model

STEPS = (6, 8, 10, 12)
FIRST_SECONDS = 0.5
THINK_SECONDS = 0.1


@dataclass(frozen=True)
class Order:
    """One request of one client, `delay` seconds after the client's last picture."""

    client: int
    request: Request
    label: str
    delay: float


@dataclass(eq=False)
class Item:
    """One order at work; what the batcher sorts."""

    order: Order
    arrived: float
    trajectory: Trajectory
    group: Hashable = None
    started: bool = True
    work: float = 0.0
    share: Hashable = ""
    weight: float = 1.0

    @property
    def request(self) -> Hashable:
        """The order itself: each has one image."""
        return self

    @property
    def num_rows(self) -> int:
        """Rows of the coming step."""
        return self.trajectory.num_rows


@dataclass
class Outcome:
    """What a discipline did with the traffic: seconds in all, each order's latency, rows and plans of each tick."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    by_client: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """When each order of a client came and was done."""
    rows: list[int] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)


def orders(model: Model, clients: int, each: int, seed: int = 0, *, foretold: bool = False) -> list[list[Order]]:
    """What every client will ask for: any accelerator of the model, any of `STEPS`, arrivals apart at random.

    `foretold`: forecasts are among the wishes, too; clients, moments and steps are the same.
    """
    rng = random.Random(seed)
    more = forecasts() if foretold else {}
    by_steps = {steps: list((accelerations(model, steps) | more).items()) for steps in STEPS}

    def order(client: int, number: int) -> Order:
        steps = rng.choice(STEPS)
        label, acceleration = by_steps[steps][int(rng.random() * len(by_steps[steps]))]  # as many numbers for any list
        delay = rng.expovariate(1 / (THINK_SECONDS if number else FIRST_SECONDS))
        request = one_request(model, steps, acceleration, seed=rng.randrange(2**31))
        return Order(client, request, f"{label}, {steps} steps", delay)

    return [[order(client, number) for number in range(each)] for client in range(clients)]


class Clients:
    """The clients' side of a run: who asks when."""

    def __init__(self, traffic: Sequence[Sequence[Order]]) -> None:
        self._lines: list[Iterator[Order]] = [iter(line) for line in traffic]
        self._coming: list[tuple[float, int, Order]] = []
        self._began = clock()
        self._skipped = 0.0
        self.outcome = Outcome()
        for client in range(len(self._lines)):
            self._think(client, 0.0)

    def now(self) -> float:
        """Seconds since the beginning: what was computed, and what there was to wait for."""
        return clock() - self._began + self._skipped

    def arrived(self, idle: bool) -> list[tuple[float, Order]]:
        """The orders that have arrived; where the server is `idle`, waits for the next. Empty and idle: all is done.

        Waiting is done by moving the clock: nobody sleeps.
        """
        if idle and self._coming:
            self._skipped += max(0.0, self._coming[0][0] - self.now())
        found = []
        while self._coming and self._coming[0][0] <= self.now():
            moment, _, order = heappop(self._coming)
            found.append((moment, order))
        return found

    def done(self, order: Order, arrived: float) -> None:
        """The picture is there; its client thinks about the next."""
        now = self.now()
        self.outcome.latencies.append(now - arrived)
        self.outcome.by_client.setdefault(order.client, []).append((arrived, now))
        self.outcome.seconds = now
        self._think(order.client, now)

    def _think(self, client: int, now: float) -> None:
        if (order := next(self._lines[client], None)) is not None:
            heappush(self._coming, (now + order.delay, client, order))


def one_by_one(traffic: Sequence[Sequence[Order]], draw: Callable[[Request], object]) -> Outcome:
    """First come, first served, one request at a time."""
    clients = Clients(traffic)
    line: list[tuple[float, Order]] = []
    while True:
        line += clients.arrived(idle=not line)
        if not line:
            return clients.outcome
        arrived, order = line.pop(0)
        draw(order.request)
        clients.done(order, arrived)


Key = Callable[[Item], Hashable]


def batched(
    model: Model,
    traffic: Sequence[Sequence[Order]],
    max_rows: int,
    key: Key,
    place: Callable[[Item], object] = lambda item: None,
) -> Outcome:
    """Our engine's loop over our batcher; items of equal `key` can share a tick. `place` says whose an item is."""
    backbone, clients = model.backbone, Clients(traffic)
    batcher: Batcher[Item, Hashable] = Batcher(lambda group: max_rows)
    while True:
        for arrived, order in clients.arrived(idle=not len(batcher)):
            run = resolve(backbone.spec, backbone.scheduler_config, order.request)
            item = Item(order, arrived, start(backbone, run)[0])
            item.group = key(item)
            place(item)
            batcher.add(item)
        tick = batcher.next()
        if not tick:
            return clients.outcome
        clients.outcome.rows.append(sum(item.num_rows for item in tick))
        clients.outcome.plans.append(len({item.trajectory.plan.signature for item in tick}))
        advance(backbone, [item.trajectory for item in tick])
        finished = [item for item in tick if item.trajectory.done]
        for item in tick:
            group = item.group if item.trajectory.done else key(item)
            if item.trajectory.done or group != item.group:
                batcher.discard(item)
            if group != item.group:
                item.group = group
                batcher.add(item)
        if finished:
            decode(backbone, [item.trajectory.latents for item in finished])
        for item in finished:
            clients.done(item.order, item.arrived)


def mixed(item: Item) -> Hashable:
    """Everything of one size shares a tick: what we do."""
    return item.trajectory.group


def equal_plan(item: Item) -> Hashable:
    """Only rows whose coming step does the same share a tick."""
    return item.trajectory.plan.signature


def equal_settings(item: Item) -> Hashable:
    """Only requests of the same accelerators and steps share a tick: the settings are in the batch key."""
    return item.order.label
