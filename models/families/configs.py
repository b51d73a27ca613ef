"""Holding a model's config against what a family implements: a key that it does not know is refused, never ignored."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers

Values = tuple[object, ...] | None
"""The values of a config key that are implemented, for a list those of its elements; None: any."""
ANY: Values = None


def refused(config: Mapping[str, Any], class_name: str, implements: Mapping[str, Values]) -> str | None:
    """The first key and value of a config that are not implemented, as a sentence's beginning; None: it is fine.

    A key that is absent has diffusers' default. One that is not in `implements` at all may only have the value that
    changes nothing: None, or that default.
    """
    defaults = _defaults(class_name)
    for key, value in {**defaults, **config}.items():
        if key.startswith("_"):
            continue
        if key in implements:
            values, given = implements[key], value if isinstance(value, list | tuple) else [value]
            fits = values is None or all(one in values for one in given)
        else:
            fits = value is None or (key in defaults and defaults[key] == value)
        if not fits:
            return f"{key} = {value!r}"
    return None


@cache
def _defaults(class_name: str) -> dict[str, Any]:
    cls = getattr(diffusers, class_name, None)
    parameters = inspect.signature(cls.__init__).parameters if cls is not None else {}
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
