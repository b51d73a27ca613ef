"""The grammar of `--acceleration`: `mode[:key=value,...]`, several joined by `+`, as accelerator values."""

from __future__ import annotations

import re

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from models.accelerators import REGISTRY, Accelerator
from models.errors import RequestError

_BETWEEN_MODES = re.compile(r"\+(?=\s*[A-Za-z_])")  # not the plus of 1e+3
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))


def parse(text: str) -> list[Accelerator]:
    """The accelerators of one run, as in "deepcache:interval=3+selective_guidance:stop=0.8".

    Raises `RequestError` with the mode or the key at fault, and the range that the key allows.
    """
    return [_one(part.strip()) for part in _BETWEEN_MODES.split(text)]


def _one(text: str) -> Accelerator:
    mode, colon, rest = (part.strip() for part in text.partition(":"))
    if mode not in REGISTRY:
        raise RequestError("acceleration.mode", f"{mode!r} is not one of {', '.join(REGISTRY)}")
    values: dict[str, str] = {}
    for pair in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key or not value:
            raise RequestError("acceleration", f"{pair!r} in {text!r} is not key=value")
        if key in values:
            raise RequestError(f"acceleration.{key}", f"is given twice in {text!r}")
        values[key] = value
    fields = _fields(REGISTRY[mode])
    for key in values:
        if key not in fields:
            raise RequestError(f"acceleration.{key}", f"{mode} takes {', '.join(fields) or 'no keys'}")
    try:
        return REGISTRY[mode].model_validate({"mode": mode, **values})
    except ValidationError as error:
        raise _explained(mode, fields, values, error) from error


def _fields(accelerator: type[Accelerator]) -> dict[str, FieldInfo]:
    fields = accelerator.model_fields.items()
    return {field.alias or name: field for name, field in fields if name != "mode"}


def _explained(mode: str, fields: dict[str, FieldInfo], values: dict[str, str], error: ValidationError) -> RequestError:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if key not in fields:
        return RequestError("acceleration", f"{mode}: {first['msg']}")
    if key not in values:
        return RequestError(f"acceleration.{key}", f"{mode} needs it; {_range(fields[key]) or 'it has no default'}")
    allowed = _range(fields[key]) or str(first["msg"])
    return RequestError(f"acceleration.{key}", f"{values[key]!r} of {mode} is not allowed: {allowed}")


def _range(field: FieldInfo) -> str:
    """What a field allows, in words; empty where the type alone says it."""
    kind = getattr(field.annotation, "__args__", (field.annotation,))[0]
    noun = "a whole number" if kind is int else "a number" if kind is float else ""
    bounds = [
        f"{word} {getattr(m, name):g}" for cls, name, word in _BOUNDS for m in field.metadata if isinstance(m, cls)
    ]
    return " ".join([noun, " and ".join(bounds)]).strip()
