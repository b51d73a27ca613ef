"""Profile files held against the model that they are registered with."""

from __future__ import annotations

from pathlib import Path

from models.accelerators import from_mode
from models.errors import ModelLoadError, RequestError
from models.profiles.profile import Profile


def load_profile(path: str | Path, config_hash: str, name: str) -> Profile:
    """Read a profile and check that it was measured on this network and holds accelerators that are known here.

    Raises `ModelLoadError`.
    """
    profile = Profile.load(path)
    if profile.config_hash != config_hash:
        raise ModelLoadError(
            f"profile {name} ({path}) was measured on another network: its config hash is {profile.config_hash}, "
            f"the model's is {config_hash}; `slipstream calibrate` measures this one"
        )
    for candidate in profile.all:
        try:
            for mode in candidate.acceleration:
                from_mode(mode)
        except RequestError as error:
            raise ModelLoadError(f"profile {name} ({path}): candidate {candidate.name}: {error}") from error
    return profile
