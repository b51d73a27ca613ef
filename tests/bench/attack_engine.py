"""Attacks on the engine: pictures that grow, deadlines, floods, memory that stays."""

from __future__ import annotations
