"""What a model can do, as plain data: accelerators and the HTTP side validate against it without touching a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from models.profiles.profile import Profile, nearest
from models.reuse.sites import Sites

if TYPE_CHECKING:
    from models.search.attention_plan import Plan
    from models.solvers.flow import FlowTimes

NetworkKind = Literal["unet", "dit"]
Family = NetworkKind
"""What accelerators ask for: the kind of network. Everything else that differs is the business of `models.families`."""
Takes = Literal["prompt", "class_label"]
GuidedBy = Literal["guidance_scale", "true_cfg_scale"]
"""A network that takes the guidance scale as an input has another scale for guidance by a second row."""


def short_name(model: str) -> str:
    """What a model is called that was named by a bundled name, a directory, a file or a hub id."""
    return PurePath(model).name.removesuffix(".safetensors")


@dataclass(frozen=True, eq=False)
class AdapterInfo:
    """A registered LoRA: a guidance student, whose file says at which scale it was distilled, or a style."""

    name: str
    guidance_scale: float | None
    rank: int  # the highest of its layers
    parameters: int
    negative_prompt: str = ""
    encodes: bool = False  # whether it changes how prompts are encoded

    @property
    def student(self) -> bool:
        """Whether it stands for guidance (`cfg_student`); else requests name it in `loras`."""
        return self.guidance_scale is not None


@dataclass(frozen=True)
class ControlInfo:
    """A control network: its name, its weights' number, and the channels of what it makes of a picture."""

    name: str
    parameters: int
    channels: int


@dataclass(frozen=True)
class ModelSpec:
    """A loaded model. Sizes are in pixels unless they say latents or tokens."""

    name: str
    family: NetworkKind
    layout: str  # the family's name, for showing: nothing asks for it
    config_hash: str
    sites: Sites
    depth: int  # U-Net: input blocks (L); DiT: transformer blocks
    latent_channels: int
    latent_scale: int  # pixels a latent pixel
    patch_size: int  # latent pixels a token side; 1 for a U-Net
    native_width: int
    native_height: int
    schedulers: tuple[str, ...]
    default_scheduler: str = "ddim"
    default_steps: int = 25
    default_guidance_scale: float = 4.0
    num_train_timesteps: int = 1000
    itemsize: int = 4  # bytes of a number in the network
    latent_itemsize: int = 4  # and in the latents
    takes: Takes = "prompt"
    inputs: frozenset[str] = frozenset()  # fields of a request beside its prompt that have a meaning
    roles: tuple[str, ...] = ("unconditional", "conditional")  # of a guided step's rows
    guided_by: GuidedBy = "guidance_scale"  # the field of a request that scales guidance by rows
    guided_above: float = 1.0  # the scale up to which there is none
    max_guidance_scale: float = 100.0
    max_latent_side: int | None = None  # the longest side in latent pixels; None: any
    flow: FlowTimes | None = None  # how noise levels are asked for, with flow matching
    square: bool = False  # makes square pictures only
    image_to_image: bool = True
    inpaints: bool = False  # the network is given a mask and what it leaves of a picture: requests must have both
    edits: bool = False  # a picture, which must be given, is what its rows see, not what a run starts from
    default_image_guidance_scale: float = 1.0  # where it edits
    num_classes: int | None = None
    has_text_encoder: bool = True
    description: str = ""
    examples: tuple[str, ...] = ()
    prompt_grammar: Mapping[str, Any] | None = None
    adapters: Mapping[str, AdapterInfo] = field(default_factory=dict)
    controls: Mapping[str, ControlInfo] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    def with_extras(
        self,
        adapters: Mapping[str, AdapterInfo],
        plans: Mapping[str, Plan],
        profiles: Mapping[str, Profile] = {},
        controls: Mapping[str, ControlInfo] = {},
    ) -> ModelSpec:
        """The same model with adapters, which may come and go, plans, profiles and control networks registered."""
        return replace(self, adapters=adapters, plans=dict(plans), profiles=dict(profiles), controls=dict(controls))

    @property
    def students(self) -> dict[str, AdapterInfo]:
        """The adapters that stand for guidance."""
        return {name: info for name, info in tuple(self.adapters.items()) if info.student}

    @property
    def styles(self) -> dict[str, AdapterInfo]:
        """The adapters that requests name in `loras`."""
        return {name: info for name, info in tuple(self.adapters.items()) if not info.student}

    def profile(
        self, scheduler: str, num_inference_steps: int, width: int, height: int, guidance_scale: float | None = None
    ) -> Profile | None:
        """The profile measured for such a run, or else closest to it under the same scheduler (`Profile.differences`
        says how far); None without one."""
        return nearest(tuple(self.profiles.values()), scheduler, num_inference_steps, width, height, guidance_scale)

    @property
    def asks_for_embeddings(self) -> bool:
        """Whether requests must bring their prompt encoded: there is no text encoder."""
        return self.takes == "prompt" and not self.has_text_encoder

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this many pixels."""
        return self.latent_scale * self.patch_size

    def tokens(self, width: int, height: int) -> int:
        """Image tokens of a DiT (latent pixels of a U-Net) at this size in pixels."""
        return (width // self.size_multiple) * (height // self.size_multiple)


@dataclass(frozen=True)
class RunSpec:
    """The facts of one request that accelerators check themselves against."""

    scheduler: str
    num_inference_steps: int
    num_steps: int  # backbone evaluations
    tokens: int
    guided: bool  # has unconditional rows
    guidance_scale: float | None  # None: not given, the model's default (or the student's own) applies
    negative: bool  # a negative prompt was given
    image_to_image: bool = False  # starts from a picture
    timestep_warp: float = 1.0
