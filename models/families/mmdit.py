"""What families over text and image tokens together share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.errors import OutOfRange
from models.families.base import Parts
from models.families.text import TextFamily, checked_pooled
from models.networks.base import Network
from models.networks.sites import JointSites
from models.reuse.rows import Conditioning
from models.reuse.sites import Sites
from models.solvers.flow import FlowTimes


class JointFamily(TextFamily):
    """A flow-matching transformer whose prompts all have one length, so that no row's result depends on another's."""

    part = "transformer"
    kind = "dit"
    flow = FlowTimes()

    def text_dim(self, config: Mapping[str, object]) -> int:
        """See `TextFamily`."""
        return int(config["joint_attention_dim"])  # type: ignore[call-overload, no-any-return]

    def sites(self, network: Network, text_tokens: int) -> Sites:
        """See `Family`."""
        assert isinstance(network.sites, JointSites)  # noqa: S101
        return replace(network.sites, text_tokens=text_tokens)

    def native_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family`; what the pipelines default to."""
        return 128, 128

    def given(self, parts: Parts, embeds: Tensor, mask: Tensor | None, pooled: Tensor | None) -> Conditioning:
        """See `TextFamily`; no longer than what a prompt's features are planned for."""
        if embeds.ndim == 3 and embeds.shape[1] > parts.text_tokens:
            raise OutOfRange("prompt_embeds", f"{embeds.shape[1]} tokens are more than {parts.text_tokens}")
        found = super().given(parts, embeds, mask, pooled)
        if "pooled_prompt_embeds" not in self.inputs:
            return found
        pooled = checked_pooled(pooled, parts.config["pooled_projection_dim"])
        return {**found, "pooled_projections": pooled.to(parts.device, parts.dtype)}

    def to_vae(self, latents: Tensor, config: Any) -> Tensor:
        """See `Family`."""
        return (latents / config.scaling_factor) + config.shift_factor  # type: ignore[no-any-return]

    def from_vae(self, latents: Tensor, config: Any) -> Tensor:
        """See `Family`."""
        return (latents - config.shift_factor) * config.scaling_factor  # type: ignore[no-any-return]
