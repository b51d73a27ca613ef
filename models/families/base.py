"""What a family is: one object that holds all that differs from one kind of model to another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from models.adapters.bound import Layers, bound_parts
from models.adapters.lora import Applied, Lora
from models.errors import ModelLoadError
from models.families import vae
from models.families.configs import Values, refused
from models.families.prompts import PromptCache, SpareTokenizer
from models.guidance import Guidance
from models.networks.base import Network
from models.request import Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning, Segment
from models.reuse.sites import Sites
from models.solvers.flow import FlowTimes
from models.spec import GuidedBy, NetworkKind, Takes


@dataclass(frozen=True, eq=False)
class Parts:
    """What a family works with once its model is loaded: diffusers' pipeline, its network's config, and the prompts."""

    pipeline: Any
    config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    text_tokens: int = 0  # of a padded prompt
    prompts: PromptCache = field(default_factory=PromptCache)
    spare: SpareTokenizer = field(default_factory=SpareTokenizer)
    offload: bool = False
    """Whether text encoders are on the host between uses."""
    styled: Hashable = ()
    """Equal for parts whose text encoders are changed alike."""

    @property
    def vae(self) -> Any:
        """diffusers' VAE."""
        return self.pipeline.vae

    def encoders(self) -> list[nn.Module]:
        """The text encoders that the pipeline has."""
        names = (name for name in self.pipeline.components if name.startswith("text_encoder"))
        return [encoder for name in names if (encoder := getattr(self.pipeline, name)) is not None]

    def under(self, styles: Sequence[Applied]) -> Parts:
        """The same with text encoders as these adapters change them; their prompts are kept apart."""
        if not styles:
            return self
        pipeline = object.__new__(type(self.pipeline))
        pipeline.__dict__.update(self.pipeline.__dict__)
        part = [Segment(0, 1, (tuple(styles),))]
        for name in (name for name in self.pipeline.components if name.startswith("text_encoder")):
            encoder = getattr(self.pipeline, name)
            if encoder is not None:
                pick = partial(text_layers, name)
                pipeline.__dict__[name] = bound_parts(encoder, "", part, pick, whole=True)
        key = tuple((style.lora.digest, style.scale) for style in styles)
        return replace(self, pipeline=pipeline, styled=key)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Have the text encoders on the device for as long as this lasts."""
        if not self.offload:
            yield
            return
        try:
            for encoder in self.encoders():
                encoder.to(self.device)
            yield
        finally:
            for encoder in self.encoders():
                encoder.to("cpu")


def text_layers(name: str, lora: Lora) -> Layers:
    """What an adapter adds to one text encoder."""
    return lora.text.get(name, {})


class Family(ABC):
    """One kind of model. Subclasses give the class variables and the abstract methods; the rest are what most share."""

    name: ClassVar[str]
    """What the API calls it (`layout`)."""
    pipelines: ClassVar[tuple[str, ...]]
    """diffusers' pipeline classes that it loads."""
    network_class: ClassVar[str]
    """diffusers' class of its network, which lies in the folder `part`."""
    part: ClassVar[str]
    kind: ClassVar[NetworkKind]
    """Which accelerators apply."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts that a directory may leave out: requests then bring along what they would have made."""
    unused: ClassVar[Mapping[str, Any]] = {}
    """Parts and settings of the pipeline that are replaced at loading."""
    implements: ClassVar[Mapping[str, Values]]
    """Keys of the network's config; `settings`: keys of the pipeline's own."""
    settings: ClassVar[Mapping[str, Values]] = {}
    guidance: ClassVar[Guidance]
    default_guidance_scale: ClassVar[float]
    """What diffusers' pipeline defaults to."""
    guided_by: ClassVar[GuidedBy] = "guidance_scale"
    """The field of a request that scales guidance by rows."""
    flow: ClassVar[FlowTimes | None] = None
    """With flow matching, how the pipeline asks for noise levels."""
    usual_text_tokens: ClassVar[int] = 0
    """The length of its prompts, where no pipeline says so."""
    takes: ClassVar[Takes] = "prompt"
    inputs: ClassVar[frozenset[str]] = frozenset()
    """Fields of a request in place of text, or beside it, that have a meaning here; others are refused."""
    square: ClassVar[bool] = False
    image_to_image: ClassVar[bool] = True
    edits: ClassVar[bool] = False
    """Whether a picture is what its rows are conditioned on, and must be given, instead of what a run starts from."""
    default_image_guidance_scale: ClassVar[float] = 1.0
    """Where it edits: what diffusers' pipeline defaults to."""
    controllable: ClassVar[bool] = False
    """Whether diffusers' control networks steer it."""

    # Loading

    def check(self, index: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Hold a pipeline's index and its network's config against what is implemented, before a weight is read.

        Raises `ModelLoadError` with the key and its value.
        """
        if (found := config.get("_class_name")) != self.network_class:
            raise ModelLoadError(f"{self.part}: {found} is not this family's {self.network_class}")
        plain = {key: value for key, value in index.items() if not isinstance(value, list | tuple)}
        bad = refused(plain, str(index.get("_class_name")), self.settings)
        if bad is not None:
            raise ModelLoadError(f"model_index.json: {bad} is not implemented for {self.name}")
        if (bad := self.refused(config)) is not None:
            raise ModelLoadError(f"{self.part}/config.json: {bad} is not implemented for {self.name}")

    def refused(self, config: Mapping[str, Any]) -> str | None:
        """The first key and value of a network's config that are not implemented."""
        return refused(config, self.network_class, self.implements)

    def check_latents(self, config: Mapping[str, Any], latent_channels: int) -> None:
        """Hold the network's channels against the VAE's. Raises `ModelLoadError`."""
        if self.latent_channels(config) != latent_channels:
            reason = f"in_channels = {config['in_channels']} are not the {latent_channels} of the VAE's latents"
            raise ModelLoadError(f"{self.part}/config.json: {reason}, which is not implemented for {self.name}")

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Channels of the VAE's latents for a network with this config."""
        return int(config["in_channels"])

    def input_channels(self, config: Mapping[str, Any]) -> int:
        """Channels of what the network is given."""
        return self.latent_channels(config)

    def pipeline(self, class_name: str) -> Any:
        """The class that reads the files."""
        return getattr(diffusers, class_name)

    @abstractmethod
    def network(self, module: Any) -> Network:
        """A freshly loaded diffusers network as one that serves rows."""

    def text_tokens(self, pipeline: Any) -> int:
        """The length that prompts are padded to."""
        return self.usual_text_tokens

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a `ModelSpec` says of a network with this config beyond what it says of all."""
        return {"patch_size": 1}

    def native_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents that a network with this config was trained for."""
        side = config["sample_size"]
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return height, width

    def limits(self, pipeline: Any) -> dict[str, Any]:
        """What a `ModelSpec` says of a loaded pipeline that its network's config does not know."""
        return {}

    def sites(self, network: Network, text_tokens: int) -> Sites:
        """What the network declares, for prompts of up to this length."""
        return network.sites

    # Requests

    def prompts(self, parts: Parts, run: Run) -> list[str]:
        """The texts that `conditioning` will encode; several runs' are encoded as one batch beforehand."""
        return []

    def encode(self, parts: Parts, texts: Sequence[str]) -> list[Conditioning]:
        """Texts to [1, ...] tensors."""
        raise NotImplementedError(f"{self.name} has no text encoder")

    @abstractmethod
    def conditioning(self, parts: Parts, run: Run) -> dict[Role, Conditioning]:
        """What each row of a run is conditioned on, of [1, ...] tensors; every role has the same names.

        Roles other than the conditional only where the run is guided. Raises a `RequestError` that names the field.
        """

    def prompt_tokens(self, parts: Parts, run: Run) -> int:
        """Text tokens of a row of this run, padding included: known before anything is encoded. Any thread may ask.

        Here the length to which prompts are padded; embeddings that are given may have another.
        """
        given = run.request.prompt_embeds
        return parts.text_tokens if given is None else given.shape[1]

    def group(self, parts: Parts, run: Run) -> Hashable:
        """Equal for runs whose rows may share a forward without one changing another's result.

        Known before anything is encoded: here the length of the text. Any thread may ask.
        """
        return self.prompt_tokens(parts, run)

    # Latents and pixels

    def to_vae(self, latents: Tensor, config: Any) -> Tensor:
        """The network's latents to the VAE's own, as diffusers' pipeline scales them."""
        return latents / config.scaling_factor  # type: ignore[no-any-return]

    def from_vae(self, latents: Tensor, config: Any) -> Tensor:
        """The VAE's latents to the network's."""
        return config.scaling_factor * latents  # type: ignore[no-any-return]

    def decode(self, parts: Parts, latents: Tensor) -> Tensor:
        """The network's latents [images, channels, h, w] to pixels [images, height, width, 3] as bytes.

        A VAE in higher precision than the network has its latents scaled in its own, as in diffusers.
        """
        latents = latents.to(torch.promote_types(latents.dtype, parts.vae.dtype))
        return vae.decode(parts.vae, self.to_vae(latents, parts.vae.config))

    # Costs and training

    @abstractmethod
    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """Conditioning of the right shapes for a network with this config; on the meta device."""

    def forward(self, module: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """diffusers' own forward of the network, with gradient, for distilling."""
        raise NotImplementedError(f"{self.name} cannot be distilled")
