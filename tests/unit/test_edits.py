"""The world of edits: what an instruction leads to, which are held out, and a judge that lets nothing else pass."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from models.shapes.edits import (
    DIRECTIONS,
    EDIT_WORDS,
    OPERATIONS,
    STEP,
    Edit,
    Placed,
    instructions,
    judge,
    sample_edit,
    sample_edits,
)
from models.shapes.shapes import COLOURS, SHAPES, SIDE, Scene, Thing
from models.shapes.tokenizers import MAX_TOKENS, clip_tokenizer, words

CIRCLE, STAR = Thing("small", "red", "circle"), Thing("large", "yellow", "star")
BEFORE = Placed("white", (CIRCLE, STAR), ((16.0, 30.0), (46.0, 34.0)))


def edits(count: int, *, held_out: bool = False, seed: int = 5) -> list[Edit]:
    return list(islice(sample_edits(seed, held_out=held_out), count))


def test_what_is_told_is_what_changes() -> None:
    for edit in edits(300):
        changed = [
            (was, now)
            for was, now in zip(
                zip(edit.before.things, edit.before.centres, strict=True),
                zip(edit.after.things, edit.after.centres, strict=True),
                strict=False,
            )
            if was != now
        ]
        if edit.operation == "background":
            assert edit.after == replace(edit.before, background=edit.after.background)
            assert edit.after.background in edit.instruction.split()
        elif edit.operation == "remove":
            gone = set(edit.before.things) - set(edit.after.things)
            assert [f"remove the {thing.shape}" for thing in gone] == [edit.instruction]
        elif edit.operation == "colour":
            [((was, there), (now, here))] = changed
            assert (now, here) == (replace(was, colour=now.colour), there)
            assert edit.instruction == f"make the {now.shape} {now.colour}"
        else:
            [((was, (x, y)), (now, (across, down)))] = changed
            assert was == now
            moved = (round((across - x) / STEP, 6), round((down - y) / STEP, 6))
            assert f"move the {now.shape} {next(n for n, d in DIRECTIONS.items() if d == moved)}" == edit.instruction
            assert all(0 < side < SIDE for side in (across, down))


def test_every_operation_is_asked_for_alike() -> None:
    counts = Counter(edit.operation for edit in edits(800))
    assert set(counts) == set(OPERATIONS)
    assert min(counts.values()) > 120


def test_training_neither_begins_nor_ends_with_a_held_out_scene() -> None:
    for seed in range(3):
        for edit in edits(100, seed=seed):
            if edit.operation in ("colour", "background") and len(edit.after.things) == 1:
                assert not Scene(edit.before.background, edit.before.things).held_out
                assert not Scene(edit.after.background, edit.after.things).held_out
    assert all(
        Scene(e.before.background, e.before.things).held_out
        for e in edits(60, held_out=True)
        if len(e.before.things) == 1
    )


def test_the_judge_passes_what_should_stand_there_and_nothing_else() -> None:
    for edit in edits(60, held_out=True):
        assert judge(edit.after.picture(), edit).all, edit
        assert not judge(edit.before.picture(), edit).done, edit


@pytest.mark.parametrize(
    ("after", "done", "rest"),
    [
        pytest.param(replace(BEFORE, things=(replace(CIRCLE, colour="blue"), STAR)), True, True, id="as-told"),
        pytest.param(BEFORE, False, True, id="nothing"),
        pytest.param(
            replace(BEFORE, things=(replace(CIRCLE, colour="blue"), replace(STAR, colour="green"))),
            True,
            False,
            id="the-other-too",
        ),
        pytest.param(
            replace(BEFORE, things=(replace(CIRCLE, colour="blue"), STAR), background="black"),
            True,
            False,
            id="the-background-too",
        ),
        pytest.param(
            replace(BEFORE, things=(replace(CIRCLE, colour="blue"), STAR), centres=((16.0, 30.0), (46.0, 27.0))),
            True,
            False,
            id="the-other-moved",
        ),
        pytest.param(
            replace(BEFORE, things=(replace(CIRCLE, colour="blue", shape="square"), STAR)), False, True, id="its-shape"
        ),
        pytest.param(Placed("white", (STAR,), ((46.0, 34.0),)), False, False, id="gone"),
    ],
)
def test_the_judge_tells_done_from_the_rest(after: Placed, done: bool, rest: bool) -> None:
    wanted = replace(BEFORE, things=(replace(CIRCLE, colour="blue"), STAR))
    outcome = judge(after.picture(), Edit("colour", "make the circle blue", BEFORE, wanted))
    assert (outcome.done, outcome.rest, outcome.all) == (done, rest, done and rest)


def test_every_instruction_is_known_and_every_word_one_token() -> None:
    known = instructions()
    assert len(known) == len(set(known)) == len(SHAPES) * (len(COLOURS) + len(DIRECTIONS) + 1) + 2 * len(COLOURS)
    assert {edit.instruction for edit in edits(300)} <= set(known)
    tokenizer = clip_tokenizer(EDIT_WORDS)
    assert [word for word in (*words(), *EDIT_WORDS) if len(tokenizer.tokenize(word)) != 1] == []
    assert max(len(tokenizer(text).input_ids) for text in known) <= MAX_TOKENS


def test_a_thing_that_cannot_move_is_never_told_to() -> None:
    crowded = Placed("white", (Thing("large", "red", "circle"),), ((14.5, 14.5),))
    told = {sample_edit(crowded, random.Random(seed)).instruction for seed in range(200)}
    assert {text for text in told if text.startswith("move")} == {
        "move the circle to the right",
        "move the circle down",
    }
