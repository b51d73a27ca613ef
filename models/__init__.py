"""Slipstream's models: load a diffusion backbone once, run any mix of accelerated requests as one continuous batch."""

from models.attention_plan import Plan
from models.backbones import load
from models.backbones.base import Backbone
from models.denoise import advance
from models.generate import generate
from models.macs import MacReport, macs
from models.plan_search import search_plan
from models.request import Request, Result
from models.warp_search import search_warp

__all__ = [
    "Backbone",
    "MacReport",
    "Plan",
    "Request",
    "Result",
    "advance",
    "generate",
    "load",
    "macs",
    "search_plan",
    "search_warp",
]
