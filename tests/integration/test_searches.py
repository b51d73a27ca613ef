"""The greedy plan search and the γ search: what they find, that they resume, and that the plan fits its run only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import Backbone, Plan, Request, advance, generate, search_plan, search_warp
from models.accelerators import DiTFastAttn
from models.errors import ModelLoadError, RequestError, WrongBackbone
from models.generate import start
from models.resolve import resolve
from models.search.attention_plan import Method
from models.search.attention_search import error
from models.search.warp_search import HIGHEST, LOWEST, climb
from tests.serving import hooked

STEPS = 4


def calibration(scale: float = 4.0) -> list[Request]:
    return [
        Request(prompt=f"a {colour} circle", seed=seed, num_inference_steps=STEPS, guidance_scale=scale)
        for seed, colour in enumerate(["red", "blue"])
    ]


SEARCHES = [(4.0, 0.05), (1.0, 0.05)]


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


class Tap:
    """A network whose last output can be looked at."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self.output = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, *arguments: Any) -> Tensor:
        """Run, and keep what came out."""
        self.output = self._network.forward(*arguments)
        return self.output


def _after(backbone: Backbone, request: Request, table: Sequence[Sequence[Method]]) -> Tensor:
    """What the network puts out at the last step of `table`, run as a plan of its own."""
    tap = Tap(backbone.network)
    tapped = replace(backbone, network=tap)
    blocks, steps = backbone.spec.depth, request.num_inference_steps or 0
    whole = [*table, *([("full",) * blocks] * (steps - len(table)))]
    run = resolve(backbone.spec, backbone.scheduler_config, request)
    plan = Plan(
        model="any",
        config_hash=backbone.spec.config_hash,
        scheduler="ddim",
        num_inference_steps=steps,
        tokens=64,
        guidance=run.guided,
        window=8,
        threshold=0.0,
        table=tuple(map(tuple, whole)),
    )
    request = replace(request, acceleration=DiTFastAttn(plan=plan))
    trajectories = start(tapped, resolve(backbone.spec, backbone.scheduler_config, request))
    for _ in table:
        advance(tapped, trajectories)
    return tap.output


def _greedy(backbone: Backbone, request: Request, threshold: float) -> tuple[tuple[Method, ...], ...]:
    """The paper's algorithm with nothing shared: every trial is a run from the start, under a plan."""
    blocks = backbone.spec.depth
    guided = (request.guidance_scale or 0.0) > 1.0
    table: list[list[Method]] = [["full"] * blocks]
    for _ in range(1, request.num_inference_steps or 0):
        row: list[Method] = ["full"] * blocks
        reference = _after(backbone, request, [*table, row])
        for i in range(blocks):
            trials: list[Method] = ["ast", "wa-rs+asc", "wa-rs", "asc"] if guided else ["ast", "wa-rs"]
            for method in trials:
                output = _after(backbone, request, [*table, [*row[:i], method, *row[i + 1 :]]])
                scale = torch.maximum(output.abs(), reference.abs()) + 1e-6
                if float(((output - reference).abs() / scale).clamp(max=10).mean()) < threshold * (i + 1) / blocks:
                    row[i] = method
                    break
        table.append(row)
    return tuple(map(tuple, table))


@pytest.mark.parametrize(("scale", "threshold"), SEARCHES)
def test_the_search_is_the_papers_greedy_one(scale: float, threshold: float, pixart: Backbone) -> None:
    request = replace(calibration(scale)[0], num_inference_steps=3)
    plan = search_plan(pixart, [request], threshold=threshold)
    assert plan.table == _greedy(pixart, request, threshold)
    assert len(plan.counts) >= (4 if scale > 1 else 3)


