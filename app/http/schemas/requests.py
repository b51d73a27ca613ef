"""The bodies of requests: every field with its type, default and meaning. Unknown fields are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from models.accelerators import REGISTRY, Accelerator
from models.resolve import MAX_CONTROL_SCALE, MAX_CONTROLS, MAX_LORA_SCALE, MAX_LORAS
from models.solvers.names import REGISTRY as SCHEDULERS

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high", "auto"]
MAX_ACCELERATORS = len(REGISTRY)

if TYPE_CHECKING:
    AnyAccelerator = Accelerator
else:
    # Any accelerator, told apart by `mode`. Made from the registry: a new one is known here without a change.
    AnyAccelerator = Annotated[Union[tuple(REGISTRY.values())], Field(discriminator="mode")]  # noqa: UP007

_STRICT: TypeAdapter[Accelerator] = TypeAdapter(AnyAccelerator)


def _strictly(value: Any, _: ValidatorFunctionWrapHandler) -> Accelerator:
    """Validate without conversions, as the rest of the body: "3" is no integer."""
    return _STRICT.validate_python(value, strict=True)


OneAccelerator = Annotated[AnyAccelerator, WrapValidator(_strictly)]
Acceleration = Annotated[
    Annotated[OneAccelerator, Tag("one")]
    | Annotated[list[OneAccelerator], Field(max_length=MAX_ACCELERATORS), Tag("many")],
    Discriminator(lambda value: "many" if isinstance(value, (list, tuple)) else "one"),
]


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 2)]

PICTURES = ("image", "mask")
"""Fields that are pictures."""
PICTURE_FIELDS: Any = {"image": True, "mask": True, "control": {"__all__": {"image"}}}
"""All that is a picture, as pydantic leaves it out."""


def control_picture(number: int) -> str:
    """The name of the picture that a request's control network of this number sees."""
    return f"control.{number}.image"


EXAMPLE: dict[str, Any] = {
    "prompt": "a large red circle above a small blue square on a white background",
    "num_inference_steps": 25,
    "guidance_scale": 2.0,
    "seed": 7,
    "acceleration": {"mode": "deepcache", "interval": 3},
}
CHOSEN: dict[str, Any] = {
    "prompt": "a small green star on a black background",
    "acceleration": {"mode": "auto", "prefer": "balanced", "flexible": True},
}
COMPOSED: dict[str, Any] = {
    "prompt": "a green ring on a black background",
    "model": "shapes-sd",
    "scheduler": "dpmpp_2m",
    "acceleration": [{"mode": "deepcache", "interval": 2}, {"mode": "selective_guidance", "stop": 0.6}],
    "stream": True,
    "partial_images": 2,
}


class LoraField(BaseModel):
    """A style of the model, and how strongly it acts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Text = Field(max_length=200, description="One of the model's adapters of kind style.")
    scale: float = Field(1.0, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE, description="1 is as it was trained.")


class ControlFields(BaseModel):
    """A control network of the model, and the picture that it sees."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Text = Field(description="One of the model's `controls`.")
    image: Text | None = Field(None, description="Base64 PNG, JPEG or WebP: edges, depth … as the network was trained.")
    scale: float = Field(1.0, ge=0, le=MAX_CONTROL_SCALE, description="How strongly it acts.")
    start: float = Field(0.0, ge=0, le=1, description="From which share of the steps on it acts.")
    stop: float = Field(1.0, ge=0, le=1, description="Until which; above `start`.")


