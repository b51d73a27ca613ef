"""What a request, or an image, costs in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from models.accelerators import Accelerator
from models.adapters.lora import Lora
from models.backbone import Backbone
from models.costs.counter import Counts, MacCounter
from models.costs.usage import Usage
from models.families import Family, of_network
from models.networks.base import Network
from models.request import Run
from models.resolve import least_request, resolve
from models.reuse.plans import RowPlan, StepRows
from models.solvers.flow import FLOW_REGISTRY
from models.solvers.names import REGISTRY
from models.spec import ModelSpec


def usage(backbone: Backbone, run: Run, ran: Sequence[Sequence[StepRows]] | None = None) -> Usage:
    """What a run costs over all its images.

    Where gates decide it is known afterwards only, from the steps that every image `ran`
    (`models.trajectory.effective_steps`); without them everything is taken to be computed.
    """
    counts = counts_of(backbone, run.width, run.height, backbone.family.prompt_tokens(backbone.parts, run))
    student, styles = _weightless(backbone, run)
    images = len(run.seeds)
    plain = counts.row(RowPlan()) * run.plain_steps * run.plain_roles
    each = [run.steps] * images if ran is None else ran
    macs = sum(counts.run(steps, student, styles) for steps in each)
    if run.request.control:
        macs += sum(_controlled(counts, run, did) for did in each)
        full = StepRows(RowPlan(), RowPlan() if run.plain_roles > 1 else None, guides=run.plain_roles - 1)
        acting = ((i, one) for i in range(run.plain_steps) for one in run.request.controls)
        plain += sum(counts.control(one.name, full) for i, one in acting if one.acts(i, run.plain_steps))
        hints = sum(counts.hint(one.name) for one in run.request.controls) * backbone.hint_rows(run)
        return Usage(len(run.steps), run.num_rows, macs + hints, plain * images + hints, run.evaluations)
    return Usage(len(run.steps), run.num_rows, macs, plain * images, run.evaluations)


def _controlled(counts: Counts, run: Run, steps: Sequence[StepRows]) -> int:
    """MACs of the control networks of one image."""
    return sum(counts.control(one.name, rows) for i, rows in enumerate(steps) for one in run.controls(i))


def _weightless(backbone: Backbone, run: Run) -> tuple[Lora | None, tuple[Lora, ...]]:
    """A run's student and its styles, for counting."""
    known = backbone.adapters.weightless
    return (None if run.student is None else known(run.student)), tuple(known(info) for info, _ in run.loras)


def counts_of(backbone: Backbone, width: int, height: int, text_tokens: int | None = None) -> Counts:
    """What rows of a loaded model cost at a size in pixels and a length of prompt."""
    scale = backbone.spec.latent_scale
    return backbone.counter.at((height // scale, width // scale), text_tokens or backbone.parts.text_tokens)


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
        spec, text_tokens = model.spec, model.parts.text_tokens
        scheduler_config = model.scheduler_config
        counter = model.counter if attention_matmuls else model.make_counter(attention_matmuls=False)
    else:
        family = of_network(model)
        text_tokens = family.usual_text_tokens
        counter = MacCounter(model, attention_matmuls, family=family)
        spec, scheduler_config = bare_spec(family, counter.network), bare_scheduler(family)
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
    counts = counter.at(size, text_tokens)
    student, styles = _weightless(model, run) if isinstance(model, Backbone) else (None, ())
    steps = tuple(counts.step(step, student, styles) for step in run.steps)
    row = counts.row(RowPlan())
    plain = row * len(steps) * run.plain_roles
    return MacReport(row, steps, sum(steps), plain, counter.parameters)


def bare_scheduler(family: Family) -> Any:
    if family.flow is None:
        return DDIMScheduler().config
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config


def bare_spec(family: Family, network: Network) -> ModelSpec:
    full: Any = network.module.config
    facts: dict[str, Any] = {
        "latent_channels": family.latent_channels(full),
        "latent_scale": 8,
        "default_steps": 50,
        "default_guidance_scale": 7.5 if len(family.guidance.roles) > 1 else 1.0,
        **family.facts(full),
    }
    height, width = (side * facts["latent_scale"] for side in family.native_size(full))
    return ModelSpec(
        name=family.network_class,
        family=family.kind,
        layout=family.name,
        config_hash="",
        sites=family.sites(network, family.usual_text_tokens),
        depth=network.depth,
        native_width=width,
        native_height=height,
        schedulers=tuple(REGISTRY if family.flow is None else FLOW_REGISTRY),
        default_scheduler="ddim" if family.flow is None else "euler",
        guided_by=family.guided_by,
        guided_above=family.guidance.above,
        flow=family.flow,
        roles=family.guidance.roles,
        takes=family.takes,
        inputs=family.inputs,
        edits=family.edits,
        **facts,
    )


__all__ = ["MacReport", "Usage", "counts_of", "macs", "usage"]
