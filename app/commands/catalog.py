"""`slipstream models` and `slipstream accelerators`: what can be asked for."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table


def models() -> None:
    """List the bundled models. Any directory or hub id in diffusers' layout can be served too, and single files."""
    from models.families import REGISTRY
    from models.loading import BUNDLED

    table = Table("model", "pipeline", "adapters", "plans", "profiles", "what it draws", title="Bundled models")
    for index in sorted(BUNDLED.glob("*/model_index.json")):
        folder = index.parent
        extras = folder / "slipstream.json"
        about: dict[str, Any] = json.loads(extras.read_text()) if extras.is_file() else {}
        adapters = ", ".join(sorted(p.name for p in (folder / "adapters").glob("*"))) or "-"
        plans = ", ".join(sorted(p.stem for p in (folder / "plans").glob("*.json"))) or "-"
        profiles = ", ".join(sorted(p.stem for p in (folder / "profiles").glob("*.json"))) or "-"
        pipeline = json.loads(index.read_text())["_class_name"]
        table.add_row(folder.name, pipeline, adapters, plans, profiles, about.get("description", ""))
    console = Console()
    console.print(table)
    console.print(f"Pipelines that can be served: {', '.join(REGISTRY)}")


def accelerators() -> None:
    """List the accelerators with their parameters."""
    from models.accelerators import REGISTRY

    table = Table("mode", "backbones", "parameters", "what it does", "paper", show_lines=True)
    for mode, cls in REGISTRY.items():
        properties = cls.model_json_schema()["properties"]
        parameters = "\n".join(_parameter(name, schema) for name, schema in properties.items() if name != "mode")
        table.add_row(mode, " ".join(cls.families), parameters or "-", cls.title, cls.paper)
    Console().print(table)


def _parameter(name: str, schema: dict[str, Any]) -> str:
    default = schema.get("default", "required")
    return f"{name} = {default if default is not None else 'auto'}"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(models)
    app.command()(accelerators)
