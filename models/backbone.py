"""A loaded model: network, text encoders, VAE and noise-scheduler config. Read-only once loaded."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from models.adapters.lora import Applied
from models.adapters.registry import Adapters
from models.costs.counter import MacCounter
from models.families.base import Family, Parts
from models.families.vae import posterior
from models.fingerprint import fingerprint
from models.networks.base import Network
from models.networks.control import ControlNet
from models.request import Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning, Row
from models.reuse.store import FeatureStore
from models.spec import AdapterInfo, ModelSpec

MOST_HINT_ROWS = 8

Stepping = Literal["exact", "batched"]
"""Schedulers take their own steps, one trajectory at a time; or all of a tick step together, by tables of theirs."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """One model on one device. Read-only once loaded, but for what is kept between forwards: the features that running
    trajectories remember, in slots that are theirs, and caches."""

    spec: ModelSpec
    family: Family
    network: Network
    parts: Parts
    scheduler_config: Mapping[str, Any]
    adapters: Adapters
    stepping: Stepping = "exact"
    batch_invariant: bool = False
    """Whether every picture is computed by itself, so that its bits do not depend on what else is asked for."""
    controls: Mapping[str, ControlNet] = field(default_factory=dict)
    features: FeatureStore = field(default_factory=FeatureStore, repr=False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.parts.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.parts.dtype

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
        config = {**module.config, "_class_name": type(module).__name__}
        controls = {name: network.module.config for name, network in self.controls.items()}
        return MacCounter(config, attention_matmuls, depth, self.family, controls)

    @property
    def latent_dtype(self) -> torch.dtype:
        """What latents that follow a table are kept in: at least single precision, whatever the network computes in."""
        return self.dtype if self.stepping == "exact" else torch.promote_types(self.dtype, torch.float32)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The rows of a guided step in the order in which diffusers' pipeline batches them."""
        return self.family.guidance.roles

    @torch.inference_mode()
    def prepare(self, runs: Sequence[Run]) -> None:
        """Encode the prompts of several runs as one batch, so that `conditioning` finds them."""
        plain = [run for run in runs if not any(info.encodes for info, _ in run.loras)]
        texts = [text for run in plain for text in self.family.prompts(self.parts, run)]
        if texts:
            self.family.encode(self.parts, texts)

    def group(self, run: Run) -> Hashable:
        """Equal for runs of one size whose rows may share a forward."""
        return self.family.group(self.parts, run)

    @torch.inference_mode()
    def conditioning(self, run: Run) -> dict[Role, Conditioning]:
        """What the rows of a run are conditioned on by role, of [1, ...] tensors."""
        styles = [self.applied(info, scale) for info, scale in run.loras if info.encodes]
        return self.family.conditioning(self.parts.under(styles), run)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [images, channels, h, w] to pixels [images, height, width, 3] as bytes on the CPU; this waits."""
        parts = [one[None] for one in latents] if self.batch_invariant else [latents]
        return torch.cat([self.family.decode(self.parts, part) for part in parts]).cpu()

    @torch.inference_mode()
    def posterior(self, picture: Image.Image, mask: Image.Image | None = None) -> Any:
        """A picture of a run's size to the distribution that `draw` draws its latents from; grey under a mask."""
        return posterior(self.parts.vae, picture, self.device, mask)

    @torch.inference_mode()
    def draw(self, posterior: Any, generator: torch.Generator) -> Tensor:
        """The network's latents [1, channels, h, w] of a picture, drawn with `generator`."""
        drawn = posterior.sample(generator).to(self.dtype)
        return self.family.from_vae(drawn, self.parts.vae.config)

    def channels_last(self) -> None:
        """Lay the weights of convolutions out as [out, h, w, in], which a CPU convolves faster."""
        for module in (self.network.module, self.parts.vae, *(one.module for one in self.controls.values())):
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def weight_bytes(self) -> int:
        """Bytes of the base weights on the device: network, text encoders and VAE."""
        modules = (self.network.module, self.parts.vae)
        return sum(p.nbytes for module in modules for p in module.parameters()) + self.encoder_bytes()

    def encoder_bytes(self) -> int:
        """Those of them that are the text encoders', while these are on the device between uses."""
        if self.parts.offload:
            return 0
        return sum(p.nbytes for module in self.parts.encoders() for p in module.parameters())

    def adapter_bytes(self) -> int:
        """Bytes of the adapters that are on the device."""
        return self.adapters.nbytes

    def applied(self, info: AdapterInfo, scale: float) -> Applied:
        """An adapter as the rows of a run take it: on the device. Raises `UnknownAdapter` where its file is gone."""
        return Applied.of(self.adapters.fetch(info), scale, self.device, self.dtype)

    def control_bytes(self) -> int:
        """Bytes of the control networks."""
        return sum(network.nbytes for network in self.controls.values())

    def hint_rows(self, run: Run) -> int:
        """How many times a control network's picture is embedded at once, for one to be kept.

        In exact stepping as often as diffusers would, up to a bound: the shape of a batch shows in the last bits.
        """
        return min(run.steps[0].num_rows * len(run.seeds), MOST_HINT_ROWS) if self.stepping == "exact" else 1

    def control_digest(self, name: str) -> str:
        """Tells one control network's weights from another's."""
        return fingerprint(self.controls[name].module.state_dict().items())

    @cached_property
    def digest(self) -> str:
        """Tells one model's weights from another's: network, text encoders and VAE."""
        modules = (self.network.module, *self.parts.encoders(), self.parts.vae)
        return fingerprint(named for module in modules for named in module.state_dict().items())

    @property
    def prompt_cache_bytes(self) -> int:
        """Bytes of the encoded prompts that are kept."""
        return self.parts.prompts.nbytes

    def release(self) -> None:
        """Give back what nobody needs or what can be made again, for when the device has no memory left."""
        self.features.trim()
        self.parts.prompts.release()
        self.adapters.release()
