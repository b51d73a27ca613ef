"""Noise schedulers: their names, their schedules, their steps."""