def test_what_a_plan_says_of_its_search(pixart: Backbone) -> None:
    requests = [replace(r, width=32, height=48, scheduler="euler", num_inference_steps=2) for r in calibration()]
    ticks: list[tuple[int, int]] = []
    plan = search_plan(
        pixart,
        requests,
        threshold=0.2,
        window=5,
        metric="signed",
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert plan.model_dump(exclude={"table"}) == {
        "schema_version": 1,
        "model": "pixart-alpha",
        "config_hash": pixart.spec.config_hash,
        "scheduler": "euler",
        "num_inference_steps": 2,
        "tokens": 96,
        "guidance": True,
        "window": 5,
        "threshold": 0.2,
        "metric": "signed",
    }
    assert ticks == [(1, 2), (2, 2)]
    assert search_plan(pixart, requests, threshold=0.0).window == 12


@pytest.mark.parametrize(
    "change",
    [{"num_inference_steps": 3}, {"width": 48}, {"scheduler": "euler"}, {"guidance_scale": 1.0}],
)
def test_calibration_requests_are_alike(change: dict[str, Any], pixart: Backbone) -> None:
    first, second = calibration()
    with pytest.raises(RequestError, match="requests: calibration requests must be alike"):
        search_plan(pixart, [first, replace(second, **change)], threshold=0.1)


@pytest.fixture(scope="module")
def searched(backbone_of: Callable[..., Backbone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished search."""
    checkpoint = tmp_path_factory.mktemp("search") / "plan.search.json"
    search_plan(backbone_of("pixart-alpha"), calibration(), threshold=1e9, window=5, checkpoint=checkpoint)
    return checkpoint


def test_a_resumed_search_tries_nothing_again(searched: Path, pixart: Backbone) -> None:
    """One forward a step that was found, to take it."""
    forwards: list[int] = []
    watched = hooked(pixart, lambda rows: forwards.append(len(rows)))
    search_plan(watched, calibration(), threshold=1e9, window=5, checkpoint=searched)
    assert forwards == [4] * STEPS


OTHER_SEARCHES: list[dict[str, Any]] = [
    {"threshold": 0.5},
    {"window": 6},
    {"metric": "signed"},
    {"each": {"num_inference_steps": STEPS + 1}},
    {"each": {"guidance_scale": 3.0}},
    {"each": {"scheduler": "euler"}},
    {"each": {"width": 48}},
    {"each": {"seed": 9}},
    {"each": {"prompt": "a green ring"}},
    {"each": {"negative_prompt": "dull"}},
    {"count": 1},
]


@pytest.mark.parametrize("other", OTHER_SEARCHES, ids=str)
def test_the_checkpoint_of_another_search_is_refused(other: dict[str, Any], searched: Path, pixart: Backbone) -> None:
    options: dict[str, Any] = {"threshold": 1e9, "window": 5, "metric": "paper", "each": {}, "count": 2} | other
    each, count = options.pop("each"), options.pop("count")
    requests = [replace(request, **each) for request in calibration()][:count]
    before = searched.read_text()
    with pytest.raises(RequestError, match=r"checkpoint: .* is of another search"):
        search_plan(pixart, requests, checkpoint=searched, **options)
    assert searched.read_text() == before


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


def test_one_places_error_counts_no_more_than_ten() -> None:
    a, b = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([-1.0, 3.0, 0.5])
    assert error(a, b, "paper") == pytest.approx((2 / 1 + 4 / 3 + 0) / 3, rel=1e-5)
    assert error(torch.tensor([0.0]), torch.tensor([-1.0]), "signed") == 10.0  # 1 over about nothing
    assert error(torch.zeros(3), torch.zeros(3), "paper") == 0.0


def test_climb_finds_the_top_of_a_hill() -> None:
    assert climb(lambda gamma: -((gamma - 1.37) ** 2), 1.0) == pytest.approx(1.37)


def _visits(score: Callable[[float], float], begin: float) -> tuple[float, set[float]]:
    seen: set[float] = set()

    def noted(gamma: float) -> float:
        seen.add(gamma)
        return score(gamma)

    return climb(noted, begin), seen


def test_climb_tries_both_neighbours_in_ever_smaller_steps() -> None:
    """From the top already: five step sizes, each to both sides, and nothing else."""
    best, seen = _visits(lambda gamma: -abs(gamma - 1.0), 1.0)
    assert best == 1.0
    assert seen == {1.0, 0.8, 1.2, 0.9, 1.1, 0.95, 1.05, 0.98, 1.02, 0.99, 1.01}


def test_climb_goes_on_while_it_gets_better() -> None:
    """Up in steps of 0.2 as far as they lead, then back and forth in smaller ones."""
    best, seen = _visits(lambda gamma: -abs(gamma - 1.5), 1.0)
    assert best == pytest.approx(1.5)
    assert {0.8, 1.2, 1.4, 1.6} <= seen
    assert max(seen) <= 1.8


def test_climb_stays_on_a_plain() -> None:
    assert _visits(lambda gamma: 0.0, 1.0)[0] == 1.0


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_climb_keeps_within_what_a_request_may_ask_for(slope: float) -> None:
    begin = 0.3 if slope < 0 else 19.7
    best, seen = _visits(lambda gamma: slope * gamma, begin)
    assert best == pytest.approx(LOWEST if slope < 0 else HIGHEST)
    assert min(seen) >= LOWEST == 0.05
    assert max(seen) <= HIGHEST == 20.0


def _photos(count: int = 2) -> list[Request]:
    pictures = [Image.linear_gradient("L").rotate(90 * i).resize((32, 32)).convert("RGB") for i in range(count)]
    return [Request(prompt=f"a {i} circle", image=p, strength=0.6, seed=3 + i) for i, p in enumerate(pictures)]


WARP: dict[str, Any] = {"num_inference_steps": 5, "reference_steps": 10}


@pytest.fixture(scope="module")
def warped(backbone_of: Callable[..., Backbone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished γ search."""
    checkpoint = tmp_path_factory.mktemp("warp") / "warp.json"
    search_warp(backbone_of("sd"), _photos(), checkpoint=checkpoint, **WARP)
    return checkpoint


def test_a_warps_worth_is_its_mean_psnr_to_many_plain_steps(warped: Path, backbone_of: Callable[..., Backbone]) -> None:
    backbone, tried = backbone_of("sd"), json.loads(warped.read_text())["tried"]

    def drawn(**options: Any) -> list[Any]:
        results = generate(backbone, [replace(request, **options) for request in _photos()])
        return [np.asarray(result.images[0]).astype(float) for result in results]

    many = drawn(num_inference_steps=10)
    for gamma in ("1.0", "0.8", "1.2"):
        few = drawn(num_inference_steps=5, timestep_warp=float(gamma))
        each = [10 * math.log10(255**2 / ((a - b) ** 2).mean()) for a, b in zip(many, few, strict=True)]
        assert tried[gamma] == pytest.approx(sum(each) / 2, rel=1e-6)
        assert abs(each[0] - each[1]) > 1e-3


def test_a_resumed_warp_search_draws_the_reference_alone(warped: Path, backbone_of: Callable[..., Backbone]) -> None:
    forwards: list[int] = []
    heard: list[float] = []
    watched = hooked(backbone_of("sd"), lambda rows: forwards.append(len(rows)))
    found = search_warp(watched, _photos(), checkpoint=warped, progress=lambda gamma, psnr: heard.append(gamma), **WARP)
    assert forwards == [4] * 6  # 0.6 of ten steps
    assert set(heard) == set(found.tried)
    assert found.psnr == max(found.tried.values()) == found.tried[found.gamma]


OTHER_WARPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_inference_steps": 6}, {}),
    ({"reference_steps": 11}, {}),
    ({}, {"strength": 0.7}),
    ({}, {"prompt": "a ring"}),
    ({}, {"seed": 9}),
    ({}, {"guidance_scale": 2.0}),
    ({}, {"image": Image.new("RGB", (32, 32), "red")}),
]


@pytest.mark.parametrize(("options", "each"), OTHER_WARPS, ids=lambda change: "-".join(change) or "as it was")
def test_the_checkpoint_of_another_warp_search_is_refused(
    options: dict[str, Any], each: dict[str, Any], warped: Path, backbone_of: Callable[..., Backbone]
) -> None:
    requests = [replace(request, **each) for request in _photos()]
    with pytest.raises(RequestError, match=r"checkpoint: .* is of another search"):
        search_warp(backbone_of("sd"), requests, checkpoint=warped, **{**WARP, **options})


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
