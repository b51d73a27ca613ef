"""`slipstream macs`: multiply-accumulates of a model or of a bare diffusers config, full and accelerated."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.commands.options import (
    AccelerationOption,
    AdapterOption,
    ConfigOption,
    PlanOption,
    ScaleOption,
    SchedulerOption,
    SizeOption,
    StepsOption,
    composed,
    loaded,
    parse_named,
    parse_size,
)


def macs(
    model: Annotated[str | None, typer.Option(help="A bundled name, a directory, or a hub id.")] = None,
    unet_config: Annotated[Path | None, typer.Option(help="A diffusers U-Net config.json; no weights needed.")] = None,
    transformer_config: Annotated[Path | None, typer.Option(help="A diffusers transformer config.json.")] = None,
    steps: StepsOption = None,
    size: SizeOption = None,
    guidance_scale: ScaleOption = None,
    scheduler: SchedulerOption = None,
    acceleration: AccelerationOption = None,
    adapter: AdapterOption = None,
    plan: PlanOption = None,
    config: ConfigOption = None,
    attention_matmuls: Annotated[bool, typer.Option(help="Count attention's two products; many papers do not.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Count MACs per pass, step and image. Nothing is computed: it runs on the meta device."""
    from models import macs as count

    given = [source for source in (model, unet_config, transformer_config) if source is not None]
    if len(given) != 1:
        raise typer.BadParameter("give exactly one of --model, --unet-config, --transformer-config")
    bare = unet_config or transformer_config
    accelerators = composed(acceleration)
    adapters, plans = parse_named(adapter, "--adapter"), parse_named(plan, "--plan")
    source: Any = (
        read_config(bare)
        if bare is not None
        else loaded(str(model), device="cpu", dtype="float32", adapters=adapters, plans=plans, config=config)
    )
    width, height = parse_size(size)
    report = count(
        source,
        acceleration=accelerators,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        width=width,
        height=height,
        attention_matmuls=attention_matmuls,
    )
    facts = {
        "parameters": report.parameters,
        "pass": report.row,
        "steps": list(report.steps),
        "step_average": report.image / len(report.steps),
        "image": report.image,
        "image_unaccelerated": report.image_unaccelerated,
        "ratio": report.ratio,
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table("", "GMACs", title=f"{report.parameters / 1e6:.1f} M parameters, {len(report.steps)} steps")
    table.add_row("one row, full pass", f"{report.row / 1e9:.3f}")
    for value, number in sorted(Counter(report.steps).items(), reverse=True):
        table.add_row(f"a step ({number} of them)", f"{value / 1e9:.3f}")
    table.add_row("image, unaccelerated", f"{report.image_unaccelerated / 1e9:.3f}")
    table.add_row("image", f"{report.image / 1e9:.3f}")
    table.add_row("ratio", f"{report.ratio:.3f}  ({1 / report.ratio:.2f}x)")
    Console().print(table)


def read_config(path: Path) -> dict[str, Any]:
    """A diffusers config.json. Raises `BadParameter` for what is none."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise typer.BadParameter(f"{path}: not a diffusers config")
    return config


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(macs)
