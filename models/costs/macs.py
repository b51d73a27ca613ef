"""What a request, or an image, costs in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler

from models.accelerators import Accelerator
from models.backbone import Backbone
from models.costs.counter import MacCounter
from models.request import Request, Run
from models.resolve import resolve
from models.reuse.plans import RowPlan, StepRows
from models.solvers.names import REGISTRY
from models.spec import Layout, ModelSpec

MOST_COUNTERS = 64
"""Sizes of one model whose counts are kept."""


@dataclass(frozen=True)
class Usage:
    """What a request cost: `steps` evaluations a trajectory, `rows` in all, MACs with and without its accelerators."""

    steps: int
    rows: int
    macs: int
    macs_unaccelerated: int


def usage(backbone: Backbone, run: Run, ran: Sequence[Sequence[StepRows]] | None = None) -> Usage:
    """What a run costs over all its images.

    Where gates decide it is known afterwards only, from the steps that every image `ran`
    (`models.trajectory.effective_steps`); without them everything is taken to be computed.
    """
    given = run.request.prompt_embeds
    counter = counter_for(backbone, run.width, run.height, None if given is None else given.shape[1])
    lora = backbone.loras[run.adapter] if run.adapter is not None else None
    images, steps = len(run.seeds), len(run.steps)
    rows = sum(step.num_rows for step in run.steps)
    plain = counter.row(RowPlan()) * steps * (2 if run.guidance_scale > 1.0 else 1)
    macs = counter.run(run.steps, lora) * images if ran is None else sum(counter.run(steps, lora) for steps in ran)
    return Usage(steps, rows * images, macs, plain * images)


def counter_for(backbone: Backbone, width: int, height: int, text_tokens: int | None = None) -> MacCounter:
    """The counter of a loaded model at a size in pixels and a length of prompt; made once a size."""
    scale, text_tokens = backbone.spec.latent_scale, text_tokens or backbone.conditioner.text_tokens
    size = (height // scale, width // scale)
    if (*size, text_tokens) not in backbone.counters:
        while len(backbone.counters) >= MOST_COUNTERS:  # sizes are a client's choice
            backbone.counters.pop(next(iter(backbone.counters)))
        counter = MacCounter(_config(backbone), size, text_tokens, depth=_loaded_depth(backbone))
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
        spec, text_tokens = model.spec, model.conditioner.text_tokens
        scheduler_config, loras = model.scheduler_config, model.loras
    else:
        config, text_tokens, loras = model, 120 if "caption_channels" in model else 77, {}
        spec, scheduler_config = _bare_spec(config), DDIMScheduler().config
    request = Request(
        prompt="",
        class_label=0 if spec.layout == "dit" else None,
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
    counter = MacCounter(config, size, text_tokens, attention_matmuls, depth)
    lora = loras[run.adapter] if run.adapter is not None else None
    steps = tuple(counter.step(step, lora) for step in run.steps)
    row = counter.row(RowPlan())
    plain = row * len(steps) * (2 if run.guidance_scale > 1.0 else 1)
    return MacReport(row, steps, sum(steps), plain, counter.parameters)


def _bare_spec(config: Mapping[str, Any]) -> ModelSpec:
    name = str(config.get("_class_name"))
    network = MacCounter(config, (8, 8)).network
    scale = 1 if name == "UNet2DModel" else 8
    side = config["sample_size"]
    height, width = side if isinstance(side, list | tuple) else (side, side)
    layout: Layout = "dit" if name == "DiTTransformer2DModel" else "pixart" if "PixArt" in name else "sd"
    return ModelSpec(
        name=name,
        family="unet" if "UNet" in name else "dit",
        layout=layout,
        config_hash="",
        sites=network.sites,
        depth=network.depth,
        latent_channels=config["in_channels"],
        latent_scale=scale,
        patch_size=config.get("patch_size") or 1,
        native_width=width * scale,
        native_height=height * scale,
        schedulers=tuple(REGISTRY),
        default_steps=50,
        default_guidance_scale=1.0 if name == "UNet2DModel" else 7.5,
        num_classes=config.get("num_embeds_ada_norm"),
    )
