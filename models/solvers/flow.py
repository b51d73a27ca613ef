"""Flow matching: the schedulers that fit it, and noise levels that shift with the size of the picture.

A sample is (1 - σ) · clean + σ · noise, and the network predicts noise - clean (Lipman et al., 2022). More noise is
needed to hide a large picture: levels are shifted: σ' = e^μ / (e^μ + 1/σ - 1), μ by image tokens (Esser et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_REGISTRY: dict[str, tuple[type, dict[str, Any]]] = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, _FLOW),
    "unipc": (UniPCMultistepScheduler, _FLOW),
}
"""What `models.solvers.names.REGISTRY` is for other models. DDIM, PNDM, Heun, LCM and ancestral noise are built on the
betas of another process; of DPM++ and UniPC diffusers has the flow form."""


@dataclass(frozen=True, slots=True)
class FlowTimes:
    """How a family's pipeline asks for noise levels: `even` ones from 1 down to 1/n, or the scheduler's own; and what
    their shift depends on."""

    even: bool = True
    shift: Literal["tokens", "tokens and steps"] = "tokens"

    def mu(self, config: Mapping[str, Any], tokens: int, num_steps: int) -> float:
        """The shift's exponent for a picture of this many tokens."""
        if self.shift == "tokens":
            least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            slope = (high - low) / (most - least)
            return float(tokens * slope + (low - slope * least))
        many = 0.00016927 * tokens + 0.45666666  # at 200 steps
        if tokens > 4300:
            return many
        few = 8.73809524e-05 * tokens + 1.89833333  # at 10
        slope = (many - few) / 190.0
        return slope * num_steps + (many - 200.0 * slope)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is one of flow matching."""
    return config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__ or bool(config.get("use_flow_sigmas"))


def prepared(name: str, config: Mapping[str, Any], num_steps: int, times: FlowTimes, tokens: int) -> Any:
    """A scheduler of this name with its steps set, as the family's pipeline would set them."""
    cls, options = FLOW_REGISTRY[name]
    scheduler: Any
    mu = times.mu(config, tokens, num_steps)
    if cls is FlowMatchEulerDiscreteScheduler:
        scheduler = cls.from_config(config)
        even = np.linspace(1.0, 1 / num_steps, num_steps) if times.even else None
        scheduler.set_timesteps(num_steps, sigmas=even, mu=mu)
        return scheduler
    dynamic = bool(config.get("use_dynamic_shifting"))
    shift = float(np.exp(mu)) if dynamic else float(config.get("flow_shift", config.get("shift", 1.0)))
    own = {key: value for key, value in config.items() if key != "shift"}
    scheduler = cls.from_config(own, **options, use_dynamic_shifting=False, flow_shift=shift)  # type: ignore[attr-defined]
    scheduler.set_timesteps(num_steps)
    return scheduler
