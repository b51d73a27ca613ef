"""The tables of deploy/docs, made from the code: `python -m tests.docs` writes each page's again, in place.

A page is prose with tables between `<!-- made: NAME -->` and `<!-- end -->`, where NAME is one of `TABLES`. A test
holds every page against what this would write. So it is with the settings in the schema of the Helm chart's values.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

import app.errors
import models.errors
from app.cli import app as cli
from app.cli import shown
from app.errors import Impossible, ServiceError
from app.http.main import create_app
from app.http.schemas.jobs import JobRequest
from app.http.schemas.requests import GenerationFields, ImagesRequest
from app.metrics import DEVICE_MEMORY, Metrics
from app.settings import Settings
from models.accelerators import REGISTRY as ACCELERATORS
from models.costs.memory import known_configs
from models.errors import RequestError
from models.families import REGISTRY as FAMILIES
from models.solvers.flow import FLOW_REGISTRY
from models.solvers.names import REGISTRY as SCHEDULERS

PAGES = Path(__file__).parents[1] / "deploy" / "docs"
CHART = PAGES.parent / "helm" / "slipstream" / "values.schema.json"
PLACED = {"host", "port", "data_dir"}
"""Settings that the chart sets itself; secrets come from a Secret."""
BLOCK = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {"unet": "U-Net", "dit": "transformer"}
BROAD = {
    "unknown_field": "A field that the route does not have.",
    "missing": "A field that the route needs.",
}
"""What is told apart of `invalid_value` by `app.http.problems`."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(*words: str) -> str:
    """Words as code, separated by commas."""
    return ", ".join(f"`{word}`" for word in words)


