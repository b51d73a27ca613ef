"""From a request to a run: every default, every check, no tensor. Raises errors that name the field and the range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from models.accelerators import Accelerator, Auto, bind, from_mode
from models.accelerators.base import needs_guidance
from models.errors import (
    AcceleratorConflict,
    GuidanceRequired,
    NoProfile,
    OutOfRange,
    RequestError,
    UnknownAdapter,
    WrongBackbone,
    cut,
)
from models.masks import beside_bytes, outside_bytes, painted, resized
from models.profiles.choice import QUALITIES, Chosen, Outlook, choose, find, promises
from models.request import Request, Run
from models.reuse.compile import compile_run, feature_bytes
from models.solvers.names import REGISTRY, NoiseSchedule, noise_schedule
from models.spec import AdapterInfo, ModelSpec, RunSpec

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
STRENGTH = 0.8  # of image-to-image where the request says nothing, as in diffusers
MAX_LORAS = 8
MAX_LORA_SCALE = 10.0
MAX_CONTROLS = 4
MAX_CONTROL_SCALE = 5.0
OPTIONAL_INPUTS = frozenset(
    {
        "negative_prompt",
        "true_cfg_scale",
        "image_guidance_scale",
        "class_label",
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_attention_mask",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    }
)
"""Fields that only some families have a use for. Elsewhere they are refused, not ignored."""


def resolve(
    model: ModelSpec, scheduler_config: Mapping[str, Any], request: Request, outlook: Outlook | None = None
) -> Run:
    """Check a request against a model and fill in its defaults. Touches no device; safe on any thread.

    Where it asks for `auto`, what it becomes is chosen here; `outlook` is what a server expects of the run.
    """
    wish = wish_of(request)
    if wish is None:
        return _resolve(model, scheduler_config, request)
    try:
        return _wished(model, scheduler_config, request, wish, outlook)
    except RequestError as error:
        if request.quality is None or not error.field.startswith("acceleration"):
            raise
        raise type(error)("quality", error.reason) from None


def _wished(
    model: ModelSpec, scheduler_config: Mapping[str, Any], request: Request, wish: Auto, outlook: Outlook | None
) -> Run:
    """The run that a profile of the model says meets the wish best."""
    plain = _resolve(model, scheduler_config, replace(request, acceleration=(), quality=None))
    _measured(request)
    facts = {name: getattr(plain, name) for name in ("scheduler", "num_inference_steps", "width", "height")}
    guidance = plain.guidance_scale if len(model.roles) > 1 else None
    closest = model.profile(**facts, guidance_scale=guidance)
    if model.guided_by != "guidance_scale" and plain.guided:
        raise NoProfile(model.guided_by, "no profile was measured with it; give a mode of acceleration")
    name, profile, differences = find(model.profiles, closest, {**facts, "guidance_scale": guidance}, wish, model.name)
    refused: dict[str, RequestError] = {}  # a student that is not loaded here, or that a negative prompt rules out
    while len(refused) < len(profile.all):
        candidate, moved = choose(profile, wish, outlook, refused)
        asked = replace(
            request,
            scheduler=candidate.scheduler,
            num_inference_steps=candidate.num_inference_steps,
            acceleration=[from_mode(mode) for mode in candidate.acceleration],
            quality=None,
        )
        try:
            run = _resolve(model, scheduler_config, asked)
        except RequestError as error:
            refused[candidate.name] = error
            continue
        promised = promises(profile, candidate)
        chosen = Chosen(name, candidate.name, promised, tuple(differences), moved)
        return replace(run, profile=chosen, plain_steps=plain.plain_steps, plain_roles=plain.plain_roles)
    raise NoProfile("acceleration", f"no run of profile {name} is possible here: {next(iter(refused.values()))}")


def wish_of(request: Request) -> Auto | None:
    """What a request wishes for in place of a mode, by `auto` or by `quality`."""
    if request.quality is not None:
        if request.accelerators:
            raise AcceleratorConflict("quality", "it stands in place of acceleration; give one of them")
        if request.quality not in QUALITIES:
            raise OutOfRange("quality", f"{request.quality!r} is not one of {', '.join(QUALITIES)}")
        prefer = QUALITIES[request.quality]
        return None if prefer is None else Auto(prefer=prefer)
    wishes = [one for one in request.accelerators if isinstance(one, Auto)]
    if wishes and len(request.accelerators) > 1:
        raise AcceleratorConflict("acceleration", "auto chooses all of the acceleration: it stands alone")
    return wishes[0] if wishes else None


def _measured(request: Request) -> None:
    """Profiles are measured on runs from pure noise, with the scheduler's own time steps."""
    if request.image is not None:
        raise AcceleratorConflict("image", "auto was measured on text-to-image; give a mode of acceleration")
    if request.control:
        raise AcceleratorConflict("control", "auto was measured without it; give a mode of acceleration")
    if request.timestep_warp != 1.0:
        raise AcceleratorConflict("timestep_warp", "auto was measured without it; give a mode of acceleration")


