"""The bodies of AUTOMATIC1111's API, as local tools send them, and what they ask for in our own terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError, model_validator

from app.errors import Impossible
from app.http.schemas.requests import Acceleration, GenerationRequest, LoraField, OutputFormat, Quality, Text
from models.errors import cut

SAMPLERS = {
    "Euler a": "euler_ancestral",
    "Euler": "euler",
    "DDIM": "ddim",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M Karras": "dpmpp_2m_karras",
    "Heun": "heun",
    "LCM": "lcm",
    "PLMS": "pndm",
    "UniPC": "unipc",
}
"""Names that these tools have for our schedulers."""
SCHEDULES = ("Automatic", "Karras")
"""And for how their steps are spaced."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "restore_faces": (False,),
    "tiling": (False,),
    "save_images": (False,),
    "include_init_images": (False,),
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "s_noise": (1,),
    "eta": (0, 1),
    "refiner_checkpoint": ("", "None"),
    "script_name": ("",),
    "firstpass_image": ("",),
    "infotext": ("",),
    "resize_mode": (0,),
    "initial_noise_multiplier": (1, 0),
    "latent_mask": ("",),
    "inpainting_mask_invert": (0,),
}
"""Fields that are taken only as long as they ask for nothing; `null` always may stand."""
UNUSED = frozenset(
    {"subseed", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards", "script_args"}
    | {"comments", "refiner_switch_at", "disable_extra_networks", "firstphase_width", "firstphase_height", "hr_scale"}
    | {"hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name", "hr_sampler_name"}
    | {"hr_scheduler", "hr_prompt", "hr_negative_prompt", "force_task_id", "image_cfg_scale", "mask_blur"}
    | {"mask_blur_x", "mask_blur_y", "mask_round", "inpainting_fill", "inpaint_full_res"}
    | {"inpaint_full_res_padding"}
)
"""Fields that mean something only together with one of those, or to a program on the same machine: taken, not used."""
SETTINGS = frozenset(
    ("sd_model_checkpoint", "acceleration", "quality", "samples_format", "CLIP_stop_at_last_layers", "sd_vae")
)
LORA = re.compile(r"<lora:([^:>]+)(?::([^:>]*))?>")
"""How these tools write a LoRA and its scale into a prompt."""
_ACCELERATION: TypeAdapter[Any] = TypeAdapter(Acceleration)


class TextRequest(BaseModel):
    """The body of POST /sdapi/v1/txt2img. Fields beside these are taken as long as they ask for nothing."""

    model_config = ConfigDict(
        extra="allow",
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"prompt": "a red circle", "steps": 20, "width": 64, "height": 64}]},
    )

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: int = Field(-1, ge=-1, le=2**63 - 2, description="-1 draws one.")
    sampler_name: Text | None = Field(None, description=f"{', '.join(SAMPLERS)}; default the model's own.")
    sampler_index: Text | None = Field(None, description="An older name of sampler_name.")
    scheduler: Text | None = Field(None, description="Automatic, or Karras with DPM++ 2M.")
    batch_size: int = Field(1, ge=1, le=1000, description="Images; batch_size times n_iter in all.")
    n_iter: int = Field(1, ge=1, le=1000)
    steps: int | None = Field(None, ge=1, le=1000, description="Default the model's own.")
    cfg_scale: float | None = Field(None, ge=0, le=100, description="Default the model's own.")
    width: int | None = Field(None, ge=1, description="Default the model's own.")
    height: int | None = Field(None, ge=1, description="Default the model's own.")
    denoising_strength: float | None = Field(None, ge=0, le=1, description="Of img2img; default 0.75.")
    send_images: bool = True
    override_settings: dict[str, Any] = Field(
        {}, description="sd_model_checkpoint, samples_format, and our acceleration and quality as in /generate."
    )
    alwayson_scripts: dict[str, Any] = Field({}, description="None are here; those that are switched off may stand.")

    _settings: dict[str, Any] = PrivateAttr({})

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """These tools send null for what they leave out."""
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body

    def check(self) -> None:
        """Refuse what is asked for and is not here. Raises `Impossible` that names the field."""
        for name, value in (self.model_extra or {}).items():
            if name in UNUSED:
                continue
            if name not in NEUTRAL:
                error = Impossible(f"{cut(name)}: is not a known field", param=name)
                error.code = "unknown_field"
                raise error
            if value not in NEUTRAL[name]:
                allowed = " or ".join(repr(one) for one in NEUTRAL[name])
                raise Impossible(f"{name}: is not possible here; leave it out, or at {allowed}", param=name)
        for script, given in self.alwayson_scripts.items():
            arguments = given.get("args") if isinstance(given, dict) else None
            if not isinstance(arguments, list) or any(arguments):
                raise Impossible(f"alwayson_scripts: {cut(script)!r} is not here", param="alwayson_scripts")

    def plain(self, options: Mapping[str, Any]) -> GenerationRequest:
        """The same request as /generate takes it, under a client's options. Raises `Impossible`."""
        self.check()
        wishes = dict(options) | settings_of(self.override_settings, "override_settings")
        given: dict[str, Any] = {
            "prompt": LORA.sub("", self.prompt).strip(),
            "loras": [_lora(name, scale) for name, scale in LORA.findall(self.prompt)] or None,
            "negative_prompt": self.negative_prompt or None,
            "model": wishes.get("sd_model_checkpoint"),
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.cfg_scale,
            "seed": None if self.seed == -1 else self.seed,
            "num_images": self.batch_size * self.n_iter,
            "scheduler": self._scheduler(),
            "acceleration": wishes.get("acceleration"),
            "quality": wishes.get("quality"),
            "output_format": wishes.get("samples_format", "png"),
        }
        return GenerationRequest.model_construct(**{k: v for k, v in given.items() if v is not None})

    def _scheduler(self) -> str | None:
        field = "sampler_name" if self.sampler_name is not None else "sampler_index"
        name = self.sampler_name or self.sampler_index
        if name is None:
            return None
        known = {spelt.lower(): ours for spelt, ours in SAMPLERS.items()} | {ours: ours for ours in SAMPLERS.values()}
        if name.lower() not in known:
            raise Impossible(f"{field}: {cut(name)!r} is not one of {', '.join(SAMPLERS)}", param=field)
        sampler, spacing = known[name.lower()], (self.scheduler or "automatic").lower()
        if spacing == "karras" and sampler.startswith("dpmpp_2m"):
            return "dpmpp_2m_karras"
        if spacing not in ("automatic", "uniform", "karras") or spacing == "karras":
            reason = f"{cut(self.scheduler or '')!r} is not possible with {name}; Automatic is, Karras with DPM++ 2M"
            raise Impossible(f"scheduler: {reason}", param="scheduler")
        return sampler


