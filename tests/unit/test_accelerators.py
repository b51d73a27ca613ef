"""What each accelerator plans, as a table; its parameters, defaults and ranges."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from models.accelerators import (
    REGISTRY,
    AdaptiveDeepCache,
    Auto,
    CfgStudent,
    DeepCache,
    DeltaDiT,
    DepthSkip,
    DiTFastAttn,
    FirstBlockCache,
    Forecast,
    MagCache,
    NoAcceleration,
    SelectiveGuidance,
    TaylorSeer,
    TeaCache,
    bind,
)
from models.accelerators.base import Accelerator
from models.accelerators.deepcache import nonuniform_steps
from models.accelerators.forecast import spread
from models.errors import AcceleratorConflict, NoProfile, OutOfRange
from models.networks.sites import attention, blocks, cross_attention, feed_forward, level
from models.reuse.gates import Gate
from models.reuse.plans import Gated, Recall, Reuse, Shared, StepPlan, Window, Zeros
from models.reuse.sites import OUTPUT, Site
from models.search.attention_plan import Plan
from tests.unit.specs import dit_spec, run_spec, unet_spec

TABLE: tuple[tuple[str, ...], ...] = (("full", "full"), ("ast", "wa-rs"), ("asc", "wa-rs+asc"))
PLAN = Plan.model_validate(
    {
        "model": "dit",
        "config_hash": "hash",
        "scheduler": "ddim",
        "num_inference_steps": 3,
        "tokens": 64,
        "guidance": True,
        "window": 7,
        "threshold": 0.1,
        "table": TABLE,
    }
)

REUSE: dict[str, Reuse] = {"ast": Recall(), "wa-rs": Window(7), "asc": Shared(), "wa-rs+asc": Shared(Window(7))}
SEEN = StepPlan(
    {site(k): Recall(2, "taylor") for k in range(28) for site in (attention, cross_attention, feed_forward)}
)
FULL, ZEROS = StepPlan(), StepPlan({level(8): Zeros()})


def gated(site: Site, order: int = 0, **rule: Any) -> StepPlan:
    """A step in which a gate decides about a site."""
    return StepPlan({site: Gated(Gate(**rule), Recall(order))})


PLANS: dict[str, tuple[Accelerator, list[StepPlan]]] = {
    "none": (NoAcceleration(), [FULL] * 4),
    "auto": (Auto(prefer="speed", flexible=True), [FULL]),
    "deepcache": (DeepCache(interval=2, branch=3), [FULL, StepPlan({level(3): Recall()})] * 2),
    "delta_dit": (
        DeltaDiT(interval=3, blocks=5, boundary=4),
        [
            FULL,
            StepPlan({blocks(23, 28): Recall()}),
            StepPlan({blocks(23, 28): Recall()}),
            FULL,
            FULL,
            StepPlan({blocks(0, 5): Recall()}),
            FULL,
            StepPlan({blocks(0, 5): Recall()}),
        ],
    ),
    "ditfastattn": (
        DiTFastAttn(plan=PLAN),
        [
            StepPlan({attention(k): REUSE[method] for k, method in enumerate(row) if method != "full"})
            for row in PLAN.table
        ],
    ),
    "cfg_student": (CfgStudent(), [StepPlan(guided=False, adapter="student")] * 3),
    "depth_skip": (DepthSkip(depth=9), [ZEROS] * 3),
    "forecast": (
        Forecast(interval=3, order=2, warmup=2),
        [FULL, FULL, StepPlan({OUTPUT: Recall(2)}), FULL, *[StepPlan({OUTPUT: Recall(2)})] * 2, FULL],
    ),
    "taylorseer": (
        TaylorSeer(interval=3, order=2, warmup=2),
        [FULL, FULL, SEEN, FULL, SEEN, SEEN, FULL, SEEN],
    ),
    "first_block_cache": (
        FirstBlockCache(threshold=0.5, order=1, warmup=2, max_skips=3, pair="max"),
        [gated(blocks(1, 28), 1, threshold=0.5000000000000001, warmup=2, max_skips=3, pair="max")] * 4,
    ),
    "teacache": (
        TeaCache(threshold=0.2, coefficients=(2.0, 1.0, 0.5)),
        [
            *[
                gated(
                    blocks(0, 28),
                    threshold=0.2,
                    probe="modulated",
                    refresh="always",
                    accumulate=True,
                    coefficients=(2.0, 1.0, 0.5),
                    warmup=1,
                    pair="mean",
                )
            ]
            * 3,
            FULL,
        ],
    ),
    "magcache": (
        MagCache(ratios=(1.0, 1.0, 1.01, 1.02, 1.5, 1.0), max_skips=2, retention=0.3, order=1, threshold=0.1),
        [FULL, FULL, *[StepPlan({blocks(0, 28): Recall(1)})] * 2, FULL, StepPlan({blocks(0, 28): Recall(1)})],
    ),
    "adaptive_deepcache": (
        AdaptiveDeepCache(branch=2, order=2),
        [gated(level(2), 2, threshold=0.2, probe="input", warmup=1, pair="mean")] * 3,
    ),
    "selective_guidance": (
        SelectiveGuidance(start=0.25, stop=0.75),
        [StepPlan(guided=guided) for guided in (False, True, True, False)],
    ),
}


def test_every_accelerator_has_a_plan_table() -> None:
    assert PLANS.keys() == REGISTRY.keys()
    assert all(type(accelerator) is REGISTRY[mode] for mode, (accelerator, _) in PLANS.items())


@pytest.mark.parametrize("mode", REGISTRY)
def test_plans(mode: str) -> None:
    accelerator, expected = PLANS[mode]
    family = accelerator.families[0]
    model = unet_spec() if family == "unet" else dit_spec(depth=2 if mode == "ditfastattn" else 28)
    bound = accelerator if mode == "auto" else accelerator.bind(model, run_spec(steps=len(expected)))
    assert [bound.plan(step, len(expected)) for step in range(len(expected))] == expected


GOLDEN = {
    (2, 15, 1.5): "0 2 4 5 7 9 10 12 14 15 16 18 20 22 24 26 28 30 32 34 37 39 42 44 47",
    (3, 15, 1.3): "0 3 6 8 11 13 15 17 20 23 26 29 32 35 39 42 46",
    (5, 10, 1.5): "0 4 7 10 14 19 24 30 36 43",
    (5, 15, 1.4): "0 5 9 13 17 21 26 31 37 43",
    (8, 10, 1.4): "0 6 10 16 23 31 40",
}
"""DeepCache's non-uniform full steps of 50, from the authors' code, by (interval, centre, power)."""


@pytest.mark.parametrize(("interval", "center", "power"), GOLDEN)
def test_nonuniform_golden_lists(interval: int, center: int, power: float) -> None:
    expected = [int(step) for step in GOLDEN[interval, center, power].split()]
    assert sorted(nonuniform_steps(50, interval, center, power)) == expected
    accelerator = DeepCache(interval=interval, schedule="nonuniform", center=center, power=power)
    assert [s for s in range(50) if not accelerator.plan(s, 50).reuse] == expected


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50, 333])
@pytest.mark.parametrize("interval", [1, 2, 5, 400])
@pytest.mark.parametrize(("center", "power"), [(0, 1.0), (15, 1.5), (40, 3.0), (1000, 10.0)])
def test_nonuniform_lists_always_start_full(num_steps: int, interval: int, center: int, power: float) -> None:
    steps = nonuniform_steps(num_steps, interval, center, power)
    assert 0 in steps
    assert all(0 <= step < num_steps for step in steps)


@pytest.mark.parametrize(("num_steps", "interval", "full"), [(50, 5, 10), (7, 3, 3), (3, 10, 1), (4, 1, 4)])
def test_uniform_takes_ceil_full_steps(num_steps: int, interval: int, full: int) -> None:
    plans = [DeepCache(interval=interval).plan(step, num_steps) for step in range(num_steps)]
    assert sum(not plan.reuse for plan in plans) == full


@pytest.mark.parametrize(
    ("accelerator", "depth", "steps", "expected"),
    [
        (DeltaDiT(), 28, 20, (21, 10)),
        (DeltaDiT(), 2, 3, (1, 1)),
        (DeltaDiT(blocks=3, boundary=0), 28, 20, (3, 0)),
    ],
)
def test_delta_dit_defaults(accelerator: DeltaDiT, depth: int, steps: int, expected: tuple[int, int]) -> None:
    bound = accelerator.bind(dit_spec(depth), run_spec(steps))
    assert (bound.blocks, bound.boundary) == expected


def test_auto_is_never_bound() -> None:
    """It becomes something else before (`tests/unit/test_auto.py`); in a profile, say, it is refused."""
    with pytest.raises(AcceleratorConflict, match="stands alone"):
        bind([Auto()], unet_spec(), run_spec())


def test_unbound_accelerators_cannot_plan() -> None:
    for accelerator in (DeltaDiT(), DiTFastAttn(plan="absent")):
        with pytest.raises(ValueError, match="bind"):
            accelerator.plan(0, 1)


RANGES: list[tuple[type[Accelerator], dict[str, Any], str]] = [
    (DeepCache, {"interval": 0}, "interval"),
    (DeepCache, {"interval": 1001}, "interval"),
    (DeepCache, {"branch": -1}, "branch"),
    (DeepCache, {"schedule": "random"}, "schedule"),
    (DeepCache, {"center": -1}, "center"),
    (DeepCache, {"power": 0.9}, "power"),
    (DeepCache, {"power": float("inf")}, "power"),
    (DeepCache, {"power": float("nan")}, "power"),
    (DeepCache, {"mode": "delta_dit"}, "mode"),
    (DeltaDiT, {"interval": 0}, "interval"),
    (DeltaDiT, {"blocks": 0}, "blocks"),
    (DeltaDiT, {"boundary": -1}, "boundary"),
    (DiTFastAttn, {}, "plan"),
    (DepthSkip, {}, "depth"),
    (DepthSkip, {"depth": 0}, "depth"),
    (SelectiveGuidance, {"start": -0.1}, "start"),
    (SelectiveGuidance, {"stop": 1.1}, "stop"),
    (SelectiveGuidance, {"start": 0.9, "stop": 0.2}, "start must be below stop"),
    (CfgStudent, {"adapter": 3}, "adapter"),
]


@pytest.mark.parametrize(("accelerator", "values", "field"), RANGES)
def test_ranges(accelerator: type[Accelerator], values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        accelerator(**values)


@pytest.mark.parametrize("mode", REGISTRY)
def test_values_are_frozen_hashable_and_refuse_unknown_fields(mode: str) -> None:
    accelerator, _ = PLANS[mode]
    assert hash(accelerator) == hash(accelerator.model_copy())
    with pytest.raises(ValidationError, match="frozen"):
        accelerator.mode = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="surprise"):
        type(accelerator)(**{**accelerator.model_dump(by_alias=True), "surprise": 1})


@pytest.mark.parametrize("mode", REGISTRY)
def test_schemas(mode: str) -> None:
    """A JSON Schema that takes what the accelerator takes, with its mode, and a word on every field."""
    cls = REGISTRY[mode]
    schema = cls.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    accelerator, _ = PLANS[mode]
    if mode != "ditfastattn":
        jsonschema.validate(json.loads(accelerator.model_dump_json()), schema)
    assert schema["properties"]["mode"]["const"] == mode
    assert all(
        "description" in field for name, field in schema["properties"].items() if name not in ("mode", "schedule")
    )
    assert not schema["additionalProperties"]


@pytest.mark.parametrize("mode", REGISTRY)
def test_each_says_what_it_is(mode: str) -> None:
    cls = REGISTRY[mode]
    assert cls.title.endswith(".")
    assert cls.families
    assert mode == "none" or cls.paper.startswith("https://")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"table": [["full", "full"], ["ast"]]}, "a method for every block"),
        ({"table": [["ast", "full"]]}, "step 0 must be full"),
        ({"guidance": False}, "asc needs guidance"),
        ({"table": [["full", "sparse"]]}, "table"),
        ({"table": []}, "table"),
        ({"window": -1}, "window"),
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_plans_are_checked(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Plan.model_validate({**PLAN.model_dump(), **change})


@pytest.mark.parametrize(
    ("forecast", "num_steps", "computed"),
    [
        (Forecast(), 5, [0, 2, 4]),
        (Forecast(interval=4), 9, [0, 4, 8]),
        (Forecast(interval=1), 3, [0, 1, 2]),
        (Forecast(interval=4, warmup=3), 9, [0, 1, 2, 4, 8]),
        (Forecast(evaluations=1), 4, [0]),
        (Forecast(evaluations=2), 9, [0, 8]),
        (Forecast(evaluations=4), 10, [0, 3, 6, 9]),
        (Forecast(evaluations=13), 50, [0, 4, 8, 12, 16, 20, 25, 29, 33, 37, 41, 45, 49]),
        (Forecast(evaluations=5), 5, [0, 1, 2, 3, 4]),
        (Forecast(steps=(0, 1, 5)), 8, [0, 1, 5]),
    ],
)
def test_which_steps_a_forecast_computes(forecast: Forecast, num_steps: int, computed: list[int]) -> None:
    assert [step for step in range(num_steps) if not forecast.plan(step, num_steps).reuse] == computed


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24, 25])
def test_a_spread_has_as_many_steps_as_asked(count: int) -> None:
    steps = sorted(spread(count, 25))
    gaps = {b - a for a, b in pairwise(steps)}
    assert len(steps) == count
    assert steps[0] == 0
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"interval": 2, "evaluations": 3},
            "give one of interval, evaluations, steps and schedule, not interval and evaluations",
        ),
        ({"steps": (0, 2, 2)}, "steps must begin with 0 and rise"),
        ({"steps": (1, 2)}, "steps must begin with 0 and rise"),
        ({"steps": ()}, "at least 1 item"),
        ({"order": 5}, "less than or equal to 4"),
        ({"basis": "hermit"}, "'newton', 'taylor' or 'hermite'"),
    ],
)
def test_forecasts_that_cannot_be(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Forecast.model_validate(values)


@pytest.mark.parametrize(
    ("forecast", "field"),
    [(Forecast(evaluations=11), "acceleration.evaluations"), (Forecast(steps=(0, 10)), "acceleration.steps")],
)
def test_a_forecast_fits_its_run(forecast: Forecast, field: str) -> None:
    with pytest.raises(OutOfRange) as caught:
        forecast.bind(unet_spec(), run_spec(steps=10))
    assert caught.value.field == field
    assert forecast.bind(unet_spec(), run_spec(steps=11)) == forecast


def test_caches_foretell_where_an_order_is_given() -> None:
    assert DeepCache(order=1).plan(1, 9).reuse == {level(0): Recall(1)}
    assert DeltaDiT(order=2).bind(dit_spec(4), run_spec()).plan(1, 9).reuse == {blocks(1, 4): Recall(2)}


@pytest.mark.parametrize(
    ("ratios", "options", "skipped"),
    [
        ((1.0,) * 9, {"retention": 0.0}, [1, 2, 3, 5, 6, 7]),  # three in a row, then one in full
        ((1.0,) * 9, {"retention": 0.5, "max_skips": 1}, [5, 7]),
        ((1.0, 0.97, 0.97, 0.97, 0.97, 0.97), {"retention": 0.0}, [1, 3, 5]),  # .03, then .03 + .0591 is too much
        ((1.0, 1.2, 1.0, 1.0, 1.0), {"retention": 0.0}, [2, 3, 4]),
        ((1.0,), {"retention": 0.2}, [1, 2, 3, 5, 6]),  # one ratio stands for seven steps
        ((5.0, 1.0), {"retention": 1.0}, []),
    ],
)
def test_which_steps_magcache_skips(ratios: tuple[float, ...], options: dict[str, Any], skipped: list[int]) -> None:
    """Worked by hand from the rule: threshold 0.06, at most three in a row unless told otherwise."""
    steps = len(ratios) if len(ratios) > 2 else 7
    cache = MagCache(ratios=ratios, **options).bind(dit_spec(4), run_spec(steps))
    assert [step for step in range(steps) if cache.plan(step, steps).reuse] == skipped


def profile(steps: int, scheduler: str = "ddim", **fitted: tuple[float, ...]) -> Any:
    """What a cache asks of a profile."""
    facts = {"scheduler": scheduler, "num_inference_steps": steps, "mag_ratios": (), "tea_coefficients": ()}
    return SimpleNamespace(**facts | fitted)


def test_fitted_numbers_come_from_the_nearest_profile_that_has_them() -> None:
    profiles = {
        "few": profile(10, mag_ratios=(1.0, 1.5), tea_coefficients=(1.0, 0.0)),
        "many": profile(50, mag_ratios=(1.0, 2.5)),
        "other": profile(25, "euler", mag_ratios=(1.0, 3.5), tea_coefficients=(7.0,)),
    }
    model = dit_spec(4, profiles=profiles)
    for steps, ratio in ((9, 1.5), (29, 1.5), (30, 1.5), (31, 2.5), (999, 2.5)):
        assert MagCache().bind(model, run_spec(steps)).ratios == (1.0, ratio)
    assert MagCache().bind(model, run_spec(25, scheduler="euler")).ratios == (1.0, 3.5)
    assert MagCache(ratios=(1.0,)).bind(model, run_spec(25)).ratios == (1.0,)
    assert TeaCache().bind(model, run_spec(50)).coefficients == (1.0, 0.0)
    assert TeaCache(coefficients=(3.0,)).bind(model, run_spec(50)).coefficients == (3.0,)


@pytest.mark.parametrize(
    ("cache", "field"), [(MagCache(), "acceleration.ratios"), (TeaCache(), "acceleration.coefficients")]
)
def test_without_a_profile_the_refusal_names_the_command(cache: Accelerator, field: str) -> None:
    model = dit_spec(4, profiles={"other": profile(25, "euler", mag_ratios=(1.0,), tea_coefficients=(1.0,))})
    with pytest.raises(NoProfile, match=r"slipstream calibrate --model dit --scheduler ddim") as caught:
        cache.bind(model, run_spec(25))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("accelerator", "values", "reason"),
    [
        (FirstBlockCache, {"threshold": 0}, "greater than 0"),
        (FirstBlockCache, {"warmup": 0}, "greater than or equal to 1"),
        (FirstBlockCache, {"max_skips": 0}, "greater than or equal to 1"),
        (FirstBlockCache, {"pair": "min"}, "'mean' or 'max'"),
        (AdaptiveDeepCache, {"order": 5}, "less than or equal to 4"),
        (TeaCache, {"coefficients": ()}, "at least 1 item"),
        (TeaCache, {"coefficients": (1.0,) * 9}, "at most 8 items"),
        (TeaCache, {"coefficients": (float("nan"),)}, "finite number"),
        (MagCache, {"ratios": (1.0,) * 1001}, "at most 1000 items"),
        (MagCache, {"ratios": (1.0, 0.0)}, "greater than 0"),
        (MagCache, {"retention": 1.5}, "less than or equal to 1"),
    ],
)
def test_caches_that_cannot_be(accelerator: type[Accelerator], values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        accelerator.model_validate(values)
