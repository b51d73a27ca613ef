"""Requests as contenders: how a run of one or several requests is denoised, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from models import Request, advance
from models.accelerators import (
    Accelerator,
    CfgStudent,
    DeepCache,
    DeltaDiT,
    DepthSkip,
    DiTFastAttn,
    Forecast,
    SelectiveGuidance,
)
from models.costs.macs import usage
from models.generate import start
from models.resolve import resolve
from models.search.attention_plan import Method, Plan
from models.trajectory import Trajectory
from tests.bench.zoo import Model

Acceleration = tuple[Accelerator, ...]
_numbers = count()


def accelerations(model: Model, steps: int) -> dict[str, Acceleration]:
    """Every accelerator that fits the model, at the settings that are measured."""
    depth = model.backbone.spec.depth
    common: dict[str, Acceleration] = {"selective_guidance 0.5": (SelectiveGuidance(stop=0.5),)}
    for adapter in list(model.backbone.spec.adapters)[:1]:
        student = CfgStudent(adapter=adapter)
        other = DeepCache(interval=3) if model.family == "unet" else DeltaDiT(interval=2)
        common |= {"cfg_student": (student,), f"cfg_student + {other.mode} N={other.interval}": (student, other)}
    if model.family == "unet":
        return {
            "none": (),
            **{f"deepcache N={n} b=0": (DeepCache(interval=n),) for n in (2, 3, 5)},
            f"deepcache N=3 b={depth // 2}": (DeepCache(interval=3, branch=depth // 2),),
            f"depth_skip {depth - 2}": (DepthSkip(depth=depth - 2),),
            **common,
        }
    return {
        "none": (),
        **{f"delta_dit N={n}": (DeltaDiT(interval=n),) for n in (2, 3)},
        **{f"ditfastattn {method}": (attention(model, steps, method),) for method in ("ast", "asc", "wa-rs")},
        **common,
    }


def forecasts() -> dict[str, Acceleration]:
    """Forecasts of the whole prediction, which fit every model."""
    return {f"forecast N={n}": (Forecast(interval=n),) for n in (2, 3)}


def attention(model: Model, steps: int, method: Method) -> DiTFastAttn:
    """A plan with one method everywhere: AST and WA-RS on every second step, ASC on all but the first."""
    spec = model.backbone.spec
    tokens = spec.tokens(spec.native_width, spec.native_height)
    full: Method = "full"
    shared = range(1, steps) if method == "asc" else range(1, steps, 2)
    table = [[method if step in shared else full] * spec.depth for step in range(steps)]
    plan = Plan(
        model=spec.name,
        config_hash=spec.config_hash,
        scheduler="ddim",
        num_inference_steps=steps,
        tokens=tokens,
        guidance=True,
        window=tokens // 8,
        threshold=0.0,
        table=tuple(tuple(row) for row in table),
    )
    return DiTFastAttn.model_validate({"plan": plan})


def request(
    model: Model, steps: int, acceleration: Sequence[Accelerator] = (), seed: int = 0, prompt: str | None = None
) -> Request:
    """One picture of the model."""
    return Request(
        **(model.given or {"prompt": prompt or model.prompt}),
        num_inference_steps=steps,
        acceleration=acceleration,
        seed=seed,
        scheduler="ddim",
    )


def fresh_prompt(model: Model) -> str:
    """A prompt that no text cache has seen."""
    return f"{model.prompt} {next(_numbers)}"


def trajectories(model: Model, requests: Sequence[Request]) -> list[Trajectory]:
    """The requests at their first step."""
    backbone = model.backbone
    runs = [resolve(backbone.spec, backbone.scheduler_config, one) for one in requests]
    return [trajectory for run in runs for trajectory in start(backbone, run)]


def denoise(model: Model, requests: Sequence[Request]) -> int:
    """Run requests side by side to the end, without decoding; returns the most feature bytes they held at a time."""
    most = 0
    running = trajectories(model, requests)
    while running:
        advance(model.backbone, running)
        most = max(most, sum(trajectory.memory_bytes() for trajectory in running))
        running = [trajectory for trajectory in running if not trajectory.done]
    return most


def mac_ratio(model: Model, one: Request) -> float:
    """MACs of the plain run over those of the accelerated one."""
    backbone = model.backbone
    cost = usage(backbone, resolve(backbone.spec, backbone.scheduler_config, one))
    return cost.macs_unaccelerated / cost.macs
