"""Slipstream's models: load a diffusion backbone once, run any mix of accelerated requests as one continuous batch."""

from models.attention_plan import Plan
from models.backbones import load
from models.backbones.base import Backbone
from models.denoise import advance
from models.generate import generate
from models.request import Request, Result

__all__ = ["Backbone", "Plan", "Request", "Result", "advance", "generate", "load"]
