"""What can be asked for and how the server is: models, accelerators, health, metrics, the playground."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import FileResponse, Response

from app.engine.engine import Engine
from app.errors import EngineDead
from app.http.problems import RESPONSES
from app.http.routes.common import service_of
from app.http.schemas.responses import (
    AcceleratorBody,
    AcceleratorsBody,
    AdapterBody,
    ControlBody,
    FrontBody,
    HealthBody,
    MeasuredBody,
    ModelBody,
    ModelsBody,
    PlanBody,
)
from models.accelerators import REGISTRY, Auto
from models.profiles import Profile
from models.profiles.choice import LOSSES, choose, promises
from models.spec import AdapterInfo, ModelSpec

WEB = Path(__file__).parents[2] / "web"
UNREADY: dict[int | str, dict[str, Any]] = {503: RESPONSES[503]}
NO_MODEL: dict[int | str, dict[str, Any]] = {404: RESPONSES[404]}

router = APIRouter()


@router.get("/v1/models", tags=["models"], responses=UNREADY, summary="The models and all they offer")
async def list_models(request: Request) -> ModelsBody:
    """The models, as OpenAI lists them, with sizes, defaults, schedulers, accelerators, adapters and plans."""
    engine, service = loaded(request), service_of(request)
    created = int(request.app.state.created)
    data = [model_body(name, i == 0, created, engine, service.also(name)) for i, name in enumerate(engine.backbones)]
    return ModelsBody(data=data, jobs=request.app.state.jobs is not None)


@router.get("/v1/models/{model_id}", tags=["models"], responses=UNREADY | NO_MODEL, summary="One model")
async def one_model(request: Request, model_id: str) -> ModelBody:
    """One of the models, as the list has it."""
    engine, service = loaded(request), service_of(request)
    name = service.model(model_id, "model_id")
    return model_body(name, name == service.model(None), int(request.app.state.created), engine, service.also(name))


@router.get("/accelerators", tags=["models"], responses=UNREADY, summary="The accelerators")
async def list_accelerators(request: Request) -> AcceleratorsBody:
    """Every mode of acceleration with its JSON Schema, its paper and the models that it fits."""
    specs = {name: backbone.spec for name, backbone in loaded(request).backbones.items()}
    return AcceleratorsBody(data=[accelerator_body(mode, specs) for mode in REGISTRY])


@router.get("/health/live", tags=["health"], summary="Is the process alive")
async def live() -> HealthBody:
    """Answers as long as the process does."""
    return HealthBody(status="alive")


@router.get("/health/ready", tags=["health"], responses=UNREADY, summary="Is new work taken")
async def ready(request: Request) -> HealthBody:
    """200 where the models are loaded and warm, the engine lives and nothing drains; else 503."""
    service_of(request).engine.check()
    return HealthBody(status="ready")


@router.get("/metrics", tags=["health"], response_class=Response, summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Everything that is counted, as Prometheus reads it."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service_of(request).metrics.registry), headers={"Content-Type": content_type})


@router.get("/", include_in_schema=False)
async def playground() -> FileResponse:
    """The playground."""
    return FileResponse(WEB / "index.html", headers={"Cache-Control": "no-cache"})


def loaded(request: Request) -> Engine:
    """The engine once its models are there; they can be looked at while it drains, too."""
    engine = service_of(request).engine
    if not engine.backbones:
        engine.check()
        raise EngineDead("no model could be loaded", retry_after=60)
    return engine


def accelerator_body(mode: str, specs: dict[str, ModelSpec]) -> AcceleratorBody:
    """One mode, described by its own class."""
    cls = REGISTRY[mode]
    fits = [name for name, spec in specs.items() if _fits(mode, spec)]
    return AcceleratorBody(
        mode=mode,
        title=cls.title,
        paper=cls.paper,
        families=list(cls.families),
        models=fits,
        parameters=cls.model_json_schema(by_alias=True),
    )


def _fits(mode: str, spec: ModelSpec) -> bool:
    """Whether a model can run it: the right kind of backbone, and something registered where it needs that."""
    needed: dict[str, Iterable[Any]] = {
        "cfg_student": spec.students,
        "ditfastattn": spec.plans,
        "auto": spec.profiles,
    }
    return spec.family in REGISTRY[mode].families and (mode not in needed or any(needed[mode]))


def profile_body(name: str, profile: Profile) -> MeasuredBody:
    """A profile as clients are to see it."""
    return MeasuredBody(
        name=name,
        scheduler=profile.scheduler,
        num_inference_steps=profile.num_inference_steps,
        width=profile.width,
        height=profile.height,
        guidance_scale=profile.guidance_scale,
        front=[
            FrontBody(
                candidate=one.name,
                scheduler=one.scheduler,
                num_inference_steps=one.num_inference_steps,
                acceleration=[dict(mode) for mode in one.acceleration],
                promised=promises(profile, one),
            )
            for one in profile.front("converged")
        ],
        prefer={prefer: choose(profile, Auto(prefer=prefer))[0].name for prefer in LOSSES},
    )


def adapter_body(info: AdapterInfo) -> AdapterBody:
    """A registered LoRA as clients see it."""
    return AdapterBody(
        name=info.name,
        kind="student" if info.student else "style",
        guidance_scale=info.guidance_scale,
        rank=info.rank,
        parameters=info.parameters,
        negative_prompt=info.negative_prompt,
    )


def model_body(name: str, default: bool, created: int, engine: Engine, aliases: list[str]) -> ModelBody:
    """Everything that a request may ask of a model."""
    spec = engine.backbones[name].spec
    return ModelBody(
        id=name,
        created=created,
        default=default,
        aliases=aliases,
        description=spec.description,
        family=spec.family,
        layout=spec.layout,
        native_width=spec.native_width,
        native_height=spec.native_height,
        size_multiple=spec.size_multiple,
        default_num_inference_steps=spec.default_steps,
        default_guidance_scale=spec.default_guidance_scale,
        default_scheduler=spec.default_scheduler,
        schedulers=list(spec.schedulers),
        conditioning="class" if spec.takes == "class_label" else "text",
        num_classes=spec.num_classes,
        image_to_image=spec.image_to_image,
        inpaints=spec.inpaints,
        edits=spec.edits,
        default_image_guidance_scale=spec.default_image_guidance_scale if spec.edits else None,
        accelerators=[accelerator_body(mode, {name: spec}) for mode in REGISTRY if _fits(mode, spec)],
        adapters=[adapter_body(info) for info in tuple(spec.adapters.values())],
        controls=[ControlBody(name=name, parameters=one.parameters) for name, one in spec.controls.items()],
        plans=[
            PlanBody(
                name=plan,
                scheduler=facts.scheduler,
                num_inference_steps=facts.num_inference_steps,
                tokens=facts.tokens,
                guidance=facts.guidance,
                window=facts.window,
                threshold=facts.threshold,
            )
            for plan, facts in spec.plans.items()
        ],
        profiles=[profile_body(profile, measured) for profile, measured in spec.profiles.items()],
        examples=list(spec.examples),
        prompt_grammar=None if spec.prompt_grammar is None else dict(spec.prompt_grammar),
        max_rows=engine.max_rows.get(name, 0),
    )
