"""The grammar of `--acceleration`."""

import pytest

from app.commands.grammar import parse
from models.accelerators import Accelerator, DeepCache, DeltaDiT, DepthSkip, DiTFastAttn, SelectiveGuidance
from models.errors import RequestError
from models.quality.cases import label


@pytest.mark.parametrize(
    ("text", "accelerators"),
    [
        ("deepcache", [DeepCache()]),
        ("deepcache:interval=5,branch=1", [DeepCache(interval=5, branch=1)]),
        (" deepcache : interval = 5 ", [DeepCache(interval=5)]),
        ("deepcache:schedule=nonuniform,power=1.2e+0", [DeepCache(schedule="nonuniform", power=1.2)]),
        ("deepcache:interval=3+selective_guidance:stop=.8", [DeepCache(interval=3), SelectiveGuidance(stop=0.8)]),
        ("ditfastattn:plan=D3 + delta_dit", [DiTFastAttn(plan="D3"), DeltaDiT()]),
        ("depth_skip:depth=9", [DepthSkip(depth=9)]),
    ],
)
def test_texts_become_accelerators(text: str, accelerators: list[Accelerator]) -> None:
    assert parse(text) == accelerators


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("", "acceleration.mode", "deepcache, delta_dit"),
        ("turbo", "acceleration.mode", "'turbo' is not one of"),
        ("deepcache:intervall=3", "acceleration.intervall", "interval, branch, schedule"),
        ("deepcache:interval=0", "acceleration.interval", "a whole number at least 1 and at most 1000"),
        ("deepcache:interval=fast", "acceleration.interval", "a whole number at least 1 and at most 1000"),
        ("deepcache:schedule=odd", "acceleration.schedule", "'uniform' or 'nonuniform'"),
        ("deepcache:interval=2,interval=3", "acceleration.interval", "twice"),
        ("deepcache:interval", "acceleration", "not key=value"),
        ("deepcache:", "acceleration", "not key=value"),
        ("deepcache:=3", "acceleration", "not key=value"),
        ("selective_guidance:stop=2", "acceleration.stop", "a number above 0 and at most 1"),
        ("selective_guidance:start=.9,stop=.2", "acceleration", "start must be below stop"),
        ("delta_dit:blocks=0", "acceleration.blocks", "a whole number at least 1"),
        ("depth_skip", "acceleration.depth", "depth_skip needs it"),
        ("ditfastattn", "acceleration.plan", "ditfastattn needs it"),
        ("deepcache+", "acceleration.mode", "is not one of"),
    ],
)
def test_errors_name_the_key_and_its_range(text: str, field: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(text)
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "text", ["deepcache:interval=5,branch=1", "cfg_student:adapter=a+deepcache:interval=2", "ditfastattn:plan=D3"]
)
def test_labels_of_an_evaluation_are_the_grammar(text: str) -> None:
    assert label(parse(text)) == text
