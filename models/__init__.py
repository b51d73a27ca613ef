"""Slipstream's models: load a diffusion backbone once, run any mix of accelerated requests as one continuous batch."""

from models.backbone import Backbone
from models.costs.macs import MacReport, macs
from models.denoise import advance
from models.generate import generate
from models.loading import load
from models.profiles import Profile
from models.request import Request, Result
from models.search.attention_plan import Plan
from models.search.attention_search import search_plan
from models.search.calibrate import calibrate
from models.search.warp_search import search_warp

__all__ = [
    "Backbone",
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