class GenerationFields(BaseModel):
    """What every generating route takes. `null` or absent means the model's default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: Text = Field(description='The text. "" for models that are conditioned on `class_label`.')
    negative_prompt: Text | None = Field(None, description="What to steer away from.")
    model: Text | None = Field(None, description="One of GET /v1/models; default the server's first.")
    class_label: int | None = Field(None, ge=0, description="The class, for class-conditional models.")
    width: int | None = Field(None, ge=1, description="Pixels; a multiple of what the model allows.")
    height: int | None = Field(None, ge=1, description="Pixels; a multiple of what the model allows.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Classifier-free guidance; 1 or less: none.")
    true_cfg_scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Guidance by a row for the negative prompt, where guidance_scale is an input of the network.",
    )
    image_guidance_scale: float | None = Field(
        None, ge=1, le=100, description="How close an edit stays to its picture, where the model edits as it is told."
    )
    seed: Seed | None = Field(None, description="Image i is drawn from seed + i; default a random seed.")
    num_images: int = Field(1, ge=1, le=1000, description="How many images.")
    scheduler: Text | None = Field(None, description=f"Noise scheduler: {', '.join(SCHEDULERS)}.")
    image: Text | None = Field(
        None,
        description="Base64 PNG, JPEG or WebP: where a run starts (image-to-image), or what an editing model changes. "
        "Transparency lies on white.",
    )
    strength: float | None = Field(
        None, ge=0, le=1, description="Image-to-image: share of the steps that is run; default 0.8."
    )
    mask: Text | None = Field(
        None,
        description="Base64 PNG or WebP of the size of `image`, which it needs: what is transparent is repainted, as "
        "with OpenAI; in shades of grey without transparency, what is white. The rest stays.",
    )
    control: list[ControlFields] | None = Field(
        None, max_length=MAX_CONTROLS, description="Control networks that steer the picture, each by one of its own."
    )
    timestep_warp: float = Field(1.0, ge=0.05, le=20, description="Spacing of the time steps; below 1 leans noisy.")
    acceleration: Acceleration | None = Field(None, description="One accelerator, or a list of them, composed.")
    quality: Quality | None = Field(
        None,
        description="Instead of `acceleration`: low is auto preferring speed, medium balanced, high fidelity; auto is "
        "the model's default. On OpenAI's routes without meaning where the model was not measured, and standard is "
        "auto there; hd, xhigh and max are high.",
    )
    loras: list[LoraField] = Field(
        default_factory=list, max_length=MAX_LORAS, description="Styles that act together, each by name and scale."
    )
    output_format: OutputFormat = Field("png", description="How images are encoded.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP, 100 the best; default 95. PNG loses nothing."
    )
    stream: bool = Field(False, description="Answer with Server-Sent Events.")
    partial_images: int = Field(
        0,
        ge=0,
        le=10,
        description="Previews in a stream, evenly spread over its steps. Steps that are foretold pass at once: the "
        "previews that fall among them are one, after them.",
    )
    timeout_seconds: float | None = Field(None, gt=0, description="Deadline; at most, and by default, the server's.")

    _quality_may_pass: bool = PrivateAttr(False)

    @property
    def quality_may_pass(self) -> bool:
        """Whether `quality` is a wish that a run without acceleration meets too, where no profile knows better."""
        return self._quality_may_pass

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """The accelerators as a tuple, however they were given."""
        if self.acceleration is None:
            return ()
        return tuple(self.acceleration) if isinstance(self.acceleration, list) else (self.acceleration,)

    @property
    def controls(self) -> list[ControlFields]:
        """The control networks."""
        return self.control or []

    @property
    def pictures(self) -> dict[str, str]:
        """The pictures in base64, by the names of their fields."""
        found = {name: getattr(self, name) for name in PICTURES}
        found |= {control_picture(i): one.image for i, one in enumerate(self.controls)}
        return {name: text for name, text in found.items() if text is not None}

    def forget_pictures(self) -> None:
        """Let go of them."""
        for name in PICTURES:
            setattr(self, name, None)
        for one in self.controls:
            one.image = None


class GenerationRequest(GenerationFields):
    """The body of POST /generate."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE, COMPOSED, CHOSEN]})


class ImagesRequest(GenerationFields):
    """The body of POST /v1/images/generations: OpenAI's fields, and every field of /generate beside them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": EXAMPLE["prompt"], "model": "shapes-sd", "n": 1, "size": "64x64"}],
        }
    )

    n: int | None = Field(None, ge=1, le=1000, description="How many images; the same as `num_images`.")
    size: Text | None = Field(None, pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="WIDTHxHEIGHT, or auto.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: an address instead of each image, that whoever has it may read until it expires."
    )
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        None, description="No model here draws transparency: transparent is refused."
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Taken and not used.")
    moderation: Literal["low", "auto"] | None = Field(None, description="Taken and not used: nothing is moderated.")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="Taken and not used: see `strength`.")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="Taken and not used.")
    user: Text | None = Field(None, max_length=512, description="Taken and not used.")
    safety_identifier: Text | None = Field(None, max_length=512, description="Taken and not used.")
    frame_count: int | None = Field(None, description="Refused: no animations are made here.")
    frame_duration_ms: int | None = Field(None, description="Refused: no animations are made here.")
    svg: dict[str, Any] | None = Field(None, description="Refused: no vector graphics are made here.")

    @field_validator("frame_count", "frame_duration_ms", "svg")
    @classmethod
    def _not_here(cls, value: object) -> object:
        if value is not None:
            raise ValueError("is not possible: png, jpeg and webp pictures are made here, one at a time; leave it out")
        return value

    @field_validator("quality", mode="before")
    @classmethod
    def _older_words(cls, quality: object) -> object:
        theirs = {"standard": "auto", "hd": "high", "xhigh": "high", "max": "high"}
        return theirs.get(quality, quality) if isinstance(quality, str) else quality

    @field_validator("background")
    @classmethod
    def _opaque(cls, background: str | None) -> str | None:
        if background == "transparent":
            raise ValueError("transparent is not possible: no model here draws transparency; give opaque or auto")
        return background

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.n is not None and "num_images" in self.model_fields_set and self.n != self.num_images:
            raise _conflict("n", "n and num_images differ; give one of them")
        if self.size not in (None, "auto") and {"width", "height"} & self.model_fields_set:
            raise _conflict("size", "size and width or height are both given; give one of them")
        if self.stream and self.response_format == "url":
            raise _conflict("response_format", "a stream carries its images itself, as b64_json")
        return self

    def plain(self) -> GenerationRequest:
        """The same request as /generate takes it."""
        fields = {name: getattr(self, name) for name in GenerationFields.model_fields}
        if self.n is not None:
            fields["num_images"] = self.n
        if self.size not in (None, "auto"):
            fields["width"], fields["height"] = (int(side) for side in str(self.size).split("x"))
        asked = GenerationRequest.model_construct(**fields)
        asked._quality_may_pass = self.acceleration is None
        return asked


def _conflict(field: str, reason: str) -> PydanticCustomError:
    """A refusal of fields together, which pydantic knows of no place for: `field` is named as at fault."""
    return PydanticCustomError("conflict", "{reason}", {"reason": reason, "field": field})


FIELD_NAMES = frozenset(
    {*ImagesRequest.model_fields, *LoraField.model_fields, *ControlFields.model_fields}
    | {info.alias or name for accelerator in REGISTRY.values() for name, info in accelerator.model_fields.items()}
)
"""Every name that a body may use; the path of an error is made of these."""