class ImageRequest(TextRequest):
    """The body of POST /sdapi/v1/img2img."""

    init_images: Annotated[list[Text], Field(min_length=1, max_length=1)] = Field(
        description="One picture, base64 with or without data:."
    )
    mask: Text | None = Field(None, description="Base64, of the picture's size: what is white is repainted.")

    def plain(self, options: Mapping[str, Any]) -> GenerationRequest:
        """See `TextRequest`."""
        asked = super().plain(options)
        asked.image, asked.mask, asked.strength = self.init_images[0], self.mask, 0.75
        if self.denoising_strength is not None:
            asked.strength = self.denoising_strength
        return asked


def _lora(name: str, scale: str) -> LoraField:
    try:
        return LoraField(name=name, scale=float(scale or 1))
    except ValueError as error:
        raise Impossible(f"prompt: {cut(scale)!r} is no scale of a LoRA", param="prompt") from error


def settings_of(given: Mapping[str, Any], field: str) -> dict[str, Any]:
    """What of these tools' settings means something here, checked. Raises `Impossible` that names the field."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in SETTINGS:
            error = Impossible(f"{field}: {cut(name)} is not a setting here; these are: {', '.join(sorted(SETTINGS))}")
            error.param, error.code = field, "unknown_field"
            raise error
        if value is None:
            continue
        try:
            found |= _setting(name, value)
        except (ValidationError, ValueError) as raised:
            first = raised.errors()[0]["msg"] if isinstance(raised, ValidationError) else str(raised)
            raise Impossible(f"{field}: {name}: {first}", param=field) from raised
    return found


def _setting(name: str, value: Any) -> dict[str, Any]:
    """One setting as we keep it; nothing of one that only its neutral value is taken of."""
    match name:
        case "acceleration":
            return {name: _ACCELERATION.validate_python(value)}
        case "quality":
            known: TypeAdapter[str] = TypeAdapter(Quality)
            return {name: known.validate_python(value)}
        case "samples_format":
            formats: TypeAdapter[OutputFormat] = TypeAdapter(OutputFormat)
            return {name: formats.validate_python("jpeg" if value == "jpg" else value)}
        case "sd_model_checkpoint":
            return {name: TypeAdapter(Annotated[str, Field(max_length=1024)]).validate_python(value)}
    if value not in {"CLIP_stop_at_last_layers": (1,), "sd_vae": ("Automatic", "None", "")}[name]:
        raise ValueError("is not possible here; leave it out")
    return {}


class Pictures(BaseModel):
    """The answer of txt2img and img2img."""

    images: list[str] = Field(description="Base64; none where the request was interrupted.")
    parameters: dict[str, Any] = Field(description="The request without its picture.")
    info: str = Field(description="JSON: seeds, texts and settings of every image, what ran and what it cost.")


class Progress(BaseModel):
    """The answer of progress."""

    progress: float
    eta_relative: float = Field(description="Seconds that are left.")
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


class Options(BaseModel):
    """The answer of options: what means something here."""

    sd_model_checkpoint: str
    acceleration: Acceleration | None = None
    quality: str | None = None
    samples_format: OutputFormat = "png"
    CLIP_stop_at_last_layers: int = 1
    sd_vae: str = "Automatic"


class Model(BaseModel):
    """One model."""

    title: str
    model_name: str
    filename: str
    hash: str | None = None
    sha256: str | None = None
    config: str | None = None


class Named(BaseModel):
    """A sampler, or how its steps are spaced."""

    name: str
    label: str | None = None
    aliases: list[str] = []
    options: dict[str, str] = {}


class Lora(BaseModel):
    """A LoRA."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any] = {}


class Scripts(BaseModel):
    """Scripts, by where they run."""

    txt2img: list[str] = []
    img2img: list[str] = []
