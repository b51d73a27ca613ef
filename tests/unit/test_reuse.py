"""Tables of what rows do, remember and forget over a run: liveness worked out backwards, without a tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.accelerators import CfgStudent, DeepCache, DeltaDiT, DepthSkip, DiTFastAttn, SelectiveGuidance
from models.accelerators.base import Accelerator
from models.networks.sites import attention as at
from models.networks.sites import blocks, level
from models.reuse import compile as compiler
from models.reuse.plans import Recall, Reuse, RowPlan, Shared, StepPlan, StepRows, Twin, Window, Zeros
from models.reuse.sites import OUTPUT, Feature, Site
from models.search.attention_plan import Method, Plan
from tests.unit.specs import DIT_SITES, UNET_SITES, dit_spec, run_spec, unet_spec


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


def compile_run(accelerators: tuple[Accelerator, ...], num_steps: int, guided: bool) -> tuple[StepRows, ...]:
    """Over the U-Net of these tests, or its transformer where an accelerator is for one."""
    unet = all("unet" in accelerator.families for accelerator in accelerators)
    sites = UNET_SITES if unet else replace(DIT_SITES, depth=5)
    return compiler.compile_run(sites, accelerators, num_steps, guided)


def keeps(steps: tuple[StepRows, ...], role: str = "conditional") -> list[set[Feature] | None]:
    rows: list[RowPlan | None] = [getattr(step, role) for step in steps]
    return [None if row is None else set(row.keep) for row in rows]


def lives(steps: tuple[StepRows, ...], role: str = "conditional") -> list[set[Feature] | None]:
    """What is remembered after each step."""
    held: set[tuple[Feature, int]] = set()
    found: list[set[Feature] | None] = []
    for step in steps:
        row: RowPlan | None = getattr(step, role)
        if row is not None:
            held |= {(feature, row.step) for feature in row.keep}
            held -= set(row.drop)
        found.append(None if row is None else {feature for feature, _ in held})
    return found


def reads(steps: tuple[StepRows, ...], role: str = "conditional") -> list[dict[Site, object] | None]:
    rows: list[RowPlan | None] = [getattr(step, role) for step in steps]
    return [None if row is None else {site: r.reuse for site, r in row.reads.items()} for row in rows]


def value(site: Site) -> Feature:
    return Feature(site, "value")


def test_no_accelerator_remembers_nothing() -> None:
    steps = compile_run((), 3, guided=True)
    assert steps == tuple(StepRows(RowPlan(i), RowPlan(i), RowPlan(i)) for i in range(3))
    assert not any(step.reduced for step in steps)


def test_unguided_runs_have_one_row() -> None:
    assert [step.unconditional for step in compile_run((), 2, guided=False)] == [None, None]


def test_deepcache_keeps_at_full_steps_and_forgets_after_the_last_reader() -> None:
    steps = compile_run((DeepCache(interval=3, branch=2),), 5, guided=True)
    inner, recalled = {value(level(2))}, {level(2): Recall()}
    assert reads(steps) == [{}, recalled, recalled, {}, recalled]
    for role in ("conditional", "unconditional"):
        assert keeps(steps, role) == [inner, set(), set(), inner, set()]
        assert lives(steps, role) == [inner, inner, set(), inner, set()]


def test_a_last_full_step_remembers_nothing() -> None:
    steps = compile_run((DeepCache(interval=2),), 3, guided=False)
    assert keeps(steps) == [{value(level(0))}, set(), set()]


def test_depth_skip_remembers_nothing() -> None:
    steps = compile_run((DepthSkip(depth=3),), 3, guided=True)
    assert reads(steps) == [{level(2): Zeros()}] * 3
    assert keeps(steps) == [set()] * 3


def test_delta_dit_keys_its_memory_by_range() -> None:
    """A switch of the range needs a fresh effect, so the keys never meet."""
    steps = compile_run((bound(DeltaDiT(interval=2, blocks=3, boundary=3), 6),), 6, guided=True)
    assert reads(steps) == [{}, {blocks(1, 4): Recall()}, {}, {}, {}, {blocks(0, 3): Recall()}]
    rear, front = (Feature(blocks(*edges), "effect") for edges in ((1, 4), (0, 3)))
    assert keeps(steps) == [{rear}, set(), set(), set(), {front}, set()]


def test_reuse_before_computing_is_an_error_before_the_first_forward() -> None:
    class Hasty(Accelerator):
        mode: str = "hasty"

        def plan(self, step: int, num_steps: int) -> StepPlan:
            return StepPlan({level(1): Recall()})

    with pytest.raises(KeyError, match="reused before it was computed"):
        compile_run((Hasty(),), 3, guided=False)


def test_attention_methods_by_row() -> None:
    steps = compile_run((attention(("full",) * 5, ("full", "ast", "wa-rs", "asc", "wa-rs+asc")),), 2, guided=True)
    band = Window(3)
    assert reads(steps)[1] == {at(1): Recall(), at(2): band, at(4): band}
    assert reads(steps, "unconditional")[1] == {at(1): Recall(), at(2): band, at(3): Twin(), at(4): Twin(band)}
    output, residual = value(at(1)), Feature(at(2), "residual", 3)
    assert keeps(steps) == [{output, residual, Feature(at(4), "residual", 3)}, set()]
    assert keeps(steps, "unconditional") == [{output, residual}, set()]


def test_window_steps_refresh_outputs_but_not_residuals() -> None:
    steps = compile_run((attention(("full",), ("wa-rs",), ("ast",), ("wa-rs",), ("full",)),), 5, guided=True)
    output, residual = value(at(0)), Feature(at(0), "residual", 3)
    assert keeps(steps) == [{residual}, {output}, set(), set(), set()]
    assert lives(steps) == [{residual}, {output, residual}, {residual}, set(), set()]


def test_asc_refreshes_the_twins_residual() -> None:
    steps = compile_run((attention(("full",), ("asc",), ("wa-rs",)),), 3, guided=True)
    for role in ("conditional", "unconditional"):
        assert keeps(steps, role) == [set(), {Feature(at(0), "residual", 3)}, set()]


def test_blocks_that_wait_read_nothing() -> None:
    """Δ-DiT over DiTFastAttn: an attention inside a cached range neither reads nor refreshes."""
    methods = attention(("full",) * 4, ("ast",) * 4, ("ast",) * 4, ("full",) * 4)
    delta = bound(DeltaDiT(interval=2, blocks=2, boundary=4), 4)
    steps = compile_run((methods, delta), 4, guided=True)
    rear, everywhere = blocks(2, 4), {value(at(block)) for block in range(4)}
    assert [rear in (step or {}) for step in reads(steps)] == [False, True, False, True]
    assert reads(steps)[1] == {rear: Recall(), at(0): Recall(), at(1): Recall()}
    assert keeps(steps)[0] == everywhere | {Feature(rear, "effect")}
    assert lives(steps)[1] == everywhere


def test_selective_guidance_drops_the_unconditional_memory() -> None:
    """The conditional row's memory goes on over the switch."""
    accelerators = (SelectiveGuidance(stop=0.5), DeepCache(interval=4))
    steps = compile_run(accelerators, 6, guided=True)
    inner = {value(level(0))}
    assert lives(steps) == [inner, inner, inner, set(), inner, set()]
    assert lives(steps, "unconditional") == [inner, inner, set(), None, None, None]


