"""The greedy plan search and the γ search: what they find, that they resume, and that the plan fits its run only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from models import Backbone, Plan, Request, generate, search_plan, search_warp
from models.accelerators import DiTFastAttn
from models.errors import ModelLoadError, RequestError, WrongBackbone
from models.search.attention_search import error
from models.search.warp_search import climb

STEPS = 4


def calibration(scale: float = 4.0) -> list[Request]:
    return [
        Request(prompt=f"a {colour} circle", seed=seed, num_inference_steps=STEPS, guidance_scale=scale)
        for seed, colour in enumerate(["red", "blue"])
    ]


@pytest.fixture
def pixart(backbone_of: Callable[..., Backbone]) -> Backbone:
    return backbone_of("pixart-alpha")


def test_no_error_allowed_means_full_everywhere(pixart: Backbone) -> None:
    plan = search_plan(pixart, calibration(), threshold=0.0)
    assert set(plan.counts) == {"full"}
    assert len(plan.table) == STEPS
    assert plan.window == plan.tokens // 8


def test_any_error_allowed_takes_the_cheapest_after_step_zero(pixart: Backbone) -> None:
    plan = search_plan(pixart, calibration(), threshold=1e9)
    assert set(plan.table[0]) == {"full"}
    assert {method for row in plan.table[1:] for method in row} == {"ast"}


def test_errors_stay_below_each_blocks_share(pixart: Backbone) -> None:
    """A threshold between the extremes gives a mixture, and a larger one shares no less."""
    loose, tight = (search_plan(pixart, calibration(), threshold=t) for t in (0.3, 0.03))
    assert loose.counts["full"] <= tight.counts["full"]
    assert 0 < tight.counts["full"] < len(tight.table) * len(tight.table[0])


def test_an_unguided_search_never_shares_across_guidance(pixart: Backbone) -> None:
    plan = search_plan(pixart, calibration(scale=1.0), threshold=0.05)
    assert not plan.guidance
    assert not plan.shares_guidance


def test_search_resumes_where_it_stopped(pixart: Backbone, tmp_path: Path) -> None:
    checkpoint = tmp_path / "search.json"
    whole = search_plan(pixart, calibration(), threshold=0.05, checkpoint=checkpoint)
    saved = json.loads(checkpoint.read_text())
    saved["table"] = saved["table"][:2]
    checkpoint.write_text(json.dumps(saved))
    assert search_plan(pixart, calibration(), threshold=0.05, checkpoint=checkpoint) == whole
    with pytest.raises(RequestError, match="another search"):
        search_plan(pixart, calibration(), threshold=0.1, checkpoint=checkpoint)


def test_the_searched_plan_runs_and_draws_itself(pixart: Backbone, tmp_path: Path) -> None:
    plan = search_plan(pixart, calibration(), threshold=0.05)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    request = calibration()[0]
    plain, shared = generate(
        pixart,
        [request, Request(**{**vars(request), "acceleration": DiTFastAttn(plan=plan)})],
    )
    assert shared.usage.macs < plain.usage.macs
    assert 0 < error(shared.latents, plain.latents, "paper") < 0.5
    plan.draw(tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 300


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"bad\.json"):
        Plan.load(tmp_path / "bad.json")


def test_plans_are_for_transformers(backbone_of: Callable[..., Backbone]) -> None:
    with pytest.raises(WrongBackbone):
        search_plan(backbone_of("sd"), calibration(), threshold=0.1)


def test_error_is_the_papers_and_the_codes() -> None:
    a, b = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    assert error(a, b, "paper") == pytest.approx(0.5)
    assert error(a, b, "signed") == pytest.approx((0.5 + 0.0) / 2)  # max(-1, -2) is negative: cut to 0


def test_climb_finds_the_top_of_a_hill() -> None:
    assert climb(lambda gamma: -((gamma - 1.37) ** 2), 1.0) == pytest.approx(1.37)


def test_warp_search_is_never_worse_than_no_warp(backbone_of: Callable[..., Backbone], tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    requests = [Request(prompt="a red circle", image=image, strength=0.6, seed=3)]
    checkpoint = tmp_path / "warp.json"
    options = {"num_inference_steps": 5, "reference_steps": 10}
    found = search_warp(backbone_of("sd"), requests, checkpoint=checkpoint, **options)  # type: ignore[arg-type]
    assert found.psnr >= found.tried[1.0]
    assert found.psnr == max(found.tried.values())
    again = search_warp(backbone_of("sd"), requests, checkpoint=checkpoint, **options)  # type: ignore[arg-type]
    assert again == found
    with pytest.raises(RequestError, match="image"):
        search_warp(backbone_of("sd"), [Request(prompt="x")], num_inference_steps=5)
