"""Slipstream's models: load a diffusion backbone once, run any mix of accelerated requests as one continuous batch."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.backbone import Backbone
    from models.costs.macs import MacReport, macs
    from models.denoise import advance
    from models.generate import generate
    from models.loading import load
    from models.profiles import Profile
    from models.request import Control, Request, Result
    from models.search.attention_plan import Plan
    from models.search.attention_search import search_plan
    from models.search.calibrate import calibrate
    from models.search.warp_search import search_warp

_WHERE = {
    "Backbone": "backbone",
    "MacReport": "costs.macs",
    "Plan": "search.attention_plan",
    "Profile": "profiles",
    "Request": "request",
    "Control": "request",
    "Result": "request",
    "advance": "denoise",
    "calibrate": "search.calibrate",
    "generate": "generate",
    "load": "loading",
    "macs": "costs.macs",
    "search_plan": "search.attention_search",
    "search_warp": "search.warp_search",
}
"""The module of each name: torch is imported by what needs it, not by `import models`."""

__all__ = [
    "Backbone",
    "Control",
    "MacReport",
    "Plan",
    "Profile",
    "Request",
    "Result",
    "advance",
    "calibrate",
    "generate",
    "load",
    "macs",
    "search_plan",
    "search_warp",
]


class _Package(ModuleType):
    """`models.generate` is the function, also where the module of that name was imported before it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _WHERE or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """A name of `_WHERE`, imported at its first use (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