def first_line(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def settings() -> str:
    """Every setting of the server."""
    rows = [
        (code(f"--{name.replace('_', '-')}"), code(f"SLIPSTREAM_{name.upper()}"), shown(info.default), _text(info))
        for name, info in Settings.model_fields.items()
    ]
    return table(("flag", "environment", "default", "meaning"), rows)


def _text(info: Any) -> str:
    return str(info.description)


def metrics() -> str:
    """Every metric but the client library's own, with its labels."""
    known = Metrics()
    labels = {metric._name: metric._labelnames for metric in vars(known).values() if hasattr(metric, "_labelnames")}
    rows = []
    for family in known.registry.collect():
        if family.name.startswith("slipstream"):
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            names = ", ".join(labels.get(family.name, ())) or "-"
            rows.append((code(family.name + suffix), family.type, names, family.documentation))
    gpu = ((f"slipstream_gpu_memory_{kind}_bytes", text) for kind, text in DEVICE_MEMORY.items())
    rows += [(code(name), "gauge", "device", text) for name, text in gpu]
    return table(("metric", "kind", "labels", "meaning"), rows)


def errors() -> str:
    """Every code that a client can meet, by status."""
    found: dict[str, tuple[int, str, str]] = {}
    for _, cls in inspect.getmembers(app.errors, inspect.isclass):
        if issubclass(cls, ServiceError) and "code" in vars(cls) and cls is not ServiceError:
            found[cls.code] = (cls.status, cls.kind, first_line(cls))
    found[ServiceError.code] = (ServiceError.status, ServiceError.kind, first_line(app.errors.Internal))
    for name, text in BROAD.items():
        found[name] = (Impossible.status, Impossible.kind, text)
    for _, cls in inspect.getmembers(models.errors, inspect.isclass):
        if issubclass(cls, RequestError):
            found[Impossible.of(cls("field", "reason")).code] = (Impossible.status, Impossible.kind, first_line(cls))
    rows = [
        (str(status), code(name), code(kind), text)
        for name, (status, kind, text) in sorted(found.items(), key=lambda item: (item[1][0], item[0]))
    ]
    return table(("status", "`code`", "`type`", "when"), rows)


def endpoints() -> str:
    """Every address and what it is for."""
    server = create_app(Settings())
    described = {
        (method.upper(), path): str(operation.get("summary", ""))
        for path, methods in server.openapi()["paths"].items()
        for method, operation in methods.items()
    }
    pages = {
        "/": "The playground.",
        "/docs": "The interface, to read and try.",
        "/openapi.json": "The same as OpenAPI.",
    }
    rows = [(code(f"{method} {path}"), text) for (method, path), text in described.items()]
    rows += [(code(f"GET {path}"), text) for path, text in pages.items()]
    return table(("route", "what it does"), rows)


def fields() -> str:
    """The fields of a request: of every generating route, then what OpenAI's and the jobs have beside them."""
    rows = []
    for model, where in ((GenerationFields, "all"), (ImagesRequest, "`/v1/images`"), (JobRequest, "jobs")):
        schema = model.model_json_schema()
        for name, field in schema["properties"].items():
            if model is GenerationFields or name not in GenerationFields.model_fields:
                rows.append((code(name), where, _default(schema, name), field.get("description", "")))
    return table(("field", "routes", "default", "meaning"), rows)


def _default(model: dict[str, Any], name: str) -> str:
    """A field's default as a table shows it, from its model's JSON Schema; lists begin empty."""
    if name in model.get("required", ()):
        return "required"
    default = model["properties"][name].get("default")
    return "-" if default in (None, []) else f"`{default}`".lower()


def accelerators() -> str:
    """Every mode with the backbones that it fits, what it does, where that comes from."""
    rows = []
    for mode, cls in ACCELERATORS.items():
        fits = "all" if set(cls.families) == set(KINDS) else ", ".join(KINDS[kind] for kind in cls.families)
        source = f" ([{'paper' if 'arxiv' in cls.paper else 'source'}]({cls.paper}))" if cls.paper else ""
        rows.append((code(mode), fits, cls.title + source))
    return table(("mode", "backbones", "what it does"), rows)


def parameters() -> str:
    """The parameters of every mode, with default, range and meaning."""
    rows = []
    for mode, cls in ACCELERATORS.items():
        schema = cls.model_json_schema()
        for name, field in schema["properties"].items():
            if name != "mode":
                what = (_default(schema, name), _range(field), field.get("description", ""))
                rows.append((code(mode), code(name), *what))
    return table(("mode", "parameter", "default", "allowed", "meaning"), rows)


def _range(schema: dict[str, Any]) -> str:
    """What a value may be, from its JSON Schema."""
    for option in (schema, *schema.get("anyOf", ())):
        if "enum" in option:
            return ", ".join(map(str, option["enum"]))
        low = option.get("minimum", option.get("exclusiveMinimum"))
        high = option.get("maximum", option.get("exclusiveMaximum"))
        if low is not None or high is not None:
            above, below = "above " * ("exclusiveMinimum" in option), "below " * ("exclusiveMaximum" in option)
            return f"{above}{low:g}" + (f" to {below}{high:g}" if high is not None else " or more" * (not above))
    return "-"


def schedulers() -> str:
    """Every noise scheduler."""
    rows = [(code(name), code(cls.__name__), "diffusion") for name, (cls, _) in SCHEDULERS.items()]
    rows += [(code(name), code(cls.__name__), "flow matching") for name, (cls, _) in FLOW_REGISTRY.items()]
    return table(("`scheduler`", "diffusers' class", "models"), rows)


def families() -> str:
    """Every family of models that can be served."""
    rows = []
    for family in dict.fromkeys(FAMILIES.values()):
        scale = family.default_guidance_scale
        rows.append((first_line(type(family)), code(*family.pipelines), KINDS[family.kind], f"{scale:g}"))
    return table(("what it is", "diffusers' pipelines", "network", "guidance scale"), rows)


def configs() -> str:
    """The bare configs that memory can be planned of by name."""
    return "".join(f"- `slipstream models --memory {name}`\n" for name in sorted(known_configs()))


def commands() -> str:
    """Every command with its options."""
    root = typer.main.get_command(cli)
    parts = []
    for name, command in walk("slipstream", root):
        parts.append(f"### `{name}`\n\n{first_line(command.callback)}\n")
        if name == "slipstream serve":
            parts.append("Its flags are the [settings](settings.md).\n")
            continue
        rows = [_option(p) for p in command.params if p.name not in ("help", "context")]
        parts.append(table(("option", "default", "meaning"), rows) if rows else "")
    return "\n".join(part for part in parts if part)


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command and those under it, by their full names."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for child in children.values():
        yield from walk(f"{name} {child.name}", child)


def _option(parameter: Any) -> tuple[str, str, str]:
    names = code(*parameter.opts) if parameter.param_type_name == "option" else code(parameter.name.upper())
    default = parameter.default
    plain = "required" if parameter.required else "-" if default in (None, (), []) else code(str(default))
    return names, plain, getattr(parameter, "help", None) or ""


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        settings, metrics, errors, endpoints, fields, accelerators, parameters, schedulers, families, configs, commands
    )
}  # fmt: skip


def made(page: str) -> str:
    """A page with its tables as the code is now. Raises KeyError for a table that there is not."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}{block[3]}", page)


def chart(schema: str) -> str:
    """The schema of the chart's values with the settings as the code is now: names, types and ranges."""
    values = json.loads(schema)
    values["properties"]["settings"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": _chart_settings(),
    }
    return json.dumps(values, indent=2) + "\n"


def _chart_settings() -> dict[str, Any]:
    out = {}
    for name, field in Settings.model_json_schema()["properties"].items():
        kept = {key: value for key, value in field.items() if key not in ("title", "default")}
        if field.get("type") == "array":
            text = {"type": "string", "pattern": "^[^,]+$"}
            kept = {"description": field["description"], "type": "array", "items": text}
        if "writeOnly" not in json.dumps(field) and name not in PLACED:
            out[name] = kept
    return out


def main() -> None:
    """Write every page that has tables, and the chart's schema."""
    if (now := chart(CHART.read_text())) != CHART.read_text():
        CHART.write_text(now)
        print(CHART)
    for file in sorted(PAGES.glob("*.md")):
        page = file.read_text()
        if (now := made(page)) != page:
            file.write_text(now)
            print(file)


if __name__ == "__main__":
    main()
