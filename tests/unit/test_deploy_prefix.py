"""Served under a proxy's prefix, the app still knows its own routes: what is counted and what needs no key."""

from __future__ import annotations

import pytest

from app.http.middleware import route_path


@pytest.mark.parametrize(
    ("path", "root", "route"),
    [
        ("/generate", "", "/generate"),
        ("/shapes-sd/generate", "/shapes-sd", "/generate"),
        ("/shapes-sd/", "/shapes-sd", "/"),
        ("/shapes-sd", "/shapes-sd", ""),
        ("/shapes-sdx/generate", "/shapes-sd", "/shapes-sdx/generate"),
        ("/generate", "/shapes-sd", "/generate"),
    ],
)
def test_route_path(path: str, root: str, route: str) -> None:
    assert route_path({"type": "http", "path": path, "root_path": root}) == route
