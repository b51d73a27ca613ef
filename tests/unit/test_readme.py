"""The README names all there is: accelerators, settings, routes, metrics, error codes, commands. Its code runs.

The operator's table of limits has every one of them.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import app.errors
import models.errors
from app.cli import app as cli
from app.errors import Impossible, ServiceError
from app.http.main import create_app
from app.metrics import Metrics
from app.settings import Settings
from models.accelerators import REGISTRY
from models.errors import RequestError
from models.solvers.names import REGISTRY as SCHEDULERS

OPERATIONS = (Path(__file__).parents[2] / "deploy" / "docs" / "operations.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", re.MULTILINE)
LIMITS = re.compile(r"^(max_\w+|\w+_seconds|decode_chunk)$")
README = (Path(__file__).parents[2] / "README.md").read_text()


def missing(names: list[str]) -> list[str]:
    return [name for name in names if f"`{name}`" not in README]


def test_accelerators_with_their_parameters() -> None:
    assert not missing(list(REGISTRY))
    for cls in REGISTRY.values():
        assert not missing([name for name in cls.model_json_schema()["properties"] if name != "mode"])


def test_settings_by_flag_variable_and_meaning() -> None:
    for name, info in Settings.model_fields.items():
        assert not missing([f"--{name.replace('_', '-')}", f"SLIPSTREAM_{name.upper()}"])
        assert str(info.description) in README


def test_metrics() -> None:
    families = [family.name for family in Metrics().registry.collect() if family.name.startswith("slipstream")]
    assert families
    assert not [name for name in families if f"`{name}" not in README]


def test_routes() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    assert paths
    wanted = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert not missing(wanted)


def test_error_codes() -> None:
    errors = [cls for _, cls in inspect.getmembers(app.errors, inspect.isclass) if issubclass(cls, ServiceError)]
    refusals = [cls for _, cls in inspect.getmembers(models.errors, inspect.isclass) if issubclass(cls, RequestError)]
    codes = {cls.code for cls in errors} | {Impossible.of(cls("field", "reason")).code for cls in refusals}
    assert not missing(sorted(codes))


def test_commands_and_schedulers() -> None:
    names = [command.name or command.callback.__name__ for command in cli.registered_commands if command.callback]
    assert "serve" in names
    assert not [name for name in names if f"`slipstream {name}" not in README]
    assert not missing(list(SCHEDULERS))


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [example] = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from models import" in code]
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "ring.png").stat().st_size > 100


def table() -> dict[str, tuple[str, str]]:
    """The rows of the security section's table: a setting's default and its reason."""
    section = OPERATIONS.partition("## Security\n")[2].partition("\n## ")[0]
    return {name: (default, reason) for name, default, reason in ROW.findall(section)}


def test_every_limit_is_in_the_table_with_its_default_and_a_reason() -> None:
    limits = {name: str(info.default) for name, info in Settings.model_fields.items() if LIMITS.match(name)}
    assert len(limits) >= 16
    assert {name: default for name, (default, _) in table().items()} == limits
    assert all(len(reason.split()) >= 3 for _, reason in table().values())
