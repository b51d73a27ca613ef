"""What a request, or an image, costs in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler

from models.accelerators import Accelerator
from models.backbone import Backbone
from models.costs.counter import Counts, MacCounter
from models.networks.transformer import DiT
from models.networks.unet import UNet
from models.request import Request, Run
from models.resolve import resolve
from models.reuse.plans import RowPlan
from models.solvers.names import REGISTRY
from models.spec import Layout, ModelSpec


@dataclass(frozen=True)
class Usage:
    """What a request cost: `steps` a trajectory, `rows` in all, MACs with and without its accelerators.

    `evaluations` are the steps of a trajectory with a forward: all but those whose prediction is foretold.
    """

    steps: int
    rows: int
    macs: int
    macs_unaccelerated: int
    evaluations: int


def usage(backbone: Backbone, run: Run) -> Usage:
    """What a run costs over all its images."""
    given = run.request.prompt_embeds
    counts = counts_of(backbone, run.width, run.height, None if given is None else given.shape[1])
    lora = backbone.loras[run.adapter] if run.adapter is not None else None
    images, steps = len(run.seeds), len(run.steps)
    plain = counts.row(RowPlan()) * steps * (2 if run.guidance_scale > 1.0 else 1)
    return Usage(steps, run.num_rows, counts.run(run.steps, lora) * images, plain * images, run.evaluations)


def counts_of(backbone: Backbone, width: int, height: int, text_tokens: int | None = None) -> Counts:
    """What rows of a loaded model cost at a size in pixels and a length of prompt."""
    scale = backbone.spec.latent_scale
    return backbone.counter.at((height // scale, width // scale), text_tokens or backbone.conditioner.text_tokens)


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
        spec, text_tokens = model.spec, model.conditioner.text_tokens
        scheduler_config, loras = model.scheduler_config, model.loras
        counter = model.counter if attention_matmuls else model.make_counter(attention_matmuls=False)
    else:
        text_tokens, loras = 120 if "caption_channels" in model else 77, {}
        counter = MacCounter(model, attention_matmuls)
        spec, scheduler_config = _bare_spec(model, counter.network), DDIMScheduler().config
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
    counts = counter.at(size, text_tokens)
    lora = loras[run.adapter] if run.adapter is not None else None
    steps = tuple(counts.step(step, lora) for step in run.steps)
    row = counts.row(RowPlan())
    plain = row * len(steps) * (2 if run.guidance_scale > 1.0 else 1)
    return MacReport(row, steps, sum(steps), plain, counter.parameters)


def _bare_spec(config: Mapping[str, Any], network: UNet | DiT) -> ModelSpec:
    name = str(config.get("_class_name"))
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
