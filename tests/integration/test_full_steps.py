"""Which steps are taken in full, how many rows they have and what is remembered after each, over whole runs.

A step is a full one if a trajectory without caches, set to the same latents, takes the very same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from models import Backbone, Plan, Request, advance, generate
from models.accelerators import DeepCache, DeltaDiT, DepthSkip, DiTFastAttn, SelectiveGuidance
from models.accelerators.base import Accelerator
from models.generate import start
from models.resolve import resolve
from models.search.attention_plan import Method
from models.trajectory import Trajectory
from tests.plain import denoise

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]

MAP = 16 * 16 * 16 * 4  # a hidden state of the small U-Net at levels 0 and 1, float32
TOKENS = 64 * 32 * 4  # one hidden state of the small transformers, or one residual of all heads


def begin(backbone: Backbone, accelerators: Sequence[Accelerator], steps: int, **options: Any) -> Trajectory:
    content = {"class_label": 3} if backbone.spec.layout == "dit" else {"prompt": "a ring", "negative_prompt": "dull"}
    wanted = Request(
        **{"num_inference_steps": steps, "scheduler": "ddim", "guidance_scale": 3.0, **content, **options},
        acceleration=accelerators,
    )
    [trajectory] = start(backbone, resolve(backbone.spec, backbone.scheduler_config, wanted))
    return trajectory


def plan(backbone: Backbone, table: Sequence[Sequence[Method]], guided: bool = True, window: int = 5) -> DiTFastAttn:
    facts = {"model": "small", "config_hash": backbone.spec.config_hash, "scheduler": "ddim", "threshold": 0.1}
    return DiTFastAttn(
        plan=Plan.model_validate(
            {
                **facts,
                "num_inference_steps": len(table),
                "tokens": 64,
                "guidance": guided,
                "window": window,
                "table": table,
            }
        )
    )


def full_steps(backbone: Backbone, accelerators: Sequence[Accelerator], steps: int) -> tuple[list[int], list[int]]:
    """The steps that are those of a run without caches, and the rows of every step."""
    guidance = [a for a in accelerators if isinstance(a, SelectiveGuidance)]
    trajectory, plain = (begin(backbone, chosen, steps) for chosen in (accelerators, guidance))
    full, rows = [], []
    while not trajectory.done:
        plain.state, plain.step = trajectory.state, trajectory.step
        rows.append(trajectory.num_rows)
        advance(backbone, [trajectory])
        advance(backbone, [plain])
        if torch.equal(plain.latents, trajectory.latents):
            full.append(trajectory.step - 1)
    return full, rows


GUIDED_LATE, GUIDED_AT_ONCE = SelectiveGuidance(start=0.5, stop=1.0), SelectiveGuidance(start=0.1, stop=1.0)
GUIDED_BETWEEN = SelectiveGuidance(start=0.3, stop=0.7)

UNET_RUNS: list[tuple[list[Accelerator], int, list[int], list[int]]] = [
    ([DeepCache(interval=3, branch=4)], 7, [0, 3, 6], [2] * 7),
    ([DeepCache(interval=10)], 3, [0], [2] * 3),
    ([DeepCache(interval=3, schedule="nonuniform", center=3, power=1.2)], 8, [0, 3, 5], [2] * 8),
    ([DepthSkip(depth=2)], 2, [], [2] * 2),
    ([GUIDED_LATE, DeepCache(interval=4)], 6, [0, 3, 4], [1, 1, 1, 2, 2, 2]),
    ([GUIDED_AT_ONCE, DeepCache(interval=4)], 6, [0, 1, 4], [1, 2, 2, 2, 2, 2]),
    ([GUIDED_BETWEEN, DeepCache(interval=5, branch=2)], 10, [0, 3, 5], [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]),
    ([SelectiveGuidance(stop=0.5), DeepCache(interval=4)], 6, [0, 4], [2, 2, 2, 1, 1, 1]),
    ([GUIDED_LATE, DepthSkip(depth=2)], 4, [], [1, 1, 2, 2]),
]
DIT_RUNS: list[tuple[list[Accelerator], int, list[int], list[int]]] = [
    ([DeltaDiT(interval=3, blocks=2, boundary=4)], 8, [0, 3, 4, 6], [2] * 8),
    ([DeltaDiT()], 7, [0, 2, 3, 4, 6], [2] * 7),
    ([DeltaDiT(interval=9, blocks=5, boundary=0)], 3, [0], [2] * 3),
    ([GUIDED_AT_ONCE, DeltaDiT(interval=3, boundary=5)], 6, [0, 1, 3, 5], [1, 2, 2, 2, 2, 2]),
    ([GUIDED_LATE, DeltaDiT(interval=5, boundary=2)], 6, [0, 2, 3, 5], [1, 1, 1, 2, 2, 2]),
]


@pytest.mark.parametrize(("accelerators", "steps", "full", "rows"), UNET_RUNS)
def test_unet_runs(
    accelerators: list[Accelerator], steps: int, full: list[int], rows: list[int], backbone_of: Backbones
) -> None:
    assert full_steps(backbone_of("sd"), accelerators, steps) == (full, rows)


@pytest.mark.parametrize(("accelerators", "steps", "full", "rows"), DIT_RUNS)
@pytest.mark.parametrize("layout", ["dit", "pixart-alpha"])
def test_transformer_runs(
    layout: str,
    accelerators: list[Accelerator],
    steps: int,
    full: list[int],
    rows: list[int],
    backbone_of: Backbones,
) -> None:
    assert full_steps(backbone_of(layout), accelerators, steps) == (full, rows)


@pytest.mark.parametrize(("guidance", "back"), [(GUIDED_AT_ONCE, 1), (GUIDED_LATE, 3)])
@pytest.mark.parametrize("method", ["ast", "wa-rs", "asc", "wa-rs+asc"])
def test_shared_attention_is_plain_where_guidance_comes_back(
    method: Method, guidance: SelectiveGuidance, back: int, backbone_of: Backbones
) -> None:
    """Sharing across guidance alone changes nothing while there is no guidance."""
    backbone = backbone_of("dit")
    table: list[list[Method]] = [["full"] * 6, *([[method] * 6] * 5)]
    full, rows = full_steps(backbone, [guidance, plan(backbone, table)], 6)
    assert full == ([*range(back + 1)] if method == "asc" else [0, back])
    assert rows == [1] * back + [2] * (6 - back)


@pytest.mark.parametrize(("start_at", "stop_at", "steps"), [(0.1, 1.0, 5), (0.4, 0.8, 5), (0.5, 1.0, 6), (0.0, 0.4, 5)])
@pytest.mark.parametrize("level", [0, 3, 7])
def test_caches_around_a_guided_stretch(
    level: int, start_at: float, stop_at: float, steps: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    """Both rows refresh where guidance comes back; the conditional memory alone goes on where it ends."""
    accelerators = [SelectiveGuidance(start=start_at, stop=stop_at), DeepCache(interval=4, branch=level)]
    guided = [start_at <= step / steps < stop_at for step in range(steps)]
    back = [step for step in range(1, steps) if guided[step] and not guided[step - 1]]
    trajectory = begin(backbone_of("sd"), accelerators, steps, prompt="a red circle")
    while not trajectory.done:
        advance(backbone_of("sd"), [trajectory])
    expected = denoise(
        pipeline_of("sd"),
        "ddim",
        steps=steps,
        guided=guided.__getitem__,
        level=level,
        inner=lambda step: "computed" if step in {0, 4, *back} else "remembered",
    )
    assert torch.equal(trajectory.latents, expected)


def held(backbone: Backbone, accelerators: Sequence[Accelerator], steps: int, **options: Any) -> list[int]:
    """Bytes remembered after every step."""
    trajectory = begin(backbone, accelerators, steps, **options)
    found = []
    while not trajectory.done:
        advance(backbone, [trajectory])
        found.append(trajectory.memory_bytes())
    return found


@pytest.mark.parametrize(
    ("branch", "size"),
    [(0, MAP), (2, 2 * MAP), (3, 32 * 8 * 8 * 4), (5, 32 * 8 * 8 * 4), (6, 32 * 16 * 4), (8, 32 * 16 * 4)],
)
def test_one_hidden_state_a_row_from_its_full_step_to_its_last_reader(
    branch: int, size: int, backbone_of: Backbones
) -> None:
    backbone = backbone_of("sd")
    pair, nothing = 2 * size, 0
    cached = DeepCache(interval=3, branch=branch)
    assert held(backbone, [cached], 7) == [pair, pair, nothing, pair, pair, nothing, nothing]
    assert held(backbone, [cached], 5) == [pair, pair, nothing, pair, nothing]
    assert held(backbone, [cached], 5, guidance_scale=1.0) == [size, size, nothing, size, nothing]


def test_what_is_remembered_around_a_guided_stretch(backbone_of: Backbones) -> None:
    """The unconditional row's goes with its last guided reader, the conditional row's goes on."""
    backbone, cached = backbone_of("sd"), DeepCache(interval=4)
    early = held(backbone, [SelectiveGuidance(stop=0.5), cached], 6)
    assert early == [2 * MAP, 2 * MAP, MAP, 0, MAP, 0]
    late = held(backbone, [GUIDED_LATE, cached], 6)
    assert late == [MAP, MAP, 0, 0, 2 * MAP, 0]
    at_once = held(backbone, [GUIDED_AT_ONCE, cached], 6)
    assert at_once == [0, 2 * MAP, 2 * MAP, 0, 2 * MAP, 0]


@pytest.mark.parametrize("layout", ["dit", "pixart-alpha"])
def test_one_effect_a_row_from_its_full_step_to_its_last_reader(layout: str, backbone_of: Backbones) -> None:
    """Full at 0, 3, 4 (the range changes) and 6; nobody reads what step 3 and the last one could remember."""
    pair = 2 * TOKENS
    accelerator = DeltaDiT(interval=3, blocks=2, boundary=4)
    assert held(backbone_of(layout), [accelerator], 7) == [pair, pair, 0, 0, pair, 0, 0]


HELD: dict[str, tuple[list[Method], list[int]]] = {
    "outputs": (["full", "ast", "full", "full", "ast", "ast"], [1, 0, 0, 1, 1, 0]),
    "residuals": (["full", "wa-rs", "wa-rs", "full", "full", "wa-rs"], [1, 1, 0, 0, 1, 0]),
    "a window step refreshes the output": (["full", "wa-rs", "ast", "full", "full", "full"], [1, 1, 0, 0, 0, 0]),
    "but not the residual": (["full", "wa-rs", "ast", "wa-rs", "full", "full"], [1, 2, 1, 0, 0, 0]),
    "a shared step does not refresh": (["full", "ast", "wa-rs", "ast", "full", "full"], [2, 1, 1, 0, 0, 0]),
}


@pytest.mark.parametrize("case", HELD)
@pytest.mark.parametrize("guided", [True, False])
def test_one_entry_an_attention_from_its_computed_step_to_its_last_reader(
    case: str, guided: bool, backbone_of: Backbones
) -> None:
    backbone = backbone_of("pixart-alpha")
    methods, entries = HELD[case]
    table: list[list[Method]] = [["full", "full", method, "full", method, "full"] for method in methods]
    scale = 3.0 if guided else 1.0
    expected = [n * 2 * TOKENS * (2 if guided else 1) for n in entries]  # two such blocks
    assert held(backbone, [plan(backbone, table, guided)], 6, guidance_scale=scale) == expected


def test_an_attention_that_waits_neither_reads_nor_refreshes(backbone_of: Backbones) -> None:
    """Blocks 4 and 5 wait at odd steps: theirs of step 0 are read at step 2 and go there, the others' at step 1."""
    backbone = backbone_of("dit")
    delta = DeltaDiT(interval=2, blocks=2, boundary=4)
    table: list[list[Method]] = [["full"] * 6, ["full"] * 6, ["wa-rs"] * 6, ["full"] * 6]
    pair = 2 * TOKENS
    after_0 = 2 * pair + pair  # residuals of two blocks that wait next, and their effect
    after_1 = 2 * pair + 4 * pair  # the same residuals, and those of the four that ran
    effect = pair
    assert held(backbone, [delta, plan(backbone, table)], 4) == [after_0, after_1, effect, 0]


def test_nothing_is_remembered_for_a_block_that_waits(backbone_of: Backbones) -> None:
    """Blocks 4 and 5 wait at odd steps, where the others attend in a window and share."""
    backbone = backbone_of("dit")
    delta = DeltaDiT(interval=2, blocks=2, boundary=4)
    table: list[list[Method]] = [["full"] * 6, ["wa-rs"] * 6, ["full"] * 6, ["ast"] * 6]
    four_and_an_effect = (4 + 1) * 2 * TOKENS
    assert held(backbone, [delta, plan(backbone, table)], 4) == [four_and_an_effect, 0, four_and_an_effect, 0]


def test_the_last_images_of_a_run_are_its_own(backbone_of: Backbones) -> None:
    """Several images under a cache, each with its memory."""
    wanted: dict[str, Any] = {"prompt": "a ring", "num_inference_steps": 4, "acceleration": DeepCache(interval=2)}
    [together] = generate(backbone_of("sd", torch.float64), [Request(**wanted, seed=7, num_images=3)])
    for i in range(3):
        [alone] = generate(backbone_of("sd", torch.float64), [Request(**wanted, seed=7 + i)])
        assert (together.latents[i] - alone.latents[0]).norm() <= 1e-10 * alone.latents.norm()
