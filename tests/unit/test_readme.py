"""README and pages together name all there is; the pages' tables are what the code says; links lead somewhere.

The README is short enough to be finished. The operator's table of limits has every one of them.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest
import typer

import app.errors
import models.errors
from app.cli import app as cli
from app.errors import Impossible, ServiceError
from app.http.main import create_app
from app.metrics import Metrics
from app.settings import Settings
from models.accelerators import REGISTRY
from models.errors import RequestError
from models.families import REGISTRY as FAMILIES
from models.solvers.names import REGISTRY as SCHEDULERS
from tests import docs

ROOT = Path(__file__).parents[2]
PAGES = sorted(docs.PAGES.glob("*.md"))
WRITTEN = [ROOT / "README.md", *PAGES, *sorted((ROOT / ".github").glob("*.md"))]
LIMIT = 1500
"""Words of the README: a newcomer finishes it. What is longer goes to a page."""
ROW = re.compile(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", re.MULTILINE)
LIMITS = re.compile(r"^(max_\w+|\w+_(seconds|bytes)|keep_\w+|decode_chunk|jobs_in_flight)$")
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
README = (ROOT / "README.md").read_text()
OPERATIONS = (docs.PAGES / "operations.md").read_text()


def missing(names: list[str], page: str) -> list[str]:
    text = (docs.PAGES / page).read_text()
    return [name for name in names if f"`{name}`" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_what_the_code_says(page: Path) -> None:
    text = page.read_text()
    assert docs.made(text) == text, "python -m tests.docs writes them"


def test_every_table_is_on_a_page() -> None:
    found = {name for page in PAGES for _, name, _ in docs.BLOCK.findall(page.read_text())}
    assert found == docs.TABLES.keys()


def test_accelerators_with_their_parameters() -> None:
    names = {name for cls in REGISTRY.values() for name in cls.model_json_schema()["properties"]} - {"mode"}
    assert not missing([*REGISTRY, *names], "accelerators.md")
    assert not [mode for mode in REGISTRY if f"`{mode}`" not in README]


def test_settings_by_flag_variable_and_meaning() -> None:
    text = (docs.PAGES / "settings.md").read_text()
    for name, info in Settings.model_fields.items():
        assert not missing([f"--{name.replace('_', '-')}", f"SLIPSTREAM_{name.upper()}"], "settings.md")
        assert str(info.description).replace("|", "\\|") in text


def test_metrics() -> None:
    families = [family.name for family in Metrics().registry.collect() if family.name.startswith("slipstream")]
    text = (docs.PAGES / "metrics.md").read_text()
    assert families
    assert not [name for name in families if f"`{name}" not in text]


def test_routes() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    assert paths
    wanted = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    assert not missing(wanted, "http.md")


def test_error_codes() -> None:
    errors = [cls for _, cls in inspect.getmembers(app.errors, inspect.isclass) if issubclass(cls, ServiceError)]
    refusals = [cls for _, cls in inspect.getmembers(models.errors, inspect.isclass) if issubclass(cls, RequestError)]
    codes = {cls.code for cls in errors} | {Impossible.of(cls("field", "reason")).code for cls in refusals}
    assert not missing(sorted(codes), "errors.md")


def test_commands_schedulers_and_families() -> None:
    commands = [name for name, _ in docs.walk("slipstream", typer.main.get_command(cli))]
    assert {"slipstream serve", "slipstream jobs list"} <= set(commands)
    assert not missing(commands, "commands.md")
    assert not missing([*SCHEDULERS, *FAMILIES], "models.md")


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        file, _, heading = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.split()) <= LIMIT
    linked = set(LINK.findall(README)) | set(LINK.findall((ROOT / ".github" / "CONTRIBUTING.md").read_text()))
    assert not [page.name for page in PAGES if f"deploy/docs/{page.name}" not in linked]


def test_its_first_screen_has_the_two_commands() -> None:
    screen = "\n".join(README.splitlines()[:30])
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/slipstream serve\n" in screen
    assert 'python3 -m venv .venv && .venv/bin/pip install ".[test]" && .venv/bin/pytest\n' in screen


def test_the_licence_is_packed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [file] = project["license-files"]
    assert "Apache License" in (ROOT / file).read_text()
    assert f"COPY {file} " in (ROOT / "Dockerfile").read_text()
    assert f"!{file}" in (ROOT / ".dockerignore").read_text().splitlines()


def table() -> dict[str, tuple[str, str]]:
    """The rows of the security section's table: a setting's default and its reason."""
    section = OPERATIONS.partition("## Security\n")[2].partition("\n## ")[0]
    return {name: (default, reason) for name, default, reason in ROW.findall(section)}


def test_every_limit_is_in_the_table_with_its_default_and_a_reason() -> None:
    limits = {name: str(info.default) for name, info in Settings.model_fields.items() if LIMITS.match(name)}
    assert len(limits) >= 16
    assert {name: default for name, (default, _) in table().items()} == limits
    assert all(len(reason.split()) >= 3 for _, reason in table().values())