def test_both_rows_refresh_where_guidance_comes_back() -> None:
    steps = compile_run((SelectiveGuidance(start=0.5, stop=1.0), DeepCache(interval=4)), 6, guided=True)
    recalled = {level(0): Recall()}
    assert reads(steps) == [{}, recalled, recalled, {}, {}, recalled]
    assert [step.unconditional is None for step in steps] == [True] * 3 + [False] * 3


def test_zeros_need_no_refresh() -> None:
    steps = compile_run((SelectiveGuidance(start=0.5, stop=1.0), DepthSkip(depth=2)), 4, guided=True)
    assert reads(steps) == [{level(1): Zeros()}] * 4


def test_attention_refreshes_where_guidance_comes_back() -> None:
    shared: tuple[Method, Method] = ("ast", "wa-rs+asc")
    methods = attention(("full", "full"), shared, shared, shared)
    steps = compile_run((SelectiveGuidance(start=0.5, stop=1.0), methods), 4, guided=True)
    reused = {at(0): Recall(), at(1): Window(3)}
    assert reads(steps) == [{}, reused, {}, reused]


def test_students_have_one_row_under_their_adapter() -> None:
    spec = unet_spec()
    student = CfgStudent().bind(spec, run_spec())
    steps = compile_run((student, DeepCache(interval=2)), 2, guided=True)
    assert [(s.conditional and s.conditional.adapter, s.unconditional) for s in steps] == [("student", None)] * 2
    assert reads(steps)[1] == {level(0): Recall()}


def test_merging_takes_each_part_from_the_one_that_asks_for_it() -> None:
    plans = [StepPlan({level(1): Recall()}), StepPlan(guided=False, adapter="a"), StepPlan()]
    assert compiler.merge(UNET_SITES, plans) == StepPlan({level(1): Recall()}, guided=False, adapter="a")


@pytest.mark.parametrize(
    ("reuse", "reason"),
    [
        ([{at(1): Recall()}, {at(1): Shared()}], "attention 1: two accelerators decide it"),
        ([{blocks(0, 2): Recall()}, {blocks(1, 3): Recall()}], "blocks 0..2 and blocks 1..3 overlap"),
        ([{blocks(0, 2): Window(3)}], "blocks 0..2: cannot do window"),
        ([{level(0): Recall()}], "level 0: this network has blocks"),
        ([{at(4): Recall()}], "attention 4: this network has blocks 0..4"),
    ],
)
def test_what_cannot_be_followed_is_refused(reuse: list[dict[Site, Reuse]], reason: str) -> None:
    with pytest.raises((ValueError, KeyError), match=reason):
        compiler.merge(DIT_SITES, [StepPlan(one) for one in reuse])


