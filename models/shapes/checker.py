"""The analytic checker: given a picture and its caption, which of the caption's claims the picture keeps.

Nothing here is learned. The background is the commonest palette colour; what differs from it is split into connected
components; each component is compared with templates of every shape and size, drawn by the same code as the scenes.
"""

from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import label, regionprops
from skimage.morphology import erosion

from models.shapes.shapes import COLOURS, RADII, RELATIONS, SHAPES, SIDE, Scene, Thing, parse_caption, silhouette

Array = NDArray[np.float32]

FOREGROUND_DISTANCE = 40.0  # in RGB; yellow and orange, the closest colours, are 73 apart
MINIMAL_AREA = 24  # pixels; the smallest thing, a small star, has about 60
MINIMAL_LIKENESS = 0.6  # intersection over union with the best template; below, it is no shape at all
_WINDOW = 36  # pixels around a component; a large thing takes 26
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Verdict:
    """Which claims hold. With a wrong number of things in the picture only the background can be right."""

    background: bool
    colours: bool
    shapes: bool
    sizes: bool
    relation: bool

    @property
    def all(self) -> bool:
        """True when every claim holds."""
        return all(astuple(self))


@dataclass(frozen=True)
class Seen:
    """One component as the checker reads it, with its centre in pixels. `shape` and `size` are None for a blot."""

    colour: str
    shape: str | None
    size: str | None
    x: float
    y: float


def check(picture: Image.Image, caption: str) -> Verdict:
    """Compare an RGB picture of SIDE x SIDE pixels with a caption of the grammar (ValueError outside it)."""
    scene = parse_caption(caption)
    background, seen = look(picture)
    if len(seen) != len(scene.things):
        return Verdict(background == scene.background, *[False] * 4)
    orders = [seen] if len(seen) == 1 else [seen, seen[::-1]]
    verdicts = [_compare(scene, background, order) for order in orders]
    return max(verdicts, key=lambda verdict: sum(astuple(verdict)))


def look(picture: Image.Image) -> tuple[str, list[Seen]]:
    """The background's colour and everything that stands on it, largest first."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"the checker reads pictures of {SIDE}x{SIDE} pixels, not {picture.size}")
    nearest = np.linalg.norm(pixels[:, :, None] - _PALETTE, axis=-1).argmin(axis=-1)  # [SIDE, SIDE]
    background = int(np.bincount(nearest.ravel()).argmax())
    base = np.median(pixels[nearest == background], axis=0)
    regions = label(np.linalg.norm(pixels - base, axis=-1) > FOREGROUND_DISTANCE, connectivity=2)
    found = [region for region in regionprops(regions) if region.area >= MINIMAL_AREA]
    found.sort(key=lambda region: -region.area)
    return _NAMES[background], [_see(pixels, base, nearest, regions == region.label) for region in found]


def _see(pixels: Array, base: Array, nearest: NDArray[np.int64], mask: NDArray[np.bool_]) -> Seen:
    core = erosion(mask, np.ones((3, 3), dtype=bool))
    inside = core if core.sum() >= 6 else mask
    colour = int(np.bincount(nearest[inside]).argmax())
    line = np.median(pixels[inside], axis=0) - base
    depth = (pixels - base) @ line / max(float(line @ line), 1.0)
    cover = (depth.clip(0.0, 1.0) * _grow(mask)).astype(np.float32)
    y, x = ((int(index.min()) + int(index.max())) / 2 for index in np.nonzero(mask))
    likeness, (size, shape) = _best_template(_window(cover, round(x), round(y)))
    known = likeness >= MINIMAL_LIKENESS
    return Seen(_NAMES[colour], shape if known else None, size if known else None, x, y)


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with one more pixel all round, for the faint end of the anti-aliased edge."""
    grown = np.pad(mask, 1)
    rows, columns = mask.shape
    shifts = [grown[y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    union: NDArray[np.bool_] = np.any(shifts, axis=0)
    return union


def _window(cover: Array, x: int, y: int) -> Array:
    """The _WINDOW x _WINDOW pixels whose middle is (x, y), zero beyond the picture."""
    half = _WINDOW // 2
    return np.pad(cover, half)[y : y + _WINDOW, x : x + _WINDOW]


def _best_template(window: Array) -> tuple[float, tuple[str, str]]:
    names, templates = _templates()
    flat = window.ravel()
    intersection = np.minimum(templates, flat).sum(axis=1)
    likeness = intersection / (templates.sum(axis=1) + flat.sum() - intersection)
    best = int(likeness.argmax())
    return float(likeness[best]), names[best]


@cache
def _templates() -> tuple[list[tuple[str, str]], Array]:
    """Coverage [templates, _WINDOW * _WINDOW] of every size and shape at shifts of half a pixel around the middle."""
    shifts = np.arange(-1.5, 1.6, 0.5) + _WINDOW / 2 + 0.5
    names, covers = [], []
    for size in RADII:
        for shape in SHAPES:
            for x in shifts:
                for y in shifts:
                    names.append((size, shape))
                    covers.append(_cover(Thing(size, "white", shape), (float(x), float(y))))
    return names, np.stack(covers)


def _cover(thing: Thing, centre: tuple[float, float]) -> Array:
    picture = silhouette(thing, centre, _WINDOW)
    return np.asarray(picture, dtype=np.float32).ravel() / 255.0


def _compare(scene: Scene, background: str, seen: list[Seen]) -> Verdict:
    pairs = list(zip(scene.things, seen, strict=True))
    return Verdict(
        background=background == scene.background,
        colours=all(thing.colour == one.colour for thing, one in pairs),
        shapes=all(thing.shape == one.shape for thing, one in pairs),
        sizes=all(thing.size == one.size for thing, one in pairs),
        relation=scene.relation is None or _stands(scene.relation, *seen),
    )


def _stands(relation: str, first: Seen, second: Seen) -> bool:
    """Whether the relation is true of the centres, along the axis on which they are further apart."""
    across, down = second.x - first.x, second.y - first.y
    x, y = RELATIONS[relation]
    if x:
        return across * x > abs(down)
    return down * y > abs(across)
