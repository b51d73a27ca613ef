"""The procedural world of the bundled models: captioned scenes of one or two flat shapes, drawn from a seed."""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from PIL import Image, ImageDraw

SIDE = 64  # pixels, both ways
SUPERSAMPLING = 4
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (45, 90, 220),
    "yellow": (240, 210, 50),
    "purple": (145, 60, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"large": 13.0, "small": 7.5}  # pixels
RELATIONS = {"to the left of": (1, 0), "to the right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
HELD_OUT_SHARE = 10  # one combination in ten is never trained on

Point = tuple[float, float]
Ink = int | tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A combination: what a caption says and nothing more. `relation` places the first thing relative to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        middle = f" {self.relation} ".join(str(thing) for thing in self.things)
        return f"{middle} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """A stable hash of the combination decides, so the split never depends on a seed."""
        digest = hashlib.blake2b(self.caption.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def parse_caption(caption: str) -> Scene:
    """The scene a caption describes; ValueError when the caption is outside the grammar."""
    body, separator, ending = caption.strip().rpartition(" on a ")
    background = ending.removesuffix(" background")
    relation = next((name for name in RELATIONS if f" {name} a " in body), None)
    parts = body.split(f" {relation} ") if relation else [body]
    things = tuple(_parse_thing(part) for part in parts)
    if not separator or ending == background or background not in COLOURS or len(things) > 2:
        raise ValueError(f"not a caption of this grammar: {caption!r}")
    return Scene(background, things, relation)


def _parse_thing(text: str) -> Thing:
    words = text.split(" ")
    if len(words) != 4 or words[0] != "a" or words[1] not in RADII or words[2] not in COLOURS or words[3] not in SHAPES:
        raise ValueError(f"not an object of this grammar: {text!r}")
    return Thing(*words[1:])


def sample_scene(rng: random.Random, pair_share: float = 0.5) -> Scene:
    """A scene with two things in `pair_share` of the cases, all else uniform; no thing has the background's colour."""
    background = rng.choice(list(COLOURS))
    free = [name for name in COLOURS if name != background]
    count = 2 if rng.random() < pair_share else 1
    things = tuple(Thing(rng.choice(list(RADII)), rng.choice(free), rng.choice(SHAPES)) for _ in range(count))
    return Scene(background, things, rng.choice(list(RELATIONS)) if count == 2 else None)


def sample_scenes(seed: int, *, held_out: bool, pair_share: float = 0.5) -> Iterator[Scene]:
    """Endless scenes of one side of the split, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, pair_share)
        if scene.held_out == held_out:
            yield scene


def misdescribe(scene: Scene, rng: random.Random) -> Scene:
    """`scene` with one claim of its caption made false, still a combination that may be trained on."""
    while True:
        other = sample_scene(rng, pair_share=float(scene.relation is not None))
        index = rng.randrange(len(scene.things))
        word = rng.choice([field.name for field in fields(Thing)])
        told = replace(scene.things[index], **{word: getattr(other.things[index], word)})
        things = (*scene.things[:index], told, *scene.things[index + 1 :])
        claims = [replace(scene, things=things), replace(scene, background=other.background)]
        if scene.relation is not None:
            claims.append(replace(scene, relation=other.relation))
        wrong = rng.choice(claims)
        clash = any(thing.colour == wrong.background for thing in wrong.things)
        if wrong != scene and not clash and not wrong.held_out:
            return wrong


def place(scene: Scene, rng: random.Random) -> tuple[Point, ...]:
    """Centres in pixels: no overlap, and the relation clearly true of the centres."""
    middle = SIDE / 2
    if scene.relation is None:
        return ((middle + rng.uniform(-8, 8), middle + rng.uniform(-8, 8)),)
    first, second = (RADII[thing.size] for thing in scene.things)
    gap = rng.uniform(3.0, 6.0)
    slack = min(4.0, (SIDE - 2 * (first + second) - gap) / 2 - 1.0)
    start = middle - (first + second + gap / 2) + rng.uniform(-slack, slack)
    near, far = start + first, start + 2 * first + gap + second
    along = RELATIONS[scene.relation]
    if sum(along) < 0:
        near, far = SIDE - near, SIDE - far
    across = [middle + rng.uniform(-4, 4) for _ in range(2)]
    if along[0]:
        return (near, across[0]), (far, across[1])
    return (across[0], near), (across[1], far)


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """An anti-aliased RGB picture of SIDE x SIDE pixels; `rng` jitters the placement."""
    return draw(scene, place(scene, rng))


def silhouette(thing: Thing, centre: Point, side: int) -> Image.Image:
    """The coverage (0 to 255, mode L) of one thing on an empty canvas of `side` x `side` pixels."""
    canvas = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING), 0)
    _draw_thing(ImageDraw.Draw(canvas), thing, centre, colour=255, background=0)
    return canvas.reduce(SUPERSAMPLING)


def draw(scene: Scene, centres: tuple[Point, ...]) -> Image.Image:
    """The scene with its things at `centres` (pixels)."""
    canvas = Image.new("RGB", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING), COLOURS[scene.background])
    brush = ImageDraw.Draw(canvas)
    for thing, centre in zip(scene.things, centres, strict=True):
        _draw_thing(brush, thing, centre, COLOURS[thing.colour], COLOURS[scene.background])
    return canvas.reduce(SUPERSAMPLING)


def _draw_thing(brush: ImageDraw.ImageDraw, thing: Thing, centre: Point, colour: Ink, background: Ink) -> None:
    x, y = (SUPERSAMPLING * value for value in centre)
    radius = SUPERSAMPLING * RADII[thing.size]
    if thing.shape in ("circle", "ring"):
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if thing.shape == "ring":
            inner = 0.52 * radius
            brush.ellipse((x - inner, y - inner, x + inner, y + inner), fill=background)
        return
    brush.polygon([(x + radius * u, y + radius * v) for u, v in OUTLINES[thing.shape]], fill=colour)


def _star(points: int, inner: float) -> list[Point]:
    angles = [math.pi * (k / points - 0.5) for k in range(2 * points)]
    return [(math.cos(a) * r, math.sin(a) * r) for a, r in zip(angles, [1.0, inner] * points, strict=True)]


_ARM = 0.34  # half the width of the cross's arms, in radii
OUTLINES: dict[str, list[Point]] = {  # in radii from the centre
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": _star(5, 0.42),
    "cross": [
        *[(-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)],
    ],
}
