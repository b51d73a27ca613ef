"""Searches whose result a request can name: attention plans, time-step warps."""
