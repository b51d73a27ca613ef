"""Auto: which candidate a wish becomes, what is never chosen, what is refused, and what the run then is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from models.accelerators import Auto, CfgStudent, DeepCache, Forecast, NoAcceleration
from models.errors import AcceleratorConflict, NoProfile, OutOfRange, RequestError
from models.profiles import Measure, Profile
from models.profiles.choice import DEADLINE_SHARE, LOSSES, Outlook, choose
from models.request import Request, Run
from models.resolve import resolve
from tests.unit.specs import candidate, profile, unet_spec

CONFIG = DDIMScheduler().config
PROFILE = profile()
UNET = unet_spec(native_width=64, native_height=32, default_steps=10, profiles={"ddim-10": PROFILE})
SOON = Outlook(wait=1.0, step=0.5, deadline=10.0)  # a plain run takes five seconds


def resolved(acceleration: Any = (), outlook: Outlook | None = None, **options: Any) -> Run:
    return resolve(UNET, CONFIG, Request(prompt="a ring", acceleration=acceleration, **options), outlook)


WISHES = [
    ({}, "forecast-5"),  # balanced: 38 dB to the converged picture do
    ({"prefer": "fidelity"}, "unipc-8"),  # nearer to it than the plain run, and cheaper
    ({"prefer": "balanced"}, "forecast-5"),
    ({"prefer": "speed"}, "unipc-3"),  # 35.5 >= 40 - 5
    ({"min_psnr": 39}, "deepcache"),  # dominated where the converged picture counts, but not here
    ({"min_psnr": 43.1}, "plain"),
    ({"min_psnr": 10}, "unipc-3"),
    ({"speedup": 1.0}, "unipc-8"),
    ({"speedup": 2.0}, "forecast-5"),
    ({"speedup": 2.01}, "student"),
    ({"max_seconds": 5.0}, "unipc-8"),  # one second of waiting, and 0.8 of five
    ({"max_seconds": 4.99}, "forecast-5"),
    ({"max_seconds": 2.5}, "unipc-3"),
]


@pytest.mark.parametrize(("wish", "name"), WISHES, ids=[str(wish) for wish, _ in WISHES])
def test_the_cheapest_that_meets_the_wish_or_the_best_that_meets_the_time(wish: dict[str, Any], name: str) -> None:
    chosen, moved = choose(PROFILE, Auto(**wish), SOON)
    assert (chosen.name, moved) == (name, False)


LIMITS = [
    ({"speedup": 3.4}, "speedup", "3.33 is the most"),
    ({"max_seconds": 2.4}, "max_seconds", "2.50 s is the least"),
]


@pytest.mark.parametrize(("wish", "field", "limit"), LIMITS, ids=[field for _, field, _ in LIMITS])
def test_a_wish_that_nothing_meets_is_refused_with_the_limit(wish: dict[str, Any], field: str, limit: str) -> None:
    with pytest.raises(OutOfRange, match=limit) as caught:
        choose(PROFILE, Auto(**wish), SOON)
    assert caught.value.field == f"acceleration.{field}"


def test_the_least_likeness_is_what_is_promised_and_not_the_mean() -> None:
    sure = {"psnr": 37.5, "ssim": 0.88, "psnr_converged": 36.0, "alignment": 0.8}
    cheap = candidate("cheap", 300, 39.0, 37.0, promise=sure)
    mean = {"mean": 41.0, "error": 0.75}
    guessed = candidate("guessed", 500, 41.0, 38.0).model_copy(update={"psnr": Measure.model_validate(mean)})
    measured = profile(cheap, guessed)
    assert [choose(measured, Auto(min_psnr=least))[0].name for least in (37.5, 37.6, 39.5, 39.6)] == [
        "cheap",
        "guessed",
        "guessed",
        "plain",
    ]
    spec = unet_spec(native_width=64, native_height=32, default_steps=10, profiles={"ddim-10": measured})
    chosen = resolve(spec, CONFIG, Request(prompt="a ring", acceleration=Auto(min_psnr=37))).profile
    assert chosen is not None
    assert chosen.promised == {**sure, "speedup": 3.3333}


def test_a_plain_run_is_the_one_that_was_asked_for() -> None:
    """Its steps are those of the request's scheduler, however few the chosen one takes."""
    for steps, scheduler, plain in ((None, None, 10), (20, "ddim", 20)):
        run = resolved(Auto(prefer="speed"), num_inference_steps=steps, scheduler=scheduler)
        assert (run.num_inference_steps, len(run.steps)) == (3, 3)
        assert (run.plain_steps, run.plain_roles) == (plain, 2)
    assert resolved(DeepCache(), num_inference_steps=7).plain_steps == 7