class Forecast(Accelerator):
    """One step in three is computed; `site` is foretold in the others from the last order + 1 values."""

    mode: str = "forecast"
    site: Site
    order: int

    def plan(self, step: int, num_steps: int) -> StepPlan:
        return StepPlan({self.site: Recall(self.order)} if step % 3 else {})


def test_a_forecast_reads_the_last_values_with_lagranges_weights() -> None:
    steps = compile_run((Forecast(site=level(1), order=2),), 9, guided=False)
    rows = [step.conditional for step in steps if step.conditional]
    read = {row.step: reading for row in rows for reading in row.reads.values()}
    taken = {step: [s for _, s in reading.entries] for step, reading in read.items()}
    assert taken == {1: [0], 2: [0], 4: [3, 0], 5: [3, 0], 7: [6, 3, 0], 8: [6, 3, 0]}
    assert read[2].weights == (1.0,)
    assert read[4].weights == pytest.approx((4 / 3, -1 / 3))
    assert read[7].weights == pytest.approx((14 / 9, -7 / 9, 2 / 9))
    assert {s for _, s in rows[8].drop} == {6, 3, 0}
    assert [len(row.drop) for row in rows] == [0] * 8 + [3]


def test_a_polynomial_is_foretold_exactly() -> None:
    steps = compile_run((Forecast(site=level(0), order=3),), 30, guided=False)
    for step in steps[12:]:
        for reading in step.conditional.reads.values() if step.conditional else ():
            values = [2 - s + 0.5 * s**2 - 0.01 * s**3 for _, s in reading.entries]
            foretold = sum(w * v for w, v in zip(reading.weights, values, strict=True))
            at_step = steps.index(step)
            assert foretold == pytest.approx(2 - at_step + 0.5 * at_step**2 - 0.01 * at_step**3, rel=1e-9)


def test_a_foretold_prediction_takes_no_rows() -> None:
    steps = compile_run((Forecast(site=OUTPUT, order=1),), 7, guided=True)
    assert [step.num_rows for step in steps] == [2, 0, 0, 2, 0, 0, 2]
    assert [step.foretold for step in steps] == [False, True, True, False, True, True, False]
    assert keeps(steps, "output") == [{value(OUTPUT)}, set(), set(), {value(OUTPUT)}, set(), set(), set()]
    assert keeps(steps) == [set(), None, None, set(), None, None, set()]


def test_a_prediction_is_not_foretold_across_a_switch_of_guidance() -> None:
    accelerators = (SelectiveGuidance(stop=0.5), Forecast(site=OUTPUT, order=2))
    steps = compile_run(accelerators, 8, guided=True)
    assert [step.num_rows for step in steps] == [2, 0, 0, 2, 1, 0, 1, 0]
    [reading] = steps[5].output.reads.values()
    assert [s for _, s in reading.entries] == [4]


def test_what_lies_inside_a_site_that_is_not_run_is_neither_read_nor_remembered() -> None:
    """Over nested levels: an inner level foretold under an outer one that is zero."""
    both = (Forecast(site=level(4), order=0), DepthSkip(depth=2))
    steps = compile_run(both, 4, guided=False)
    assert reads(steps) == [{level(1): Zeros()}] * 4
    assert keeps(steps) == [set()] * 4


@pytest.mark.parametrize(
    ("skipped", "newest"),
    [
        pytest.param(blocks(4, 5), 1, id="apart"),
        pytest.param(blocks(2, 3), 1, id="inside"),
        pytest.param(blocks(0, 2), 0, id="overlaps its beginning"),
        pytest.param(blocks(3, 5), 0, id="overlaps its end"),
        pytest.param(blocks(0, 4), 0, id="around"),
        pytest.param(blocks(1, 4), 0, id="the same"),
    ],
)
def test_a_range_that_was_run_in_part_is_not_remembered(skipped: Site, newest: int) -> None:
    """Step 0 runs everything, step 1 all but one range, and step 2 reads blocks 1..4 as they were last run whole."""
    of = blocks(1, 4)

    class Ranges(Accelerator):
        mode: str = "ranges"

        def plan(self, step: int, num_steps: int) -> StepPlan:
            return StepPlan({} if step == 0 else {(skipped if step == 1 else of): Recall()})

    steps = compiler.compile_run(replace(DIT_SITES, depth=5), (Ranges(),), 3, False)
    last = steps[2].conditional
    assert last is not None
    assert [at for _, at in last.reads[of].entries] == [newest]


def test_the_peak_of_memory_follows_from_the_plans() -> None:
    """Three entries of order 2 overlap only where the third is there."""
    one = 4 * 8 * 8 * 8
    for steps, entries in ((2, 1), (5, 2), (9, 3), (30, 3)):
        run = compile_run((Forecast(site=level(1), order=2),), steps, guided=False)
        assert compiler.feature_bytes(UNET_SITES, run, 8, 8, itemsize=4) == entries * one
    guided = compile_run((Forecast(site=level(5), order=0),), 4, guided=True)
    assert compiler.feature_bytes(UNET_SITES, guided, 9, 7, itemsize=2) == 2 * 2 * 8 * 5 * 4
