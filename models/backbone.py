"""A loaded model: network, text encoders, VAE and noise-scheduler config. Read-only once loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from models.adapters.lora import Lora
from models.costs.counter import MacCounter
from models.families.conditioning import Conditioner
from models.reuse.plans import ROLES, Role
from models.reuse.rows import Conditioning, Row
from models.reuse.sites import Sites
from models.reuse.store import FeatureStore
from models.spec import ModelSpec

Stepping = Literal["exact", "batched"]
"""Schedulers take their own steps, one trajectory at a time; or all of a tick step together, by tables of theirs."""


class Network(Protocol):
    """The denoising network: serves rows with different plans in one forward."""

    module: nn.Module
    reusable: Sequence[nn.Module]
    """The attentions that are sites."""

    @property
    def sites(self) -> Sites:
        """What the network declares of itself."""

    @property
    def depth(self) -> int:
        """U-Net: input blocks; DiT: transformer blocks."""

    def forward(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row], store: FeatureStore
    ) -> Tensor:
        """Predict for rows in the order given: x [rows, channels, h, w], t [rows]; the store takes what they keep."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """One model on one device. Read-only once loaded, but for what is kept between forwards: the features that running
    trajectories remember, in slots that are theirs, and caches."""

    spec: ModelSpec
    network: Network
    conditioner: Conditioner
    vae: Any
    scheduler_config: Mapping[str, Any]
    loras: Mapping[str, Lora]
    device: torch.device
    dtype: torch.dtype
    stepping: Stepping = "exact"
    features: FeatureStore = field(default_factory=FeatureStore, repr=False)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]) -> Tensor:
        """One forward of the network over rows in any order; predictions come in the same."""
        return self.network.forward(x, t, conditioning, rows, self.features)

    @cached_property
    def counter(self) -> MacCounter:
        """Counts what rows cost, on a network of its own without weights."""
        return self.make_counter()

    def make_counter(self, attention_matmuls: bool = True) -> MacCounter:
        """A counter for this network, loaded in part or as a whole."""
        module: Any = self.network.module
        depth = self.spec.depth if getattr(module, "mid_block", ()) is None else None
        return MacCounter({**module.config, "_class_name": type(module).__name__}, attention_matmuls, depth)

    @property
    def latent_dtype(self) -> torch.dtype:
        """What latents that follow a table are kept in: at least single precision, whatever the network computes in."""
        return self.dtype if self.stepping == "exact" else torch.promote_types(self.dtype, torch.float32)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The rows of a guided step in the order in which diffusers' pipeline batches them."""
        return ROLES if self.spec.layout == "dit" else ROLES[::-1]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents [images, channels, h, w] to pictures; this waits for the device."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype)  # before they are scaled, as SDXL's pipeline does
        if getattr(config, "latents_mean", None) is not None and self.spec.layout == "sdxl":
            mean, std = (
                torch.tensor(v).view(1, -1, 1, 1).to(latents.device, latents.dtype)
                for v in (config.latents_mean, config.latents_std)
            )
            latents = latents * std / config.scaling_factor + mean
        elif self.spec.layout == "dit":
            latents = 1 / config.scaling_factor * latents
        else:
            latents = latents / config.scaling_factor
        pixels = self.vae.decode(latents, return_dict=False)[0]
        images: list[Image.Image] = self._processor.postprocess(pixels, output_type="pil")
        return images

    @torch.inference_mode()
    def encode(self, image: Image.Image, width: int, height: int, generator: torch.Generator) -> Tensor:
        """A picture, resized to width x height pixels, to scaled latents [1, channels, h, w] drawn with `generator`."""
        pixels = self._processor.preprocess(image, height=height, width=width).to(self.device, self.vae.dtype)
        latents: Tensor = self.vae.encode(pixels).latent_dist.sample(generator).to(self.dtype)
        config = self.vae.config
        if getattr(config, "latents_mean", None) is not None and self.spec.layout == "sdxl":
            mean, std = (
                torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std)
            )
            return (latents - mean) * config.scaling_factor / std  # type: ignore[no-any-return]
        return config.scaling_factor * latents  # type: ignore[no-any-return]

    def channels_last(self) -> None:
        """Lay the weights of convolutions out as [out, h, w, in], which a CPU convolves faster."""
        for module in (self.network.module, self.vae):
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def weight_bytes(self) -> int:
        """Bytes of the base weights: network, text encoders and VAE."""
        modules = (self.network.module, self.vae, *self.conditioner.modules())
        return sum(p.nbytes for module in modules for p in module.parameters())

    def adapter_bytes(self) -> int:
        """Bytes that the adapters add."""
        return sum(lora.nbytes for lora in self.loras.values())

    @property
    def _processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.spec.latent_scale)