def test_time_is_planned_with_slack() -> None:
    slow = replace(SOON, slack=1.25)  # what took five seconds is taken for 6.25
    names = [choose(PROFILE, Auto(max_seconds=most), slow)[0].name for most in (6.0, 5.9, 4.125, 4.1)]
    assert names == ["unipc-8", "forecast-5", "forecast-5", "student"]
    late = Outlook(1.0, 0.5, (1 + 3.1) / DEADLINE_SHARE, slack=1.25)
    wish = Auto(prefer="balanced", flexible=True)
    assert [choose(PROFILE, wish, replace(late, slack=s))[0].name for s in (1.0, 1.25)] == ["forecast-5", "student"]


def test_seconds_are_only_known_to_a_server() -> None:
    with pytest.raises(RequestError, match="max_seconds"):
        choose(PROFILE, Auto(max_seconds=5))


@pytest.mark.parametrize(
    ("deadline", "name", "moved"),
    [
        ((1 + 2.5) / DEADLINE_SHARE, "forecast-5", False),
        ((1 + 2.4) / DEADLINE_SHARE, "student", True),
        (3.0, "unipc-3", True),  # nothing is fast enough: the cheapest
        (None, "forecast-5", False),
    ],
)
def test_a_flexible_request_gives_way_to_its_deadline(deadline: float | None, name: str, moved: bool) -> None:
    outlook = Outlook(1.0, 0.5, deadline)
    chosen, was = choose(PROFILE, Auto(prefer="balanced", flexible=True), outlook)
    assert (chosen.name, was) == (name, moved)
    assert choose(PROFILE, Auto(prefer="balanced"), outlook)[0].name == "forecast-5"


