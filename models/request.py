"""A request as the library takes it, and the run that it resolves to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from models.accelerators import Accelerator
from models.costs.usage import Usage
from models.errors import RequestError
from models.guidance import Scales
from models.profiles.choice import Chosen
from models.reuse.plans import StepRows
from models.solvers.names import NoiseSchedule
from models.spec import AdapterInfo


@dataclass(frozen=True)
class LoraScale:
    """A registered style, and how strongly it acts; 1 is as it was trained."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Control:
    """A registered control network and the picture that it sees, resized to the run's; how strongly it acts, and from
    which to which share of the run."""

    name: str
    image: Image.Image
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def acts(self, step: int, num_steps: int) -> bool:
        """Whether it acts in a step, by diffusers' rule."""
        return not (step / num_steps < self.start or (step + 1) / num_steps > self.stop)


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What to generate. `None` means the model's default. Sizes are pixels.

    A model that edits sees `image`, by `image_guidance_scale`; others start from it, `strength` of the way back (0.8).
    Where the network takes `guidance_scale` as an input, `true_cfg_scale` guides away from the negative prompt.
    In place of text, what diffusers' pipelines take: `prompt_embeds` [1, tokens, dim] with their mask [1, tokens] and,
    for SDXL, `pooled_prompt_embeds` [1, dim]; `class_label` for class-conditional models; `latents`
    [num_images, channels, height / scale, width / scale] as the starting noise, of unit variance.
    Image `i` of `num_images` is drawn from `seed + i`. `quality` (low, medium, high, auto) may stand in place of
    `acceleration`. `loras` are registered styles with their scales, as `LoraScale` or {"name", "scale"}.
    `mask` has the size of `image`: what of it is transparent (or, without transparency, white) is made
    anew, the rest is the picture to its latents' round trip.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    image_guidance_scale: float | None = None
    seed: int = 0
    num_images: int = 1
    scheduler: str | None = None
    image: Image.Image | None = None
    strength: float | None = None
    mask: Image.Image | None = None
    control: Sequence[Control | Mapping[str, Any]] = ()
    timestep_warp: float = 1.0
    acceleration: Accelerator | Sequence[Accelerator] = ()
    quality: str | None = None
    loras: Sequence[LoraScale | Mapping[str, Any]] = ()
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    class_label: int | None = None
    latents: Tensor | None = None

    @property
    def styles(self) -> tuple[LoraScale, ...]:
        """The LoRAs, however they were given. Raises `RequestError`."""
        try:
            return tuple(one if isinstance(one, LoraScale) else LoraScale(**one) for one in self.loras)
        except TypeError as error:
            raise RequestError("loras", 'each is a name and a scale: {"name": "watercolour", "scale": 0.8}') from error

    @property
    def controls(self) -> tuple[Control, ...]:
        """What steers it, however that was given. Raises `RequestError`."""
        try:
            return tuple(one if isinstance(one, Control) else Control(**one) for one in self.control)
        except TypeError as error:
            reason = "each is a name and an image, with scale, start and stop where they are not 1, 0 and 1"
            raise RequestError("control", reason) from error

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """The accelerators as a tuple, however they were given."""
        return (self.acceleration,) if isinstance(self.acceleration, Accelerator) else tuple(self.acceleration)


def digest(requests: Sequence[Request]) -> str:
    """A short digest of all that requests say, with pictures and tensors by their content; what is not given does
    not count, so that a new field leaves digests as they are."""
    sha = hashlib.sha256()
    for request in requests:
        given = ((name, value) for name, value in vars(request).items() if value is not None)
        for name, value in given:
            sha.update(f"{name}={_content(value)};".encode())
    return sha.hexdigest()[:16]


def _content(value: object) -> object:
    if isinstance(value, Image.Image):
        return value.size, value.mode, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, Control):
        return {name: _content(one) for name, one in vars(value).items()}
    if isinstance(value, (list, tuple)):
        return [_content(one) for one in value]
    if isinstance(value, Tensor):
        return tuple(value.shape), hashlib.sha256(value.detach().cpu().double().numpy().tobytes()).hexdigest()
    return value


@dataclass(frozen=True, eq=False)
class Run:
    """A request with every default filled in and every check passed; no tensor has been made yet.

    Its request's picture and mask already have the size of the run, the mask is 255 where the picture is made anew, and
    the strength is filled in where one starts from the picture.
    """

    request: Request
    width: int
    height: int
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    accelerators: tuple[Accelerator, ...]
    schedule: NoiseSchedule
    steps: tuple[StepRows, ...]
    feature_bytes: int  # the most that one image remembers between steps
    seeds: tuple[int, ...]
    student: AdapterInfo | None
    cfg_scale: float  # by which the rows of a guided step are combined
    plain_roles: int  # rows a step without acceleration
    plain_steps: int  # steps without acceleration: where `auto` chose, those that were asked for
    image_guidance_scale: float | None = None  # where the model edits
    profile: Chosen | None = None  # where `auto` chose
    loras: tuple[tuple[AdapterInfo, float], ...] = ()  # styles with their scales

    @property
    def adapter(self) -> str | None:
        """The student's name."""
        return None if self.student is None else self.student.name

    def controls(self, step: int) -> tuple[Control, ...]:
        """What steers the rows of a step."""
        return tuple(one for one in self.request.controls if one.acts(step, len(self.steps)))

    @property
    def scales(self) -> Scales:
        """How strongly it is guided."""
        return Scales(self.cfg_scale, 1.0 if self.image_guidance_scale is None else self.image_guidance_scale)

    @property
    def guided(self) -> bool:
        """Whether any step has an unconditional row."""
        return any(step.unconditional is not None for step in self.steps)

    @property
    def evaluations(self) -> int:
        """Steps of one image with a forward: all but those whose prediction is foretold."""
        return sum(not step.foretold for step in self.steps)

    @property
    def num_rows(self) -> int:
        """Rows over all steps and images."""
        return sum(step.num_rows for step in self.steps) * len(self.seeds)


@dataclass(frozen=True, eq=False)
class Result:
    """The images of one request, their final latents [num_images, channels, h, w], seeds, what they cost, and what was
    chosen where `auto` was asked for."""

    images: list[Image.Image]
    latents: Tensor
    seeds: tuple[int, ...]
    acceleration: tuple[Accelerator, ...]
    usage: Usage = field(repr=False)
    profile: Chosen | None = None
