"""Tables of what rows do, remember and forget over a run: liveness worked out backwards, without a tensor."""

from __future__ import annotations

import pytest

from models.accelerators import CfgStudent, DeepCache, DeltaDiT, DepthSkip, DiTFastAttn, SelectiveGuidance
from models.accelerators.base import Accelerator
from models.plan import Exit, Key, Method, RowPlan, StepPlan, StepRows, compile_run, merge
from models.search.attention_plan import Plan
from tests.unit.specs import dit_spec, run_spec, unet_spec


def bound(accelerator: Accelerator, steps: int, guided: bool = True) -> Accelerator:
    family = "dit" if "unet" not in accelerator.families else "unet"
    model = dit_spec(depth=4) if family == "dit" else unet_spec(depth=9)
    return accelerator.bind(model, run_spec(steps=steps, guided=guided))


def attention(*rows: tuple[Method, ...], window: int = 3, guided: bool = True) -> Accelerator:
    plan = Plan(
        model="m",
        config_hash="hash",
        scheduler="ddim",
        num_inference_steps=len(rows),
        tokens=64,
        guidance=guided,
        window=window,
        threshold=0.1,
        table=rows,
    )
    spec = dit_spec(depth=len(rows[0]))
    return DiTFastAttn(plan=plan).bind(spec, run_spec(steps=len(rows), guided=guided))


def keeps(steps: tuple[StepRows, ...], role: str = "conditional") -> list[set[Key] | None]:
    rows: list[RowPlan | None] = [getattr(step, role) for step in steps]
    return [None if row is None else set(row.keep) for row in rows]


def lives(steps: tuple[StepRows, ...], role: str = "conditional") -> list[set[Key] | None]:
    rows: list[RowPlan | None] = [getattr(step, role) for step in steps]
    return [None if row is None else set(row.live) for row in rows]


def test_no_accelerator_remembers_nothing() -> None:
    steps = compile_run((), 3, guided=True)
    assert steps == (StepRows(RowPlan(), RowPlan()),) * 3
    assert not any(step.reduced for step in steps)


def test_unguided_runs_have_one_row() -> None:
    assert [step.unconditional for step in compile_run((), 2, guided=False)] == [None, None]


def test_deepcache_keeps_at_full_steps_and_forgets_after_the_last_reader() -> None:
    steps = compile_run((DeepCache(interval=3, branch=2),), 5, guided=True)
    level: set[Key] = {("level", 2)}
    exits = [step.conditional.exit for step in steps]
    assert exits == [None, Exit(2), Exit(2), None, Exit(2)]
    for role in ("conditional", "unconditional"):
        assert keeps(steps, role) == [level, set(), set(), level, set()]
        assert lives(steps, role) == [level, level, set(), level, set()]


def test_a_last_full_step_remembers_nothing() -> None:
    steps = compile_run((DeepCache(interval=2),), 3, guided=False)
    assert keeps(steps) == [{("level", 0)}, set(), set()]


def test_depth_skip_remembers_nothing() -> None:
    steps = compile_run((DepthSkip(depth=3),), 3, guided=True)
    assert all(step.conditional == RowPlan(exit=Exit(2, remembered=False)) for step in steps)


def test_delta_dit_keys_its_memory_by_range() -> None:
    """A switch of the range needs a fresh effect, so the keys never meet."""
    steps = compile_run((bound(DeltaDiT(interval=2, blocks=3, boundary=3), 6),), 6, guided=True)
    assert [step.conditional.cached for step in steps] == [None, (1, 4), None, None, None, (0, 3)]
    rear, front = ("range", 1, 4), ("range", 0, 3)
    assert keeps(steps) == [{rear}, set(), set(), set(), {front}, set()]


def test_reuse_before_computing_is_an_error_before_the_first_forward() -> None:
    class Hasty(Accelerator):
        mode: str = "hasty"

        def plan(self, step: int, num_steps: int) -> StepPlan:
            return StepPlan(exit=Exit(1))

    with pytest.raises(KeyError, match="reused before it was computed"):
        compile_run((Hasty(),), 3, guided=False)