def promise(psnr: float) -> dict[str, float]:
    return {"psnr": psnr, "ssim": 0.9, "psnr_converged": psnr}


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any candidates under any plain run that the file format allows."""
    numbers = st.tuples(st.integers(1, 2000), st.integers(10, 99), st.integers(10, 60), st.floats(0.01, 3))
    lines = draw(st.lists(numbers, min_size=1, max_size=12))
    short = draw(st.floats(0, 9))  # what may be promised of every other one is so much less
    made = [
        candidate(f"c{i}", m, p, c, seconds=s, promise=promise(p - short) if i % 2 else None)
        for i, (m, p, c, s) in enumerate(lines)
    ]
    return profile(*made)


wishes = st.one_of(
    st.builds(Auto, prefer=st.sampled_from(sorted(LOSSES)), flexible=st.booleans()),
    st.builds(Auto, min_psnr=st.floats(10, 100), flexible=st.booleans()),
    st.builds(Auto, speedup=st.floats(1, 20), flexible=st.booleans()),
    st.builds(Auto, max_seconds=st.floats(0.1, 20), flexible=st.booleans()),
)
outlooks = st.builds(
    Outlook,
    wait=st.floats(0, 10),
    step=st.floats(0.01, 1),
    deadline=st.one_of(st.none(), st.floats(0.1, 30)),
    slack=st.floats(0.5, 2),
)


@given(profiles(), wishes, outlooks)
def test_nothing_dominated_is_ever_chosen(measured: Profile, wish: Auto, outlook: Outlook) -> None:
    try:
        chosen, moved = choose(measured, wish, outlook)
    except OutOfRange:
        return
    to = "converged" if wish.min_psnr is None else "plain"
    mine = chosen.likeness(to).mean  # type: ignore[arg-type]
    for other in measured.all:
        theirs = other.likeness(to).mean  # type: ignore[arg-type]
        assert not (other.macs <= chosen.macs and theirs >= mine and (other.macs < chosen.macs or theirs > mine))
    if moved:
        return
    plain = measured.plain
    if wish.prefer is not None:
        assert chosen.psnr_converged.mean >= plain.psnr_converged.mean - LOSSES[wish.prefer]
    assert chosen.promised.psnr >= (wish.min_psnr or 0)
    assert chosen.macs * (wish.speedup or 0) <= plain.macs
    whole = outlook.wait + chosen.seconds * outlook.plain(measured)  # as it is summed there, to the bit
    assert whole <= (wish.max_seconds or 1e9)


def test_the_run_is_the_candidates_and_says_so() -> None:
    run = resolved(Auto(prefer="speed"), seed=5)
    assert (run.scheduler, run.num_inference_steps, run.accelerators, run.seeds) == ("dpmpp_2m", 3, (), (5,))
    assert run.profile is not None
    assert (run.profile.name, run.profile.candidate, run.profile.differences) == ("ddim-10", "unipc-3", ())
    assert run.profile.promised == {"psnr": 30.0, "ssim": 0.9, "psnr_converged": 35.5, "speedup": 3.3333}
    run = resolved([Auto(prefer="balanced")])
    assert (run.scheduler, run.num_inference_steps, run.evaluations) == ("ddim", 10, 5)
    assert run.accelerators == (Forecast(evaluations=5),)
    assert resolved(DeepCache()).profile is None


@pytest.mark.parametrize(
    ("quality", "name"), [("low", "unipc-3"), ("medium", "forecast-5"), ("high", "unipc-8"), ("auto", None)]
)
def test_quality_is_a_preference(quality: str, name: str | None) -> None:
    run = resolved(quality=quality)
    assert (None if run.profile is None else run.profile.candidate) == name
    assert (run.scheduler, run.num_inference_steps) == ("ddim", 10) or name is not None


def test_what_a_negative_prompt_or_a_missing_student_rules_out_is_not_chosen() -> None:
    chosen = resolved(Auto(speedup=2.5)).profile
    assert chosen is not None
    assert chosen.candidate == "student"
    kept = resolved(Auto(speedup=2.5), negative_prompt="blurry").profile
    assert kept is not None
    assert kept.candidate == "unipc-3"


REFUSED: list[tuple[dict[str, Any], type[RequestError], str]] = [
    ({"acceleration": [Auto(), DeepCache()]}, AcceleratorConflict, "acceleration"),
    ({"acceleration": [Auto(), NoAcceleration()]}, AcceleratorConflict, "acceleration"),
    ({"acceleration": [Auto(), Auto()]}, AcceleratorConflict, "acceleration"),
    ({"acceleration": [DeepCache()], "quality": "low"}, AcceleratorConflict, "quality"),
    ({"quality": "hd"}, OutOfRange, "quality"),
    ({"acceleration": Auto(), "image": Image.new("RGB", (64, 32))}, AcceleratorConflict, "image"),
    ({"acceleration": Auto(), "timestep_warp": 0.5}, AcceleratorConflict, "timestep_warp"),
    ({"acceleration": Auto(), "width": 3}, OutOfRange, "width"),
    ({"acceleration": Auto(), "scheduler": "euler"}, NoProfile, "acceleration"),
    ({"acceleration": Auto(), "guidance_scale": 3.0}, NoProfile, "acceleration"),
    ({"acceleration": Auto(min_psnr=40), "num_inference_steps": 11}, NoProfile, "acceleration"),
    ({"acceleration": Auto(speedup=2), "width": 32}, NoProfile, "acceleration"),
]


@pytest.mark.parametrize(("given", "error", "field"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_auto_cannot_be_asked(given: dict[str, Any], error: type[RequestError], field: str) -> None:
    with pytest.raises(error) as caught:
        resolved(**given)
    assert type(caught.value) is error
    assert caught.value.field == field


def test_a_missing_profile_is_answered_with_the_command_that_makes_it() -> None:
    with pytest.raises(NoProfile) as caught:
        resolved(Auto(speedup=2), num_inference_steps=12, width=32)
    command = "slipstream calibrate --model unet --scheduler ddim --steps 12 --size 32x32 -o profile.json"
    assert f"`{command}`" in str(caught.value)
    bare = unet_spec(native_width=64, native_height=32)
    with pytest.raises(NoProfile, match="profiles: none"):
        resolve(bare, CONFIG, Request(prompt="a ring", quality="high"))


def test_a_preference_takes_the_nearest_and_says_what_differs() -> None:
    chosen = resolved(Auto(prefer="balanced"), num_inference_steps=12, width=32).profile
    assert chosen is not None
    assert chosen.candidate == "forecast-5"
    assert chosen.differences == (
        "num_inference_steps: measured with 10, not 12",
        "size: measured with 64x32, not 32x32",
    )


def test_one_wish_at_a_time_and_each_in_its_range() -> None:
    for wish in ({"prefer": "speed", "speedup": 2}, {"min_psnr": 9}, {"speedup": 0.5}, {"max_seconds": 0}):
        with pytest.raises(ValidationError):
            Auto.model_validate(wish)
    assert (Auto().preference, Auto(speedup=2).preference) == ("balanced", None)


def test_a_profile_that_has_only_what_is_not_loaded_here_says_so() -> None:
    gone = {"mode": "cfg_student", "adapter": "gone"}
    lost = profile(candidate("a", 100, 90.0, 90.0, acceleration=[gone]))
    spec = unet_spec(native_width=64, native_height=32, default_steps=10, profiles={"lost": lost})
    run = resolve(spec, CONFIG, Request(prompt="a ring", acceleration=Auto(prefer="speed")))
    assert run.profile is not None
    assert run.profile.candidate == "plain"
    assert CfgStudent(adapter="gone") not in run.accelerators
