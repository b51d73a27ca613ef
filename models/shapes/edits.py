"""The world of edits: a scene, an instruction, the scene it leads to, and a judge that asks whether it was followed."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image

from models.shapes.checker import Seen, look
from models.shapes.shapes import COLOURS, RADII, SHAPES, SIDE, Point, Scene, Thing, draw, place, sample_scene

STEP = 12.0  # pixels that "move" moves
TOLERANCE = 3.0  # pixels by which a centre may be off
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPERATIONS = ("colour", "background", "move", "remove")
BACKGROUND_WORDS = ("on a {} background", "make the background {}")
EDIT_WORDS = ("make", "the", "move", "remove", "up", "down", "turn", "into", "it", "add")  # beside the captions' words


@dataclass(frozen=True)
class Placed:
    """Things at their centres (pixels) on a background: what a picture shows."""

    background: str
    things: tuple[Thing, ...]
    centres: tuple[Point, ...]

    def picture(self) -> Image.Image:
        """The RGB picture of SIDE x SIDE pixels."""
        return draw(Scene(self.background, self.things), self.centres)


@dataclass(frozen=True)
class Edit:
    """What stands there, what is asked for, and what should stand there afterwards."""

    operation: str
    instruction: str
    before: Placed
    after: Placed


@dataclass(frozen=True)
class Outcome:
    """Whether what was asked for is `done`, and whether the `rest` is as it was."""

    done: bool
    rest: bool

    @property
    def all(self) -> bool:
        """True when the edit is done and nothing else happened."""
        return self.done and self.rest


def sample_edits(seed: int, *, held_out: bool, per_scene: int = 1, pair_share: float = 0.6) -> Iterator[Edit]:
    """Endless edits of one side of the split, the same for the same seed; `per_scene` of each scene.

    An edit is held out when its scene's combination is. Those of the other side neither begin nor end with such a one.
    """
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, pair_share)
        if scene.held_out != held_out or len({thing.shape for thing in scene.things}) < len(scene.things):
            continue
        before = Placed(scene.background, scene.things, place(scene, rng))
        for _ in range(per_scene):
            while _ends_held_out(edit := sample_edit(before, rng), scene.relation) and not held_out:
                pass
            yield edit


def _ends_held_out(edit: Edit, relation: str | None) -> bool:
    things = edit.after.things
    return bool(things) and Scene(edit.after.background, things, relation if len(things) > 1 else None).held_out


def sample_edit(before: Placed, rng: random.Random) -> Edit:
    """A random possible edit of `before`: operations alike, then their values."""
    moves = _moves(before)
    operation = rng.choice([name for name in OPERATIONS if moves or name != "move"])
    if operation == "move":
        return rng.choice(moves)
    index = rng.randrange(len(before.things))
    thing = before.things[index]
    if operation == "background":
        taken = {before.background, *(one.colour for one in before.things)}
        colour = rng.choice([name for name in COLOURS if name not in taken])
        words = rng.choice(BACKGROUND_WORDS).format(colour)
        return Edit(operation, words, before, replace(before, background=colour))
    if operation == "colour":
        colour = rng.choice([name for name in COLOURS if name not in (before.background, thing.colour)])
        after = _with(before, index, replace(thing, colour=colour), before.centres[index])
        return Edit(operation, f"make the {thing.shape} {colour}", before, after)
    left = [position for position in range(len(before.things)) if position != index]
    things, centres = tuple(before.things[at] for at in left), tuple(before.centres[at] for at in left)
    return Edit(operation, f"remove the {thing.shape}", before, Placed(before.background, things, centres))


def _moves(before: Placed) -> list[Edit]:
    """Every move that keeps all things inside the picture and apart."""
    edits = []
    for index, (thing, (x, y)) in enumerate(zip(before.things, before.centres, strict=True)):
        for direction, (across, down) in DIRECTIONS.items():
            after = _with(before, index, thing, (x + STEP * across, y + STEP * down))
            if _possible(after):
                edits.append(Edit("move", f"move the {thing.shape} {direction}", before, after))
    return edits


def _with(placed: Placed, index: int, thing: Thing, centre: Point) -> Placed:
    things, centres = list(placed.things), list(placed.centres)
    things[index], centres[index] = thing, centre
    return replace(placed, things=tuple(things), centres=tuple(centres))


def _possible(placed: Placed) -> bool:
    """Everything inside the picture, nothing on top of another."""
    radii = [RADII[thing.size] for thing in placed.things]
    for radius, (x, y) in zip(radii, placed.centres, strict=True):
        if min(x, y) < radius + 1 or max(x, y) > SIDE - radius - 1:
            return False
    if len(radii) < 2:
        return True
    (ax, ay), (bx, by) = placed.centres
    return max(abs(ax - bx), abs(ay - by)) >= sum(radii) + 2


def judge(picture: Image.Image, edit: Edit) -> Outcome:
    """Read the picture with the analytic checker and compare it with what should stand there."""
    background, seen = look(picture)
    after, before = edit.after, edit.before
    wanted = list(zip(after.things, after.centres, strict=True))
    if len(seen) != len(wanted):
        return Outcome(False, False)
    orders = [seen] if len(seen) < 2 else [seen, seen[::-1]]
    outcomes = []
    for order in orders:
        matches = [_matches(one, *want) for one, want in zip(order, wanted, strict=True)]
        same = [pair in zip(before.things, before.centres, strict=True) for pair in wanted]
        done = all(match for match, unchanged in zip(matches, same, strict=True) if not unchanged)
        rest = all(match for match, unchanged in zip(matches, same, strict=True) if unchanged)
        right = background == after.background
        changed = after.background != before.background
        outcomes.append(Outcome(done and (right or not changed), rest and (right or changed)))
    return max(outcomes, key=lambda outcome: outcome.done + outcome.rest)


def _matches(seen: Seen, thing: Thing, centre: Point) -> bool:
    near = math.dist((seen.x, seen.y), _middle(thing, centre)) <= TOLERANCE
    return near and (seen.colour, seen.shape, seen.size) == (thing.colour, thing.shape, thing.size)


def _middle(thing: Thing, centre: Point) -> Point:
    """Where the checker sees a thing that stands at `centre`: the middle of its bounding box."""
    _, seen = look(draw(Scene("white", (replace(thing, colour="black"),)), (centre,)))
    return seen[0].x, seen[0].y


def instructions() -> list[str]:
    """Every instruction of the world, in a fixed order."""
    return [
        *(f"make the {shape} {colour}" for shape in SHAPES for colour in COLOURS),
        *(words.format(colour) for words in BACKGROUND_WORDS for colour in COLOURS),
        *(f"move the {shape} {direction}" for shape in SHAPES for direction in DIRECTIONS),
        *(f"remove the {shape}" for shape in SHAPES),
    ]
