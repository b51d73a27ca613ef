"""Profiles: what `calibrate` measured of a model, for one scheduler, number of steps and size."""

from models.profiles.profile import Candidate, Likeness, Measure, Profile, Promise, Schedule, nearest, pareto

__all__ = ["Candidate", "Likeness", "Measure", "Profile", "Promise", "Schedule", "nearest", "pareto"]
