"""Attacks on the server's edge: signals, ports, half-open connections, bodies, framing, logs."""

from __future__ import annotations

import signal
import subprocess
import time

from tests.bench.attack import Arena, Outcome, attack


@attack(3)
def second_signal(arena: Arena) -> Outcome:
    """A second SIGTERM with work open."""
    with arena.server(drain_seconds=600) as target:
        clients = target.busy(6)
        code = target.stop(signal.SIGTERM, signal.SIGTERM)
        typed = sum(client.ended().typed for client in clients)
    return Outcome(f"exit {code}, {typed} of 6 typed answers", "exit 143, 6 of 6", code == 143 and typed == 6)


@attack(3)
def port_taken(arena: Arena) -> Outcome:
    """A port that is taken already."""
    with arena.server(ready=False) as target:
        began = time.monotonic()
        second = subprocess.run(arena.command(port=target.port), capture_output=True, text=True, timeout=120)
        seconds = time.monotonic() - began
    lines = second.stderr.strip().splitlines()
    said = len(lines) == 1 and f"port {target.port}" in lines[0] and "--port" in lines[0]
    figure = f"exit {second.returncode}, {len(lines)} lines, {seconds:.1f} s"
    return Outcome(figure, "exit 1, 1 line naming port and remedy", second.returncode == 1 and said)
