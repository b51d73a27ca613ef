"""The command line: `slipstream serve` from the settings' own definition, and every command of `app.commands`."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from app import commands
from app.settings import Settings
from models.errors import SlipstreamError

app = typer.Typer(
    name="slipstream",
    help="Diffusion inference where each request chooses its own acceleration and all share one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its frames leave 30 of 80 columns for words
)


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"slipstream {version('slipstream-diffusion')}")
        except PackageNotFoundError:
            typer.echo("slipstream 0, a bare checkout")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which this is.")] = False,
) -> None:
    """Diffusion inference where each request chooses its own acceleration and all share one batch."""


def _serve(**flags: Any) -> None:
    """Start the server. Every flag is also an environment variable, SLIPSTREAM_ and its name in capitals."""
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for line in explain(error):
            typer.echo(line, err=True)
        raise typer.Exit(2) from None
    from app.listening import CannotListen, listen

    try:
        for one in listen(settings.host, settings.port):  # a taken port is said before anything heavy is even imported
            one.close()
        from app.serve import serve

        code = serve(settings)
    except CannotListen as error:
        typer.echo(f"slipstream: {error}", err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


def explain(error: ValidationError) -> list[str]:
    """A line a bad setting: its flag, its variable, what is allowed."""
    lines = []
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else ""
        message = detail["msg"].removeprefix("Value error, ")
        flag = f"--{name.replace('_', '-')} (SLIPSTREAM_{name.upper()}): " if name else ""
        lines.append(f"slipstream: {flag}{message}{_range(Settings.model_fields.get(name))}")
    return list(dict.fromkeys(lines))


def _range(info: FieldInfo | None) -> str:
    """What a number may be."""
    if info is None:
        return ""
    nested = [m for a in (info.annotation, *get_args(info.annotation)) for m in getattr(a, "__metadata__", ())]
    bounds: dict[str, Any] = {}
    for rule in info.metadata + [inner for m in nested for inner in getattr(m, "metadata", [m])]:
        bounds |= {name: getattr(rule, name) for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)}
    least = f"{bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}" if "gt" in bounds else ""
    most = f" to {bounds['le']}" if "le" in bounds else " or more" if "ge" in bounds else ""
    return f" (allowed: {least}{most})" if least or most else ""


def flag(name: str, info: FieldInfo) -> inspect.Parameter:
    """A setting as a command-line flag; absent flags leave the setting to the environment and its default."""
    text = f"{info.description} Default {shown(info.default)}."
    dashed = "--" + name.replace("_", "-")
    if info.annotation is bool:
        kind: Any = bool | None
        option = typer.Option(f"{dashed}/--no-{dashed[2:]}", help=text, show_default=False)
    else:
        kind = list[str] | None if get_origin(info.annotation) is tuple else str | None
        option = typer.Option(dashed, help=text, metavar=metavar(info), show_default=False)
    annotated = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotated)


def shown(default: object) -> str:
    """A default as the help shows it."""
    if default in (None, ()):
        return "none"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def metavar(info: FieldInfo) -> str:
    """What may stand behind a flag."""
    choices = [str(choice) for choice in get_args(info.annotation) if isinstance(choice, str)]
    return "|".join(choices) if choices else "VALUE"


_serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [flag(name, info) for name, info in Settings.model_fields.items()]
)
app.command("serve")(_serve)
for found in pkgutil.iter_modules(commands.__path__):
    module = importlib.import_module(f"{commands.__name__}.{found.name}")
    if hasattr(module, "register"):
        module.register(app)


def main() -> None:
    """The console script. What a user got wrong is a line and exit code 2, not a traceback.

    The libraries beneath keep their advice to themselves, unless asked for it (`python -W`, `TRANSFORMERS_VERBOSITY`).
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        app()
    except SlipstreamError as error:
        typer.echo(f"slipstream: {error}", err=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(f"slipstream: {error.filename}: {error.strerror}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