def _resolve(model: ModelSpec, scheduler_config: Mapping[str, Any], request: Request) -> Run:
    width, height = _size(model, request)
    _inputs(model, request)
    _controls(model, request)
    scheduler = _scheduler(model, request)
    count = _integer("num_inference_steps", request.num_inference_steps, model.default_steps, MAX_STEPS)
    strength = 1.0
    if request.image is not None and not model.edits:
        strength = STRENGTH if request.strength is None else request.strength
    warp = _number("timestep_warp", request.timestep_warp, 0.05, 20.0)
    _number("strength", strength, 0.0, 1.0)
    tokens = 0 if model.flow is None else model.tokens(width, height)
    schedule = noise_schedule(scheduler, scheduler_config, count, strength, warp, model.flow, tokens)
    scale = model.default_guidance_scale if request.guidance_scale is None else request.guidance_scale
    _number("guidance_scale", scale, 0.0, model.max_guidance_scale)
    cfg_scale = _cfg_scale(model, request, scale)
    image_scale = model.default_image_guidance_scale if model.edits else None
    if request.image_guidance_scale is not None:
        image_scale = _number("image_guidance_scale", request.image_guidance_scale, 1.0, 100.0)
    accelerators = _bind(model, request, schedule, scheduler, count, cfg_scale)
    guided = _guides(model, cfg_scale) and needs_guidance(accelerators)
    student = _student(model, accelerators)
    if student is not None and student.guidance_scale is not None:
        cfg_scale = student.guidance_scale
        scale = cfg_scale if model.guided_by == "guidance_scale" else scale
    images = _integer("num_images", request.num_images, 1, 10_000)
    seed = _integer("seed", request.seed, 0, MAX_SEED - images, least=0)
    steps = compile_run(model.sites, accelerators, len(schedule.timesteps), guided, len(model.roles) - 1)
    latent_size = (height // model.latent_scale, width // model.latent_scale)
    kept_bytes = _control_bytes(model, request, *latent_size)
    if request.control:
        seen = tuple(replace(one, image=resize(one.image, width, height)) for one in request.controls)
        request = replace(request, control=seen)
    if request.mask is not None and request.image is not None:
        request = replace(request, mask=resized(painted(request.mask, request.image), width, height))
        kept = beside_bytes if model.inpaints else outside_bytes
        kept_bytes += kept(model.latent_channels, *latent_size, model.latent_itemsize)
    if request.image is not None:
        used = None if model.edits else strength
        request = replace(request, image=resize(request.image, width, height), strength=used)
    return Run(
        request=request,
        width=width,
        height=height,
        scheduler=scheduler,
        num_inference_steps=count,
        guidance_scale=scale,
        accelerators=accelerators,
        schedule=schedule,
        steps=steps,
        feature_bytes=kept_bytes
        + feature_bytes(model.sites, steps, *latent_size, model.itemsize, model.latent_itemsize),
        seeds=tuple(seed + i for i in range(images)),
        student=student,
        loras=_loras(model, request),
        cfg_scale=cfg_scale,
        plain_roles=len(model.roles) if _guides(model, cfg_scale) else 1,
        plain_steps=len(steps),
        image_guidance_scale=image_scale,
    )


def _student(model: ModelSpec, accelerators: Sequence[Accelerator]) -> AdapterInfo | None:
    name = next((a.adapter for a in accelerators if hasattr(a, "adapter")), None)
    if name is None:
        return None
    if (info := model.adapters.get(name)) is None:
        raise UnknownAdapter("acceleration.adapter", f"{model.name} has no adapter {cut(name)!r} any more")
    return info


def _loras(model: ModelSpec, request: Request) -> tuple[tuple[AdapterInfo, float], ...]:
    """The styles of a request, each once, in a finite scale."""
    asked, adapters = request.styles, dict(model.adapters)
    if len(asked) > MAX_LORAS:
        raise OutOfRange("loras", f"{len(asked)} are more than {MAX_LORAS}")
    found: list[tuple[AdapterInfo, float]] = []
    for i, one in enumerate(asked):
        _number(f"loras.{i}.scale", one.scale, -MAX_LORA_SCALE, MAX_LORA_SCALE)
        info = adapters.get(one.name)
        if info is None or info.student:
            known = ", ".join(name for name, other in adapters.items() if not other.student) or "none"
            kind = "a guidance student, for cfg_student" if info is not None else f"no LoRA of {model.name}"
            raise UnknownAdapter(f"loras.{i}.name", f"{cut(str(one.name))!r} is {kind} (registered: {known})")
        if any(info is other for other, _ in found):
            raise OutOfRange(f"loras.{i}.name", f"{cut(one.name)!r} is named twice")
        found.append((info, float(one.scale)))
    return tuple(found)


def _control_bytes(model: ModelSpec, request: Request, height: int, width: int) -> int:
    """Bytes that are kept of what the control networks make of their pictures, for latents of this size."""
    return sum(model.controls[one.name].channels for one in request.controls) * height * width * model.itemsize


def _controls(model: ModelSpec, request: Request) -> None:
    if request.control and not model.controls:
        raise WrongBackbone("control", f"{model.name} has no control networks")
    if len(request.controls) > MAX_CONTROLS:
        raise OutOfRange("control", f"{len(request.controls)} are more than {MAX_CONTROLS}")
    for i, one in enumerate(request.controls):
        if one.name not in model.controls:
            known = ", ".join(model.controls)
            raise OutOfRange(f"control.{i}.name", f"{cut(str(one.name))!r} is not one of {known}")
        _number(f"control.{i}.scale", one.scale, 0.0, MAX_CONTROL_SCALE)
        _number(f"control.{i}.start", one.start, 0.0, 1.0)
        _number(f"control.{i}.stop", one.stop, 0.0, 1.0)
        if one.start >= one.stop:
            raise OutOfRange(f"control.{i}.stop", f"{one.stop:g} is not above start, {one.start:g}")


def _cfg_scale(model: ModelSpec, request: Request, scale: float) -> float:
    """The scale by which the rows of a guided step are combined."""
    if model.guided_by == "guidance_scale":
        return scale
    cfg_scale = 1.0 if request.true_cfg_scale is None else request.true_cfg_scale
    _number("true_cfg_scale", cfg_scale, 0.0, 100.0)
    negative = request.negative_prompt is not None or request.negative_prompt_embeds is not None
    if _guides(model, cfg_scale) and not negative and needs_guidance(request.accelerators):
        raise GuidanceRequired("negative_prompt", "is needed with true_cfg_scale: it is what that guides away from")
    return cfg_scale


def plain_rows(model: ModelSpec, request: Request) -> int:
    """Rows of a step of one image without acceleration."""
    scale = model.default_guidance_scale if request.guidance_scale is None else request.guidance_scale
    return len(model.roles) if _guides(model, _cfg_scale(model, request, scale)) else 1


def _guides(model: ModelSpec, cfg_scale: float) -> bool:
    return len(model.roles) > 1 and cfg_scale > model.guided_above


def _bind(
    model: ModelSpec, request: Request, schedule: NoiseSchedule, scheduler: str, count: int, cfg_scale: float
) -> tuple[Accelerator, ...]:
    width, height = _size(model, request)
    run = RunSpec(
        scheduler=scheduler,
        num_inference_steps=count,
        num_steps=len(schedule.timesteps),
        tokens=model.tokens(width, height),
        guided=_guides(model, cfg_scale) and needs_guidance(request.accelerators),
        guidance_scale=getattr(request, model.guided_by),
        negative=bool(request.negative_prompt) or request.negative_prompt_embeds is not None,
        image_to_image=request.image is not None and not model.edits,
        timestep_warp=request.timestep_warp,
    )
    return bind(request.accelerators, model, run)


def _size(model: ModelSpec, request: Request) -> tuple[int, int]:
    width = model.native_width if request.width is None else request.width
    height = model.native_height if request.height is None else request.height
    for name, value in (("width", width), ("height", height)):
        if value < 1 or value % model.size_multiple:
            raise OutOfRange(name, f"{value} is not a positive multiple of {model.size_multiple} pixels")
        most = None if model.max_latent_side is None else model.max_latent_side * model.latent_scale
        if most is not None and value > most:
            raise OutOfRange(name, f"{value} is more than the {most} pixels that {model.name} has positions for")
    if model.square and width != height:
        raise OutOfRange("height", f"{model.name} makes square pictures only, so it must equal the width")
    return width, height


def _inputs(model: ModelSpec, request: Request) -> None:
    for name in OPTIONAL_INPUTS - model.inputs:
        given = getattr(request, name)
        if given is not None and not (isinstance(given, str) and given == ""):
            raise WrongBackbone(name, f"{model.name} does not take it")
    if request.image is not None and not model.image_to_image:
        raise WrongBackbone("image", f"{model.name} has no image-to-image")
    if request.mask is not None and not model.image_to_image:
        raise WrongBackbone("mask", f"{model.name} has no image-to-image")
    if request.mask is not None and request.image is None:
        raise RequestError("mask", "says what of an image is made anew: give image too")
    if model.inpaints:
        for name in ("image", "mask"):
            if getattr(request, name) is None:
                raise RequestError(name, f"is required: {model.name} was trained to fill in masked parts of pictures")
    if model.edits:
        if request.image is None:
            raise RequestError("image", f"is required: {model.name} edits a picture")
        if request.strength is not None:
            raise WrongBackbone("strength", f"{model.name} sees the whole picture; see image_guidance_scale")
        if request.mask is not None:
            raise WrongBackbone("mask", f"{model.name} edits the whole picture")
    if model.takes == "class_label":
        if request.class_label is None or not 0 <= request.class_label < (model.num_classes or 0):
            raise OutOfRange("class_label", f"{request.class_label} is not in 0..{(model.num_classes or 0) - 1}")
    elif request.prompt is None and request.prompt_embeds is None:
        raise RequestError("prompt", "is required")
    elif request.prompt_embeds is None and model.asks_for_embeddings:
        raise WrongBackbone("prompt", f"{model.name} was loaded without a text encoder; give prompt_embeds")
    if request.latents is not None:
        width, height = _size(model, request)
        scale = model.latent_scale
        wanted = (request.num_images, model.latent_channels, height // scale, width // scale)
        if tuple(request.latents.shape) != wanted:
            raise OutOfRange("latents", f"shape {tuple(request.latents.shape)} is not {wanted}")


def least_request(model: ModelSpec, **fields: Any) -> Request:
    """A request with nothing but what this model must be told, for measuring and counting."""
    if model.inpaints:
        fields = {"image": Image.new("RGB", (1, 1)), "mask": Image.new("L", (1, 1), 255), "strength": 1.0} | fields
    if model.edits:
        fields = {"image": Image.new("RGB", (1, 1))} | fields
    return Request(prompt="", class_label=0 if model.takes == "class_label" else None, **fields)


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """As diffusers resizes before it encodes: here, so that it is nobody's work who has the device."""
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _scheduler(model: ModelSpec, request: Request) -> str:
    name = request.scheduler or model.default_scheduler
    if name not in model.schedulers:
        kind = "is not for flow matching" if model.flow else "cannot end in pure noise as this model's schedule does"
        reason = kind if name in REGISTRY else "is not known"
        raise WrongBackbone("scheduler", f"{cut(name)!r} {reason}; one of {', '.join(model.schedulers)}")
    return name


def _integer(name: str, value: int | None, default: int, most: int, least: int = 1) -> int:
    value = default if value is None else value
    if not least <= value <= most:
        raise OutOfRange(name, f"{value} is not in {least}..{most}")
    return value


def _number(name: str, value: float, least: float, most: float) -> float:
    if not math.isfinite(value) or not least <= value <= most:
        raise OutOfRange(name, f"{value} is not in {least:g}..{most:g}")
    return value