def test_attention_methods_by_row() -> None:
    steps = compile_run((attention(("full",) * 5, ("full", "ast", "wa-rs", "asc", "wa-rs+asc")),), 2, guided=True)
    assert steps[1].conditional.attention == ("full", "reuse", "window", "full", "window")
    assert steps[1].unconditional is not None
    assert steps[1].unconditional.attention == ("full", "reuse", "window", "twin", "twin-window")
    assert keeps(steps) == [{("attention", 1), ("residual", 2), ("residual", 4)}, set()]
    assert keeps(steps, "unconditional") == [{("attention", 1), ("residual", 2)}, set()]


def test_window_steps_refresh_outputs_but_not_residuals() -> None:
    steps = compile_run((attention(("full",), ("wa-rs",), ("ast",), ("wa-rs",), ("full",)),), 5, guided=True)
    output, residual = ("attention", 0), ("residual", 0)
    assert keeps(steps) == [{residual}, {output}, set(), set(), set()]
    assert lives(steps) == [{residual}, {output, residual}, {residual}, set(), set()]


def test_asc_refreshes_the_twins_residual() -> None:
    steps = compile_run((attention(("full",), ("asc",), ("wa-rs",)),), 3, guided=True)
    for role in ("conditional", "unconditional"):
        assert keeps(steps, role) == [set(), {("residual", 0)}, set()]


def test_blocks_that_wait_read_nothing() -> None:
    """Δ-DiT over DiTFastAttn: an attention inside a cached range neither reads nor refreshes."""
    methods = attention(("full",) * 4, ("ast",) * 4, ("ast",) * 4, ("full",) * 4)
    delta = bound(DeltaDiT(interval=2, blocks=2, boundary=4), 4)
    steps = compile_run((methods, delta), 4, guided=True)
    assert [step.conditional.cached for step in steps] == [None, (2, 4), None, (2, 4)]
    everywhere: set[Key] = {("attention", block) for block in range(4)}
    assert keeps(steps)[0] == everywhere | {("range", 2, 4)}
    assert lives(steps)[1] == everywhere


def test_selective_guidance_drops_the_unconditional_memory() -> None:
    """The conditional row's memory goes on over the switch."""
    accelerators = (SelectiveGuidance(stop=0.5), DeepCache(interval=4))
    steps = compile_run(accelerators, 6, guided=True)
    level: set[Key] = {("level", 0)}
    assert lives(steps) == [level, level, level, set(), level, set()]
    assert lives(steps, "unconditional") == [level, level, set(), None, None, None]


def test_both_rows_refresh_where_guidance_comes_back() -> None:
    steps = compile_run((SelectiveGuidance(start=0.5, stop=1.0), DeepCache(interval=4)), 6, guided=True)
    assert [step.conditional.exit for step in steps] == [None, Exit(0), Exit(0), None, None, Exit(0)]
    assert [step.unconditional is None for step in steps] == [True] * 3 + [False] * 3


def test_zeros_need_no_refresh() -> None:
    steps = compile_run((SelectiveGuidance(start=0.5, stop=1.0), DepthSkip(depth=2)), 4, guided=True)
    assert all(step.conditional.exit == Exit(1, remembered=False) for step in steps)


def test_attention_refreshes_where_guidance_comes_back() -> None:
    shared: tuple[Method, Method] = ("ast", "wa-rs+asc")
    methods = attention(("full", "full"), shared, shared, shared)
    steps = compile_run((SelectiveGuidance(start=0.5, stop=1.0), methods), 4, guided=True)
    assert [step.conditional.attention for step in steps] == [
        ("full", "full"),
        ("reuse", "window"),
        ("full", "full"),
        ("reuse", "window"),
    ]


def test_students_have_one_row_under_their_adapter() -> None:
    spec = unet_spec()
    student = CfgStudent().bind(spec, run_spec())
    steps = compile_run((student, DeepCache(interval=2)), 2, guided=True)
    assert [(s.conditional.adapter, s.unconditional) for s in steps] == [("student", None)] * 2
    assert steps[1].conditional.exit == Exit(0)


def test_merging_takes_each_field_from_the_one_that_sets_it() -> None:
    plans = [StepPlan(exit=Exit(1)), StepPlan(guided=False, adapter="a"), StepPlan()]
    assert merge(plans) == StepPlan(exit=Exit(1), guided=False, adapter="a")
