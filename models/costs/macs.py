"""What a request, or an image, costs in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler

from models.accelerators import Accelerator
from models.backbone import Backbone
from models.costs.counter import MacCounter
from models.costs.usage import Usage
from models.families import Family, of_network
from models.request import Run
from models.resolve import least_request, resolve
from models.reuse.plans import RowPlan
from models.solvers.names import REGISTRY
from models.spec import ModelSpec

MOST_COUNTERS = 64
"""Sizes of one model whose counts are kept."""


def usage(backbone: Backbone, run: Run) -> Usage:
    """What a run costs over all its images."""
    given = run.request.prompt_embeds
    counter = counter_for(backbone, run.width, run.height, None if given is None else given.shape[1])
    lora = backbone.loras[run.adapter] if run.adapter is not None else None
    images, steps = len(run.seeds), len(run.steps)
    rows = sum(step.num_rows for step in run.steps)
    plain = counter.row(RowPlan()) * steps * (len(backbone.spec.roles) if run.guidance_scale > 1.0 else 1)
    return Usage(steps, rows * images, counter.run(run.steps, lora) * images, plain * images)


def counter_for(backbone: Backbone, width: int, height: int, text_tokens: int | None = None) -> MacCounter:
    """The counter of a loaded model at a size in pixels and a length of prompt; made once a size."""
    scale, text_tokens = backbone.spec.latent_scale, text_tokens or backbone.parts.text_tokens
    size = (height // scale, width // scale)
    if (*size, text_tokens) not in backbone.counters:
        while len(backbone.counters) >= MOST_COUNTERS:  # sizes are a client's choice
            backbone.counters.pop(next(iter(backbone.counters)))
        counter = MacCounter(
            _config(backbone), size, text_tokens, depth=_loaded_depth(backbone), family=backbone.family
        )
        backbone.counters[*size, text_tokens] = counter
    return backbone.counters[*size, text_tokens]


def _loaded_depth(backbone: Backbone) -> int | None:
    """How many input blocks were loaded of a U-Net that was loaded in part."""
    return backbone.spec.depth if getattr(backbone.network.module, "mid_block", ()) is None else None


def _config(backbone: Backbone) -> dict[str, Any]:
    module: Any = backbone.network.module
    return {**module.config, "_class_name": type(module).__name__}


@dataclass(frozen=True)
class MacReport:
    """MACs of one image: `row` is one row of a plain forward, `steps` every evaluation as accelerated."""

    row: int
    steps: tuple[int, ...]
    image: int
    image_unaccelerated: int
    parameters: int

    @property
    def ratio(self) -> float:
        """Accelerated over plain."""
        return self.image / self.image_unaccelerated


def macs(
    model: Backbone | Mapping[str, Any],
    *,
    acceleration: Accelerator | Sequence[Accelerator] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    attention_matmuls: bool = True,
) -> MacReport:
    """Count the MACs of an image made by a loaded model, or by the bare diffusers config of a network.

    Sizes are in pixels; a bare config is taken to have eight pixels a latent pixel, an unconditional U-Net one.
    `attention_matmuls=False` leaves attention's two products out, as many papers do.
    """
    if isinstance(model, Backbone):
        config: Mapping[str, Any] = _config(model)
        family = model.family
        spec, text_tokens = model.spec, model.parts.text_tokens
        scheduler_config, loras = model.scheduler_config, model.loras
    else:
        config, loras, family = model, {}, of_network(model)
        text_tokens = family.usual_text_tokens
        spec, scheduler_config = _bare_spec(family, config), DDIMScheduler().config
    request = least_request(
        spec,
        acceleration=acceleration,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        width=width,
        height=height,
    )
    run = resolve(spec, scheduler_config, request)
    size = (run.height // spec.latent_scale, run.width // spec.latent_scale)
    depth = _loaded_depth(model) if isinstance(model, Backbone) else None
    counter = MacCounter(config, size, text_tokens, attention_matmuls, depth, family)
    lora = loras[run.adapter] if run.adapter is not None else None
    steps = tuple(counter.step(step, lora) for step in run.steps)
    row = counter.row(RowPlan())
    plain = row * len(steps) * (len(spec.roles) if run.guidance_scale > 1.0 else 1)
    return MacReport(row, steps, sum(steps), plain, counter.parameters)


def _bare_spec(family: Family, config: Mapping[str, Any]) -> ModelSpec:
    counter = MacCounter(config, (8, 8), family=family)
    full: Any = counter.network.module.config
    facts = {"latent_scale": 8, **family.facts(full)}
    side, scale = full["sample_size"], facts["latent_scale"]
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return ModelSpec(
        name=family.network_class,
        family=family.kind,
        layout=family.name,
        config_hash="",
        sites=counter.network.sites,
        depth=counter.network.depth,
        latent_channels=full["in_channels"],
        native_width=width * scale,
        native_height=height * scale,
        schedulers=tuple(REGISTRY),
        default_steps=50,
        default_guidance_scale=7.5 if len(family.guidance.roles) > 1 else 1.0,
        roles=family.guidance.roles,
        takes=family.takes,
        inputs=family.inputs,
        **facts,
    )


__all__ = ["MacReport", "Usage", "counter_for", "macs", "usage"]
