"""The bodies of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.http.schemas.requests import AnyAccelerator, OutputFormat


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str = Field(description="For people.")
    type: str = Field(description="The kind of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field at fault, where there is one.", examples=["num_inference_steps"])
    code: str = Field(description="For programs.", examples=["out_of_range"])


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class GeneratedImage(BaseModel):
    """One image, and the seed that makes it again."""

    b64_json: str
    seed: int


class UsageBody(BaseModel):
    """What the request cost: steps an image, rows in all, multiply-accumulates with and without acceleration."""

    steps: int
    evaluations: int = Field(description="Steps an image with a forward; the others are foretold.")
    rows: int
    macs: int | None = Field(description="null where they could not be counted.")
    macs_unaccelerated: int | None = Field(
        description="Of the same images in full: where auto chose, of the steps and scheduler that were asked for."
    )


class TimingBody(BaseModel):
    """Where the time went, in seconds. `denoise` begins with the first tick and includes encoding the text."""

    queue_seconds: float
    denoise_seconds: float
    decode_seconds: float
    total_seconds: float


class ProfileBody(BaseModel):
    """What `auto` chose, and what was measured of it."""

    name: str = Field(description="The profile that was chosen from.")
    candidate: str
    promised: dict[str, float] = Field(
        description="What the mean over many captions is at least, by what the profile measured (99 %): `psnr` and "
        "`ssim` to the plain picture, `psnr_converged` to the one of very many steps, `alignment` where a judge reads "
        "the pictures. `speedup` is in MACs."
    )
    differences: list[str] = Field(description="How the request differs from what the profile was measured with.")
    moved: bool = Field(description="Whether a flexible request was made cheaper for its deadline.")


class GenerationBody(BaseModel):
    """The answer of POST /generate, and the data of a stream's `completed`."""

    id: str
    created: int = Field(description="Unix time.")
    model: str
    images: list[GeneratedImage]
    acceleration: list[AnyAccelerator] = Field(description="The accelerators with every default filled in.")
    profile: ProfileBody | None = Field(None, description="Where auto chose.")
    usage: UsageBody
    timing: TimingBody
    width: int
    height: int
    output_format: OutputFormat


class OpenAIImage(BaseModel):
    """One image as OpenAI's API gives it, or its address, with its seed."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class TokenDetails(BaseModel):
    """OpenAI's counts of the tokens of a request by kind."""

    image_tokens: int = 0
    text_tokens: int = 0


class OpenAIUsage(UsageBody):
    """What the request cost, and OpenAI's counts of tokens, which clients read: 0 here, where nothing goes by them."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class ImagesBody(BaseModel):
    """The answer of the OpenAI routes: theirs, and what /generate says beside it."""

    created: int
    data: list[OpenAIImage]
    id: str
    model: str
    acceleration: list[AnyAccelerator]
    profile: ProfileBody | None = None
    usage: OpenAIUsage
    timing: TimingBody
    size: str
    width: int
    height: int
    output_format: OutputFormat

    @classmethod
    def of(cls, body: GenerationBody, seeds: Sequence[int] = (), urls: Sequence[str] = ()) -> ImagesBody:
        """The same answer in OpenAI's shape; where it has no images, with the addresses of those drawn from `seeds`."""
        shared = {name: getattr(body, name) for name in cls.model_fields if name in GenerationBody.model_fields}
        data = [OpenAIImage(b64_json=image.b64_json, seed=image.seed) for image in body.images]
        data += [OpenAIImage(url=url, seed=seed) for url, seed in zip(urls, seeds, strict=True)]
        shared["usage"] = OpenAIUsage(**body.usage.model_dump())
        return cls.model_construct(data=data, size=f"{body.width}x{body.height}", **shared)


class AcceleratorBody(BaseModel):
    """One mode of acceleration."""

    mode: str
    title: str
    paper: str
    families: list[str] = Field(description="Kinds of backbone it works on.")
    models: list[str] = Field(description="Models of this server that it fits.")
    parameters: dict[str, Any] = Field(description="JSON Schema of its fields.")


class AcceleratorsBody(BaseModel):
    """The answer of GET /accelerators."""

    object: str = "list"
    data: list[AcceleratorBody]


class AdapterBody(BaseModel):
    """A registered LoRA."""

    name: str
    kind: Literal["student", "style"] = Field(description="For `cfg_student`, or for a request's `loras`.")
    guidance_scale: float | None = Field(description="Of a student.")
    rank: int
    parameters: int
    negative_prompt: str


class AdaptersBody(BaseModel):
    """The answer of GET /v1/models/{model}/adapters."""

    object: str = "list"
    data: list[AdapterBody]


class ControlBody(BaseModel):
    """A control network."""

    name: str
    parameters: int


class PlanBody(BaseModel):
    """A DiTFastAttn plan, and the run that it fits."""

    name: str
    scheduler: str
    num_inference_steps: int
    tokens: int
    guidance: bool
    window: int
    threshold: float


class FrontBody(BaseModel):
    """A run that nothing else measured beats in MACs and likeness."""

    candidate: str
    scheduler: str
    num_inference_steps: int
    acceleration: list[dict[str, Any]]
    promised: dict[str, float]


class MeasuredBody(BaseModel):
    """A profile: the run that it was measured for, its front cheapest first, and what `prefer` stands for in it."""

    name: str
    scheduler: str
    num_inference_steps: int
    width: int
    height: int
    guidance_scale: float
    front: list[FrontBody] = Field(description="By likeness to the converged picture.")
    prefer: dict[str, str] = Field(description="The candidate of each of fidelity, balanced and speed.")


class ModelBody(BaseModel):
    """One model, as OpenAI lists it and with everything that a request may ask of it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "slipstream"
    default: bool = Field(description="Whether requests that name no model get this one.")
    aliases: list[str] = Field(description="Other names that requests may use for it.")
    description: str
    family: str
    layout: str
    native_width: int
    native_height: int
    size_multiple: int
    default_num_inference_steps: int
    default_guidance_scale: float
    default_scheduler: str
    schedulers: list[str]
    conditioning: str = Field(description="text or class: whether it takes `prompt` or `class_label`.")
    num_classes: int | None
    image_to_image: bool = Field(description="Whether it takes `image`, and `mask` with it.")
    inpaints: bool = Field(description="Whether it fills in masked parts of pictures only: both are required.")
    edits: bool = Field(description="Whether it edits the picture that it is given, and needs one.")
    default_image_guidance_scale: float | None = Field(description="Where it edits.")
    accelerators: list[AcceleratorBody]
    adapters: list[AdapterBody]
    controls: list[ControlBody] = Field(description="Control networks that requests may name.")
    plans: list[PlanBody]
    profiles: list[MeasuredBody]
    examples: list[str]
    prompt_grammar: dict[str, Any] | None
    max_rows: int = Field(description="Rows a tick.")


class ModelsBody(BaseModel):
    """The answer of GET /v1/models."""

    object: str = "list"
    data: list[ModelBody]
    jobs: bool = Field(description="Whether this server keeps jobs, files and batches.")


class HealthBody(BaseModel):
    """The answer of the health routes."""

    status: str
