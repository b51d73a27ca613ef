"""`slipstream models` and `slipstream accelerators`: what can be asked for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.commands.macs import read_config
from app.commands.options import SizeOption, parse_size

GIB = 2**30
CARDS = (24, 48, 80)
"""GiB of the devices that a plan is made for."""
PARTS = ("transformer", "unet")


def models(
    memory: Annotated[
        str | None,
        typer.Option(help="Plan the memory of one instead: a known config, a diffusers config.json, or a directory."),
    ] = None,
    size: SizeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON on standard output.")] = False,
) -> None:
    """List the bundled models. Any directory or hub id in diffusers' layout can be served too, and single files."""
    if memory is not None:
        plan(memory, size, as_json)
        return
    from models.costs.memory import known_configs
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
    known = ", ".join(known_configs())
    console.print(f"Memory can be planned (--memory) from any config, and by name for: {known}", soft_wrap=True)
    console.print(f"Pipelines that can be served: {', '.join(REGISTRY)}", soft_wrap=True)


def plan(model: str, size: str | None, as_json: bool) -> None:
    """Weights, activations, and what images remember, from a bare config."""
    from models.costs.memory import memory_plan
    from models.errors import ModelLoadError, RequestError

    width, height = parse_size(size)
    try:
        found = memory_plan(_config(model), width, height)
    except (ModelLoadError, RequestError) as error:
        raise typer.BadParameter(f"{model}: {error}") from error
    fits = {
        mode: {gigabytes: found.rows(gigabytes * GIB, features) for gigabytes in CARDS}
        for mode, features in found.features.items()
    }
    if as_json:
        print(json.dumps({**asdict(found), "rows": fits}))
        return
    title = f"{model}: {found.parameters / 1e9:.2f} B, bfloat16; text encoders and VAE on top"
    table = Table("", "GiB", *(f"rows in {gigabytes} GiB" for gigabytes in CARDS), title=title)
    table.add_row("weights", f"{found.weights / GIB:.2f}")
    table.add_row("activations, a row", f"{found.activations / GIB:.3f}")
    for mode, features in found.features.items():
        rows = [str(fits[mode][gigabytes]) for gigabytes in CARDS]
        table.add_row(f"remembered by an image, {mode}", f"{features / GIB:.3f}", *rows)
    Console().print(table)


def _config(model: str) -> dict[str, Any]:
    from models.costs.memory import known_configs

    path = known_configs().get(model, Path(model))
    if path.is_dir():
        path = next((path / part / "config.json" for part in PARTS if (path / part / "config.json").is_file()), path)
    return read_config(path)


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
