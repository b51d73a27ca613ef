"""Gates as tables: what a rule decides, which steps ask it, what rows then do, and how much they hold at most."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

import pytest
import torch

from models.accelerators import DeepCache, DepthSkip, SelectiveGuidance
from models.accelerators.base import Accelerator
from models.networks.gating import Gates
from models.networks.sites import attention, blocks, level
from models.reuse.compile import compile_run, feature_bytes
from models.reuse.gates import Change, Gate, GateState, decide, distance, polynomial
from models.reuse.plans import Gated, Gating, Recall, Reuse, RowPlan, StepPlan, StepRows
from models.reuse.rows import Places, Row
from models.reuse.sites import OUTPUT, Feature, Site, Sites
from models.reuse.store import FeatureStore
from models.reuse.turns import Turn, replaced, settled
from tests.gated import AskGate, Skip
from tests.unit.specs import DIT_SITES, UNET_SITES

REAR = blocks(1, 4)
EFFECT = Feature(REAR, "effect")
PROBE = (Feature(REAR, "probe"), 0)
TEACACHE = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


def ask(site: Site = REAR, order: int = 0, plain: tuple[int, ...] = (), **rule: Any) -> AskGate:
    return AskGate(site=site, rule=Gate(**{"threshold": 0.1, **rule}), order=order, plain=frozenset(plain))


def compiled(*accelerators: Accelerator, steps: int, guided: bool = False, sites: Sites = DIT_SITES) -> Any:
    return compile_run(sites, accelerators, steps, guided)


def gatings(steps: tuple[StepRows, ...], role: str = "conditional") -> str:
    """A letter a step: asked, forced, restarting; a capital is the last; no gate, no row."""
    letters = []
    for step in steps:
        row: RowPlan | None = getattr(step, role)
        gating = row.gating if row is not None else None
        letter = "a" if gating is None else "r" if gating.restart else "f" if gating.forced else "a"
        letters.append("-" if row is None else "." if gating is None else letter.upper() if gating.last else letter)
    return "".join(letters)


def run_rule(rule: Gate, changes: list[float | None]) -> str:
    """Which steps are skipped (s) and computed (c)."""
    state, done = GateState(), []
    for change in changes:
        skip, state = decide(rule, state, change)
        done.append("s" if skip else "c")
    return "".join(done)


@pytest.mark.parametrize(
    ("rule", "changes", "decided"),
    [
        (Gate(0.1), [None, 0.05, 0.1, 0.0999, 0.2, 0.0], "cscscs"),
        (Gate(0.0), [None, 0.0, 0.0], "ccc"),
        (Gate(0.1), [nan, 0.0, nan], "csc"),
        (Gate(0.1, max_skips=2), [None, *[0.0] * 7], "csscsscs"),
        (Gate(0.1, max_skips=0), [None, 0.0, 0.0], "ccc"),
        (Gate(0.1, accumulate=True), [None, 0.04, 0.04, 0.04, 0.04, 0.04, 0.04], "csscssc"),
        (Gate(0.1, accumulate=True, max_skips=1), [None, 0.04, 0.04, 0.04, 0.09, 0.09], "cscscs"),
        (Gate(0.1, accumulate=True), [None, 0.09, None, 0.09, 0.09], "cscsc"),
        (Gate(1.0, accumulate=True, coefficients=(2.0, 0.0, 0.4)), [None, 0.3, 0.3, 0.0, 0.0, 0.5], "cscssc"),
        (Gate(0.1, coefficients=(100.0, 0.0)), [None, 0.05], "cs"),
    ],
)
def test_what_a_rule_decides(rule: Gate, changes: list[float | None], decided: str) -> None:
    """Changes add up only where they are told to; what is not a number is never skipped on."""
    assert run_rule(rule, changes) == decided


def test_the_polynomial_is_teacaches() -> None:
    """Its published coefficients for Flux, as numpy reads them: highest power first."""
    by_hand = 498.651651 * 0.1**4 - 283.781631 * 0.1**3 + 55.8554382 * 0.1**2 - 3.82021401 * 0.1 + 0.264230861
    assert polynomial(TEACACHE, 0.1) == pytest.approx(by_hand)
    assert polynomial((), 3.0) == 0.0


@pytest.mark.parametrize(
    ("pair", "rows", "expected"),
    [
        ("max", [(1.0, 4.0)], 0.25),
        ("mean", [(1.0, 4.0)], 0.25),
        ("max", [(1.0, 4.0), (1.0, 2.0)], 0.5),
        ("max", [(1.0, 2.0), (1.0, 4.0)], 0.5),
        ("mean", [(1.0, 4.0), (1.0, 2.0)], 1 / 3),
    ],
)
def test_a_pair_goes_by_one_number(pair: Any, rows: list[tuple[float, float]], expected: float) -> None:
    assert distance(Gate(0.1, pair=pair), [Change(*row) for row in rows]) == pytest.approx(expected)


@pytest.mark.parametrize("pair", ["max", "mean"])
@pytest.mark.parametrize("rows", [[(nan, 1.0), (0.0, 1.0)], [(0.0, 1.0), (nan, 1.0)], [(0.0, 0.0)]])
def test_a_change_that_is_no_number_has_the_site_computed(pair: Any, rows: list[tuple[float, float]]) -> None:
    rule = Gate(0.1, pair=pair)
    assert decide(rule, GateState(), distance(rule, [Change(*row) for row in rows]))[0] is False


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [
        (ask(), "faaaA"),
        (ask(warmup=3), "fffaA"),
        (ask(plain=(2,)), "fafaA"),
        (ask(plain=(4,)), "faaA."),
        (ask(plain=(0, 1, 3, 4)), "ffA.."),
        (ask(warmup=5), "....."),
        (ask(plain=(0, 1, 2, 3, 4)), "....."),
        (ask(plain=(1, 2, 3, 4)), "....."),
    ],
)
def test_which_steps_ask(accelerator: AskGate, expected: str) -> None:
    """The first is always computed. What is computed anyway is remembered while a later step may read it."""
    assert gatings(compiled(accelerator, steps=5)) == expected


def test_a_pair_asks_together_while_there_is_one() -> None:
    steps = compiled(ask(), SelectiveGuidance(stop=0.5), steps=6, guided=True)
    assert gatings(steps) == "faaaaA"
    assert gatings(steps, "unconditional") == "faA---"


def test_where_guidance_comes_back_both_rows_begin_anew() -> None:
    steps = compiled(ask(), SelectiveGuidance(start=0.5, stop=1.0), steps=6, guided=True)
    assert gatings(steps) == "faaraA"
    assert gatings(steps, "unconditional") == "---raA"


def test_a_gate_inside_a_site_that_is_not_run_is_not_asked() -> None:
    """An outer level remembered in two steps of three, or zero throughout."""
    inner = ask(level(4), probe="input")
    steps = compiled(inner, DeepCache(interval=3, branch=2), steps=8, sites=UNET_SITES)
    assert gatings(steps) == "f..a..A."
    assert [set(row.reads) for step in steps for row in step][1:4] == [{level(2)}, {level(2)}, set()]
    assert gatings(compiled(inner, DepthSkip(depth=2), steps=3, sites=UNET_SITES)) == "..."


def test_a_gate_waits_while_the_whole_prediction_is_foretold() -> None:
    steps = compiled(ask(), Skip(site=OUTPUT, skipped=frozenset({2, 3})), steps=6, guided=True)
    assert gatings(steps) == gatings(steps, "unconditional") == "fa--aA"


class Ask(Accelerator):
    mode: str = "ask"
    steps: tuple[dict[Site, Reuse], ...]

    def plan(self, step: int, num_steps: int) -> StepPlan:
        return StepPlan(self.steps[step])


GATED = Gated(Gate(0.1))
INPUT = Gated(Gate(0.1, probe="input"))


@pytest.mark.parametrize(
    ("steps", "sites", "reason"),
    [
        (({}, {REAR: GATED, attention(2): Recall()}), DIT_SITES, "attention 2 depends on what gated blocks 1..4"),
        (({}, {REAR: GATED}, {attention(2): Recall()}), DIT_SITES, "attention 2 depends on what gated blocks 1..4"),
        (({}, {blocks(2, 4): GATED}, {blocks(0, 3): Recall()}), DIT_SITES, "blocks 0..3 depends on what gated"),
        (({}, {level(2): INPUT, level(3): Recall()}), UNET_SITES, "level 3 depends on what gated level 2"),
        (({}, {blocks(1, 2): GATED, blocks(2, 4): GATED}), DIT_SITES, "gated blocks 1..2 and gated blocks 2..4: a run"),
        (({}, {REAR: GATED}, {blocks(2, 4): GATED}), DIT_SITES, "gated blocks 1..4 and gated blocks 2..4: a run"),
        (({}, {REAR: GATED}, {REAR: INPUT}), DIT_SITES, "gated blocks 1..4 and gated blocks 1..4: a run"),
        (({}, {REAR: GATED}, {REAR: Recall()}), DIT_SITES, "blocks 1..4: gated in some steps, recall in others"),
        (({}, {blocks(0, 4): GATED}), DIT_SITES, "blocks 0..4: cannot do gated by residual"),
        (({}, {level(1): GATED}), UNET_SITES, "level 1: cannot do gated by residual"),
        (({}, {attention(1): INPUT}), DIT_SITES, "attention 1: cannot do gated by input"),
        (({}, {OUTPUT: INPUT}), DIT_SITES, "output: cannot do gated by input"),
        (({}, {OUTPUT: INPUT}), UNET_SITES, "output: cannot do gated by input"),
    ],
)
def test_what_a_gate_does_not_go_with(steps: tuple[dict[Site, Reuse], ...], sites: Sites, reason: str) -> None:
    """In one step or over the run: nothing may be read that a gate might have left out."""
    with pytest.raises(ValueError, match=reason):
        compiled(Ask(steps=steps), steps=len(steps), sites=sites)


def test_sites_apart_from_a_gate_and_around_it_go_with_it() -> None:
    steps = compiled(Ask(steps=({}, {blocks(2, 4): GATED, attention(1): Recall()}, {blocks(1, 4): Recall()})), steps=3)
    assert gatings(steps) == "fA."
    assert [set(row.reads) for step in steps for row in step] == [set(), {attention(1)}, {blocks(1, 4)}]


def gating(step: int, *, order: int = 1, **changes: Any) -> RowPlan:
    return RowPlan(step, gating=Gating(REAR, EFFECT, Gated(Gate(0.1), Recall(order)), **changes))


def turn(step: int, skip: bool, computed: tuple[int, ...], plan: RowPlan) -> Turn:
    found = Turn(GateState(computed=computed), step)
    assert plan.gating is not None
    found.ask(plan.gating, [Change(0.0 if skip else 1.0, 1.0)])
    return found


def test_a_skip_is_a_recall_from_the_steps_computed() -> None:
    plan = gating(6)
    taken = turn(6, True, (4, 1), plan)
    row = settled(plan, taken)
    reading = row.reads[REAR]
    assert (reading.reuse, reading.entries) == (Recall(1), ((EFFECT, 4), (EFFECT, 1)))
    assert reading.weights == pytest.approx((5 / 3, -2 / 3))
    assert (row.keep, row.drop, row.gating) == (frozenset(), (), None)
    assert (taken.after.computed, taken.after.skips) == ((4, 1), 1)


def test_a_computed_step_takes_the_oldest_ones_place() -> None:
    plan = gating(6)
    taken = turn(6, False, (4, 1), plan)
    row = settled(plan, taken)
    assert (row.reads, row.keep, row.drop) == ({}, frozenset({EFFECT}), ())
    assert taken.after.computed == (6, 4)
    other = (Feature(attention(0), "value"), 1)
    held = [(EFFECT, 4), PROBE, other, (EFFECT, 1)]
    assert plan.gating is not None
    assert replaced(plan.gating, taken, held) == [(EFFECT, 1)]
    assert replaced(plan.gating, turn(6, True, (4, 1), plan), held) == []


def test_a_restart_forgets_all_that_came_before() -> None:
    plan = gating(6, forced=True, restart=True)
    assert plan.gating is not None
    taken = Turn(GateState(0.3, 2, (4, 1)), 6)
    taken.force(plan.gating)
    assert taken.after == GateState(computed=(6,))
    assert replaced(plan.gating, taken, [(EFFECT, 4), (EFFECT, 1)]) == [(EFFECT, 4), (EFFECT, 1)]


@pytest.mark.parametrize("skip", [True, False])
def test_the_last_step_forgets_everything(skip: bool) -> None:
    plan = gating(6, last=True)
    taken = turn(6, skip, (4, 1), plan)
    row = settled(plan, taken)
    assert row.keep == frozenset()
    assert sorted(row.drop) == sorted([PROBE, (EFFECT, 4), (EFFECT, 1)])
    assert plan.gating is not None
    assert replaced(plan.gating, taken, [(EFFECT, 4), (EFFECT, 1)]) == []


@pytest.mark.parametrize(("steps", "order", "entries"), [(2, 0, 1), (2, 3, 1), (4, 1, 2), (4, 3, 3), (9, 2, 3)])
def test_admission_plans_for_all_computed(steps: int, order: int, entries: int) -> None:
    """A ring of order + 1 entries, as far as there are steps before the last, and the probe."""
    one = 4 * 4 * 16 * 2  # tokens, dim, itemsize
    run = compiled(ask(order=order), steps=steps)
    assert feature_bytes(DIT_SITES, run, 8, 8, itemsize=2) == (entries + 1) * one
    pair = compiled(ask(order=order), steps=steps, guided=True)
    assert feature_bytes(DIT_SITES, pair, 8, 8, itemsize=2) == 2 * (entries + 1) * one


def test_a_levels_probe_has_the_size_of_what_leaves_its_input_block() -> None:
    sites = replace(UNET_SITES, skips=(6,) * 12)
    run = compiled(ask(level(5), probe="input"), steps=3, sites=sites)
    assert feature_bytes(sites, run, 9, 7, itemsize=4) == (8 + 6) * 5 * 4 * 4


def test_an_unconditional_rows_ring_ends_with_guidance() -> None:
    """Three steps guided: two entries of its own, gone before the conditional row has four."""
    one = 4 * 4 * 16
    run = compiled(ask(order=3), SelectiveGuidance(stop=0.5), steps=6, guided=True)
    assert feature_bytes(DIT_SITES, run, 8, 8, itemsize=1) == (3 + 1 + 2 + 1) * one


def test_a_restart_begins_with_one_entry() -> None:
    """Most is held by two rows with two entries each, not by one with what it had before."""
    one = 4 * 4 * 16
    run = compiled(ask(order=3), SelectiveGuidance(start=0.5, stop=1.0), steps=6, guided=True)
    assert feature_bytes(DIT_SITES, run, 8, 8, itemsize=1) == 2 * (2 + 1) * one


@pytest.mark.parametrize(
    ("rule", "factors", "skips"),
    [
        (Gate(0.11), [(1.1, 1.0)], [True]),
        (Gate(0.09), [(1.1, 1.0)], [False]),
        (Gate(0.11), [(1.1, 1.2), (1.2, 1.1), (0.9, 1.1), (1.0, 1.0)], [False, False, True, True]),
        (Gate(0.13, pair="mean"), [(1.1, 1.2), (1.2, 1.1), (1.2, 1.0)], [False, True, True]),
    ],
)
def test_rows_are_measured_by_themselves_and_pairs_together(
    rule: Gate, factors: list[tuple[float, float]], skips: list[bool]
) -> None:
    """Pairs of rows whose probes grew by a factor; before, the second of a pair was three times the first."""
    store, places = FeatureStore(), Places(torch.zeros(1))
    plan = RowPlan(1, gating=Gating(REAR, EFFECT, Gated(rule)))
    turns = [Turn(GateState(computed=(0,)), 1) for _ in factors]
    first, second = ([Row(plan, "conditional", i, turn=turn) for i, turn in enumerate(turns)] for _ in range(2))
    before = torch.randn(2 * len(factors), 4, 6, dtype=torch.float64).sign()
    before[len(factors) :] *= 3
    rows = first + second
    store.write([(row.memory, PROBE) for row in rows], before)
    gates = Gates(rows, store, places)
    grown = torch.tensor([one for one, _ in factors] + [two for _, two in factors], dtype=torch.float64)
    gates.offer(second, before[len(factors) :] * grown[len(factors) :, None, None])
    assert [turn.skip for turn in turns] == [None] * len(factors)
    gates.offer(first, before[: len(factors)] * grown[: len(factors), None, None])
    assert [turn.skip for turn in turns] == skips
    assert [REAR in row.plan.reads for row in rows] == skips * 2
